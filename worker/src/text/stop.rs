//! Stop strings: the text of an answer ends where the first one is complete.
//!
//! Owns: the end of the text that could still become a match. Invariants: no text behind a match comes out, nor any part of
//! the match; what comes out, and whether it stops, depends on the text as a whole and not on how it was cut into pieces.

/// Looks for stop strings in text that arrives in pieces.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    has_stopped: bool,
}

impl StopMatcher {
    /// Prepares to look for `stops`. Empty strings are ignored: they would match before the first character.
    #[must_use]
    pub fn new(mut stops: Vec<String>) -> StopMatcher {
        stops.retain(|stop| !stop.is_empty());
        StopMatcher { stops, held: String::new(), has_stopped: false }
    }

    /// Says whether a stop string has matched.
    #[must_use]
    pub fn has_stopped(&self) -> bool {
        self.has_stopped
    }

    /// Takes more text and gives what is certain not to be part of a match. After a match, nothing.
    ///
    /// The match that is complete first wins; of those that complete together, the longest.
    pub fn push(&mut self, text: &str) -> String {
        if self.has_stopped {
            return String::new();
        }
        let mut all = std::mem::take(&mut self.held);
        all.push_str(text);
        let matches = self.stops.iter().filter_map(|stop| all.find(stop.as_str()).map(|at| (at + stop.len(), at)));
        if let Some((_, start)) = matches.min() {
            self.has_stopped = true;
            all.truncate(start);
            return all;
        }
        self.held = all.split_off(all.len() - self.undecided_bytes(&all));
        all
    }

    /// Gives what was held back: the text has ended, so it is no match.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Length of the longest end of `text` that begins a stop string.
    fn undecided_bytes(&self, text: &str) -> usize {
        let longest = |stop: &String| {
            let most = text.len().min(stop.len() - 1);
            (1..=most).rev().find(|length| text.as_bytes().ends_with(&stop.as_bytes()[..*length])).unwrap_or(0)
        };
        let bytes = self.stops.iter().map(longest).max().unwrap_or(0);
        // A stop string begins with a whole character, so the cut cannot fall inside of one.
        assert!(text.is_char_boundary(text.len() - bytes));
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(stops: &[&str], text: &str, expected: &str, stopped: bool) {
        let boundaries: Vec<usize> = (0..=text.len()).filter(|at| text.is_char_boundary(*at)).collect();
        let mut cuts: Vec<Vec<&str>> = vec![text.split("").collect()];
        for first in &boundaries {
            for second in boundaries.iter().filter(|second| *second >= first) {
                cuts.push(vec![&text[..*first], &text[*first..*second], &text[*second..]]);
            }
        }
        for pieces in cuts {
            let mut matcher = StopMatcher::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
            let mut out: String = pieces.iter().map(|piece| matcher.push(piece)).collect();
            out.push_str(&matcher.finish());
            assert_eq!(out, expected, "{stops:?} in {pieces:?}");
            assert_eq!(matcher.has_stopped(), stopped, "{stops:?} in {pieces:?}");
        }
    }

    #[test]
    fn text_ends_before_the_first_match() {
        check(&[], "abc", "abc", false);
        check(&[""], "abc", "abc", false);
        check(&["x"], "abc", "abc", false);
        check(&["b"], "abc", "a", true);
        check(&["abc"], "abc", "", true);
        check(&["abcd"], "abc", "abc", false);
        check(&["Observation:"], "do it\nObservation: 3", "do it\n", true);
        check(&["aab"], "aaab", "a", true);
        check(&["abab"], "aababab", "a", true);
        check(&["END", "STOP"], "a STOP END", "a ", true);
        check(&["END", "STOP"], "a END STOP", "a ", true);
        check(&["ß→"], "grüß → ß→x", "grüß → ", true);
    }

    #[test]
    fn the_match_that_completes_first_wins_and_then_the_longest() {
        check(&["abcd", "c"], "abcd", "ab", true);
        check(&["bc", "abc"], "xabc", "x", true);
        check(&["c", "bc"], "abc", "a", true);
    }

    #[test]
    fn only_what_could_become_a_match_is_held_back() {
        let mut matcher = StopMatcher::new(vec!["</code>".to_owned()]);
        assert_eq!(matcher.push("x </co"), "x ");
        assert_eq!(matcher.push("l <"), "</col ");
        assert_eq!(matcher.push("<"), "<");
        assert_eq!(matcher.push("/code"), "");
        assert_eq!(matcher.push(">y"), "");
        assert!(matcher.has_stopped());
        assert_eq!(matcher.push("z"), "");
        assert_eq!(matcher.finish(), "");
    }
}
