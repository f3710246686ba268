//! The public door: OpenAI's API over HTTP/1.1.
//!
//! Owns: paths, bodies, headers, what an answer looks like. Refuses: to judge parameters (`request`), to order requests
//! (`queue`), to know workers (`child`). Invariants: every answer that is not a success is OpenAI's error object; every
//! answer carries `x-request-id`; on a loopback address the `Host` header is checked, so that no web page can reach the
//! service under a name of its own (DNS rebinding).

mod answer;
mod body;
mod error;
mod health;
mod host;
pub mod server;

mod wire;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, Method, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tracing::debug;

use crate::fleet::Fleet;
use crate::limits::BODIES_BYTES_MAX;
use crate::queue::Client;
use crate::random;
use crate::request::{self, Admission, Delivery, RequestError};
use error::{ApiError, REQUEST_ID};
pub(crate) use health::worker;
use wire::{Form, Head};

/// What the handlers share.
#[derive(Debug)]
pub(crate) struct App {
    fleet: Arc<Fleet>,
    listen: SocketAddr,
    /// Bytes of bodies that may still be read.
    body_bytes: Semaphore,
}

/// Makes the service.
pub fn router(fleet: Arc<Fleet>, listen: SocketAddr) -> Router {
    let app = Arc::new(App { fleet, listen, body_bytes: Semaphore::new(BODIES_BYTES_MAX) });
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/metrics", get(metrics))
        .route("/health", get(health::health))
        .route("/health/live", get(health::live))
        .route("/health/ready", get(health::ready))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(middleware::from_fn_with_state(app.clone(), guard))
        .with_state(app)
}

/// What clients and the log call a request, in the header `x-request-id`.
#[derive(Clone, Debug)]
struct Name(String);

/// Checks the host and names the request.
async fn guard(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let id = random::id("req_");
    request.extensions_mut().insert(Name(id.clone()));
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut response = match host::check(app.listen, &request) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    // The path is the client's text, but never a prompt's: those travel in bodies.
    debug!(http_request = id, %method, path = ?path, status = response.status().as_u16(), "answered");
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

async fn chat(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    generate(&app, request, Form::Chat, request::chat).await
}

async fn completion(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    generate(&app, request, Form::Text, request::completion).await
}

type Check = fn(&[u8], Admission) -> Result<request::Request, RequestError>;

async fn generate(app: &App, http: Request, form: Form, check: Check) -> Result<Response, ApiError> {
    let client = client(&http);
    let name = http.extensions().get::<Name>().cloned();
    let body = body::read(&app.body_bytes, http.into_body()).await?;
    let admission = Admission { date: time::OffsetDateTime::now_utc().date().to_string(), seed: random::bits() };
    let request = check(&body.bytes, admission)?;
    let model = app.fleet.find(request.model.as_deref())?;
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let head = Head::new(form, created, model);
    let ticket = app.fleet.tickets.admit(request.generate, request::weight(body.bytes.len()), client)?;
    drop(body);
    debug!(http_request = name.map(|name| name.0), request = ticket.id().0, "request is admitted");
    match request.delivery {
        Delivery::Whole => answer::whole(ticket, head).await,
        Delivery::Stream { has_usage } => answer::stream(ticket, head, has_usage).await,
    }
}

/// Tells clients apart, so that they can take turns: by their key, where they have one, which is not kept.
fn client(http: &Request) -> Client {
    Client(http.headers().get(header::AUTHORIZATION).map_or(0, |key| random::hash(key.as_bytes())))
}

/// Answers in Prometheus' text format.
async fn metrics(State(app): State<Arc<App>>) -> Response {
    const FORMAT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, FORMAT)], app.fleet.metrics()).into_response()
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [model_object(&app.fleet)]}))
}

async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    app.fleet.find(Some(&id))?;
    Ok(Json(model_object(&app.fleet)))
}

fn model_object(fleet: &Fleet) -> Value {
    let status = fleet.status();
    json!({
        "id": fleet.model_id,
        "object": "model",
        "created": fleet.created,
        "owned_by": "bulkhead",
        "aliases": fleet.aliases,
        "state": status.state.as_str(),
        "max_model_len": status.facts.as_ref().map(|facts| facts.context_tokens),
        "quantization": status.facts.as_ref().map(|facts| facts.quantization.as_str()),
    })
}

async fn no_such_path(method: Method, uri: Uri) -> ApiError {
    ApiError::NoSuchPath { method, path: uri.path().to_owned() }
}

async fn no_such_method(method: Method, uri: Uri) -> ApiError {
    ApiError::NoSuchMethod { method, path: uri.path().to_owned() }
}
