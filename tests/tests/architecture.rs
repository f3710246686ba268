//! The rules of the design that a program can check: who links what, who may use `unsafe`, which module knows which.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The only files that may contain `unsafe`, each with its reason.
const UNSAFE_FILES: [(&str, &str); 15] = [
    ("tests/src/bin/sandbox-probe.rs", "makes the system calls of an attacker"),
    ("worker/src/checkpoint/map.rs", "maps files"),
    ("worker/src/cuda/driver.rs", "calls the CUDA driver"),
    ("worker/src/cuda/transfer.rs", "calls the CUDA driver's copies"),
    ("worker/src/memory/pages.rs", "asks for large pages"),
    ("worker/src/model/attention/lanes.rs", "vector instructions"),
    ("worker/src/quant/cpu/amx.rs", "tile instructions, and asking the system for them"),
    ("worker/src/quant/cpu/dot.rs", "vector instructions"),
    ("worker/src/quant/cpu/floats.rs", "vector instructions"),
    ("worker/src/quant/cpu/pool.rs", "threads share a closure and a slice for as long as a loop lasts"),
    ("worker/src/quant/cpu/ymm.rs", "vector instructions"),
    ("worker/src/quant/cpu/ymm_many.rs", "vector instructions"),
    ("worker/src/quant/cpu/zmm.rs", "vector instructions"),
    ("worker/src/sandbox/limits.rs", "closes inherited descriptors"),
    ("worker/src/sandbox/watch.rs", "asks the kernel for the calls that a filter would refuse"),
];

/// Lines of a file without its tests, at most.
const FILE_LINES_MAX: usize = 500;

/// Lines of a function, at most.
const FUNCTION_LINES_MAX: usize = 70;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests are a member of the workspace").to_owned()
}

/// Lists the crates that a package with these features links when it is built for users, dependencies of dependencies
/// included.
fn linked(package: &str, features: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--offline",
            "--locked",
            "--edges",
            "normal",
            "--prefix",
            "none",
            "--format",
            "{lib}",
            "--package",
            package,
            "--features",
            features,
        ])
        .current_dir(root())
        .output()
        .expect("cargo runs: it runs this test");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("names of crates are text");
    text.lines().map(|line| line.trim_end_matches(" (*)").to_owned()).filter(|name| !name.is_empty()).collect()
}

fn check_not_linked(package: &str, features: &str, forbidden: &[&str]) {
    let linked = linked(package, features);
    assert!(linked.len() > 3, "the tree of {package} was read: {linked:?}");
    let found: Vec<_> = forbidden.iter().filter(|name| linked.contains(**name)).collect();
    assert!(found.is_empty(), "{package} links {found:?}");
}

#[test]
fn the_supervisor_links_nothing_that_reads_models() {
    let forbidden = [
        "candle_core",
        "candle_nn",
        "candle_transformers",
        "tokenizers",
        "safetensors",
        "memmap2",
        "minijinja",
        "bulkhead_worker",
    ];
    check_not_linked("bulkhead-supervisor", "", &forbidden);
}

#[test]
fn the_worker_links_nothing_that_speaks_to_a_network() {
    let forbidden = [
        "axum",
        "curl",
        "h2",
        "hf_hub",
        "hyper",
        "hyper_util",
        "isahc",
        "native_tls",
        "openssl",
        "openssl_sys",
        "quinn",
        "reqwest",
        "rustls",
        "tokio",
        "tokio_rustls",
        "ureq",
        "bulkhead_supervisor",
    ];
    check_not_linked("bulkhead-worker", "", &forbidden);
    check_not_linked("bulkhead-worker", "cuda", &forbidden);
    // The feature is what brings the card's driver in, and nothing of CUDA's libraries.
    assert!(!linked("bulkhead-worker", "").contains("cudarc"));
    assert!(linked("bulkhead-worker", "cuda").contains("cudarc"));
}

#[test]
fn the_contract_links_no_input_or_output() {
    let allowed = ["bincode", "bincode_derive", "bulkhead_shared", "thiserror", "thiserror_impl", "unty"];
    // What derives code at build time is not part of the program.
    let build_time = ["proc_macro2", "quote", "syn", "unicode_ident", "virtue"];
    let linked = linked("bulkhead-shared", "");
    let unknown: Vec<_> = linked
        .iter()
        .filter(|name| !allowed.contains(&name.as_str()) && !build_time.contains(&name.as_str()))
        .collect();
    assert!(unknown.is_empty(), "bulkhead-shared links {unknown:?}");
}

/// A source file: its path from the root, and its text.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// The text without unit tests, which stand at the end of a file.
    fn product(&self) -> &str {
        self.text.split("\n#[cfg(test)]\nmod tests {").next().expect("split gives at least one part")
    }

    fn is_test(&self) -> bool {
        self.path.starts_with("tests/") || self.path.ends_with("/tests.rs") || self.path.contains("/tests/")
    }
}

/// Reads the files below a folder whose names end so; build outputs and hidden folders are left out.
fn sources(folder: &str, endings: &[&str]) -> Vec<Source> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("the source tree can be read").path();
            let name = path.file_name().and_then(|name| name.to_str()).expect("names in the source tree are text");
            if name.starts_with('.') || ["target", "fixtures", "checkpoint.d", "__pycache__"].contains(&name) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                let path = path.strip_prefix(root()).expect("below the root").to_str().expect("text").to_owned();
                found.push(Source { path, text });
            }
        }
    }
    assert!(!found.is_empty(), "no sources in {folder}");
    found
}

fn rust() -> Vec<Source> {
    ["shared", "supervisor", "worker", "tests"].iter().flat_map(|folder| sources(folder, &[".rs"])).collect()
}

/// The part of a line that is code.
fn code(line: &str) -> &str {
    line.split("//").next().expect("split gives at least one part")
}

/// Says whether code holds a word that is not part of a longer one.
fn has_word(line: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(is_part) && !line[at + word.len()..].starts_with(is_part))
}

#[test]
fn unsafe_stands_in_its_files_only() {
    let keyword = "unsafe";
    let found: BTreeSet<_> = rust()
        .into_iter()
        .filter(|source| source.text.lines().any(|line| has_word(code(line), keyword) && !line.contains('"')))
        .map(|source| source.path)
        .collect();
    let allowed: BTreeSet<_> = UNSAFE_FILES.iter().map(|(path, _)| (*path).to_owned()).collect();
    assert_eq!(found, allowed, "found on the left, listed on the right");
}

#[test]
fn the_contract_and_the_supervisor_forbid_it_altogether() {
    for path in ["shared/src/lib.rs", "supervisor/src/lib.rs"] {
        let text = fs::read_to_string(root().join(path)).expect("it is there");
        assert!(text.contains("#![forbid(unsafe_code)]"), "{path}");
    }
}

/// Checks that no file below a folder names any of these paths.
fn knows_not(folder: &str, forbidden: &[&str]) {
    for source in sources(folder, &[".rs"]) {
        for (number, line) in source.product().lines().enumerate() {
            let found = forbidden.iter().find(|path| code(line).contains(**path));
            assert!(found.is_none(), "{}:{} knows {}", source.path, number + 1, found.expect("it was found"));
        }
    }
}

#[test]
fn modules_depend_downwards() {
    knows_not("supervisor/src/child", &["crate::http", "crate::request", "crate::fleet", "axum", "hyper"]);
    // Attention reads and writes the cache, whose blocks the engine hands out: the one thing that the model knows of it.
    let engine =
        ["intake", "sampler", "schedule", "sequence", "single", "{"].map(|module| format!("crate::engine::{module}"));
    let engine: Vec<_> = engine.iter().map(String::as_str).chain(["crate::engine;"]).collect();
    knows_not("worker/src/model", &engine);
    knows_not("worker/src/model", &["generate::", "message::", "crate::text", "crate::ipc", "crate::serve"]);
    knows_not("worker/src/quant", &["crate::model", "crate::engine", "crate::text", "crate::ipc", "bulkhead_shared"]);
    knows_not("worker/src/text", &["crate::model", "crate::engine", "crate::ipc", "crate::checkpoint", "candle_core"]);
    knows_not("worker/src/engine", &["crate::ipc", "crate::serve", "crate::checkpoint"]);
    knows_not("worker/src/checkpoint", &["crate::engine", "crate::text", "crate::ipc"]);
    let queue = fs::read_to_string(root().join("supervisor/src/queue.rs")).expect("it is there");
    for word in ["serde_json", "axum", "hyper", "tokio"] {
        assert!(!queue.contains(word), "the queue is a policy and knows no {word}");
    }
}

#[test]
fn the_codec_is_used_in_one_file() {
    for source in rust().iter().filter(|source| !source.is_test() && source.path != "shared/src/frame.rs") {
        for (number, line) in source.product().lines().enumerate() {
            let is_derive = line.contains("use bincode::{Decode, Encode};")
                || line.contains("derive(") && line.contains("bincode::Encode, bincode::Decode");
            let is_use = code(line).contains("bincode::") && !is_derive;
            assert!(!is_use, "{}:{} uses bincode", source.path, number + 1);
        }
    }
}

#[test]
fn the_environment_is_read_in_one_place() {
    for source in sources("supervisor/src", &[".rs"]) {
        if source.path.starts_with("supervisor/src/config") {
            continue;
        }
        let found = source.product().lines().find(|line| code(line).contains("env::var"));
        assert!(found.is_none(), "{}: {found:?}", source.path);
    }
}

#[test]
fn nothing_is_left_open() {
    // Put together, so that this file does not hold them.
    let marks =
        [["TO", "DO"].concat(), ["FIX", "ME"].concat(), ["todo", "!("].concat(), ["unimplemented", "!("].concat()];
    for folder in ["shared", "supervisor", "tools", "worker", "tests"] {
        for source in sources(folder, &[".rs", ".py", ".toml", ".md", ".sh"]) {
            let found = marks.iter().find(|mark| source.text.contains(mark.as_str()));
            assert!(found.is_none(), "{} has {found:?}", source.path);
        }
    }
}

#[test]
fn no_source_names_a_place_on_somebodys_machine() {
    let places = [["/", "work/"].concat(), ["/ro", "ot/"].concat(), ["/ho", "me/"].concat(), ["/Us", "ers/"].concat()];
    for folder in ["shared", "supervisor", "tools", "worker", "tests"] {
        for source in sources(folder, &[".rs", ".py", ".toml", ".md", ".sh"]) {
            let found = places.iter().find(|place| source.text.contains(place.as_str()));
            assert!(found.is_none(), "{} names {found:?}", source.path);
        }
    }
}

#[test]
fn files_are_short_and_begin_with_what_they_are_for() {
    for source in rust() {
        let lines = source.product().lines().count();
        assert!(source.is_test() || lines <= FILE_LINES_MAX, "{} has {lines} lines", source.path);
        let first = source.text.lines().next().unwrap_or_default();
        let is_unit_tests = source.path.ends_with("/tests.rs");
        assert!(first.starts_with("//!") || is_unit_tests, "{} does not say what it owns", source.path);
    }
}

#[test]
fn functions_are_short() {
    for source in rust().iter().filter(|source| !source.is_test()) {
        for (name, lines) in functions(source.product()) {
            assert!(lines <= FUNCTION_LINES_MAX, "{}: {name} has {lines} lines", source.path);
        }
    }
}

/// Measures functions by indentation, which the formatter guarantees: from the line with `fn` to the brace below it.
fn functions(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<_> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        let Some((before, name)) = line.trim_start().split_once("fn ") else { continue };
        let is_head = before.split_whitespace().all(|word| {
            word.starts_with("pub")
                || ["const", "async", "unsafe", "extern", "in"].contains(&word)
                || word.ends_with(')')
        });
        if !is_head || code(line).trim_end().ends_with(['}', ';']) {
            continue;
        }
        let closing = format!("{}}}", " ".repeat(indent));
        if let Some(length) = lines[start..].iter().position(|line| *line == closing) {
            let name = name.split(['(', '<']).next().unwrap_or_default();
            found.push((name.to_owned(), length + 1));
        }
    }
    found
}

#[test]
fn scripts_for_machines_with_a_card_can_be_read() {
    // Nothing else here runs them: they need what this machine lacks.
    let python = |arguments: &[&str]| {
        let mut command = Command::new("python3");
        command.args(arguments).current_dir(root()).env("PYTHONDONTWRITEBYTECODE", "1");
        let output = command.output().expect("the README asks for Python 3");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    python(&["tests/gpu/run.py", "--help"]);
    let parse = "import ast, pathlib, sys\nfor path in sys.argv[1:]: ast.parse(pathlib.Path(path).read_text(), path)";
    let scripts: Vec<_> =
        ["tests/gpu", "tests/cuda", "tools"].iter().flat_map(|folder| sources(folder, &[".py"])).collect();
    let paths = scripts.iter().map(|script| script.path.as_str());
    python(&["-c", parse].into_iter().chain(paths).collect::<Vec<_>>());
}

#[test]
fn functions_are_measured() {
    let text = "pub(crate) fn one(\n    a: u8,\n) -> u8 {\n    a\n}\n\nimpl X {\n    fn two() {\n        if a {\n        }\n    }\n}\nfn three() {}\n";
    assert_eq!(functions(text), [("one".to_owned(), 5), ("two".to_owned(), 4)]);
}

#[test]
fn the_readme_names_commands_that_exist() {
    let readme = fs::read_to_string(root().join("README.md")).expect("there is a README");
    let makefile = fs::read_to_string(root().join("Makefile")).expect("there is a Makefile");
    let targets: BTreeSet<_> = makefile
        .lines()
        .filter_map(|line| {
            line.split_once(':').filter(|(name, rest)| !rest.starts_with('=') && !name.contains([' ', '\t', '.']))
        })
        .map(|(name, _)| name)
        .collect();
    let mut named = 0;
    for (at, _) in readme.match_indices("make ") {
        // Only in code: the word is common in prose.
        if !readme[..at].ends_with(['`', '\n', ' ']) {
            continue;
        }
        let target: String = readme[at + 5..].chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect();
        let is_command = readme[..at].ends_with(['`', '\n']) || readme[..at].ends_with("-demo ");
        if is_command && !target.is_empty() {
            assert!(targets.contains(target.as_str()), "make {target} is not in the Makefile: {targets:?}");
            named += 1;
        }
    }
    assert!(named > 0, "the README says how to run");
    let phony: BTreeSet<_> = ["run", "test", "bench", "lint", "fuzz"].into();
    assert!(phony.is_subset(&targets), "{targets:?}");
}
