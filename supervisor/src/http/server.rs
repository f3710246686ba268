//! Accepts connections and serves them until told to stop.
//!
//! Invariants: the number of connections is bounded, and none that is idle keeps out another; a client that is slow to send
//! its head is dropped, and so is one that takes nothing for long; a connection's end drops what it was waiting for.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::connections::{Answer, Connections, Stage, Waits};
use crate::limits::{CONNECTIONS_MAX, HEAD_BYTES_MAX, HEADER_TIMEOUT, HEADERS_MAX, STALL_TIMEOUT};

/// The pause after a failed accept, which mostly means that descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `closing` is true, then lets each connection finish its present answer.
///
/// Cancel safety: dropping it drops every connection.
pub async fn serve(listener: TcpListener, router: Router, mut closing: watch::Receiver<bool>) {
    let places = Connections::new(CONNECTIONS_MAX);
    let service = TowerToHyperService::new(router);
    let mut connections = JoinSet::new();
    loop {
        let (stream, peer) = tokio::select! {
            accepted = accept(&listener) => accepted,
            Some(_) = connections.join_next() => continue,
            () = wait_until_closing(&mut closing) => break,
        };
        let place = tokio::select! {
            place = places.place(peer.ip()) => place,
            () = wait_until_closing(&mut closing) => break,
        };
        let Some(place) = place else { return };
        let (service, closing) = (service.clone(), closing.clone());
        connections.spawn(async move {
            tokio::select! {
                () = serve_connection(stream, service, place.stage(), closing) => {}
                () = place.eviction() => debug!("a connection that kept the server waiting made room for another"),
            }
            drop(place);
        });
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Answers one request, and has it known what is waited for meanwhile.
async fn answer(
    service: TowerToHyperService<Router>,
    stage: Stage,
    request: Request<Incoming>,
) -> Result<Response<Answer>, Infallible> {
    stage.set(Waits::Nothing);
    let mut request = request.map(Body::new);
    request.extensions_mut().insert(stage.clone());
    let response = service.call(request).await?;
    Ok(response.map(|body| Answer::new(body, stage)))
}

async fn serve_connection(
    stream: TcpStream,
    service: TowerToHyperService<Router>,
    stage: Stage,
    mut closing: watch::Receiver<bool>,
) {
    // Events are small and should leave at once; without it they only come later.
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "cannot set nodelay");
    }
    let stall_ms = u32::try_from(STALL_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    if let Err(error) = setsockopt(&stream, sockopt::TcpUserTimeout, &stall_ms) {
        debug!(%error, "cannot bound the time for which a client may stand still");
    }
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    builder.max_header_size(HEAD_BYTES_MAX).max_headers(HEADERS_MAX);
    let service = service_fn(|request| answer(service.clone(), stage.clone(), request));
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    let finished = tokio::select! {
        result = connection.as_mut() => Some(result),
        () = wait_until_closing(&mut closing) => None,
    };
    let result = match finished {
        Some(result) => result,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        debug!(%error, "connection ended early");
    }
}

/// Waits until connections are to close. The sender is dropped only when the supervisor ends, which means the same.
async fn wait_until_closing(closing: &mut watch::Receiver<bool>) {
    drop(closing.wait_for(|is_closing| *is_closing).await);
}
