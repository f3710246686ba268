//! The layers of a worker's isolation, and how many of them a worker must stand behind.
//!
//! The worker says in `Hello` which layers are in force; the supervisor refuses less than was configured. What each layer
//! holds back, and which test would notice its loss, stands in `worker/src/sandbox/README.md`.

use bincode::{Decode, Encode};

/// A layer of a worker's isolation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub enum Layer {
    /// The worker is killed when its supervisor dies.
    ParentDeathSignal,
    /// No new privileges through exec.
    NoNewPrivileges,
    /// Core dumps and file sizes are limited to nothing, descriptors to a few.
    ResourceLimits,
    /// Other processes of the same user cannot read its memory.
    NotDumpable,
    /// No environment variable was inherited.
    EmptyEnvironment,
    /// No descriptor beyond the link and standard error was inherited.
    ClosedDescriptors,
    /// Every capability set is empty.
    NoCapabilities,
    /// Of all files, the model's can be read and none can be written or run (Landlock).
    Files,
    /// No TCP port can be bound or reached (Landlock, Linux 6.7). The filter of system calls forbids it too.
    Tcp,
    /// No signal and no abstract socket reaches beyond the worker (Landlock, Linux 6.12). The filter forbids it too.
    Scope,
    /// Only the system calls of a short list are answered, on every thread; any other ends the worker (seccomp).
    SystemCalls,
}

impl Layer {
    /// Every layer, in the order in which they are listed for people.
    pub const ALL: [Layer; 11] = [
        Layer::ParentDeathSignal,
        Layer::NoNewPrivileges,
        Layer::ResourceLimits,
        Layer::NotDumpable,
        Layer::EmptyEnvironment,
        Layer::ClosedDescriptors,
        Layer::NoCapabilities,
        Layer::Files,
        Layer::Tcp,
        Layer::Scope,
        Layer::SystemCalls,
    ];

    /// Says whether a worker that is to be fully walled in must have it. The others are a second wall behind one of these,
    /// which not every kernel offers.
    #[must_use]
    pub const fn is_required(self) -> bool {
        match self {
            Layer::ParentDeathSignal
            | Layer::NoNewPrivileges
            | Layer::ResourceLimits
            | Layer::NotDumpable
            | Layer::EmptyEnvironment
            | Layer::ClosedDescriptors
            | Layer::NoCapabilities
            | Layer::Files
            | Layer::SystemCalls => true,
            Layer::Tcp | Layer::Scope => false,
        }
    }

    /// Lists the required layers that are not among these.
    #[must_use]
    pub fn missing(in_force: &[Layer]) -> Vec<Layer> {
        Layer::ALL.into_iter().filter(|layer| layer.is_required() && !in_force.contains(layer)).collect()
    }

    /// Gives the word for logs and status lines.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Layer::ParentDeathSignal => "parent-death-signal",
            Layer::NoNewPrivileges => "no-new-privileges",
            Layer::ResourceLimits => "resource-limits",
            Layer::NotDumpable => "not-dumpable",
            Layer::EmptyEnvironment => "empty-environment",
            Layer::ClosedDescriptors => "closed-descriptors",
            Layer::NoCapabilities => "no-capabilities",
            Layer::Files => "landlock-files",
            Layer::Tcp => "landlock-tcp",
            Layer::Scope => "landlock-scope",
            Layer::SystemCalls => "system-call-filter",
        }
    }
}

/// How much isolation is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SandboxMode {
    /// Every required layer, or the worker does not start.
    #[default]
    Full,
    /// The layers that the system offers.
    BestEffort,
    /// As `Full`, but the filter of system calls names what it would have ended the worker for: for development.
    Log,
    /// None but what ties a worker to its supervisor.
    Off,
}

impl SandboxMode {
    /// The words of every mode.
    pub const WORDS: [&'static str; 4] = ["full", "best-effort", "log", "off"];

    /// Gives the word for settings and status lines.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            SandboxMode::Full => "full",
            SandboxMode::BestEffort => "best-effort",
            SandboxMode::Log => "log",
            SandboxMode::Off => "off",
        }
    }

    /// Finds the mode of a word.
    #[must_use]
    pub fn from_word(word: &str) -> Option<SandboxMode> {
        let modes = [SandboxMode::Full, SandboxMode::BestEffort, SandboxMode::Log, SandboxMode::Off];
        modes.into_iter().find(|mode| mode.as_str() == word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(Layer::missing(&Layer::ALL), []);
        let without: Vec<_> = Layer::ALL.into_iter().filter(|layer| *layer != Layer::Files).collect();
        assert_eq!(Layer::missing(&without), [Layer::Files]);
        let needed: Vec<_> = Layer::ALL.into_iter().filter(|layer| layer.is_required()).collect();
        assert_eq!((needed.len(), Layer::missing(&needed)), (9, Vec::new()));
    }

    #[test]
    fn every_word_is_a_mode() {
        for word in SandboxMode::WORDS {
            assert_eq!(SandboxMode::from_word(word).map(SandboxMode::as_str), Some(word));
        }
        assert_eq!(SandboxMode::from_word("on"), None);
    }
}
