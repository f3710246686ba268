//! The state of the service for people, load balancers and the clients of the service that this one replaces.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bulkhead_shared::layers::{Layer, SandboxMode};
use bulkhead_shared::units::Bytes;
use serde_json::{Map, Value, json};

use super::App;
use crate::child::lifecycle::State as ChildState;
use crate::child::oom::Source;
use crate::fleet::{Fleet, Health};
use crate::nvml::Sample;

/// Answers 200 when a model can answer, else 503.
pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    let (code, word, reason) = match app.fleet.health(Instant::now()) {
        Health::Healthy => (StatusCode::OK, "healthy", None),
        Health::Degraded(reason) => (StatusCode::OK, "degraded", Some(reason)),
        Health::Loading(reason) => (StatusCode::SERVICE_UNAVAILABLE, "loading", Some(reason)),
        Health::Unhealthy(reason) => (StatusCode::SERVICE_UNAVAILABLE, "unhealthy", Some(reason)),
    };
    let worker = worker(&app.fleet);
    // A worker on the CPU holds no memory of a card, and nobody measures one.
    let (used, total) = match app.fleet.devices.memory.sample() {
        Sample::Memory(memory) => (memory.used, memory.total),
        Sample::Unknown | Sample::Lost => (Bytes(0), Bytes(0)),
    };
    let (running, waiting) = app.fleet.tickets.lengths();
    let mut body = json!({
        "status": word,
        "model_loaded": worker["state"] == ChildState::Running.as_str(),
        "gpu_memory_used": used.gib(),
        "gpu_memory_total": total.gib(),
        "queue": {"running": running, "waiting": waiting},
        "workers": [worker],
        "supervisor": app.door.walls.describe(),
    });
    if let Some(reason) = reason {
        body["reason"] = reason.into();
    }
    (code, Json(body)).into_response()
}

/// Answers 200 as long as the supervisor does.
pub(super) async fn live() -> Json<Value> {
    Json(json!({"status": "live"}))
}

/// Answers 200 when requests are taken and a model can answer.
pub(super) async fn ready(State(app): State<Arc<App>>) -> Response {
    let is_ready = matches!(app.fleet.health(Instant::now()), Health::Healthy | Health::Degraded(_));
    if is_ready && app.fleet.tickets.check_door().is_ok() {
        Json(json!({"status": "ready"})).into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "not ready"}))).into_response()
    }
}

/// Says how isolated a worker is: what was asked for, and of what was asked for as far as it goes, how far it went.
fn sandbox_word(mode: SandboxMode, has_greeted: bool, is_whole: bool) -> &'static str {
    match (mode, has_greeted) {
        (SandboxMode::BestEffort, true) if is_whole => SandboxMode::Full.as_str(),
        (SandboxMode::BestEffort, true) => "partial",
        (SandboxMode::Full | SandboxMode::BestEffort | SandboxMode::Log | SandboxMode::Off, _) => mode.as_str(),
    }
}

/// Describes the worker, for the public and the private door.
pub(crate) fn worker(fleet: &Fleet) -> Value {
    let status = fleet.status();
    let mut worker = json!({
        "model": fleet.model_id,
        "state": status.state.as_str(),
        "incarnation": status.incarnation,
        "pid": status.pid,
        "restarts": status.restarts(),
        "since_s": status.since.elapsed().as_secs(),
        "last_end": status.last_end,
        "stops_when_idle": fleet.is_stopping(),
        "oom_told_by": status.oom_source.map(Source::as_str),
        "isolation": status.layers.iter().map(|layer| layer.as_str()).collect::<Vec<_>>(),
    });
    let missing = Layer::missing(&status.layers);
    let has_greeted = !status.layers.is_empty();
    worker["sandbox"] = sandbox_word(fleet.sandbox(), has_greeted, missing.is_empty()).into();
    if has_greeted && !missing.is_empty() {
        worker["isolation_missing"] = missing.iter().map(|layer| layer.as_str()).collect::<Vec<_>>().into();
    }
    if let Some(reason) = fleet.devices.reason() {
        worker["device_reason"] = reason.into();
    }
    if let Some(progress) = status.progress {
        worker["progress"] = json!({"done": progress.done.0, "total": progress.total.0, "what": progress.what});
    }
    if let Some(facts) = status.facts {
        let memory = facts.memory.iter().map(|(kind, bytes)| (kind.as_str().to_owned(), bytes.0.into()));
        worker["device"] = facts.device.into();
        worker["quantization"] = facts.quantization.into();
        worker["context_tokens"] = facts.context_tokens.into();
        worker["given_up"] = facts.given_up.into();
        worker["memory"] = Value::Object(memory.collect::<Map<_, _>>());
        worker["blocks"] = json!({
            "total": facts.blocks, "free": status.blocks_free, "tokens": facts.block_tokens,
        });
    }
    worker
}
