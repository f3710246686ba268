//! The public door: OpenAI's API over HTTP/1.1.
//!
//! Owns: paths, bodies, headers, what an answer looks like. Refuses: to judge parameters (`request`), to order requests
//! (`queue`), to know workers (`child`). Invariants: every answer that is not a success is OpenAI's error object; every
//! answer carries `x-request-id`; on a loopback address the `Host` header is checked, so that no web page can reach the
//! service under a name of its own (DNS rebinding); where there are API keys, nothing but `/health` and what is below it
//! answers without one, and nothing of a body is kept before; no address that a client names is ever opened.

mod answer;
mod auth;
mod body;
mod connections;
mod cors;
mod error;
mod health;
mod host;
mod logprobs;
pub mod server;

mod wire;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::rejection::PathRejection;
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
use crate::keys::Keys;
use crate::limits::{BODIES_BYTES_MAX, STRANGER_BYTES_MAX};
use crate::queue::Client;
use crate::random;
use crate::request::{self, Admission, Delivery, RequestError};
use crate::walls::Walls;
use auth::KeyName;
use connections::{Stage, Waits};
use error::{ApiError, REQUEST_ID};
pub(crate) use health::worker;
use wire::{Detail, Form, Head};

/// What the handlers share.
#[derive(Debug)]
pub(crate) struct App {
    fleet: Arc<Fleet>,
    door: Door,
    /// Bytes of bodies that may still be read.
    body_bytes: Semaphore,
}

/// Who is let in, and behind which walls.
#[derive(Debug)]
pub struct Door {
    /// The address listened on.
    pub listen: SocketAddr,
    /// The keys of those who may come in.
    pub keys: Arc<Keys>,
    /// The origins of the web pages that may.
    pub cors_origins: Vec<String>,
    /// The supervisor's own walls.
    pub walls: Arc<Walls>,
}

/// Makes the service.
pub fn router(fleet: Arc<Fleet>, door: Door) -> Router {
    let app = Arc::new(App { fleet, door, body_bytes: Semaphore::new(BODIES_BYTES_MAX) });
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

/// Checks who sends a request, and names it.
async fn guard(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let id = random::id("req_");
    request.extensions_mut().insert(Name(id.clone()));
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let origins = &app.door.cors_origins;
    let origin = cors::allowed_origin(origins, &request);
    let (mut response, key) = match admit(&app.door, &request, origin.as_ref()) {
        Ok(_) if cors::is_preflight(&request, origin.as_ref()) => (cors::preflight(&request), None),
        Ok(key) => {
            key.iter().for_each(|key| drop(request.extensions_mut().insert(key.clone())));
            (next.run(request).await, key)
        }
        Err(error) => {
            // A client that is still sending would lose the answer with the connection.
            request.extensions().get::<Stage>().iter().for_each(|stage| stage.set(Waits::Body));
            body::drain(request.into_body(), STRANGER_BYTES_MAX).await;
            (error.into_response(), None)
        }
    };
    cors::open(origins, origin, response.headers_mut());
    let status = response.status().as_u16();
    // The path is the client's text, but never a prompt's: those travel in bodies.
    debug!(http_request = id, %method, path = ?path, key = key.as_ref().map(|key| &*key.0), status, "answered");
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// Decides whether a request is looked at: by the host that it names, the web page that it comes from, and its key.
fn admit(door: &Door, request: &Request, origin: Option<&HeaderValue>) -> Result<Option<KeyName>, ApiError> {
    host::check(door.listen, request)?;
    cors::check(request, origin, door.keys.are_needed())?;
    // What a browser asks before it sends the request has no key yet.
    match cors::is_preflight(request, origin) {
        true => Ok(None),
        false => auth::check(&door.keys, request),
    }
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
    let stage = http.extensions().get::<Stage>().cloned();
    stage.iter().for_each(|stage| stage.set(Waits::Body));
    let body = body::read(&app.body_bytes, http.into_body()).await?;
    stage.iter().for_each(|stage| stage.set(Waits::Nothing));
    let admission = Admission { date: time::OffsetDateTime::now_utc().date().to_string(), seed: random::bits() };
    let request = check(&body.bytes, admission)?;
    let model = app.fleet.find(request.model.as_deref())?;
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let detail = request.generate.logprobs.map_or(Detail::Text, |_| Detail::Tokens);
    let head = Head::new((form, detail), created, model);
    let ticket = app.fleet.tickets.admit(request.generate, request::weight(body.bytes.len()), client)?;
    drop(body);
    debug!(http_request = name.map(|name| name.0), request = ticket.id().0, "request is admitted");
    match request.delivery {
        Delivery::Whole => answer::whole(ticket, head).await,
        Delivery::Stream { has_usage } => answer::stream(ticket, head, has_usage).await,
    }
}

/// Tells clients apart, so that they can take turns: by the name of their key, or where none is needed by whatever they
/// show, which is not kept.
fn client(http: &Request) -> Client {
    if let Some(KeyName(name)) = http.extensions().get() {
        return Client(random::hash(name.as_bytes()));
    }
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

async fn model(
    State(app): State<Arc<App>>,
    method: Method,
    uri: Uri,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    // A name that is no text is nobody's.
    let Ok(Path(id)) = id else { return Err(no_such_path(method, uri).await) };
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
