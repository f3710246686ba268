//! What a stranger at the public door can do: without a key, from a web page, slowly, or with too much of everything.

mod framing;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::client::{self, WholeAnswer};
use bulkhead_tests::fake::Fake;
use bulkhead_tests::process;
use bulkhead_tests::server::{Server, binary};
use bulkhead_tests::talk::CHAT;
use bulkhead_tests::wait;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

const KEY: &str = "sk-canary-0123456789abcdef0123456789abcdef";
const OTHER_KEY: &str = "sk-another-fedcba9876543210fedcba9876543210";

/// Sends a request with these header lines, and reads the answer.
fn ask(address: SocketAddr, method: &str, path: &str, headers: &[&str], body: &str) -> WholeAnswer {
    let host = if headers.iter().any(|line| line.starts_with("host:")) { "" } else { "host: localhost\r\n" };
    let lines: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
    let length = if method == "POST" { format!("content-length: {}\r\n", body.len()) } else { String::new() };
    let request = format!("{method} {path} HTTP/1.1\r\n{host}{lines}{length}connection: close\r\n\r\n{body}");
    let answer = client::send_raw(address, request.as_bytes()).expect("there is an answer");
    if method == "HEAD" || answer.status == 204 {
        return WholeAnswer { status: answer.status, headers: answer.headers, text: String::new() };
    }
    answer.read_whole().expect("the answer is whole")
}

fn bearer(key: &str) -> String {
    format!("authorization: Bearer {key}")
}

fn chat_body(text: &str) -> String {
    json!({"messages": [{"role": "user", "content": text}]}).to_string()
}

fn code(answer: &WholeAnswer) -> (u16, Value) {
    (answer.status, answer.json()["error"]["code"].clone())
}

/// A file with keys, in a folder of its own.
fn keys_file(text: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let file = folder.path().join("keys");
    fs::write(&file, text).expect("is written");
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("ours");
    (folder, file)
}

fn start_with_keys(text: &str, flags: &[&str]) -> (Server, TempDir, PathBuf) {
    let (folder, file) = keys_file(text);
    let flags: Vec<&str> =
        ["--api-keys-file", file.to_str().expect("text")].into_iter().chain(flags.to_vec()).collect();
    (Server::start_fake(&flags), folder, file)
}

#[test]
fn without_a_key_nothing_but_health_answers() {
    let (server, _folder, _) = start_with_keys(&format!("laptop:{KEY}\n{OTHER_KEY}\n"), &[]);
    for path in ["/health", "/health/live", "/health/ready"] {
        assert_eq!(ask(server.address, "GET", path, &[], "").status, 200, "{path}");
    }
    let paths = [
        "/",
        "/v1/models",
        "/v1/models/fake-model",
        CHAT,
        "/v1/completions",
        "/metrics",
        "/health/",
        "/Health",
        "/health/../metrics",
        "/health/%2e%2e/metrics",
        "//metrics",
        "/health?x=/metrics/..;",
        "/admin",
        "/.env",
        "/docs",
    ];
    for path in paths {
        for method in ["GET", "POST", "HEAD", "OPTIONS", "DELETE", "TRACE"] {
            let answer = ask(server.address, method, path, &[], "");
            let is_health = path.split('?').next() == Some("/health");
            assert!(answer.status == 401 || is_health, "{method} {path}: {}", answer.status);
            if method == "POST" && !is_health {
                assert_eq!(code(&answer), (401, json!("invalid_api_key")), "{path}");
                assert_eq!(answer.headers.get("www-authenticate").map(String::as_str), Some("Bearer"));
                assert!(!answer.text.contains(KEY));
            }
        }
    }
    let almost = format!("{}g", &KEY[..KEY.len() - 1]);
    for key in ["", "x", "laptop", &almost, &format!("{KEY}x"), &KEY[1..], &"k".repeat(20_000)] {
        assert_eq!(ask(server.address, "GET", "/v1/models", &[&bearer(key)], "").status, 401, "{key}");
    }
    let twice = [bearer("wrong"), bearer(KEY)];
    assert_eq!(ask(server.address, "GET", "/v1/models", &[&twice[0], &twice[1]], "").status, 401);
    // A body that nobody will read does not cost the client the answer.
    assert_eq!(code(&ask(server.address, "POST", CHAT, &[], &chat_body(&"x".repeat(30_000)))).0, 401);
    for key in [KEY, OTHER_KEY] {
        assert_eq!(ask(server.address, "GET", "/v1/models", &[&bearer(key)], "").status, 200);
        assert_eq!(ask(server.address, "GET", "/metrics", &[&bearer(key)], "").status, 200);
        assert_eq!(ask(server.address, "POST", CHAT, &[&bearer(key)], &chat_body("x")).status, 200);
    }
}

#[test]
fn how_long_a_wrong_key_takes_is_printed() {
    const ROUNDS: usize = 300;
    let (server, _folder, _) = start_with_keys(KEY, &[]);
    let wrong = [
        ("all of it", "#".repeat(KEY.len())),
        ("half of it", format!("{}{}", &KEY[..21], "#".repeat(KEY.len() - 21))),
        ("the last byte", format!("{}#", &KEY[..KEY.len() - 1])),
        ("the length", KEY[..KEY.len() - 1].to_owned()),
    ];
    let mut times: Vec<Vec<Duration>> = vec![Vec::new(); wrong.len()];
    for _ in 0..ROUNDS {
        for (index, (_, key)) in wrong.iter().enumerate() {
            let start = Instant::now();
            assert_eq!(ask(server.address, "GET", "/v1/models", &[&bearer(key)], "").status, 401);
            times[index].push(start.elapsed());
        }
    }
    for ((what, _), times) in wrong.iter().zip(&mut times) {
        times.sort();
        let at = |share: usize| times[times.len() * share / 100].as_micros();
        println!("a key that differs in {what}: 10 % {} µs, 50 % {} µs, 90 % {} µs", at(10), at(50), at(90));
    }
}

#[test]
fn keys_are_exchanged_while_requests_run() {
    let (server, _folder, file) = start_with_keys(&format!("old:{KEY}"), &[]);
    let status = |key: &str| ask(server.address, "GET", "/v1/models", &[&bearer(key)], "").status;
    let address = server.address;
    let running = thread::scope(|scope| {
        let slow = chat_body("[delay=20] [repeat=100] word");
        let running = scope.spawn(move || ask(address, "POST", CHAT, &[&bearer(KEY)], &slow).status);
        server.wait_for_health("/queue/running", &json!(1));
        fs::write(&file, format!("new:{OTHER_KEY}")).expect("is written");
        assert_eq!((status(KEY), status(OTHER_KEY)), (200, 401), "not before the signal");
        server.signal(Signal::SIGHUP);
        server.wait_for_log("API keys were read anew");
        assert_eq!((status(KEY), status(OTHER_KEY)), (401, 200));
        running.join().expect("does not panic")
    });
    assert_eq!(running, 200, "whoever was admitted stays so");
    fs::write(&file, "new:short").expect("is written");
    server.signal(Signal::SIGHUP);
    let line = server.wait_for_log("the API keys stay as they were");
    assert!(line.contains(":1: a key has from 16 to 256 characters") && !line.contains("short"), "{line}");
    assert_eq!(status(OTHER_KEY), 200);
    fs::write(&file, format!("a:{KEY}\nb:{OTHER_KEY}")).expect("is written");
    let mut command = Command::new(binary("bulkheadctl"));
    let Output { stdout, .. } =
        command.arg("--runtime-dir").arg(server.runtime_dir()).arg("reread").output().expect("it runs");
    assert_eq!(String::from_utf8_lossy(&stdout), "2 API keys\n");
    assert_eq!((status(KEY), status(OTHER_KEY)), (200, 200));
}

#[test]
fn a_key_is_nowhere_but_in_its_file() {
    let (server, _folder, _) = start_with_keys(&format!("laptop:{KEY}"), &["--log-level", "trace"]);
    assert_eq!(ask(server.address, "POST", CHAT, &[&bearer(KEY)], &chat_body("x")).status, 200);
    assert_eq!(ask(server.address, "GET", "/v1/models", &[&bearer(&KEY[..40])], "").status, 401);
    let metrics = ask(server.address, "GET", "/metrics", &[&bearer(KEY)], "").text;
    server.wait_for_log("laptop");
    let worker = server.worker().expect("it runs");
    let mut places = vec![("log", server.log()), ("metrics", metrics), ("health", server.health().to_string())];
    for pid in [server.pid(), worker.pid] {
        for file in ["cmdline", "environ"] {
            let text = fs::read(format!("/proc/{pid}/{file}")).expect("tests of root's children may");
            places.push((file, String::from_utf8_lossy(&text).into_owned()));
        }
    }
    assert!(fs::read(format!("/proc/{}/environ", worker.pid)).expect("may be read").is_empty());
    for (place, text) in places {
        // Neither the key nor what was nearly the key.
        assert!(!text.contains(&KEY[..20]), "{place}: {text}");
    }
}

#[test]
fn an_open_address_needs_keys_or_a_word() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let refused = Fake::default().command(folder.path(), &["--listen", "0.0.0.0:0"]).output().expect("it runs");
    let text = String::from_utf8_lossy(&refused.stderr);
    assert_eq!((refused.status.code(), text.lines().count()), (Some(2), 1), "{text}");
    assert!(text.contains("--api-keys-file") && text.contains("--allow-unauthenticated"), "{text}");

    let server = Server::start_fake(&["--listen", "0.0.0.0:0", "--allow-unauthenticated"]);
    server.wait_for_log("there are no API keys: anyone who reaches");
    assert_eq!(server.chat("x").status, 200);
    let (server, _folder, _) = start_with_keys(KEY, &["--listen", "0.0.0.0:0"]);
    assert!(!server.log().contains("there are no API keys"));
    assert_eq!(server.chat("x").status, 401);

    // As systemd hands them over.
    let (credentials, file) = keys_file(KEY);
    fs::rename(&file, credentials.path().join("api-keys")).expect("ours");
    let server = Server::launch(|folder| {
        let mut command = Fake::default().command(folder, &[]);
        command.env("CREDENTIALS_DIRECTORY", credentials.path());
        command
    });
    assert_eq!(server.chat("x").status, 401);

    let (_folder, empty) = keys_file("# later\n");
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let flags = ["--api-keys-file", empty.to_str().expect("text")];
    let refused = Fake::default().command(folder.path(), &flags).output().expect("it runs");
    let text = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2));
    assert!(text.contains("holds no key"), "{text}");
}

#[test]
fn a_web_page_reaches_nothing_by_a_name_of_its_own() {
    let server = Server::start_fake(&[]);
    let port = server.address.port();
    for host in [
        "evil.example".to_owned(),
        format!("evil.example:{port}"),
        format!("127.0.0.1.evil.example:{port}"),
        "localhost.evil.example".to_owned(),
        "localhost, evil.example".to_owned(),
        "0.0.0.0".to_owned(),
        "169.254.169.254".to_owned(),
        "[::ffff:1.2.3.4]".to_owned(),
        String::new(),
    ] {
        for (method, path) in [("GET", "/health"), ("GET", "/v1/models"), ("POST", CHAT)] {
            let answer = ask(server.address, method, path, &[&format!("host: {host}")], &chat_body("x"));
            assert_eq!(code(&answer), (403, json!("host_not_allowed")), "{host} {path}");
        }
    }
    // Two names, or a second one in the target.
    let two = ask(server.address, "GET", "/health", &["host: localhost", "host: evil.example"], "");
    assert!([400, 403].contains(&two.status), "{}", two.status);
    assert_eq!(ask(server.address, "GET", "http://evil.example/health", &[], "").status, 403);
}

#[test]
fn web_pages_of_other_origins_are_kept_out_unless_named() {
    let origin = "origin: https://chat.example";
    let question =
        [origin, "access-control-request-method: POST", "access-control-request-headers: authorization, x-a"];
    let is_open = |answer: &WholeAnswer| answer.headers.get("access-control-allow-origin").cloned();

    let server = Server::start_fake(&[]);
    let form = ask(server.address, "POST", CHAT, &[origin, "content-type: text/plain"], &chat_body("x"));
    assert_eq!(code(&form), (403, json!("origin_not_allowed")));
    assert_eq!(ask(server.address, "OPTIONS", CHAT, &question, "").status, 405);
    let read = ask(server.address, "GET", "/v1/models", &[origin], "");
    assert_eq!((read.status, is_open(&read)), (200, None));
    let own = ask(server.address, "POST", CHAT, &["host: localhost:7", "origin: http://localhost:7"], &chat_body("x"));
    assert_eq!(own.status, 200);

    let (_folder, file) = keys_file(KEY);
    let keys = ["--api-keys-file", file.to_str().expect("text")];
    for flags in [&[][..], &keys] {
        let named: Vec<&str> = ["--cors-origins", "https://chat.example"].iter().chain(flags).copied().collect();
        let server = Server::start_fake(&named);
        let answer = ask(server.address, "OPTIONS", CHAT, &question, "");
        assert_eq!((answer.status, is_open(&answer)), (204, Some("https://chat.example".into())));
        assert_eq!(answer.headers["access-control-allow-headers"], "authorization, x-a");
        let key = bearer(KEY);
        let answer = ask(server.address, "POST", CHAT, &[origin, &key], &chat_body("x"));
        assert_eq!((answer.status, is_open(&answer)), (200, Some("https://chat.example".into())));
        assert_eq!(answer.headers["vary"], "origin");
        let other = ask(server.address, "GET", "/v1/models", &["origin: https://evil.example", &key], "");
        assert_eq!((other.status, is_open(&other)), (200, None));
        let without = ask(server.address, "POST", CHAT, &[origin], &chat_body("x"));
        assert_eq!(without.status, if flags.is_empty() { 200 } else { 401 });
    }
}

#[test]
fn no_address_that_a_client_names_is_opened() {
    let server = Server::start_fake(&[]);
    let trap = TcpListener::bind("127.0.0.1:0").expect("there is a port");
    trap.set_nonblocking(true).expect("is allowed");
    let url = format!("http://{}/x.png", trap.local_addr().expect("it listens"));
    for part in [
        json!({"type": "image_url", "image_url": {"url": url}}),
        json!({"type": "input_audio", "input_audio": {"url": url}}),
        json!({"type": "file", "file": {"file_data": url}}),
    ] {
        let body = json!({"messages": [{"role": "user", "content": [part]}]}).to_string();
        assert_eq!(ask(server.address, "POST", CHAT, &[], &body).status, 400, "{body}");
    }
    assert_eq!(server.chat(&url).status, 200);
    assert!(trap.accept().is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock));
}

/// Lets this process hold many connections, or says that it cannot.
fn may_open(connections: u64) -> bool {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit can be read");
    let wanted = connections + 200;
    soft >= wanted || hard >= wanted && setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).is_ok()
}

/// Opens connections that send a part of a request, keeps each of them alive byte by byte, opens another one for each that
/// the server has closed, and has others ask meanwhile.
fn hold(server: &Server, beginning: &str, drip: &[u8]) {
    const SLOW: usize = 1000;
    if !may_open(SLOW as u64) {
        println!("SKIPPED: this process may not open {SLOW} connections");
        return;
    }
    let open = || {
        let mut stream = client::connect(server.address).expect("the server listens");
        // One that was closed already is as good.
        drop(stream.write_all(beginning.as_bytes()));
        stream
    };
    let mut slow: Vec<TcpStream> = (0..SLOW).map(|_| open()).collect();
    let is_over = AtomicBool::new(false);
    let mut times = thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                for stream in &mut slow {
                    if stream.write_all(drip).is_err() && !is_over.load(Ordering::Relaxed) {
                        *stream = open();
                    }
                }
                thread::sleep(Duration::from_millis(100));
            }
        });
        let asked: Vec<Duration> = (0..40)
            .map(|number| {
                let start = Instant::now();
                let answer = if number % 2 == 0 {
                    server.chat("quick")
                } else {
                    server.get("/v1/models").read_whole().expect("whole")
                };
                assert_eq!(answer.status, 200);
                start.elapsed()
            })
            .collect();
        is_over.store(true, Ordering::Relaxed);
        asked
    });
    times.sort();
    println!(
        "beside {SLOW} of {beginning:?}: half within {:?}, all within {:?}",
        times[times.len() / 2],
        times[times.len() - 1]
    );
}

#[test]
fn a_thousand_slow_heads_keep_nobody_out() {
    let server = Server::start_fake(&[]);
    hold(&server, "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-slow: ", b"x");
}

#[test]
fn a_thousand_slow_bodies_keep_nobody_out() {
    let server = Server::start_fake(&[]);
    hold(&server, "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n{", b" ");
}

#[test]
fn a_thousand_silent_connections_keep_nobody_out() {
    let server = Server::start_fake(&[]);
    hold(&server, "", b"");
}

#[test]
fn ten_megabytes_of_headers_are_refused() {
    let server = Server::start_fake(&[]);
    let peak = |server: &Server| -> u64 {
        let status = process::status(server.pid());
        status["VmHWM"].split(' ').next().and_then(|number| number.parse().ok()).expect("a number of kB")
    };
    assert_eq!(server.chat("x").status, 200);
    let before = peak(&server);
    let line = format!("x-filler: {}\r\n", "x".repeat(8000));
    let many = "a: b\r\n".repeat(101);
    for filler in [line.repeat(1300), "x".repeat(10 << 20), many] {
        let mut stream = client::connect(server.address).expect("the server listens");
        let head = format!("GET /health HTTP/1.1\r\nhost: localhost\r\nx: {filler}\r\n\r\n");
        // Refused in the middle, the rest cannot be sent, and the answer may be lost with it.
        drop(stream.write_all(head.as_bytes()));
        if let Ok(answer) = client::receive(stream) {
            assert_eq!(answer.status, 431);
        }
        assert_eq!(server.chat("x").status, 200);
    }
    let longest = format!("x: {}", "x".repeat(30 << 10));
    assert_eq!(ask(server.address, "GET", "/health", &[&longest], "").status, 200);
    println!("peak memory before {before} KiB, after {} KiB", peak(&server));
}

#[test]
fn a_body_that_trickles_is_given_up() {
    let server = Server::start_fake(&[]);
    let mut stream = client::connect(server.address).expect("the server listens");
    stream.set_read_timeout(Some(wait::DEADLINE)).expect("is allowed");
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n{{");
    stream.write_all(head.as_bytes()).expect("is sent");
    let mut writer = stream.try_clone().expect("a second handle");
    let is_over = AtomicBool::new(false);
    let text = thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) && writer.write_all(b" ").is_ok() {
                assert_eq!(server.chat("quick").status, 200);
                thread::sleep(Duration::from_millis(200));
            }
        });
        let mut text = [0; 12];
        let read = stream.read_exact(&mut text);
        is_over.store(true, Ordering::Relaxed);
        read.map(|()| String::from_utf8_lossy(&text).into_owned())
    });
    assert_eq!(text.expect("it is answered"), "HTTP/1.1 408");
}
