//! What the next worker gets less of after one ran out of memory: the rungs of the plan.
//!
//! Pure. A rung halves the requests that are computed at once, and with them the keys and values that are kept for them,
//! down to one. A worker that ran well for a while takes the plan back up by a rung when it is replaced for another reason.
//! Refuses: to touch what a single request may have; a worker that has no room for one cannot serve. What a lower rung
//! changes is speed: the arithmetic of a request does not depend on how many are computed beside it.

use std::time::Duration;

use bulkhead_shared::message::LoadPlan;

use super::exit::Cause;
use crate::limits::HEALTHY_SPELL;

/// Where the plan stands: 0 is what was configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rung(u32);

impl Rung {
    /// Takes in how a worker with this plan ended, and how long it had been ready. Gives the rung of the next one.
    #[must_use]
    pub(crate) fn after(self, plan: &LoadPlan, cause: Cause, ready_for: Duration) -> Rung {
        if cause.is_out_of_memory() {
            return if self.sequences(plan) > 1 { Rung(self.0 + 1) } else { self };
        }
        if ready_for >= HEALTHY_SPELL { Rung(self.0.saturating_sub(1)) } else { self }
    }

    /// Gives the plan on this rung.
    #[must_use]
    pub(crate) fn plan(self, plan: &LoadPlan) -> LoadPlan {
        LoadPlan { sequences_max: self.sequences(plan), ..plan.clone() }
    }

    /// Says what is given up, where something is.
    #[must_use]
    pub(crate) fn given_up(self, plan: &LoadPlan) -> Option<String> {
        let (sequences, all) = (self.sequences(plan), plan.sequences_max);
        (sequences < all)
            .then(|| format!("{sequences} requests at once instead of {all}, since a worker ran out of memory"))
    }

    fn sequences(self, plan: &LoadPlan) -> u32 {
        plan.sequences_max.checked_shr(self.0).unwrap_or(0).max(1)
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_shared::exit::WorkerExit;
    use bulkhead_shared::message::{DeviceChoice, Faults, KvType};
    use bulkhead_shared::units::Bytes;

    use super::*;

    fn plan(sequences_max: u32) -> LoadPlan {
        LoadPlan {
            model_dir: "/models/m".into(),
            device: DeviceChoice::Cpu,
            may_use_processor: false,
            context_tokens: 0,
            sequences_max,
            kv_bytes: Bytes(0),
            device_budget: Bytes(0),
            kv_type: KvType::default(),
            faults: Faults::default(),
        }
    }

    #[test]
    fn the_plan_goes_down_by_want_of_memory_and_up_by_good_health() {
        const OOM: Cause = Cause::Exit(WorkerExit::OutOfHostMemory);
        const KILLED: Cause = Cause::KilledFromOutside;
        let (soon, late) = (Duration::ZERO, HEALTHY_SPELL);
        let plan = plan(6);
        let mut rung = Rung::default();
        assert_eq!((rung.plan(&plan), rung.given_up(&plan)), (plan.clone(), None));
        for (cause, ready_for, sequences) in [
            (KILLED, late, 6),
            (OOM, late, 3),
            (KILLED, soon, 3),
            (Cause::OutOfMemory, soon, 1),
            (Cause::SuspectedOutOfMemory, soon, 1),
            (Cause::Exit(WorkerExit::OutOfDeviceMemory), soon, 1),
            (KILLED, late, 3),
            (Cause::Crash { code: 101 }, late, 6),
            (KILLED, late, 6),
        ] {
            rung = rung.after(&plan, cause, ready_for);
            assert_eq!(rung.plan(&plan).sequences_max, sequences, "{cause}");
            assert_eq!(rung.given_up(&plan).is_some(), sequences < 6, "{cause}");
        }
    }
}
