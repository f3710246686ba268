//! A small HTTP/1.1 client for tests: whole answers, streams event by event, and raw bytes.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use serde_json::Value;

use crate::service::DEADLINE;

/// An answer whose body was read to the end.
#[derive(Clone, Debug)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The headers, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Response {
    /// Gives a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Reads the body as JSON.
    ///
    /// # Panics
    /// When it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        let text = String::from_utf8_lossy(&self.body);
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {text}"))
    }
}

/// Connects to a port of this machine.
///
/// # Panics
/// When nobody listens.
#[must_use]
pub fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("somebody listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout can be set");
    stream
}

/// Sends a request and reads the whole answer.
///
/// # Panics
/// When the connection breaks.
#[must_use]
pub fn request(port: u16, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Response {
    let mut stream = connect(port);
    send(&mut stream, method, path, headers, body);
    read(stream)
}

/// Sends a request. Without a `host` among the headers, localhost is named.
///
/// # Panics
/// When the connection breaks.
pub fn send(stream: &mut TcpStream, method: &str, path: &str, headers: &[&str], body: &[u8]) {
    let mut head = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    if !headers.iter().any(|header| header.starts_with("host:")) {
        head.push_str("host: localhost\r\n");
    }
    for header in headers {
        head.push_str(header);
        head.push_str("\r\n");
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).expect("the head is sent");
    stream.write_all(body).expect("the body is sent");
}

/// Reads an answer to its end.
///
/// # Panics
/// When it is no HTTP.
#[must_use]
pub fn read(stream: TcpStream) -> Response {
    let mut stream = Stream::new(stream);
    let mut body = Vec::new();
    while let Some(chunk) = stream.chunk() {
        body.extend(chunk);
    }
    Response { status: stream.status, headers: stream.headers, body }
}

/// An answer whose body is read bit by bit.
#[derive(Debug)]
pub struct Stream {
    reader: BufReader<TcpStream>,
    /// The status code.
    pub status: u16,
    headers: Vec<(String, String)>,
    pending: Vec<u8>,
    is_over: bool,
}

impl Stream {
    /// Sends a POST of JSON and reads the head of the answer.
    #[must_use]
    pub fn post(port: u16, path: &str, body: &Value) -> Stream {
        let mut stream = connect(port);
        send(&mut stream, "POST", path, &[], body.to_string().as_bytes());
        Stream::new(stream)
    }

    /// Reads the head of an answer.
    ///
    /// # Panics
    /// When it is no HTTP.
    #[must_use]
    pub fn new(stream: TcpStream) -> Stream {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).expect("a status line");
        let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no status line but {line:?}"));
        let mut headers = Vec::new();
        loop {
            line.clear();
            reader.read_line(&mut line).expect("a header");
            match line.trim_end().split_once(':') {
                Some((name, value)) => headers.push((name.to_lowercase(), value.trim().to_owned())),
                None => break,
            }
        }
        Stream { reader, status, headers, pending: Vec::new(), is_over: false }
    }

    /// Reads the next part of the body.
    fn chunk(&mut self) -> Option<Vec<u8>> {
        if self.is_over {
            return None;
        }
        let is_chunked = self.headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked");
        let length = self.headers.iter().find(|(name, _)| name == "content-length");
        let mut chunk = Vec::new();
        if is_chunked {
            let mut line = String::new();
            self.reader.read_line(&mut line).ok()?;
            let bytes = usize::from_str_radix(line.trim_end(), 16).ok()?;
            chunk.resize(bytes + 2, 0);
            self.reader.read_exact(&mut chunk).ok()?;
            chunk.truncate(bytes);
            self.is_over = bytes == 0;
        } else {
            let bytes = length.and_then(|(_, value)| value.parse().ok()).unwrap_or(u64::MAX);
            self.reader.by_ref().take(bytes).read_to_end(&mut chunk).ok()?;
            self.is_over = true;
        }
        Some(chunk)
    }

    /// Reads the next event's data; comments are skipped.
    pub fn event(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.pending.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.pending.drain(..end + 2).collect();
                let text = String::from_utf8_lossy(&event).trim_end().to_owned();
                match text.strip_prefix("data: ") {
                    Some(data) => return Some(data.to_owned()),
                    None => continue,
                }
            }
            let chunk = self.chunk()?;
            self.pending.extend(chunk);
        }
    }

    /// Reads all events that are left: JSON objects, and whether `[DONE]` came.
    pub fn events(&mut self) -> (Vec<Value>, bool) {
        let mut events = Vec::new();
        while let Some(data) = self.event() {
            if data == "[DONE]" {
                return (events, true);
            }
            events.push(serde_json::from_str(&data).unwrap_or_else(|error| panic!("{error}: {data}")));
        }
        (events, false)
    }
}
