//! Which request makes its worker die: the policy of suspects, isolation and quarantine.
//!
//! Pure. When a worker dies by its own doing, every request that it was at work on is a suspect. A suspect that is there
//! at a second such death, and has gained no token in between, has to run alone. One that gains a token while it runs
//! alone is cleared; one that kills its worker alone is the culprit. Refuses: processes, the order of requests, and the
//! judgement which deaths blame anybody, which is [`Cause::blames`]'s. Invariant: whoever gains a token is no suspect, so
//! every round of suspicion either names a culprit or leaves each suspect further than it was.
//!
//! [`Cause::blames`]: crate::child::exit::Cause::blames

use std::collections::BTreeMap;

use bulkhead_shared::units::RequestId;

/// Deaths without a token gained after which a suspect has to run alone.
const DEATHS_BEFORE_ISOLATION: u32 = 2;

/// The suspects, with the deaths at which each was there since it last gained a token.
#[derive(Debug, Default)]
pub struct Blame {
    deaths: BTreeMap<RequestId, u32>,
}

impl Blame {
    /// Takes in a death that blames the requests that the worker was at work on. Gives the culprit, once it is certain.
    pub fn death(&mut self, suspects: &[RequestId]) -> Option<RequestId> {
        for id in suspects {
            *self.deaths.entry(*id).or_default() += 1;
        }
        match suspects {
            [alone] if self.has_to_run_alone(*alone) => {
                self.forget(*alone);
                Some(*alone)
            }
            _ => None,
        }
    }

    /// Notes that a request gained a token.
    pub fn gained(&mut self, id: RequestId) {
        self.deaths.remove(&id);
    }

    /// Notes that a request has ended.
    pub fn forget(&mut self, id: RequestId) {
        self.deaths.remove(&id);
    }

    /// Gives the request that has to run next, and alone, if there is one.
    #[must_use]
    pub fn next_alone(&self) -> Option<RequestId> {
        self.deaths.keys().copied().find(|id| self.has_to_run_alone(*id))
    }

    fn has_to_run_alone(&self, id: RequestId) -> bool {
        self.deaths.get(&id).is_some_and(|deaths| *deaths >= DEATHS_BEFORE_ISOLATION)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: RequestId = RequestId(1);
    const B: RequestId = RequestId(2);
    const C: RequestId = RequestId(3);

    enum Step {
        /// The worker was at work on these when it died; this one is the culprit.
        Death(&'static [RequestId], Option<RequestId>),
        Gained(RequestId),
        Ended(RequestId),
        /// This one has to run alone.
        Alone(Option<RequestId>),
    }
    use Step::{Alone, Death, Ended, Gained};

    fn check(name: &str, steps: &[Step]) {
        let mut blame = Blame::default();
        for (index, step) in steps.iter().enumerate() {
            match step {
                Death(suspects, culprit) => assert_eq!(blame.death(suspects), *culprit, "{name}, step {index}"),
                Gained(id) => blame.gained(*id),
                Ended(id) => blame.forget(*id),
                Alone(id) => assert_eq!(blame.next_alone(), *id, "{name}, step {index}"),
            }
        }
    }

    #[test]
    fn the_culprit_is_found_and_its_neighbours_are_cleared() {
        check(
            "one of three",
            &[
                Death(&[A, B, C], None),
                Alone(None),
                Gained(C),
                Death(&[A, B, C], None),
                Alone(Some(A)),
                Gained(A),
                Alone(Some(B)),
                Death(&[B], Some(B)),
                Alone(None),
            ],
        );
    }

    #[test]
    fn a_request_that_kills_twice_alone_needs_no_further_trial() {
        check("alone", &[Death(&[A], None), Alone(None), Death(&[A], Some(A)), Alone(None)]);
        check("alone with progress", &[Death(&[A], None), Gained(A), Death(&[A], None), Alone(None)]);
    }

    #[test]
    fn two_culprits_are_found_one_after_the_other() {
        check(
            "two",
            &[
                Death(&[A, B], None),
                Death(&[A, B], None),
                Alone(Some(A)),
                Death(&[A], Some(A)),
                Alone(Some(B)),
                Death(&[B], Some(B)),
                Alone(None),
            ],
        );
    }

    #[test]
    fn who_ends_or_gains_is_no_suspect() {
        check("ended", &[Death(&[A, B], None), Death(&[A, B], None), Ended(A), Alone(Some(B)), Ended(B), Alone(None)]);
        check("not there", &[Death(&[A], None), Death(&[B], None), Alone(None), Death(&[], None)]);
    }
}
