//! Builds a CUDA source file as C++ and runs launches of its kernels in a process of their own.
//!
//! The protocol is that of tests/cuda/launcher.cpp. Nothing here knows what a kernel computes.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use half::bf16;

/// The compilers that are tried, in this order.
const COMPILERS: [&str; 3] = ["c++", "g++", "clang++"];

/// One of a session's buffers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffer(usize);

/// An argument of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg {
    /// A buffer's start.
    At(Buffer),
    /// No buffer.
    Null,
    /// A number.
    Word(u32),
    /// A float.
    Float(f32),
}

/// A change of the source that a test must notice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    /// What is broken, for people.
    pub(crate) name: &'static str,
    /// The file in worker/kernels.
    pub(crate) file: &'static str,
    /// Text that occurs exactly once.
    pub(crate) from: &'static str,
    /// What it becomes.
    pub(crate) to: &'static str,
}

/// How the tensor cores' factors are built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Factors {
    /// bf16, as from compute capability 8.0 on.
    Bf16,
    /// f16 with block exponents, as on 7.5.
    Half,
}

/// A source file, built.
#[derive(Debug)]
pub(crate) struct Program {
    executable: PathBuf,
    factors: Factors,
    _folder: tempfile::TempDir,
}

impl Program {
    /// Builds `worker/kernels/{source}.cu` with its kernels, as it is or with a fault.
    ///
    /// `None` where this machine has no C++ compiler: a reason is printed.
    pub(crate) fn build(source: &str, kernels: &[&str], factors: Factors, fault: Option<&Fault>) -> Option<Program> {
        let Some(compiler) = COMPILERS.iter().find(|name| answers(name)) else {
            println!("skipped: {source}.cu was not emulated, 1 file: no C++ compiler found, tried {COMPILERS:?}");
            return None;
        };
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        copy_sources(&root.join("../worker/kernels"), folder.path(), fault);
        let executable = folder.path().join("launcher");
        let table: String = kernels.iter().map(|name| format!("K({name}) ")).collect();
        let mut command = Command::new(compiler);
        command.args(["-std=c++17", "-O1", "-w", "-DBULKHEAD_EMULATED"]);
        if factors == Factors::Half {
            command.arg("-DBULKHEAD_HALF");
        }
        command.arg(format!("-DKERNELS=\"{}/{source}.cu\"", folder.path().display()));
        command.arg(format!("-DKERNEL_TABLE={table}"));
        command.arg("-include").arg(root.join("cuda/emulation.h"));
        command.arg(root.join("cuda/launcher.cpp")).arg("-o").arg(&executable);
        let output = command.output().expect("the compiler that answered starts again");
        assert!(output.status.success(), "{source}.cu, {fault:?}: {}", String::from_utf8_lossy(&output.stderr));
        Some(Program { executable, factors, _folder: folder })
    }

    /// How it builds the tensor cores' factors.
    pub(crate) fn factors(&self) -> Factors {
        self.factors
    }
}

fn answers(compiler: &str) -> bool {
    let run = Command::new(compiler).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    run.is_ok_and(|status| status.success())
}

fn copy_sources(from: &Path, to: &Path, fault: Option<&Fault>) {
    let mut is_planted = fault.is_none();
    for entry in std::fs::read_dir(from).expect("the kernels' folder can be read") {
        let path = entry.expect("its entries too").path();
        let name = path.file_name().expect("an entry has a name").to_string_lossy().into_owned();
        let mut text = std::fs::read_to_string(&path).expect("the sources are text");
        if let Some(fault) = fault.filter(|fault| fault.file == name) {
            assert_eq!(text.matches(fault.from).count(), 1, "{fault:?} fits no single place of {name}");
            text = text.replace(fault.from, fault.to);
            is_planted = true;
        }
        std::fs::write(to.join(name), text).expect("the copy can be written");
    }
    assert!(is_planted, "{fault:?}: no such file");
}

/// Buffers and launches of one run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Session {
    buffers: Vec<Vec<u8>>,
    pointers: Vec<Vec<(u32, Buffer)>>,
    launches: Vec<u8>,
    launch_count: u32,
}

/// The order in which the warps of a block run between two barriers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// The first warp first.
    Ascending,
    /// The last warp first.
    Descending,
}

/// The sizes of a launch: grid, threads, bytes of dynamic shared memory.
pub(crate) type Size = ([u32; 3], u32, u32);

impl Session {
    /// Adds a buffer.
    pub(crate) fn bytes(&mut self, bytes: Vec<u8>) -> Buffer {
        self.buffers.push(bytes);
        self.pointers.push(Vec::new());
        Buffer(self.buffers.len() - 1)
    }

    /// Adds floats.
    pub(crate) fn floats(&mut self, values: &[f32]) -> Buffer {
        self.bytes(values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    /// Adds floats as bf16.
    pub(crate) fn narrow(&mut self, values: &[f32]) -> Buffer {
        self.bytes(values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect())
    }

    /// Adds words.
    pub(crate) fn words(&mut self, values: &[u32]) -> Buffer {
        self.bytes(values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    /// Adds a buffer for a result, filled with what no result holds: floats that are not numbers.
    pub(crate) fn output(&mut self, bytes: usize) -> Buffer {
        self.bytes(vec![0xff; bytes])
    }

    /// Puts the address of `target` into `buffer` at an offset.
    pub(crate) fn point(&mut self, buffer: Buffer, offset: u32, target: Buffer) {
        self.pointers[buffer.0].push((offset, target));
    }

    /// Adds a launch.
    pub(crate) fn launch(&mut self, kernel: &str, size: Size, order: Order, arguments: &[Arg]) {
        let mut words = |values: &[u32]| values.iter().for_each(|word| self.launches.extend(word.to_le_bytes()));
        words(&[kernel.len() as u32]);
        self.launches.extend(kernel.as_bytes());
        let mut words = |values: &[u32]| values.iter().for_each(|word| self.launches.extend(word.to_le_bytes()));
        words(&size.0);
        words(&[size.1, size.2, u32::from(order == Order::Descending), arguments.len() as u32]);
        for argument in arguments {
            let (kind, value) = match argument {
                Arg::At(buffer) => (0u32, (buffer.0 as u64) << 40),
                Arg::Null => (0, u64::MAX),
                Arg::Word(word) => (1, u64::from(*word)),
                Arg::Float(value) => (2, u64::from(value.to_bits())),
            };
            self.launches.extend(kind.to_le_bytes());
            self.launches.extend(value.to_le_bytes());
        }
        self.launch_count += 1;
    }

    /// Runs the launches.
    ///
    /// # Errors
    /// What the emulation says when it does not come to an end.
    pub(crate) fn run(&self, program: &Program) -> Result<Results, String> {
        let mut command = Command::new(&program.executable);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the launcher was just built");
        let mut stdin = child.stdin.take().expect("it was asked for");
        let input = self.input();
        // A launcher that fails early closes the pipe: its status tells.
        let writer = std::thread::spawn(move || stdin.write_all(&input).is_ok());
        let output = child.wait_with_output().expect("a child can be waited for");
        let is_written = writer.join().expect("writing does not panic");
        if !output.status.success() || !is_written {
            let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(format!("{}: {message}", output.status));
        }
        let mut rest = output.stdout.as_slice();
        let take = |buffer: &Vec<u8>| {
            let (own, after) = rest.split_at(buffer.len());
            rest = after;
            own.to_vec()
        };
        Ok(Results { buffers: self.buffers.iter().map(take).collect() })
    }

    fn input(&self) -> Vec<u8> {
        let mut input = (self.buffers.len() as u32).to_le_bytes().to_vec();
        for (buffer, pointers) in self.buffers.iter().zip(&self.pointers) {
            input.extend((buffer.len() as u64).to_le_bytes());
            input.extend(buffer);
            input.extend((pointers.len() as u32).to_le_bytes());
            for (offset, target) in pointers {
                input.extend(offset.to_le_bytes());
                input.extend((target.0 as u32).to_le_bytes());
                input.extend(0u64.to_le_bytes());
            }
        }
        input.extend(self.launch_count.to_le_bytes());
        input.extend(&self.launches);
        input
    }
}

/// The buffers after a run.
#[derive(Clone, Debug)]
pub(crate) struct Results {
    buffers: Vec<Vec<u8>>,
}

impl Results {
    /// Gives a buffer's bytes.
    pub(crate) fn bytes(&self, buffer: Buffer) -> &[u8] {
        &self.buffers[buffer.0]
    }

    /// Gives a buffer as words.
    pub(crate) fn words(&self, buffer: Buffer) -> Vec<u32> {
        self.bytes(buffer).as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()
    }

    /// Gives a buffer as floats.
    pub(crate) fn floats(&self, buffer: Buffer) -> Vec<f32> {
        self.words(buffer).into_iter().map(f32::from_bits).collect()
    }

    /// Gives a buffer of bf16 as floats.
    pub(crate) fn widened(&self, buffer: Buffer) -> Vec<f32> {
        self.bytes(buffer).as_chunks::<2>().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect()
    }
}
