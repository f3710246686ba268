//! Web pages of other origins: off, unless the configuration names theirs.
//!
//! A browser lets a page read an answer only where this module says so. What it lets any page do without asking, which is to
//! send a form, is refused here as long as no keys are needed: or any page could put the model to work, and only not see
//! the result. Source: the Fetch standard, "CORS protocol".

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::error::ApiError;
use crate::config::access::ANY_ORIGIN;

/// Seconds for which a browser need not ask again.
const MAX_AGE: HeaderValue = HeaderValue::from_static("600");

/// Gives the origin that a browser says a request comes from, if it may.
pub(super) fn allowed_origin(origins: &[String], request: &Request) -> Option<HeaderValue> {
    let value = request.headers().get(header::ORIGIN)?;
    let text = value.to_str().ok()?.to_ascii_lowercase();
    origins.iter().any(|origin| origin == ANY_ORIGIN || *origin == text).then(|| value.clone())
}

/// Refuses what a page of another origin wants done, where no key tells friends from strangers.
pub(super) fn check(request: &Request, allowed: Option<&HeaderValue>, needs_key: bool) -> Result<(), ApiError> {
    let Some(origin) = request.headers().get(header::ORIGIN) else { return Ok(()) };
    let is_harmless = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    if needs_key || is_harmless || allowed.is_some() || is_same(origin, request.headers()) {
        return Ok(());
    }
    Err(ApiError::Origin { origin: String::from_utf8_lossy(origin.as_bytes()).into_owned() })
}

/// Says whether the page was served by this server itself.
fn is_same(origin: &HeaderValue, headers: &HeaderMap) -> bool {
    let host = origin.to_str().ok().and_then(|origin| origin.strip_prefix("http://"));
    host.is_some_and(|host| headers.get(header::HOST).is_some_and(|named| named.as_bytes() == host.as_bytes()))
}

/// Says whether a browser asks what a page may send that may send something.
pub(super) fn is_preflight(request: &Request, allowed: Option<&HeaderValue>) -> bool {
    let is_question = request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    *request.method() == Method::OPTIONS && is_question && allowed.is_some()
}

/// Answers that question.
pub(super) fn preflight(request: &Request) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let answer = response.headers_mut();
    answer.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, OPTIONS"));
    // OpenAI's SDK sends a dozen headers of its own; none means anything here.
    if let Some(asked) = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        answer.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
    }
    answer.insert(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE);
    response
}

/// Lets the page read an answer. Caches must know that answers differ by origin.
pub(super) fn open(origins: &[String], allowed: Option<HeaderValue>, headers: &mut HeaderMap) {
    if origins.is_empty() {
        return;
    }
    headers.append(header::VARY, HeaderValue::from_static("origin"));
    if let Some(origin) = allowed {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
    }
}

const EXPOSED: HeaderValue = HeaderValue::from_static("x-request-id, retry-after");
