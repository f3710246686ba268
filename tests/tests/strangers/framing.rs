//! Requests that two readers of HTTP could read as different ones, and requests for another protocol.
//!
//! What comes behind the first request of a connection is only ever a second one where both ends agree that it is: a request in
//! another's body must not be answered, nor may the rest of a refused one.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};

use bulkhead_tests::client;
use bulkhead_tests::server::Server;
use bulkhead_tests::talk::{CHAT, check_error};
use serde_json::{Value, json};

use super::{KEY, ask, bearer, chat_body, start_with_keys};

/// An answer as it came: status, head in lower case, body.
#[derive(Clone, Debug)]
struct Came {
    status: u16,
    head: String,
    body: String,
}

/// Sends bytes and reads every answer until the server closes: it does so after what it refuses, and after what asks for it.
fn say(address: SocketAddr, bytes: &[u8]) -> Vec<Came> {
    let mut stream = client::connect(address).expect("the server listens");
    // What is refused in the middle cannot be sent to its end.
    drop(stream.write_all(bytes));
    let mut read = Vec::new();
    // A server that refuses and closes may reset the connection; what came before counts.
    drop(stream.read_to_end(&mut read));
    answers(&String::from_utf8_lossy(&read))
}

/// Takes apart answers that follow each other.
fn answers(mut text: &str) -> Vec<Came> {
    let mut all = Vec::new();
    while let Some((head, rest)) = text.split_once("\r\n\r\n") {
        let head = head.to_ascii_lowercase();
        let status = head.strip_prefix("http/1.1 ").and_then(|line| line.get(..3)?.parse().ok());
        let status = status.unwrap_or_else(|| panic!("{head:?} is no answer"));
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse().ok());
        let (body, behind) = match length {
            Some(length) => rest.split_at(std::cmp::min(length, rest.len())),
            None => panic!("{head:?} has no length"),
        };
        all.push(Came { status, head, body: body.to_owned() });
        text = behind;
    }
    assert!(text.is_empty(), "{text:?} is no answer");
    all
}

fn statuses(came: &[Came]) -> Vec<u16> {
    came.iter().map(|came| came.status).collect()
}

/// Makes a request to chat with these header lines and this body.
fn post(lines: &str, body: &str) -> String {
    format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n{lines}\r\n{body}")
}

/// A request that must never be answered, since it stands where the body of another is, or behind a refusal.
const HIDDEN: &str = "GET /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";

/// A request after which the connection goes on.
const LIVE: &str = "GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n";

#[test]
fn what_is_in_a_body_is_no_request() {
    let server = Server::start_fake(&[]);
    let body = chat_body("one");
    let length = body.len();
    let chunked = format!("{length:x}\r\n{body}\r\n0\r\n\r\n");
    // Whoever counts by the length and whoever counts by chunks see another request: it is the connection's last
    // (RFC 9112, section 6.3).
    for lines in [
        format!("content-length: {length}\r\ntransfer-encoding: chunked\r\n"),
        format!("transfer-encoding: chunked\r\ncontent-length: {length}\r\n"),
        "content-length: 5\r\ntransfer-encoding: chunked\r\n".to_owned(),
        "transfer-encoding: chunked\r\ncontent-length: 5\r\n".to_owned(),
    ] {
        let came = say(server.address, post(&lines, &format!("{chunked}{HIDDEN}")).as_bytes());
        assert!(matches!(statuses(&came)[..], [200 | 400]), "{lines}: {came:?}");
        assert!(came[0].head.contains("connection: close"), "{lines}: {came:?}");
    }
    // Framing that is not exactly as it must be.
    for lines in [
        "content-length: 4\r\ncontent-length: 5\r\n",
        "content-length: 4, 5\r\n",
        "content-length: +5\r\n",
        "content-length: -1\r\n",
        "content-length: 0x5\r\n",
        "content-length: 5 5\r\n",
        "content-length: \r\n",
        "content-length: 18446744073709551616\r\n",
        "content-length : 5\r\n",
        "transfer-encoding : chunked\r\n",
        "transfer-encoding: xchunked\r\n",
        "transfer-encoding: chunked, identity\r\n",
        "transfer-encoding: identity\r\n",
        "transfer-encoding: \u{b}chunked\r\n",
        "transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n",
        "x: a\r\n transfer-encoding: chunked\r\n",
        "x: a\u{0}b\r\n",
        "x y: a\r\n",
        "x: a\rtransfer-encoding: chunked\r\n",
        ": a\r\n",
    ] {
        let came = say(server.address, post(lines, &format!("{chunked}{HIDDEN}")).as_bytes());
        assert!(came.len() <= 1 && came.iter().all(|came| came.status >= 400), "{lines:?}: {came:?}");
    }
    // Chunks that lie about their length.
    for chunks in [
        format!("FFFFFFFFFFFFFFFFF\r\n{HIDDEN}"),
        format!("-1\r\n{HIDDEN}"),
        format!("5\r\n12345678\r\n0\r\n\r\n{HIDDEN}"),
        format!("{length:x}\n{body}\n0\n\n{HIDDEN}"),
        format!("{length:x};{}\r\n{body}\r\n0\r\n\r\n{HIDDEN}", "x".repeat(100_000)),
        format!("0\r\nx: {}\r\n\r\n{HIDDEN}", "x".repeat(100_000)),
    ] {
        let came = say(server.address, post("transfer-encoding: chunked\r\n", &chunks).as_bytes());
        assert!(came.len() <= 1 && came.iter().all(|came| came.status >= 400), "{chunks:?}: {came:?}");
    }
    let old = format!("POST {CHAT} HTTP/1.0\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n{chunked}{HIDDEN}");
    let came = say(server.address, old.as_bytes());
    assert!(came.len() <= 1 && came.iter().all(|came| came.status >= 400), "{came:?}");
    // An honest one in chunks is answered.
    let came = say(server.address, post("connection: close\r\ntransfer-encoding: chunked\r\n", &chunked).as_bytes());
    assert_eq!(statuses(&came), [200], "{came:?}");
}

/// A line may end without a carriage return: every part of it then does, for the server as for whoever stands before it.
#[test]
fn bare_line_ends_hide_nothing() {
    let server = Server::start_fake(&[]);
    let body = chat_body("one");
    let bare =
        format!("POST {CHAT} HTTP/1.1\nhost: localhost\nconnection: close\ncontent-length: {}\n\n{body}", body.len());
    let came = say(server.address, bare.as_bytes());
    assert!(matches!(statuses(&came)[..], [200 | 400]), "{came:?}");
    let inner = format!("x: a\ncontent-length: {}\r\n", body.len());
    let came = say(server.address, post(&inner, &format!("{body}{HIDDEN}")).as_bytes());
    assert!(matches!(statuses(&came)[..], [200, 200] | [400]), "{came:?}");
    let came = say(server.address, format!("GET /health/live HTTP/1.1\r\nhost: localhost\r\n\n{HIDDEN}").as_bytes());
    assert!(matches!(statuses(&came)[..], [200, 200] | [400]), "{came:?}");
}

#[test]
fn requests_behind_each_other_are_answered_in_order() {
    let server = Server::start_fake(&[]);
    let body = chat_body("[repeat=3] word");
    let chat = post(&format!("content-length: {}\r\n", body.len()), &body);
    let missing = "GET /nowhere HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let came = say(server.address, [LIVE, &chat, missing, LIVE, &chat, HIDDEN].concat().as_bytes());
    assert_eq!(statuses(&came), [200, 200, 404, 200, 200, 200], "{came:?}");
    let content = |came: &Came| -> Value {
        let body: Value = serde_json::from_str(&came.body).expect("JSON");
        body["choices"][0]["message"]["content"].clone()
    };
    assert_eq!(content(&came[1]), content(&came[4]));
    // One without a valid host ends nothing for itself alone.
    let evil = "GET /health HTTP/1.1\r\nhost: evil.example\r\n\r\n";
    let came = say(server.address, [LIVE, evil, HIDDEN].concat().as_bytes());
    assert_eq!(statuses(&came), [200, 403, 200], "{came:?}");
    // A hundred at once are a hundred.
    let came = say(server.address, [&LIVE.repeat(99), HIDDEN].concat().as_bytes());
    assert_eq!(came.len(), 100);
}

#[test]
fn a_key_is_for_its_own_request_alone() {
    let (server, _folder, _) = start_with_keys(KEY, &[]);
    let with_key = format!("GET /v1/models HTTP/1.1\r\nhost: localhost\r\n{}\r\n\r\n", bearer(KEY));
    let without = "GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let came = say(server.address, [&with_key, without, &with_key, without, HIDDEN].concat().as_bytes());
    assert_eq!(statuses(&came), [200, 401, 200, 401, 200], "{came:?}");
}

#[test]
fn other_protocols_are_not_spoken() {
    let server = Server::start_fake(&[]);
    let upgrades = [
        "upgrade: h2c\r\nconnection: close, upgrade, http2-settings\r\nhttp2-settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
        "upgrade: websocket\r\nconnection: close, upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
        "upgrade: tls/1.2\r\nconnection: close, upgrade\r\n",
        "upgrade: HTTP/3.0, h2c, websocket\r\nconnection: close, upgrade\r\n",
    ];
    for lines in upgrades {
        for path in ["/health/live", "/v1/models", "/", CHAT] {
            let came = say(server.address, format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{lines}\r\n").as_bytes());
            assert_eq!(came.len(), 1, "{path} {lines}: {came:?}");
            assert!(came[0].status != 101 && !came[0].head.contains("\nupgrade:"), "{path} {lines}: {came:?}");
        }
    }
    // HTTP/2 by prior knowledge, TLS, and what is no HTTP at all.
    let tls = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".repeat(20);
    for bytes in [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".as_slice(),
        &tls,
        b"GET /health/live HTTP/3.0\r\nhost: localhost\r\n\r\n",
        b"GET /health/live HTTP/0.9\r\n\r\n",
        b"GET /health/live\r\n\r\n",
        b"\r\n\r\n\r\n\0\0\0\0",
        b"SSH-2.0-x\r\n",
        b"* 1 2 3\r\n\r\n",
    ] {
        let came = say(server.address, bytes);
        assert!(came.len() <= 1 && came.iter().all(|came| came.status == 400), "{bytes:?}: {came:?}");
    }
    assert_eq!(server.chat("one").status, 200);
}

#[test]
fn nobody_is_connected_to_anywhere_else() {
    let server = Server::start_fake(&[]);
    let trap = TcpListener::bind("127.0.0.1:0").expect("there is a port");
    trap.set_nonblocking(true).expect("is allowed");
    let elsewhere = trap.local_addr().expect("it listens");
    for host in [elsewhere.to_string(), format!("localhost:{}", server.address.port()), "localhost".into()] {
        let tunnel = format!("CONNECT {elsewhere} HTTP/1.1\r\nhost: {host}\r\n\r\n{HIDDEN}");
        let came = say(server.address, tunnel.as_bytes());
        assert!(came.iter().all(|came| came.status >= 400 || came.body.contains("live")), "{host}: {came:?}");
        assert!(came.first().is_some_and(|came| came.status >= 400), "{host}: {came:?}");
    }
    for (target, status) in [
        // Another port of this machine is still this machine, and it is we who answer.
        (format!("http://{elsewhere}/health/live"), 200),
        ("http://evil.example/health/live".into(), 403),
        ("https://evil.example:443/v1/models".into(), 403),
        (format!("http://user:secret@{elsewhere}/health/live"), 403),
        ("http://localhost/health/live".into(), 200),
        (format!("http://127.0.0.1:{}/health/live", server.address.port()), 200),
    ] {
        assert_eq!(ask(server.address, "GET", &target, &[], "").status, status, "{target}");
    }
    // What the target names counts, and so does the header: either alone can keep out.
    let both = ask(server.address, "GET", "http://localhost/health/live", &["host: evil.example"], "");
    assert_eq!(both.status, 403);
    let all = ask(server.address, "OPTIONS", "*", &[], "");
    assert!(all.status >= 400, "{all:?}");
    assert!(trap.accept().is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock));
}

#[test]
fn no_spelling_of_a_path_is_another_path() {
    let paths = [
        "/v1%2fmodels",
        "/%76%31/models",
        "/v1/%6dodels",
        "/metrics%00",
        "/metric%73",
        "/health%2flive",
        "/health/live/",
        "/health/./live",
        "/health//live",
        "/health;/live",
        "/v1/models/%00",
        "/v1/models/%ff%fe",
        "/v1/models/%",
        "/v1/models/%zz",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/v1/models/../../../../etc/passwd",
        "/v1/models/%c0%ae%c0%ae/x",
        "/v1/models/\u{fc}",
        "/v1/models/<script>",
        "\\windows\\win.ini",
    ];
    let (guarded, _folder, _) = start_with_keys(KEY, &[]);
    let open = Server::start_fake(&[]);
    let long = format!("/{}", "a".repeat(20_000));
    for path in paths.into_iter().chain([long.as_str()]) {
        let request = |key: &str| format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{key}\r\n");
        for came in say(guarded.address, request("").as_bytes()) {
            assert!([400, 401].contains(&came.status), "{path}: {came:?}");
        }
        let key = format!("{}\r\n", bearer(KEY));
        let came = [say(guarded.address, request(&key).as_bytes()), say(open.address, request("").as_bytes())].concat();
        for came in came {
            assert!([400, 404].contains(&came.status), "{path}: {came:?}");
            assert!(!came.body.contains("root:"), "{path}: {came:?}");
            // What the parser of HTTP refuses has no body; all else is OpenAI's error.
            if !came.body.is_empty() {
                check_error(&serde_json::from_str(&came.body).unwrap_or_else(|_| panic!("{path}: {came:?}")));
            }
        }
    }
    for bytes in [40_000, 70_000, 1 << 20] {
        let path = format!("/{}", "a".repeat(bytes));
        let came = say(
            open.address,
            format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").as_bytes(),
        );
        assert!(came.len() <= 1 && came.iter().all(|came| [414, 431].contains(&came.status)), "{bytes}: {came:?}");
    }
    assert_eq!(open.chat("one").json()["choices"][0]["message"]["content"], json!("one"));
}
