//! Who may reach the API: the address, the keys and the origins of web pages, as far as settings tell.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::{Config, Environment};

/// The variable with the folder of a unit's credentials (systemd.exec(5)).
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// The name of the credential with API keys.
const CREDENTIAL: &str = "api-keys";

/// Stands for every origin.
pub(crate) const ANY_ORIGIN: &str = "*";

/// Finds the API keys that systemd hands over.
pub(super) fn credential(environment: &Environment) -> Option<PathBuf> {
    let folder = environment.get(CREDENTIALS)?;
    Some(Path::new(folder).join(CREDENTIAL)).filter(|file| file.is_file())
}

/// Refuses an address that others reach, where nobody would have to show a key.
pub(super) fn check_listen(listen: SocketAddr, has_keys: bool, is_allowed: bool) -> Result<(), String> {
    if listen.ip().is_loopback() || has_keys || is_allowed {
        return Ok(());
    }
    Err(format!(
        "{listen} is not a loopback address: anyone who reaches it could use the model; \
         name API keys with --api-keys-file FILE, or say --allow-unauthenticated"
    ))
}

/// Says what is open to whom on purpose.
pub(super) fn warning(config: &Config) -> Option<String> {
    let is_open = !config.listen.ip().is_loopback() && config.api_keys_file.is_none();
    is_open.then(|| format!("there are no API keys: anyone who reaches {} may use the model", config.listen))
}

/// Reads origins as browsers send them: a scheme, a host and perhaps a port.
pub(super) fn origins(texts: Vec<String>) -> Result<Vec<String>, String> {
    texts.into_iter().map(|text| origin(&text)).collect()
}

fn origin(text: &str) -> Result<String, String> {
    let lower = text.to_ascii_lowercase();
    let is_origin = lower.split_once("://").is_some_and(|(scheme, host)| {
        let is_plain = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | '?' | '#' | '@' | '*' | '\\');
        !scheme.is_empty()
            && scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
            && !host.is_empty()
            && host.chars().all(is_plain)
    });
    if is_origin || text == ANY_ORIGIN {
        return Ok(lower);
    }
    Err(format!("{text:?} is not an origin: use a scheme and a host, such as https://chat.example, or *"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_a_scheme_and_a_host() {
        for (text, expected) in [
            ("https://chat.example", Some("https://chat.example")),
            ("HTTP://Localhost:3000", Some("http://localhost:3000")),
            ("app://obsidian.md", Some("app://obsidian.md")),
            ("http://[::1]:80", Some("http://[::1]:80")),
            ("*", Some("*")),
            ("https://*.example", None),
            ("https://chat.example/", None),
            ("https://", None),
            ("://chat.example", None),
            ("chat.example", None),
            ("null", None),
            ("https://a@b", None),
        ] {
            assert_eq!(origin(text).ok().as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn only_loopback_needs_no_keys() {
        for (listen, has_keys, is_allowed, expected) in [
            ("127.0.0.1:1", false, false, true),
            ("127.9.9.9:1", false, false, true),
            ("[::1]:1", false, false, true),
            ("0.0.0.0:1", false, false, false),
            ("[::]:1", false, false, false),
            ("10.0.0.1:1", false, false, false),
            ("[::ffff:127.0.0.1]:1", false, false, false),
            ("0.0.0.0:1", true, false, true),
            ("0.0.0.0:1", false, true, true),
        ] {
            let listen: SocketAddr = listen.parse().expect("is an address");
            assert_eq!(check_listen(listen, has_keys, is_allowed).is_ok(), expected, "{listen}");
        }
        let refusal = check_listen(SocketAddr::from(([0, 0, 0, 0], 80)), false, false).expect_err("is open");
        assert!(refusal.contains("--api-keys-file") && refusal.contains("--allow-unauthenticated"), "{refusal}");
    }
}
