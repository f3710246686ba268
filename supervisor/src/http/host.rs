//! The check of the `Host` header on loopback.

use std::net::{IpAddr, SocketAddr};

use axum::extract::Request;
use axum::http::header;

use super::error::ApiError;

/// Checks that a request means this machine. Only on loopback: a public address has names that nobody told us.
pub(super) fn check(listen: SocketAddr, request: &Request) -> Result<(), ApiError> {
    if !listen.ip().is_loopback() {
        return Ok(());
    }
    let headers = request.headers().get_all(header::HOST).iter();
    let named = headers.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    // A proxy's request names the host in the target as well.
    let target = request.uri().authority().map(|authority| authority.as_str().to_owned());
    match named.chain(target).find(|host| !is_ours(host)) {
        Some(host) => Err(ApiError::Host { host }),
        None => Ok(()),
    }
}

fn is_ours(host: &str) -> bool {
    let (name, port) = match host.rsplit_once(':') {
        // The last colon of an address in brackets may be one of its own.
        Some((name, port)) if !name.starts_with('[') || name.ends_with(']') => (name, port),
        Some(_) | None => (host, "0"),
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    let is_local = name.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    is_local && port.parse::<u16>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_pass() {
        for (host, expected) in [
            ("localhost", true),
            ("LOCALHOST:8000", true),
            ("localhost.", true),
            ("127.0.0.1", true),
            ("127.0.0.1:1", true),
            ("127.8.9.1:65535", true),
            ("[::1]", true),
            ("[::1]:8000", true),
            ("", false),
            ("evil.example", false),
            ("localhost.evil.example", false),
            ("127.0.0.1.evil.example:8000", false),
            ("127.0.0.1:x", false),
            ("127.0.0.1@evil.example", false),
            ("10.0.0.1", false),
            ("[::2]:8000", false),
            ("0.0.0.0:8000", false),
        ] {
            assert_eq!(is_ours(host), expected, "{host}");
        }
    }
}
