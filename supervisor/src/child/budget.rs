//! How much of a card the next worker may hold: less after each worker that found too little there.
//!
//! Pure. Invariant: what is allowed never passes what the configuration allows.

use std::time::Duration;

use bulkhead_shared::exit::WorkerExit;
use bulkhead_shared::message::device_budget;
use bulkhead_shared::units::Bytes;

use super::exit::Cause;

/// Steps down, at most: beyond these, too little memory is not what is wrong.
const STEPS_MAX: u32 = 4;

/// Life after which a worker's successor gets a step more again.
const HEALTHY_SPELL: Duration = Duration::from_secs(600);

/// Where the budget stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Budget {
    asked: Bytes,
    steps: u32,
}

impl Budget {
    /// Takes the budget of the configuration; 0 is the usual share of the card.
    pub(crate) fn new(asked: Bytes) -> Budget {
        Budget { asked, steps: 0 }
    }

    /// Takes note of the end of a worker that lived for so long.
    pub(crate) fn ended(&mut self, cause: Cause, lived: Duration) {
        if cause == Cause::Exit(WorkerExit::OutOfDeviceMemory) {
            self.steps = (self.steps + 1).min(STEPS_MAX);
        } else if lived >= HEALTHY_SPELL {
            self.steps = self.steps.saturating_sub(1);
        }
    }

    /// Gives what the next worker may hold on a card of this size: a tenth less with each step.
    pub(crate) fn of_card(self, card: Bytes) -> Bytes {
        let full = device_budget(self.asked, card);
        (0..self.steps).fold(full, |budget, _| Bytes(budget.0 / 10 * 9))
    }

    /// Says whether workers get less than the configuration allows.
    pub(crate) fn is_reduced(self) -> bool {
        self.steps > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUT: Cause = Cause::Exit(WorkerExit::OutOfDeviceMemory);
    const CARD: Bytes = Bytes(10_000);

    #[test]
    fn each_want_of_memory_takes_a_tenth_and_a_long_life_gives_it_back() {
        let mut budget = Budget::new(Bytes(0));
        assert_eq!((budget.of_card(CARD), budget.is_reduced()), (Bytes(9000), false));
        for expected in [8100, 7290, 6561, 5904, 5904] {
            budget.ended(OUT, HEALTHY_SPELL);
            let got = budget.of_card(CARD).0;
            assert!(got.abs_diff(expected) < 10 && budget.is_reduced(), "{got} for {expected}");
        }
        budget.ended(Cause::Crash { code: 101 }, HEALTHY_SPELL - Duration::from_secs(1));
        assert!(budget.of_card(CARD).0 < 5910);
        budget.ended(Cause::Crash { code: 101 }, HEALTHY_SPELL);
        assert!(budget.of_card(CARD).0 > 6500);
    }

    #[test]
    fn what_was_asked_for_is_the_most() {
        let mut budget = Budget::new(Bytes(5000));
        assert_eq!(budget.of_card(CARD), Bytes(5000));
        budget.ended(OUT, Duration::ZERO);
        assert_eq!(budget.of_card(CARD), Bytes(4500));
        budget.ended(Cause::KilledFromOutside, HEALTHY_SPELL);
        budget.ended(Cause::KilledFromOutside, HEALTHY_SPELL);
        assert_eq!(budget.of_card(CARD), Bytes(5000));
    }
}
