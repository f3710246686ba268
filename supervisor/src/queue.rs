//! Who may wait, who runs next, who has waited too long: the admission policy.
//!
//! Pure: time comes in, ids go out. Owns: the order, the bounds in number and bytes, the deadlines, and how long a client
//! that is refused should stay away. Refuses: journals, channels, JSON. The order: what a worker gave back comes first,
//! then the clients in turn, each in its own order: the next to run is the first request of the client of whom the fewest
//! run. Invariants: every admitted id is in exactly one of the three lists until it is removed; bytes are those of the
//! admitted requests and never above the bound; a request that was given back never waits behind one that has not run.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use bulkhead_shared::units::RequestId;

/// The bounds of a queue.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Requests that a worker computes at once; what it is handed beyond them waits inside it.
    pub step_max: usize,
    /// Requests that a worker may be handed at once.
    pub running_max: usize,
    /// Requests that may wait beyond those.
    pub waiting_max: usize,
    /// Bytes of all admitted requests together.
    pub bytes_max: usize,
}

/// Why a request is not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// There are too many.
    #[error("{waiting} requests are waiting, the limit is {max}")]
    Number {
        /// How many wait.
        waiting: usize,
        /// The bound.
        max: usize,
    },
    /// They are too big together.
    #[error("admitted requests take {bytes} bytes, {more} more exceed the limit of {max}")]
    Bytes {
        /// What the admitted ones take.
        bytes: usize,
        /// What this one would take.
        more: usize,
        /// The bound.
        max: usize,
    },
}

/// Who asks: requests with the same value take turns with those of others. It is a hash, never the key itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Client(pub u64);

/// What the queue has to know of a request.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// What it takes of the bytes of all requests.
    pub bytes: usize,
    /// When it has to have ended; `None` once it has, and only its worker does not know yet.
    pub deadline: Option<Instant>,
    /// Who asks.
    pub client: Client,
}

/// The requests that were admitted and have not ended.
#[derive(Debug)]
pub struct Queue {
    bounds: Bounds,
    waiting: VecDeque<(RequestId, Place)>,
    /// How many at the head of `waiting` were given back.
    given_back: usize,
    running: HashMap<RequestId, Place>,
    /// Those that wait for their own readers, and for nothing else.
    held: HashMap<RequestId, Place>,
    bytes: usize,
    /// When the last requests ended, oldest first.
    ends: VecDeque<Instant>,
}

/// Ends from which the rate is measured, at most.
const ENDS_MAX: usize = 32;

/// The longest time for which a refused client is asked to stay away.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(600);

impl Queue {
    /// Begins empty.
    #[must_use]
    pub fn new(bounds: Bounds) -> Queue {
        Queue {
            bounds,
            waiting: VecDeque::new(),
            given_back: 0,
            running: HashMap::new(),
            held: HashMap::new(),
            bytes: 0,
            ends: VecDeque::new(),
        }
    }

    /// Gives the bounds.
    #[must_use]
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Counts those that run and those that wait.
    #[must_use]
    pub fn lengths(&self) -> (usize, usize) {
        (self.running.len(), self.waiting.len())
    }

    /// Gives the bytes of all admitted requests.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Puts a request at the end of the queue.
    ///
    /// # Errors
    /// `Full` when a bound would be passed; nothing has changed then.
    pub fn admit(&mut self, id: RequestId, place: Place) -> Result<(), Full> {
        let Bounds { running_max, waiting_max, bytes_max, step_max: _ } = self.bounds;
        if self.running.len() + self.waiting.len() + self.held.len() >= running_max + waiting_max {
            return Err(Full::Number { waiting: self.waiting.len(), max: waiting_max });
        }
        if self.bytes.saturating_add(place.bytes) > bytes_max {
            return Err(Full::Bytes { bytes: self.bytes, more: place.bytes, max: bytes_max });
        }
        self.bytes += place.bytes;
        self.waiting.push_back((id, place));
        Ok(())
    }

    /// Takes the next request that may run, if one waits and there is room.
    pub fn start_next(&mut self) -> Option<RequestId> {
        let next = if self.given_back > 0 { 0 } else { self.next_in_turn()? };
        self.start(self.waiting.get(next)?.0)
    }

    /// Takes this request, if it waits and there is room.
    pub fn start(&mut self, id: RequestId) -> Option<RequestId> {
        if self.running.len() >= self.bounds.running_max {
            return None;
        }
        let (id, place) = self.take_waiting(id)?;
        self.running.insert(id, place);
        Some(id)
    }

    /// Finds the first waiting request of a client of whom no other has fewer running.
    fn next_in_turn(&self) -> Option<usize> {
        let mut running: HashMap<Client, usize> = HashMap::new();
        self.running.values().for_each(|place| *running.entry(place.client).or_default() += 1);
        let count = |place: &Place| running.get(&place.client).copied().unwrap_or(0);
        self.waiting.iter().enumerate().min_by_key(|(_, (_, place))| count(place)).map(|(index, _)| index)
    }

    /// Takes a running request out of the order until it is given back.
    pub fn hold(&mut self, id: RequestId) {
        if let Some(place) = self.running.remove(&id) {
            self.held.insert(id, place);
        }
    }

    /// Puts a running or held request back to the head of the queue, among those given back in the order of their ids.
    pub fn give_back(&mut self, id: RequestId) {
        let Some(place) = self.running.remove(&id).or_else(|| self.held.remove(&id)) else { return };
        let index = self.waiting.iter().take(self.given_back).position(|(other, _)| *other > id);
        self.waiting.insert(index.unwrap_or(self.given_back), (id, place));
        self.given_back += 1;
    }

    /// Removes a request, wherever it is.
    pub fn remove(&mut self, id: RequestId, now: Instant) {
        let running = self.running.remove(&id);
        if running.is_some() {
            self.ends.push_back(now);
            self.ends.drain(..self.ends.len().saturating_sub(ENDS_MAX));
        }
        let place = running.or_else(|| self.held.remove(&id)).or_else(|| self.take_waiting(id).map(|(_, place)| place));
        self.bytes -= place.map_or(0, |place| place.bytes);
    }

    fn take_waiting(&mut self, id: RequestId) -> Option<(RequestId, Place)> {
        let index = self.waiting.iter().position(|(waiting, _)| *waiting == id)?;
        self.given_back -= usize::from(index < self.given_back);
        self.waiting.remove(index)
    }

    /// Says when a client that is refused now may find room, by the rate at which the last requests have ended. At least a
    /// second.
    #[must_use]
    pub fn retry_after(&self, now: Instant) -> Duration {
        let Some(oldest) = self.ends.front() else { return Duration::from_secs(1) };
        let ends = u32::try_from(self.ends.len()).unwrap_or(u32::MAX);
        let each = now.saturating_duration_since(*oldest) / ends;
        // One place is free as soon as one request has ended. But whoever else is refused now comes back too, and nobody
        // counts them: half of the queue's time spreads such a crowd.
        let ahead = u32::try_from(self.waiting.len() / 2 + 1).unwrap_or(u32::MAX);
        each.saturating_mul(ahead).clamp(Duration::from_secs(1), RETRY_AFTER_MAX)
    }

    /// Lists the requests whose deadline has passed, running ones and waiting ones.
    #[must_use]
    pub fn expired(&self, now: Instant) -> Vec<RequestId> {
        let is_over = |place: &Place| place.deadline.is_some_and(|deadline| deadline <= now);
        self.places().filter(|(_, place)| is_over(place)).map(|(id, _)| id).collect()
    }

    /// Gives the earliest deadline.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.places().filter_map(|(_, place)| place.deadline).min()
    }

    /// Waits no longer for the end of a running request: it has one.
    pub fn lift_deadline(&mut self, id: RequestId) {
        if let Some(place) = self.running.get_mut(&id) {
            place.deadline = None;
        }
    }

    fn places(&self) -> impl Iterator<Item = (RequestId, Place)> {
        let running = self.running.iter().chain(&self.held).map(|(id, place)| (*id, *place));
        running.chain(self.waiting.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { step_max: 2, running_max: 2, waiting_max: 1, bytes_max: 100 };
    const ROOMY: Bounds = Bounds { step_max: 3, running_max: 3, waiting_max: 10, bytes_max: 1000 };

    fn place(bytes: usize) -> Place {
        Place { bytes, deadline: Some(Instant::now()), client: Client(0) }
    }

    fn queue(bounds: Bounds, clients: &[u64]) -> Queue {
        let mut queue = Queue::new(bounds);
        for (index, client) in clients.iter().enumerate() {
            let place = Place { client: Client(*client), ..place(1) };
            queue.admit(RequestId(index as u64 + 1), place).expect("there is room");
        }
        queue
    }

    /// Starts as many as may run and gives their ids.
    fn start_all(queue: &mut Queue) -> Vec<u64> {
        std::iter::from_fn(|| queue.start_next()).map(|id| id.0).collect()
    }

    #[test]
    fn requests_run_in_their_order_up_to_the_bounds() {
        let mut queue = Queue::new(BOUNDS);
        for id in 1..=3 {
            queue.admit(RequestId(id), place(10)).expect("there is room");
        }
        let full = Full::Number { waiting: 3, max: 1 };
        assert_eq!(queue.admit(RequestId(4), place(10)), Err(full));
        assert_eq!(start_all(&mut queue), [1, 2]);
        assert_eq!(queue.lengths(), (2, 1));
        queue.remove(RequestId(1), Instant::now());
        assert_eq!(queue.start_next(), Some(RequestId(3)));
        assert_eq!((queue.lengths(), queue.bytes()), ((2, 0), 20));
    }

    #[test]
    fn clients_take_turns() {
        // Client 1 has sent five before client 2 sends one.
        let mut queue = queue(ROOMY, &[1, 1, 1, 1, 1, 2]);
        assert_eq!(start_all(&mut queue), [1, 6, 2]);
        queue.remove(RequestId(6), Instant::now());
        assert_eq!(start_all(&mut queue), [3]);
    }

    #[test]
    fn what_is_given_back_comes_first_and_in_its_order() {
        let mut queue = queue(ROOMY, &[1, 1, 1, 1, 2]);
        assert_eq!(start_all(&mut queue), [1, 5, 2]);
        for id in [5, 1, 2, 77] {
            queue.give_back(RequestId(id));
        }
        assert_eq!(queue.lengths(), (0, 5));
        queue.remove(RequestId(2), Instant::now());
        assert_eq!(start_all(&mut queue), [1, 5, 3]);
        queue.give_back(RequestId(3));
        assert_eq!(queue.start(RequestId(4)), Some(RequestId(4)));
        assert_eq!((queue.start(RequestId(3)), queue.start(RequestId(4))), (None, None));
        queue.remove(RequestId(1), Instant::now());
        assert_eq!(start_all(&mut queue), [3]);
        assert_eq!((queue.lengths(), queue.bytes()), ((3, 0), 3));
    }

    #[test]
    fn what_is_held_is_out_of_the_order_and_keeps_its_place() {
        let mut queue = queue(Bounds { running_max: 1, waiting_max: 2, ..ROOMY }, &[1, 1, 1]);
        assert_eq!(start_all(&mut queue), [1]);
        queue.hold(RequestId(1));
        assert_eq!(start_all(&mut queue), [2]);
        assert_eq!((queue.lengths(), queue.bytes()), ((1, 1), 3));
        assert!(queue.admit(RequestId(4), place(1)).is_err(), "its place is still taken");
        queue.give_back(RequestId(1));
        queue.remove(RequestId(2), Instant::now());
        assert_eq!(start_all(&mut queue), [1]);
        queue.hold(RequestId(1));
        queue.remove(RequestId(1), Instant::now());
        assert_eq!((queue.lengths(), queue.bytes()), ((0, 1), 1));
    }

    #[test]
    fn bytes_are_bounded_and_come_back() {
        let now = Instant::now();
        let mut queue = Queue::new(BOUNDS);
        queue.admit(RequestId(1), place(99)).expect("there is room");
        assert_eq!(queue.admit(RequestId(2), place(2)), Err(Full::Bytes { bytes: 99, more: 2, max: 100 }));
        queue.admit(RequestId(2), place(1)).expect("there is room for one byte");
        queue.remove(RequestId(1), now);
        queue.remove(RequestId(1), now);
        assert_eq!(queue.bytes(), 1);
        assert!(matches!(queue.admit(RequestId(3), place(usize::MAX)), Err(Full::Bytes { .. })));
    }

    #[test]
    fn deadlines_hold_for_running_and_waiting() {
        let now = Instant::now();
        let mut queue = Queue::new(BOUNDS);
        let until = |seconds| Place { deadline: Some(now + Duration::from_secs(seconds)), ..place(1) };
        queue.admit(RequestId(1), until(2)).expect("there is room");
        queue.admit(RequestId(2), until(1)).expect("there is room");
        queue.start_next();
        assert_eq!(queue.next_deadline(), Some(now + Duration::from_secs(1)));
        assert_eq!(queue.expired(now), []);
        assert_eq!(queue.expired(now + Duration::from_secs(1)), [RequestId(2)]);
        assert_eq!(queue.expired(now + Duration::from_secs(2)), [RequestId(1), RequestId(2)]);
        queue.lift_deadline(RequestId(1));
        assert_eq!(queue.expired(now + Duration::from_secs(2)), [RequestId(2)]);
    }

    #[test]
    fn the_time_to_stay_away_follows_from_the_rate() {
        let start = Instant::now();
        let mut queue = queue(Bounds { running_max: 1, ..ROOMY }, &[1; 11]);
        assert_eq!(queue.retry_after(start), Duration::from_secs(1));
        // Two ends in eight seconds, and nine that wait.
        for (id, seconds) in [(1, 0), (2, 4)] {
            queue.start_next();
            queue.remove(RequestId(id), start + Duration::from_secs(seconds));
        }
        assert_eq!(queue.retry_after(start + Duration::from_secs(8)), Duration::from_secs(4 * 5));
        assert_eq!(queue.retry_after(start + Duration::from_secs(8_000_000)), RETRY_AFTER_MAX);
        assert_eq!(queue.retry_after(start), Duration::from_secs(1));
    }
}
