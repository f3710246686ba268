//! The open connections: what the server waits for on each, and which one has to go when there is no place for another.
//!
//! Owns: the places, and the choice. Invariants: the number of connections is bounded; a connection whose client has said
//! all that it has to say is never chosen; of those that keep the server waiting, the one that has done so for longest goes,
//! among those of the source that has most of them. So a thousand connections that say nothing cost whoever opened them
//! their places, and nobody else.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Pause before another connection is looked for that may go.
const EVICTION_PAUSE: Duration = Duration::from_millis(50);

/// What the server waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waits {
    /// The head of a request, of which nothing or a part is here.
    Head,
    /// The body of a request.
    Body,
    /// Nothing: the client waits.
    Nothing,
}

#[derive(Clone, Debug)]
struct Entry {
    source: IpAddr,
    waits: Waits,
    since: Instant,
    eviction: Arc<Notify>,
}

/// Every open connection, by number.
#[derive(Debug)]
pub(super) struct Connections {
    places: Arc<Semaphore>,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    entries: HashMap<u64, Entry>,
    next: u64,
}

impl Connections {
    pub(super) fn new(max: usize) -> Arc<Connections> {
        Arc::new(Connections { places: Arc::new(Semaphore::new(max)), table: Mutex::default() })
    }

    /// Gives a place to a new connection, for which another one may have to go. `None` when the server ends.
    ///
    /// Cancel safety: at worst a connection went for nothing.
    pub(super) async fn place(self: &Arc<Self>, source: IpAddr) -> Option<Place> {
        let permit = loop {
            if let Ok(permit) = self.places.clone().try_acquire_owned() {
                break permit;
            }
            self.evict();
            match tokio::time::timeout(EVICTION_PAUSE, self.places.clone().acquire_owned()).await {
                Ok(permit) => break permit.ok()?,
                Err(_) => continue,
            }
        };
        let eviction = Arc::new(Notify::new());
        let source = neighbourhood(source);
        let entry = Entry { source, waits: Waits::Head, since: Instant::now(), eviction: eviction.clone() };
        let mut table = self.lock();
        let number = table.next;
        table.next += 1;
        table.entries.insert(number, entry);
        drop(table);
        Some(Place { connections: self.clone(), number, eviction, _permit: permit })
    }

    fn evict(&self) {
        let mut table = self.lock();
        let waiting = table.entries.iter().map(|(number, entry)| (*number, entry.source, entry.waits, entry.since));
        if let Some(number) = choose(waiting.collect()) {
            // Out of the table, so that it is not chosen twice.
            table.entries.remove(&number).iter().for_each(|entry| entry.eviction.notify_one());
        }
    }

    /// Each critical section leaves the table whole.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Chooses who goes: by number, from number, source, what is waited for and since when. What is waited for does not matter:
/// were heads to go before bodies, slow bodies would have everyone's new connections closed before their heads are read.
fn choose(mut entries: Vec<(u64, IpAddr, Waits, Instant)>) -> Option<u64> {
    entries.retain(|(_, _, waits, _)| *waits != Waits::Nothing);
    let mut counts: HashMap<IpAddr, usize> = HashMap::new();
    for (_, source, _, _) in &entries {
        *counts.entry(*source).or_default() += 1;
    }
    let most = counts.values().copied().max()?;
    let of_most = entries.into_iter().filter(|(_, source, _, _)| counts.get(source) == Some(&most));
    of_most.min_by_key(|(number, _, _, since)| (*since, *number)).map(|(number, ..)| number)
}

/// Gives the address that stands for all that one party is likely to have: a network of 64 bits in IPv6.
fn neighbourhood(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
    }
}

/// The place of one connection, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    connections: Arc<Connections>,
    number: u64,
    eviction: Arc<Notify>,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    /// Waits until the place is needed for another one.
    pub(super) async fn eviction(&self) {
        self.eviction.notified().await;
    }

    /// Gives what tells the table about the requests on this connection.
    pub(super) fn stage(&self) -> Stage {
        Stage { connections: self.connections.clone(), number: self.number }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.lock().entries.remove(&self.number);
    }
}

/// Tells what the server waits for on a connection.
#[derive(Clone, Debug)]
pub(super) struct Stage {
    connections: Arc<Connections>,
    number: u64,
}

impl Stage {
    pub(super) fn set(&self, waits: Waits) {
        if let Some(entry) = self.connections.lock().entries.get_mut(&self.number) {
            (entry.waits, entry.since) = (waits, Instant::now());
        }
    }
}

/// The body of an answer: when it is over, the next request is waited for.
#[derive(Debug)]
pub(super) struct Answer {
    body: Body,
    stage: Stage,
}

impl Answer {
    pub(super) fn new(body: Body, stage: Stage) -> Answer {
        Answer { body, stage }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.stage.set(Waits::Head);
    }
}

impl hyper::body::Body for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_keeps_the_server_waiting_for_longest_goes() {
        use Waits::{Body, Head, Nothing};
        let start = Instant::now();
        let check = |entries: &[(u8, Waits, u64)], expected| {
            let entry = |(number, (host, waits, age)): (usize, &(u8, Waits, u64))| {
                let since = start + Duration::from_secs(100 - age);
                (number as u64, IpAddr::from([10, 0, 0, *host]), *waits, since)
            };
            assert_eq!(choose(entries.iter().enumerate().map(entry).collect()), expected, "{entries:?}");
        };
        check(&[], None);
        check(&[(1, Nothing, 9), (2, Nothing, 99)], None);
        check(&[(1, Nothing, 9), (2, Head, 1)], Some(1));
        check(&[(1, Head, 5), (1, Head, 7), (1, Head, 6)], Some(1));
        // The new connection, whose head is on its way, stays.
        check(&[(1, Body, 50), (1, Head, 1)], Some(0));
        check(&[(1, Body, 50), (1, Body, 60), (1, Nothing, 70)], Some(1));
        // One source with many pays before another with few that has waited for longer.
        check(&[(1, Head, 50), (2, Head, 3), (2, Head, 4)], Some(2));
        check(&[(1, Head, 50), (1, Nothing, 60), (1, Nothing, 70), (2, Head, 3), (2, Head, 4)], Some(4));
    }

    #[test]
    fn a_network_is_one_source() {
        let same = |left: &str, right: &str| {
            neighbourhood(left.parse().expect("an address")) == neighbourhood(right.parse().expect("an address"))
        };
        assert!(same("2001:db8::1", "2001:db8::ffff:1"));
        assert!(!same("2001:db8::1", "2001:db8:0:1::1"));
        assert!(!same("10.0.0.1", "10.0.0.2"));
        assert!(same("::ffff:10.0.0.1", "10.0.0.1"));
        assert!(!same("::ffff:10.0.0.1", "::ffff:10.0.0.2"));
    }

    #[tokio::test]
    async fn a_place_is_made_for_a_new_connection() {
        let connections = Connections::new(2);
        let source = IpAddr::from([127, 0, 0, 1]);
        let busy = connections.place(source).await.expect("there is room");
        busy.stage().set(Waits::Nothing);
        let idle = connections.place(source).await.expect("there is room");
        let waiting = tokio::spawn(async move {
            idle.eviction().await;
            drop(idle);
        });
        let third = connections.place(source).await.expect("the idle one goes");
        waiting.await.expect("it went");
        third.stage().set(Waits::Nothing);
        // Nobody is idle: the next one waits until somebody leaves.
        let fourth = connections.place(source);
        let mut fourth = std::pin::pin!(fourth);
        assert!(tokio::time::timeout(EVICTION_PAUSE * 3, fourth.as_mut()).await.is_err());
        drop(busy);
        assert!(fourth.await.is_some());
    }
}
