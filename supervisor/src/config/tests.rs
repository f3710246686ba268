//! Tests of the configuration: layers, faults, and what is derived.

use std::io::Write;

use bulkhead_shared::message::CpuChoice;

use super::*;

fn load_from(flag_list: &[&str], variables: &[(&str, &str)]) -> Result<Loaded, ConfigError> {
    let command = flags(clap::Command::new("test"));
    let matches = command.try_get_matches_from(std::iter::once(&"test").chain(flag_list)).expect("flags are known");
    load(&matches, &Environment::of(variables))
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(text.as_bytes()).expect("is written");
    file
}

fn faults(flag_list: &[&str], variables: &[(&str, &str)]) -> Vec<String> {
    let error = load_from(flag_list, variables).expect_err("there are faults");
    error.0.iter().map(Fault::to_string).collect()
}

#[test]
fn the_defaults_are_as_documented() {
    let config = load_from(&[], &[]).expect("defaults are good").config;
    assert_eq!(config.listen.to_string(), "127.0.0.1:8000");
    assert_eq!((config.model_id.as_str(), config.aliases.len()), ("bulkhead-demo", 0));
    assert_eq!((config.device, config.sequences_max), (DeviceSetting::Auto, 8));
    assert_eq!((config.device_memory, config.kv_cache_type), (Bytes(0), KvType::Bf16));
    assert_eq!((config.host_memory, config.worker_cgroup), (Bytes(0), WorkerCgroup::Auto));
    assert_eq!(config.worker_cuda.file_name().and_then(|name| name.to_str()), Some("bulkhead-worker-cuda"));
    assert_eq!(config.shutdown_timeout, Duration::from_secs(5));
    assert_eq!(config.worker.file_name().and_then(|name| name.to_str()), Some("bulkhead-worker"));
}

#[test]
fn later_layers_win_and_origins_are_told() {
    let file = file("queue_max = 7\nthreads = 3\nrequest_timeout = \"90s\"\nlog = { level = \"debug\" }\n");
    let path = file.path().to_str().expect("is text").to_owned();
    let loaded = load_from(
        &["--config", &path, "--threads", "5", "--cpu", "scalar"],
        &[("BULKHEAD_THREADS", "4"), ("BULKHEAD_QUEUE_MAX", "8"), ("BULKHEAD_ALIASES", "a, b")],
    )
    .expect("is good");
    assert_eq!((loaded.config.threads, loaded.config.queue_max), (5, 8));
    assert_eq!(loaded.config.cpu, CpuChoice::Scalar);
    assert_eq!(loaded.config.request_timeout, Duration::from_secs(90));
    assert_eq!(loaded.config.aliases, ["a", "b"]);
    for line in [
        "threads = 5  # --threads".to_owned(),
        "queue_max = 8  # BULKHEAD_QUEUE_MAX".to_owned(),
        format!("request_timeout = \"90s\"  # {path}:3"),
        format!("log.level = \"debug\"  # {path}:4"),
        "log.format = \"human\"  # default".to_owned(),
    ] {
        assert!(loaded.listing().lines().any(|got| got == line), "{line} in {}", loaded.listing());
    }
}

#[test]
fn every_fault_is_reported_at_once_with_its_place() {
    let file = file("listn = \"x\"\nqueue_max = -1\ndevice = 3\nzzzzzzzz = 1\n[log]\nlevel = \"loud\"\n");
    let path = file.path().to_str().expect("is text").to_owned();
    let got = faults(&["--config", &path, "--threads", "many"], &[("BULKHEAD_LISTEN", "nowhere")]);
    assert_eq!(
        got,
        [
            format!("{path}:1: unknown setting \"listn\", did you mean \"listen\"?"),
            format!("{path}:2: queue_max: \"-1\" is not a whole number from 0 to 65536"),
            format!("{path}:3: device: is a integer, not a string"),
            format!("{path}:4: unknown setting \"zzzzzzzz\""),
            format!("{path}:6: log.level: \"loud\" is none of error, warn, info, debug, trace"),
            "--threads: threads: \"many\" is not a whole number from 0 to 1024".to_owned(),
            "BULKHEAD_LISTEN: listen: \"nowhere\" is not an address with a port, such as 127.0.0.1:8000 or [::1]:8000"
                .to_owned(),
        ]
    );
}

#[test]
fn single_values_are_judged() {
    for (flag_list, start) in [
        (&["--listen", "0.0.0.0:80"][..], "--listen: listen: 0.0.0.0:80 is not a loopback address"),
        (&["--device-memory", "16"], "--device-memory: device_memory: \"16\" is not an amount of memory"),
        (&["--device-memory", "16 GB"], "--device-memory: device_memory: \"16 GB\" is not an amount of memory"),
        (&["--device-memory", "1.5.5GiB"], "--device-memory: device_memory: \"1.5.5GiB\" is not an amount of memory"),
        (
            &["--device-memory", "255MiB"],
            "--device-memory: device_memory: 255.0 MiB is not from 256.0 MiB to 4096.0 GiB",
        ),
        (&["--device-memory", "5000GiB"], "--device-memory: device_memory: 5000.0 GiB is not from"),
        (&["--cpu", "sse2"], "--cpu: cpu: \"sse2\" is none of auto, scalar, avx2, avxvnni, avx512, amx"),
        (&["--host-memory", "8 TB"], "--host-memory: host_memory: \"8 TB\" is not an amount of memory"),
        (&["--worker-cgroup", "on"], "--worker-cgroup: worker_cgroup: \"on\" is none of auto, off"),
        (&["--kv-cache-type", "int4"], "--kv-cache-type: kv_cache_type: \"int4\" is none of bf16, int8"),
        (&["--device", "cpu", "--kv-cache-type", "int8"], "--kv-cache-type: kv_cache_type: int8 is for a CUDA card"),
        (&["--device", "gpu"], "--device: device: \"gpu\" is not a device"),
        (&["--device", "cuda:x"], "--device: device: \"cuda:x\" is not a device"),
        (&["--sequences-max", "0"], "--sequences-max: sequences_max: 0 is not from 1 to 64"),
        (&["--hang-timeout", "99ms"], "--hang-timeout: hang_timeout: 99ms is not from 100ms to 86400s"),
        (&["--hang-timeout", "soon"], "--hang-timeout: hang_timeout: \"soon\" is not a time"),
        (&["--faults-step-delay-ms", "1"], "--faults-step-delay-ms: faults.step_delay_ms: is for tests"),
        (&["--faults-die-on-token", "0"], "--faults-die-on-token: faults.die_on_token: is for tests"),
        (&["--faults-oom-after-steps", "0"], "--faults-oom-after-steps: faults.oom_after_steps: is for tests"),
        (&["--faults-hang-after-steps", "0"], "--faults-hang-after-steps: faults.hang_after_steps: is for tests"),
        (&["--faults-hang-after-steps", "x"], "--faults-hang-after-steps: faults.hang_after_steps: \"x\" is not"),
        (&["--config", "/nowhere/b.toml"], "/nowhere/b.toml: cannot be read: No such file"),
    ] {
        let got = faults(flag_list, &[]);
        assert!(got.len() == 1 && got[0].starts_with(start), "{flag_list:?}: {got:?}");
    }
    let open = load_from(&["--listen", "0.0.0.0:80", "--allow-unauthenticated"], &[]).expect("was allowed");
    assert_eq!(open.config.listen.port(), 80);
    let slow = load_from(&["--allow-faults", "--faults-step-delay-ms", "9"], &[]).expect("was allowed");
    assert_eq!(slow.config.faults, Faults { step_delay_ms: 9, ..Faults::default() });
    let file = file("allow_faults = true\nfaults = { die_on_token = 0, oom_after_steps = 1_0 }\n");
    let path = file.path().to_str().expect("is text").to_owned();
    let faulty = load_from(&["--config", &path, "--faults-hang-after-steps", "7"], &[]).expect("was allowed");
    let asked =
        Faults { step_delay_ms: 0, die_on_token: Some(0), oom_after_steps: Some(10), hang_after_steps: Some(7) };
    assert_eq!(faulty.config.faults, asked);
}

#[test]
fn a_card_is_described() {
    for (device, memory, expected) in [
        ("auto", "0", (DeviceSetting::Auto, Bytes(0))),
        ("cpu", "256MiB", (DeviceSetting::Cpu, Bytes(256 << 20))),
        ("cuda:0", "16GiB", (DeviceSetting::Cuda(0), Bytes(16 << 30))),
        ("cuda:12", "10.5 GiB", (DeviceSetting::Cuda(12), Bytes(21 << 29))),
    ] {
        let flag_list = ["--device", device, "--device-memory", memory];
        let config = load_from(&flag_list, &[]).expect("is good").config;
        assert_eq!((config.device, config.device_memory), expected);
    }
    let small = load_from(&["--device", "cuda:0", "--kv-cache-type", "int8"], &[]).expect("is good").config;
    assert_eq!(small.kv_cache_type, KvType::Int8);
}

#[test]
fn a_model_is_named_after_its_folder() {
    let config = load_from(&["--model", "models/gpt-oss-20b/"], &[]).expect("is good").config;
    assert_eq!(config.model_id, "gpt-oss-20b");
    assert!(config.model.is_absolute());
    let config = load_from(&["--model", "models/x", "--model-id", "openai/gpt-oss-20b"], &[]).expect("is good").config;
    assert_eq!(config.model_id, "openai/gpt-oss-20b");
}

#[test]
fn a_path_in_a_file_counts_from_the_file() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("b.toml");
    std::fs::write(&path, "model = \"m\"\n").expect("is written");
    let config = load_from(&["--config", path.to_str().expect("is text")], &[]).expect("is good").config;
    assert_eq!(config.model, folder.path().join("m"));
}

#[test]
fn unknown_variables_are_warned_of() {
    let loaded = load_from(&[], &[("BULKHEAD_PORT", "tcp://1.2.3.4:80"), ("PATH", "/bin")]).expect("is good");
    assert_eq!(loaded.warnings, ["the variable BULKHEAD_PORT is no setting and has no effect"]);
}

#[test]
fn a_runtime_folder_must_be_ours_alone() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let fresh = folder.path().join("a/b");
    let ours = crate::walls::identity(None).expect("nobody else");
    let make = |folder: &Path| paths::make_runtime_dir(folder, &ours);
    make(&fresh).expect("is made");
    make(&fresh).expect("is taken again");
    std::fs::set_permissions(&fresh, std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("is opened");
    assert!(matches!(make(&fresh), Err(paths::PathError::RuntimeDir { .. })));
    let file = folder.path().join("file");
    std::fs::write(&file, "").expect("is written");
    assert!(matches!(make(&file), Err(paths::PathError::RuntimeDir { .. })));
}
