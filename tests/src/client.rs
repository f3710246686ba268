//! A blocking HTTP/1.1 client, just large enough: one request for each connection, whole bodies or server-sent events.
//!
//! Written here instead of taken from a crate so that tests can break connections where they like, and see every byte.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// Time for which a connection may be silent: a whole answer is, for as long as its workers are killed.
const SILENCE_MAX: Duration = Duration::from_secs(300);

/// The head of an answer, and a way to read the rest.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The headers, names in lower case.
    pub headers: HashMap<String, String>,
    body: Body,
}

/// An answer that was read to its end.
#[derive(Clone, Debug)]
pub struct WholeAnswer {
    /// The status code.
    pub status: u16,
    /// The headers, names in lower case.
    pub headers: HashMap<String, String>,
    /// The body.
    pub text: String,
}

#[derive(Debug)]
struct Body {
    reader: BufReader<TcpStream>,
    framing: Framing,
}

#[derive(Clone, Copy, Debug)]
enum Framing {
    /// Bytes left of a body of known length.
    Length(usize),
    /// Bytes left of the chunk that is being read.
    Chunked(usize),
    /// The last chunk was read.
    Ended,
}

/// Sends a request and reads the head of the answer.
///
/// # Errors
/// When the connection fails or what comes back is no HTTP.
pub fn send(address: SocketAddr, method: &str, path: &str, body: Option<&str>) -> io::Result<Answer> {
    send_raw(address, request(address, method, path, body).as_bytes())
}

/// Sends bytes and reads the head of the answer.
///
/// # Errors
/// When the connection fails or what comes back is no HTTP.
pub fn send_raw(address: SocketAddr, request: &[u8]) -> io::Result<Answer> {
    let mut stream = connect(address)?;
    stream.write_all(request)?;
    receive(stream)
}

/// Sends a POST request and leaves without waiting for an answer.
///
/// # Errors
/// When the connection fails.
pub fn send_and_leave(address: SocketAddr, path: &str, body: &str) -> io::Result<()> {
    send_and_hold(address, path, body)?.shutdown(Shutdown::Both)
}

/// Sends a POST request and gives the connection, from which nothing was read.
///
/// # Errors
/// When the connection fails.
pub fn send_and_hold(address: SocketAddr, path: &str, body: &str) -> io::Result<TcpStream> {
    let mut stream = connect(address)?;
    stream.write_all(request(address, "POST", path, Some(body)).as_bytes())?;
    Ok(stream)
}

/// Connects and says nothing yet, for requests that come bit by bit.
///
/// # Errors
/// When nobody listens.
pub fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.set_write_timeout(Some(SILENCE_MAX))?;
    Ok(stream)
}

fn request(address: SocketAddr, method: &str, path: &str, body: Option<&str>) -> String {
    let head = match body {
        Some(body) => format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()),
        None => String::new(),
    };
    format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n{head}\r\n{}", body.unwrap_or(""))
}

/// Reads the head of an answer to whatever was written into a connection.
///
/// # Errors
/// When the connection fails or what comes back is no HTTP.
pub fn receive(stream: TcpStream) -> io::Result<Answer> {
    let mut reader = BufReader::new(stream);
    let status_line = read_line(&mut reader)?;
    let status = status_line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or_else(|| malformed(format!("status line {status_line:?}")))?;
    let mut headers = HashMap::new();
    loop {
        let line = read_line(&mut reader)?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').ok_or_else(|| malformed(format!("header {line:?}")))?;
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let framing = match headers.get("content-length") {
        Some(length) => Framing::Length(length.parse().map_err(|_| malformed(format!("length {length:?}")))?),
        None => Framing::Chunked(0),
    };
    Ok(Answer { status, headers, body: Body { reader, framing } })
}

impl Answer {
    /// Reads the rest as text.
    ///
    /// # Errors
    /// When the connection ends early.
    pub fn text(mut self) -> io::Result<String> {
        let mut text = String::new();
        BufReader::new(&mut self.body).read_to_string(&mut text)?;
        Ok(text)
    }

    /// Reads the rest and keeps the head with it.
    ///
    /// # Errors
    /// When the connection ends early.
    pub fn read_whole(self) -> io::Result<WholeAnswer> {
        let (status, headers) = (self.status, self.headers.clone());
        Ok(WholeAnswer { status, headers, text: self.text()? })
    }

    /// Reads the rest as JSON.
    ///
    /// # Errors
    /// When the connection ends early or the body is no JSON.
    pub fn json(self) -> io::Result<Value> {
        let text = self.text()?;
        serde_json::from_str(&text).map_err(|error| malformed(format!("{error} in {text:?}")))
    }

    /// Reads the rest as server-sent events.
    #[must_use]
    pub fn events(self) -> Events {
        Events { reader: BufReader::new(self.body) }
    }
}

impl WholeAnswer {
    /// Takes the body as JSON.
    ///
    /// # Panics
    /// When it is none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error} in {:?}", self.text))
    }
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Framing::Chunked(0) = self.framing {
            let line = read_line(&mut self.reader)?;
            let bytes = usize::from_str_radix(&line, 16).map_err(|_| malformed(format!("chunk length {line:?}")))?;
            self.framing = if bytes == 0 { Framing::Ended } else { Framing::Chunked(bytes) };
        }
        let left = match self.framing {
            Framing::Length(left) | Framing::Chunked(left) => left,
            Framing::Ended => return Ok(0),
        };
        if left == 0 || buffer.is_empty() {
            return Ok(0);
        }
        let room = left.min(buffer.len());
        let read = self.reader.read(&mut buffer[..room])?;
        if read == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{left} bytes of the body are missing")));
        }
        match &mut self.framing {
            Framing::Length(left) => *left -= read,
            Framing::Chunked(left) => {
                *left -= read;
                if *left == 0 {
                    let end = read_line(&mut self.reader)?;
                    if !end.is_empty() {
                        return Err(malformed(format!("{end:?} behind a chunk")));
                    }
                }
            }
            Framing::Ended => {}
        }
        Ok(read)
    }
}

/// The server-sent events of an answer. Dropping it closes the connection.
#[derive(Debug)]
pub struct Events {
    reader: BufReader<Body>,
}

impl Events {
    /// Reads the data of the next event; comments are passed over. `None` at the orderly end of the body.
    ///
    /// # Errors
    /// When the connection ends early, or a line is neither data nor a comment.
    pub fn next_data(&mut self) -> io::Result<Option<String>> {
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line)? == 0 {
                return Ok(None);
            }
            let line = line.trim_end_matches(['\r', '\n']);
            if let Some(data) = line.strip_prefix("data: ") {
                return Ok(Some(data.to_owned()));
            }
            if !line.is_empty() && !line.starts_with(':') {
                return Err(malformed(format!("event line {line:?}")));
            }
        }
    }

    /// Breaks the connection in both directions.
    pub fn hang_up(self) {
        // The peer may have closed it first, which is as good.
        drop(self.reader.get_ref().reader.get_ref().shutdown(Shutdown::Both));
    }
}

fn read_line(reader: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed"));
    }
    line.truncate(line.trim_end_matches(['\r', '\n']).len());
    Ok(line)
}

fn malformed(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}
