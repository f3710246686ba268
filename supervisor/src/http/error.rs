//! Errors as clients see them: the only place that knows status codes.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bulkhead_shared::limits::BODY_BYTES_MAX;
use bulkhead_shared::message::Failure;
use serde_json::{Value, json};
use tracing::error;

use crate::fleet::UnknownModel;
use crate::journal::End;
use crate::request::RequestError;
use crate::tickets::Refusal;

/// Why a client does not get what it asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ApiError {
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error(transparent)]
    UnknownModel(#[from] UnknownModel),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("too many requests are being sent at once")]
    Busy,
    #[error("the body exceeds {BODY_BYTES_MAX} bytes")]
    BodyTooLarge,
    #[error("the body did not arrive in time")]
    BodyTimeout,
    #[error("the body could not be read")]
    BodyBroken,
    #[error("there is nothing at {method} {path}")]
    NoSuchPath { method: Method, path: String },
    #[error("{path} does not answer to {method}")]
    NoSuchMethod { method: Method, path: String },
    #[error("host {host:?} is not served here: use localhost, a loopback address or the address listened on")]
    Host { host: String },
    #[error("this server needs an API key: send it as `Authorization: Bearer KEY`")]
    NoKey,
    #[error("the API key is not valid here")]
    WrongKey,
    #[error("web pages of the origin {origin:?} may not do this: its owner can allow it with cors_origins")]
    Origin { origin: String },
    #[error("{}", describe_end(.0))]
    Ended(End),
}

/// The parts of OpenAI's error object beside the message.
struct Shape {
    status: StatusCode,
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
    /// Seconds after which a client should try again.
    retry_after: Option<u32>,
}

impl Shape {
    fn client(status: StatusCode, code: Option<&'static str>) -> Shape {
        Shape { status, kind: "invalid_request_error", param: None, code, retry_after: None }
    }

    fn server(status: StatusCode, code: &'static str, retry_after: Option<u32>) -> Shape {
        Shape { status, kind: "server_error", param: None, code: Some(code), retry_after }
    }

    fn rate_limit(retry_after: Duration) -> Shape {
        let code = Some("rate_limit_exceeded");
        let status = StatusCode::TOO_MANY_REQUESTS;
        let seconds = u32::try_from(retry_after.as_millis().div_ceil(1000)).unwrap_or(u32::MAX);
        Shape { status, kind: "rate_limit_error", param: None, code, retry_after: Some(seconds) }
    }

    fn with_param(self, param: &str) -> Shape {
        Shape { param: Some(param.to_owned()), ..self }
    }
}

impl ApiError {
    fn shape(&self) -> Shape {
        match self {
            ApiError::Request(error) => request_shape(error),
            ApiError::UnknownModel(_) => {
                Shape::client(StatusCode::NOT_FOUND, Some("model_not_found")).with_param("model")
            }
            ApiError::Refused(refusal) => match refusal {
                Refusal::Loading => Shape::server(StatusCode::SERVICE_UNAVAILABLE, "model_loading", Some(2)),
                Refusal::Unserved(_) => Shape::server(StatusCode::SERVICE_UNAVAILABLE, "model_unavailable", Some(30)),
                Refusal::Stopping => Shape::server(StatusCode::SERVICE_UNAVAILABLE, "model_unavailable", Some(30)),
                Refusal::Draining => Shape::server(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", Some(5)),
                Refusal::Full { retry_after, .. } => Shape::rate_limit(*retry_after),
            },
            ApiError::Busy => Shape::rate_limit(Duration::from_secs(1)),
            ApiError::BodyTooLarge => Shape::client(StatusCode::PAYLOAD_TOO_LARGE, Some("body_too_large")),
            ApiError::BodyTimeout => Shape::client(StatusCode::REQUEST_TIMEOUT, Some("body_timeout")),
            ApiError::BodyBroken => Shape::client(StatusCode::BAD_REQUEST, Some("body_incomplete")),
            ApiError::NoSuchPath { .. } => Shape::client(StatusCode::NOT_FOUND, Some("unknown_url")),
            ApiError::NoSuchMethod { .. } => {
                Shape::client(StatusCode::METHOD_NOT_ALLOWED, Some("method_not_supported"))
            }
            ApiError::Host { .. } => Shape::client(StatusCode::FORBIDDEN, Some("host_not_allowed")),
            ApiError::NoKey | ApiError::WrongKey => Shape::client(StatusCode::UNAUTHORIZED, Some("invalid_api_key")),
            ApiError::Origin { .. } => Shape::client(StatusCode::FORBIDDEN, Some("origin_not_allowed")),
            ApiError::Ended(end) => end_shape(end),
        }
    }

    /// Gives OpenAI's error object, as in a body and as in a stream.
    pub(crate) fn object(&self) -> Value {
        let shape = self.shape();
        let message = match shape.status {
            StatusCode::TOO_MANY_REQUESTS => format!("rate limit reached: {self}; try again later"),
            _ => self.to_string(),
        };
        json!({"error": {"message": message, "type": shape.kind, "param": shape.param, "code": shape.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let shape = self.shape();
        let mut response = (shape.status, Json(self.object())).into_response();
        if let Some(seconds) = shape.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if matches!(self, ApiError::Ended(End::Quarantined(_) | End::Failed(Failure::Cancelled))) {
            // OpenAI's clients send again what was answered with a 5xx, unless they are told not to.
            response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if matches!(self, ApiError::NoKey | ApiError::WrongKey) {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(self, ApiError::BodyTooLarge | ApiError::BodyTimeout | ApiError::BodyBroken) {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// The header by which a server of OpenAI's API says whether a client should send a request again.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// The header that names a request in the log.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

fn request_shape(error: &RequestError) -> Shape {
    let bad = |code| Shape::client(StatusCode::BAD_REQUEST, code);
    match error {
        RequestError::NotJson { .. } => bad(Some("invalid_json")),
        RequestError::Missing { param } => bad(Some("missing_required_parameter")).with_param(param),
        RequestError::Invalid { param, .. } => bad(Some("invalid_value")).with_param(param),
        RequestError::Unsupported { param, .. } => bad(Some("unsupported_parameter")).with_param(param),
        RequestError::Unknown { param, .. } => bad(Some("unknown_parameter")).with_param(param),
    }
}

fn end_shape(end: &End) -> Shape {
    const RETRY: StatusCode = StatusCode::SERVICE_UNAVAILABLE;
    match end {
        End::Failed(Failure::ContextLength { .. }) => {
            Shape::client(StatusCode::BAD_REQUEST, Some("context_length_exceeded")).with_param("messages")
        }
        End::Failed(Failure::Invalid { param, .. }) => {
            Shape::client(StatusCode::BAD_REQUEST, Some("invalid_value")).with_param(param)
        }
        End::Quarantined(_) => Shape::server(StatusCode::INTERNAL_SERVER_ERROR, "request_quarantined", None),
        End::TimedOut => Shape::server(StatusCode::GATEWAY_TIMEOUT, "request_timeout", None),
        End::Unserved => Shape::server(RETRY, "model_unavailable", Some(30)),
        End::ShuttingDown => Shape::server(RETRY, "shutting_down", Some(5)),
        // Whose client is gone has nobody to read this; the others were cancelled by the private door.
        End::Failed(Failure::Cancelled) => Shape::server(RETRY, "request_cancelled", None),
        End::Unsendable | End::Done { .. } => {
            error!(?end, "a request ended as none should");
            Shape::server(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", None)
        }
    }
}

fn describe_end(end: &End) -> String {
    match end {
        End::Failed(Failure::ContextLength { prompt_tokens, max_tokens, context_tokens }) => format!(
            "this model's maximum context length is {context_tokens} tokens, and {} were requested \
             ({prompt_tokens} in the prompt, {max_tokens} for the answer)",
            u64::from(*prompt_tokens) + u64::from(*max_tokens)
        ),
        End::Failed(Failure::Invalid { param, detail }) => format!("{param}: {detail}"),
        End::Failed(Failure::Cancelled) => "the request was cancelled".into(),
        End::Quarantined(cause) => format!(
            "this request ended every worker that ran it ({cause}) and was set aside; sending it again would do the same"
        ),
        End::TimedOut => "the request took longer than the server's request_timeout".into(),
        End::Unserved => "no worker can run this request".into(),
        End::ShuttingDown => "the server is shutting down".into(),
        End::Unsendable => "the request cannot be handed to a worker".into(),
        End::Done { .. } => "the request has ended".into(),
    }
}
