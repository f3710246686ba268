//! Who gets how many rows of a step. Pure.

use super::backend::StepTokens;
use crate::model::batch::Role;

/// Tokens of a sequence that wait to be computed: all of one role, for those of a prompt come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Their role.
    pub role: Role,
    /// How many there are.
    pub tokens: u32,
}

/// The share of a step's prompt rows that are taken while answers run beside them: one in so many. The running answers wait
/// for the whole step.
const BESIDE_SHARE: u32 = 4;

/// Shares a step among sequences: each role has rows of its own.
#[must_use]
pub fn share_step(pending: &[Pending], max: StepTokens) -> Vec<u32> {
    let of_role = |role, rows_max| {
        let tokens: Vec<u32> = pending.iter().map(|p| if p.role == role { p.tokens } else { 0 }).collect();
        share_rows(&tokens, rows_max)
    };
    let is_beside = pending.iter().any(|pending| pending.role == Role::Generated && pending.tokens > 0);
    let prompt_max = if is_beside { max.prompt.div_ceil(BESIDE_SHARE) } else { max.prompt };
    let (generated, prompt) = (of_role(Role::Generated, max.generated), of_role(Role::Prompt, prompt_max));
    generated.into_iter().zip(prompt).map(|(generated, prompt)| generated + prompt).collect()
}

/// Shares the rows of a step among sequences by what each has pending.
///
/// Every sequence gets at least one row while there are rows (a running answer needs just one), and what is left is dealt
/// out evenly to those with long prompts, so that a short one is not stuck behind a long one.
fn share_rows(pending: &[u32], rows_max: u32) -> Vec<u32> {
    let mut shares = vec![0; pending.len()];
    let mut left = rows_max;
    while left > 0 {
        let hungry: Vec<usize> = (0..pending.len()).filter(|i| shares[*i] < pending[*i]).collect();
        if hungry.is_empty() {
            break;
        }
        let each = (left / u32::try_from(hungry.len()).unwrap_or(u32::MAX)).max(1);
        for index in hungry {
            let more = each.min(pending[index] - shares[index]).min(left);
            shares[index] += more;
            left -= more;
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_and_answers_have_rows_of_their_own() {
        let pending = |role, tokens| Pending { role, tokens };
        let all = [
            pending(Role::Prompt, 100),
            pending(Role::Generated, 1),
            pending(Role::Prompt, 3),
            pending(Role::Generated, 9),
        ];
        let max = StepTokens { generated: 4, prompt: 64 };
        assert_eq!(share_step(&all, max), [13, 1, 3, 3]);
        // Alone, prompts have the whole step.
        assert_eq!(share_step(&[all[0], all[2]], max), [61, 3]);
    }

    #[test]
    fn rows_go_first_to_running_answers_then_evenly_to_prompts() {
        for (pending, rows_max, expected) in [
            (vec![], 8, vec![]),
            (vec![1], 8, vec![1]),
            (vec![100], 8, vec![8]),
            (vec![1, 100, 1], 8, vec![1, 6, 1]),
            (vec![100, 100], 8, vec![4, 4]),
            (vec![100, 2, 100], 8, vec![3, 2, 3]),
            (vec![0, 3], 8, vec![0, 3]),
            (vec![1, 1, 1], 2, vec![1, 1, 0]),
        ] {
            assert_eq!(share_rows(&pending, rows_max), expected, "{pending:?} of {rows_max}");
        }
    }
}
