//! Compiles each module of kernels/ for each architecture, and packs the results into a list that the worker includes.
//!
//! A module is a `.cu` file that no other one includes. One whose name ends with `_90a` uses what only 9.0 has, and is
//! compiled for that alone. Packed results stay in the build folder under a key of their sources, the compiler's version
//! and its flags, so that every profile uses them and a change compiles only what it touches.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, io, thread};

/// What the worker is built for: compute capability times ten.
const ARCHITECTURES: [u32; 6] = [75, 80, 86, 89, 90, 120];

const FLAGS: [&str; 3] = ["-std=c++17", "-O3", "-cubin"];

/// How well the images are packed, at most 10; more takes longer and wins little.
const PACK_LEVEL: u8 = 9;

/// Bytes before a packed image in the build folder: the length that it unpacks to.
const HEADER_BYTES: usize = 8;

/// One image to make.
struct Job {
    module: String,
    architecture: u32,
    /// What nvcc calls the architecture.
    target: String,
    source: PathBuf,
    /// Where the packed image is kept.
    kept: PathBuf,
}

/// Makes OUT_DIR/kernels.rs, the expression that `images.rs` includes, and the files that it names.
pub(crate) fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed=kernels");
    for name in ["BULKHEAD_NVCC", "BULKHEAD_CUDA_ARCHITECTURES", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets no OUT_DIR")?);
    let target = target_folder(&out);
    let (nvcc, version) = find_nvcc(target)?;
    let kept = target.join("cuda-kernels");
    fs::create_dir_all(&kept).map_err(|error| format!("{}: {error}", kept.display()))?;
    let jobs = jobs(Path::new("kernels"), &architectures()?, &version, &kept)?;
    run_all(&jobs, &nvcc)?;
    write_list(&jobs, &out)
}

/// The folder that all profiles share. Cargo names only one below it, but marks it.
fn target_folder(out: &Path) -> &Path {
    out.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file()).unwrap_or(out)
}

/// Finds a compiler, in the order of tools/cuda_toolkit.py, and what it says of itself.
fn find_nvcc(target: &Path) -> Result<(PathBuf, Vec<u8>), String> {
    let version = |nvcc: &Path| {
        let output = Command::new(nvcc).arg("--version").output().ok()?;
        output.status.success().then_some(output.stdout)
    };
    if let Some(nvcc) = env::var_os("BULKHEAD_NVCC").map(PathBuf::from) {
        let version = version(&nvcc).ok_or_else(|| format!("BULKHEAD_NVCC is no compiler: {}", nvcc.display()))?;
        return Ok((nvcc, version));
    }
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let fetched = target.join("cuda-toolkit/nvidia/cu13/bin/nvcc");
    let places = home.into_iter().chain([PathBuf::from("nvcc"), fetched]);
    places.map(|nvcc| (version(&nvcc), nvcc)).find_map(|(version, nvcc)| Some((nvcc, version?))).ok_or_else(|| {
        "the feature cuda needs nvcc, in CUDA_HOME or PATH: `make build-cuda` fetches one and builds with it".to_owned()
    })
}

/// The architectures to build for: those of BULKHEAD_CUDA_ARCHITECTURES ("80,90", for quick builds), or all.
fn architectures() -> Result<Vec<u32>, String> {
    let Ok(wanted) = env::var("BULKHEAD_CUDA_ARCHITECTURES") else { return Ok(ARCHITECTURES.to_vec()) };
    let known = |text: &str| text.trim().parse().ok().filter(|number| ARCHITECTURES.contains(number));
    let parse =
        |text| known(text).ok_or_else(|| format!("BULKHEAD_CUDA_ARCHITECTURES: `{text}` is none of {ARCHITECTURES:?}"));
    wanted.split(',').map(parse).collect()
}

/// Lists the images to make, by name and architecture.
fn jobs(folder: &Path, architectures: &[u32], version: &[u8], kept: &Path) -> Result<Vec<Job>, String> {
    let mut sources = Vec::new();
    let failed = |error: io::Error| format!("{}: {error}", folder.display());
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "cu") {
            sources.push(path);
        }
    }
    sources.sort();
    let mut parts = BTreeSet::new();
    for source in &sources {
        parts.extend(includes(source)?);
    }
    let mut jobs = Vec::new();
    for source in sources.into_iter().filter(|source| !parts.contains(source)) {
        let module = source.file_stem().and_then(|name| name.to_str()).ok_or("a kernel's name is not text")?.to_owned();
        let special = module.ends_with("_90a");
        for &architecture in architectures.iter().filter(|architecture| !special || **architecture == 90) {
            let target = format!("sm_{architecture}{}", if special { "a" } else { "" });
            let mut hasher = DefaultHasher::new();
            hash_sources(&source, &mut hasher, &mut BTreeSet::new())?;
            for part in [version, target.as_bytes(), FLAGS.join(" ").as_bytes(), &[PACK_LEVEL]] {
                hasher.write(part);
            }
            let kept = kept.join(format!("{module}.{target}.{:016x}", hasher.finish()));
            jobs.push(Job { module: module.clone(), architecture, target, source: source.clone(), kept });
        }
    }
    Ok(jobs)
}

/// The files that a source includes from its own folder.
fn includes(source: &Path) -> Result<Vec<PathBuf>, String> {
    let text = fs::read_to_string(source).map_err(|error| format!("{}: {error}", source.display()))?;
    let names = text.lines().filter_map(|line| line.trim().strip_prefix("#include \"")?.split('"').next());
    Ok(names.map(|name| source.with_file_name(name)).collect())
}

/// Adds a source and all that it includes to a key.
fn hash_sources(source: &Path, hasher: &mut DefaultHasher, seen: &mut BTreeSet<PathBuf>) -> Result<(), String> {
    if seen.insert(source.to_owned()) {
        let text = fs::read(source).map_err(|error| format!("{}: {error}", source.display()))?;
        hasher.write_usize(text.len());
        hasher.write(&text);
        for included in includes(source)? {
            hash_sources(&included, hasher, seen)?;
        }
    }
    Ok(())
}

/// Makes the images that are not kept from earlier, as many side by side as cargo grants and the machine has cores.
fn run_all(jobs: &[Job], nvcc: &Path) -> Result<(), String> {
    let granted = env::var("NUM_JOBS").ok().and_then(|number| number.parse().ok()).unwrap_or(1);
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            if !job.kept.is_file() {
                run(job, nvcc)?;
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..cores.min(granted)).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread of the build panicked")?)
    })
}

/// Compiles and packs one image. It gets its name when it is whole, since another build may look for it.
fn run(job: &Job, nvcc: &Path) -> Result<(), String> {
    let mark = format!("{}.tmp", std::process::id());
    let (image, packed) = (job.kept.with_added_extension(format!("{mark}.cubin")), job.kept.with_added_extension(mark));
    let mut command = Command::new(nvcc);
    command.args(FLAGS).arg(format!("-arch={}", job.target)).arg("-o").arg(&image).arg(&job.source);
    let output = command.output().map_err(|error| format!("{}: {error}", nvcc.display()))?;
    if !output.status.success() {
        // An error of cargo's is one line.
        let text = String::from_utf8_lossy(&output.stderr).replace('\n', " | ");
        return Err(format!("{} for {}: {text}", job.source.display(), job.target));
    }
    let failed = |error: io::Error| format!("{}: {error}", job.kept.display());
    let bytes = fs::read(&image).map_err(failed)?;
    let mut kept = u64::try_from(bytes.len()).map_err(|error| error.to_string())?.to_le_bytes().to_vec();
    kept.extend(miniz_oxide::deflate::compress_to_vec(&bytes, PACK_LEVEL));
    fs::write(&packed, kept).map_err(failed)?;
    fs::rename(&packed, &job.kept).map_err(failed)?;
    fs::remove_file(&image).map_err(failed)
}

/// Writes the list, and beside it the packed images, which must not change when another build makes newer ones.
fn write_list(jobs: &[Job], out: &Path) -> Result<(), String> {
    let mut list = "&[\n".to_owned();
    for job in jobs {
        let failed = |error: io::Error| format!("{}: {error}", job.kept.display());
        let kept = fs::read(&job.kept).map_err(failed)?;
        let (header, packed) = kept.split_first_chunk::<HEADER_BYTES>().ok_or("a kept image is cut off")?;
        let file = format!("{}.{}", job.module, job.target);
        fs::write(out.join(&file), packed).map_err(failed)?;
        let unpacked = u64::from_le_bytes(*header);
        let written = writeln!(
            list,
            "    Image {{ architecture: {}, module: {:?}, unpacked_bytes: {unpacked}, \
             packed: include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{file}\")) }},",
            job.architecture, job.module
        );
        written.map_err(|error| error.to_string())?;
    }
    list.push_str("]\n");
    let path = out.join("kernels.rs");
    fs::write(&path, list).map_err(|error| format!("{}: {error}", path.display()))
}
