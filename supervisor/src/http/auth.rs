//! Who sends a request: the check of its API key.

use std::sync::Arc;

use axum::extract::Request;
use axum::http::{HeaderMap, header};

use super::error::ApiError;
use crate::keys::Keys;

/// The name of the key with which a request came.
#[derive(Clone, Debug)]
pub(super) struct KeyName(pub(super) Arc<str>);

/// Paths that answer without a key: what watches the service has none.
const OPEN_PATHS: [&str; 3] = ["/health", "/health/live", "/health/ready"];

/// Checks the key, where one is needed, and gives its name.
pub(super) fn check(keys: &Keys, request: &Request) -> Result<Option<KeyName>, ApiError> {
    if !keys.are_needed() || OPEN_PATHS.contains(&request.uri().path()) {
        return Ok(None);
    }
    let shown = shown(request.headers()).ok_or(ApiError::NoKey)?;
    keys.find(shown).map(|name| Some(KeyName(name))).ok_or(ApiError::WrongKey)
}

/// Gives the key of the one header that has it.
fn shown(headers: &HeaderMap) -> Option<&[u8]> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (value, None) = (values.next()?, values.next()) else { return None };
    let (scheme, key) = value.as_bytes().split_at_checked(SCHEME.len())?;
    scheme.eq_ignore_ascii_case(SCHEME).then(|| key.trim_ascii())
}

const SCHEME: &[u8] = b"Bearer ";

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    #[test]
    fn a_key_comes_in_one_header_as_a_bearer() {
        for (values, expected) in [
            (&["Bearer abc"][..], Some("abc")),
            (&["bearer  abc "], Some("abc")),
            (&["Bearer "], Some("")),
            (&["Bearer"], None),
            (&["Basic abc"], None),
            (&["abc"], None),
            (&[], None),
            (&["Bearer abc", "Bearer abc"], None),
        ] {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, HeaderValue::from_static(value));
            }
            assert_eq!(shown(&headers), expected.map(str::as_bytes), "{values:?}");
        }
    }
}
