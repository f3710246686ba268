//! The header of a message, read tolerantly: who speaks, on which channel, to whom.
//!
//! Owns: the rules that make sense of a malformed header, and of text where a header should be. Bounded: a header that
//! grows beyond any sound length is taken for text.

use bulkhead_shared::limits::TOOL_NAME_BYTES_MAX;

/// Bytes of a header, at most; what is longer is a text whose `<|message|>` is missing.
const HEADER_BYTES_MAX: usize = 512;

/// The channels that the format knows.
const CHANNELS: [&str; 3] = ["analysis", "commentary", "final"];

/// What stands before a recipient.
const RECIPIENT: &str = "to=";

/// The namespace of a client's tools.
const FUNCTIONS: &str = "functions.";

/// The role whose header a prompt ends with.
const ASSISTANT: &str = "assistant";

/// Roles that the model must not speak for.
const FOREIGN_ROLES: [&str; 4] = ["user", "system", "developer", "tool"];

/// Recipients that are no tools, written without a namespace.
const NO_TOOLS: [&str; 8] = ["assistant", "user", "system", "developer", "all", "analysis", "commentary", "final"];

/// A channel of text that a client sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Channel {
    Reasoning,
    Content,
}

/// What the text of a message is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Text(Channel),
    /// The arguments of a call of the tool with this name.
    Call(String),
}

/// The bytes of a header so far, by the markers between them.
#[derive(Clone, Debug)]
pub(super) struct Header {
    /// A `<|start|>` opened it, so it begins with a role.
    is_started: bool,
    role: Vec<u8>,
    /// What follows the last `<|channel|>`.
    channel: Option<Vec<u8>>,
    /// What follows `<|constrain|>`.
    format: Option<Vec<u8>>,
}

impl Header {
    /// A header behind `<|start|>assistant`, or one whose `<|start|>` is missing.
    pub(super) fn implied() -> Header {
        Header { is_started: false, role: Vec::new(), channel: None, format: None }
    }

    /// A header behind `<|start|>`.
    pub(super) fn started() -> Header {
        Header { is_started: true, ..Header::implied() }
    }

    pub(super) fn open_channel(&mut self) {
        self.channel = Some(Vec::new());
        self.format = None;
    }

    pub(super) fn open_format(&mut self) {
        self.format = Some(Vec::new());
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        let part = self.format.as_mut().or(self.channel.as_mut()).unwrap_or(&mut self.role);
        part.extend_from_slice(bytes);
    }

    /// Says whether a marker shows that this is a header.
    pub(super) fn is_structured(&self) -> bool {
        self.is_started || self.channel.is_some() || self.format.is_some()
    }

    /// Says whether this cannot be a header any more: it is too long, or began with text instead of a marker.
    pub(super) fn is_text(&self) -> bool {
        let bytes =
            self.role.len() + self.channel.as_ref().map_or(0, Vec::len) + self.format.as_ref().map_or(0, Vec::len);
        bytes > HEADER_BYTES_MAX || (!self.is_structured() && !could_be_role(&self.role))
    }

    /// Reads a whole header: what the text behind it is.
    pub(super) fn read(&self) -> Kind {
        let role = words(&self.role).next().unwrap_or_default();
        let is_foreign = FOREIGN_ROLES.contains(&role.as_str()) || role.starts_with(FUNCTIONS);
        if self.is_started && is_foreign {
            return Kind::Text(Channel::Reasoning);
        }
        let channel = self.channel.as_deref().and_then(|part| words(part).next()).unwrap_or_default();
        let channel = channel.to_ascii_lowercase();
        let is_on = |name: &str| channel.starts_with(name);
        let of_text = if is_on("analysis") { Channel::Reasoning } else { Channel::Content };
        let accepts_any_tool = is_on("analysis") || is_on("commentary");
        match self.recipient().as_deref().and_then(|recipient| tool_name(recipient, accepts_any_tool)) {
            Some(name) => Kind::Call(name.to_owned()),
            None => Kind::Text(of_text),
        }
    }

    /// Gives what is no part of a header: the text of a message whose `<|message|>` is missing. It stands at the end.
    pub(super) fn text_behind(&self) -> Vec<u8> {
        let rest = match (&self.format, &self.channel) {
            (Some(format), _) => after_word(format),
            (None, Some(channel)) => after_recipients(after_word(channel)),
            (None, None) if self.is_started => after_recipients(after_word(&self.role)),
            (None, None) if self.role.trim_ascii() == ASSISTANT.as_bytes() => &[],
            (None, None) => after_recipients(&self.role),
        };
        rest.to_vec()
    }

    /// Finds whom the message goes to, as written. Of several recipients the last one counts, as with channels.
    fn recipient(&self) -> Option<String> {
        let parts = [Some(&self.role), self.channel.as_ref(), self.format.as_ref()];
        let recipient = |word: String| {
            let at = CHANNELS.iter().find(|channel| word.starts_with(**channel)).map_or(0, |channel| channel.len());
            match word[at..].strip_prefix(RECIPIENT) {
                Some(recipient) => Some(recipient.to_owned()),
                None => word.starts_with(FUNCTIONS).then_some(word),
            }
        };
        parts.into_iter().flatten().flat_map(|part| words(part)).filter_map(recipient).last()
    }
}

/// Gives the tool that a recipient names: `functions.NAME`, or `NAME` where any tool is accepted. Anybody else who may be
/// named, the assistant itself above all, is no tool.
fn tool_name(recipient: &str, accepts_any_tool: bool) -> Option<&str> {
    let is_in_name = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    let function = recipient.strip_prefix(FUNCTIONS);
    let name = function.unwrap_or(recipient);
    let name = &name[..name.find(|c| !is_in_name(c)).unwrap_or(name.len())];
    let is_tool = function.is_some() || (accepts_any_tool && !NO_TOOLS.contains(&name));
    (is_tool && !name.is_empty() && name.len() <= TOOL_NAME_BYTES_MAX).then_some(name)
}

/// Says whether text behind `<|start|>assistant`, or between two messages, could still become a part of a header.
fn could_be_role(text: &[u8]) -> bool {
    let text = text.trim_ascii_start();
    let recipient = match text.strip_prefix(ASSISTANT.as_bytes()) {
        Some(rest) if rest.first().is_some_and(|byte| !byte.is_ascii_whitespace()) => return false,
        Some(rest) => rest.trim_ascii_start(),
        None if ASSISTANT.as_bytes().starts_with(text) => return true,
        None => text,
    };
    RECIPIENT.as_bytes().starts_with(recipient) || recipient.starts_with(RECIPIENT.as_bytes())
}

fn words(part: &[u8]) -> impl Iterator<Item = String> {
    part.split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty())
        .map(|word| String::from_utf8_lossy(word).into_owned())
}

/// Gives what stands behind the first word. A brace ends a word: it begins the arguments of a call.
fn after_word(part: &[u8]) -> &[u8] {
    let part = part.trim_ascii_start();
    let end = part.iter().position(|byte| byte.is_ascii_whitespace() || *byte == b'{');
    part[end.unwrap_or(part.len())..].trim_ascii_start()
}

fn after_recipients(mut part: &[u8]) -> &[u8] {
    while part.trim_ascii_start().starts_with(RECIPIENT.as_bytes()) {
        part = after_word(part);
    }
    part
}
