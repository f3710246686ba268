//! Who may wait, who runs next, who has waited too long: the admission policy.
//!
//! Pure: time comes in, ids go out. Owns: the order (first come, first served), the bounds in number and bytes, the
//! deadlines. Refuses: journals, channels, JSON. Invariants: every admitted id is in exactly one of the two lists until
//! it is removed; bytes are those of the admitted requests and never above the bound.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use bulkhead_shared::units::RequestId;

/// The bounds of a queue.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
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

#[derive(Clone, Copy, Debug)]
struct Place {
    bytes: usize,
    deadline: Instant,
}

/// The requests that were admitted and have not ended.
#[derive(Debug)]
pub struct Queue {
    bounds: Bounds,
    waiting: VecDeque<(RequestId, Place)>,
    running: HashMap<RequestId, Place>,
    bytes: usize,
}

impl Queue {
    /// Begins empty.
    #[must_use]
    pub fn new(bounds: Bounds) -> Queue {
        Queue { bounds, waiting: VecDeque::new(), running: HashMap::new(), bytes: 0 }
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
    pub fn admit(&mut self, id: RequestId, bytes: usize, deadline: Instant) -> Result<(), Full> {
        let Bounds { running_max, waiting_max, bytes_max } = self.bounds;
        if self.running.len() + self.waiting.len() >= running_max + waiting_max {
            return Err(Full::Number { waiting: self.waiting.len(), max: waiting_max });
        }
        if self.bytes.saturating_add(bytes) > bytes_max {
            return Err(Full::Bytes { bytes: self.bytes, more: bytes, max: bytes_max });
        }
        self.bytes += bytes;
        self.waiting.push_back((id, Place { bytes, deadline }));
        Ok(())
    }

    /// Takes the next request that may run, if one waits and there is room.
    pub fn start_next(&mut self) -> Option<RequestId> {
        if self.running.len() >= self.bounds.running_max {
            return None;
        }
        let (id, place) = self.waiting.pop_front()?;
        self.running.insert(id, place);
        Some(id)
    }

    /// Removes a request, wherever it is.
    pub fn remove(&mut self, id: RequestId) {
        let place = self.running.remove(&id).or_else(|| {
            let index = self.waiting.iter().position(|(waiting, _)| *waiting == id)?;
            self.waiting.remove(index).map(|(_, place)| place)
        });
        self.bytes -= place.map_or(0, |place| place.bytes);
    }

    /// Lists the requests whose deadline has passed, running ones and waiting ones.
    #[must_use]
    pub fn expired(&self, now: Instant) -> Vec<RequestId> {
        self.places().filter(|(_, place)| place.deadline <= now).map(|(id, _)| id).collect()
    }

    /// Gives the earliest deadline.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.places().map(|(_, place)| place.deadline).min()
    }

    fn places(&self) -> impl Iterator<Item = (RequestId, Place)> {
        let running = self.running.iter().map(|(id, place)| (*id, *place));
        running.chain(self.waiting.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const BOUNDS: Bounds = Bounds { running_max: 2, waiting_max: 1, bytes_max: 100 };

    #[test]
    fn requests_run_in_their_order_up_to_the_bounds() {
        let deadline = Instant::now();
        let mut queue = Queue::new(BOUNDS);
        for id in 1..=3 {
            queue.admit(RequestId(id), 10, deadline).expect("there is room");
        }
        let full = Full::Number { waiting: 3, max: 1 };
        assert_eq!(queue.admit(RequestId(4), 10, deadline), Err(full));
        assert_eq!(queue.start_next(), Some(RequestId(1)));
        assert_eq!(queue.start_next(), Some(RequestId(2)));
        assert_eq!(queue.start_next(), None);
        assert_eq!(queue.lengths(), (2, 1));
        queue.remove(RequestId(1));
        assert_eq!(queue.start_next(), Some(RequestId(3)));
        assert_eq!((queue.lengths(), queue.bytes()), ((2, 0), 20));
    }

    #[test]
    fn bytes_are_bounded_and_come_back() {
        let deadline = Instant::now();
        let mut queue = Queue::new(BOUNDS);
        queue.admit(RequestId(1), 99, deadline).expect("there is room");
        assert_eq!(queue.admit(RequestId(2), 2, deadline), Err(Full::Bytes { bytes: 99, more: 2, max: 100 }));
        queue.admit(RequestId(2), 1, deadline).expect("there is room for one byte");
        queue.remove(RequestId(1));
        queue.remove(RequestId(1));
        assert_eq!(queue.bytes(), 1);
        assert!(matches!(queue.admit(RequestId(3), usize::MAX, deadline), Err(Full::Bytes { .. })));
    }

    #[test]
    fn deadlines_hold_for_running_and_waiting() {
        let now = Instant::now();
        let mut queue = Queue::new(BOUNDS);
        queue.admit(RequestId(1), 1, now + Duration::from_secs(2)).expect("there is room");
        queue.admit(RequestId(2), 1, now + Duration::from_secs(1)).expect("there is room");
        queue.start_next();
        assert_eq!(queue.next_deadline(), Some(now + Duration::from_secs(1)));
        assert_eq!(queue.expired(now), []);
        assert_eq!(queue.expired(now + Duration::from_secs(1)), [RequestId(2)]);
        assert_eq!(queue.expired(now + Duration::from_secs(2)), [RequestId(1), RequestId(2)]);
    }
}
