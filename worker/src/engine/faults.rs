//! Ways to make a worker worse on purpose, for tests of what happens then.
//!
//! Decides only by what it is given: the steps that were taken and the tokens of the next one. Refuses to be set by anybody
//! but the plan, which the supervisor fills in behind `--allow-faults` only.

use std::time::Duration;

use bulkhead_shared::message::Faults as Planned;

/// What a test asked for ended the engine: an end as for want of host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no memory is left after {steps} steps, as the plan's faults say")]
pub struct OutOfMemory {
    steps: u32,
}

/// The faults of one engine and the steps that it took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    planned: Planned,
    steps: u32,
}

/// What the next step comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Lives,
    Dies,
    Hangs,
    RunsOut,
}

impl Faults {
    /// Begins before the first step.
    #[must_use]
    pub fn new(planned: Planned) -> Faults {
        Faults { planned, steps: 0 }
    }

    /// Takes part in a step that computes these tokens: does nothing, or ends the process as a crash does, or never
    /// returns, as it was planned.
    ///
    /// # Errors
    /// `OutOfMemory` when that was planned.
    pub fn before_step(&mut self, tokens: impl IntoIterator<Item = u32>) -> Result<(), OutOfMemory> {
        match self.fate(tokens) {
            Fate::Lives => Ok(()),
            Fate::Dies => std::process::abort(),
            Fate::Hangs => loop {
                std::thread::park();
            },
            Fate::RunsOut => Err(OutOfMemory { steps: self.steps }),
        }
    }

    fn fate(&mut self, tokens: impl IntoIterator<Item = u32>) -> Fate {
        let Planned { step_delay_ms: _, die_on_token, oom_after_steps, hang_after_steps } = self.planned;
        if die_on_token.is_some_and(|deadly| tokens.into_iter().any(|token| token == deadly)) {
            return Fate::Dies;
        }
        if oom_after_steps.is_some_and(|steps| self.steps >= steps) {
            return Fate::RunsOut;
        }
        if hang_after_steps.is_some_and(|steps| self.steps >= steps) {
            return Fate::Hangs;
        }
        self.steps = self.steps.saturating_add(1);
        Fate::Lives
    }

    /// Gives the pause that follows each step.
    #[must_use]
    pub fn step_delay(&self) -> Duration {
        Duration::from_millis(self.planned.step_delay_ms.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(planned: Planned, steps: &[(&[u32], Fate)]) {
        let mut faults = Faults::new(planned);
        for (index, (tokens, fate)) in steps.iter().enumerate() {
            assert_eq!(faults.fate(tokens.iter().copied()), *fate, "{planned:?}, step {index}");
        }
    }

    #[test]
    fn a_step_has_the_fate_that_was_planned() {
        check(Planned::default(), &[(&[0, 1], Fate::Lives), (&[u32::MAX], Fate::Lives)]);
        let deadly = Planned { die_on_token: Some(0), ..Planned::default() };
        check(deadly, &[(&[1, 2], Fate::Lives), (&[1, 0, 2], Fate::Dies)]);
        let oom = Planned { oom_after_steps: Some(2), ..Planned::default() };
        check(oom, &[(&[1], Fate::Lives), (&[1], Fate::Lives), (&[1], Fate::RunsOut), (&[1], Fate::RunsOut)]);
        let hang = Planned { hang_after_steps: Some(1), ..Planned::default() };
        check(hang, &[(&[1], Fate::Lives), (&[1], Fate::Hangs)]);
    }

    #[test]
    fn running_out_of_memory_is_an_error_and_not_a_crash() {
        let mut faults = Faults::new(Planned { oom_after_steps: Some(0), ..Planned::default() });
        assert_eq!(faults.before_step([7]), Err(OutOfMemory { steps: 0 }));
    }
}
