//! Reads an answer token by token: what the model thinks, what it says, which tools it calls.
//!
//! Owns: the state between tokens. Never fails: models write malformed headers now and then, and a turn is worth more than
//! its form. Invariants: markers never come out; everything that the model wrote inside of a message comes out once; a tool
//! call comes out whole or not at all; the state is a function of the tokens.
//!
//! The text of a message becomes
//!
//! | channel | without a recipient | to a tool |
//! | --- | --- | --- |
//! | `analysis` | reasoning | tool call |
//! | `commentary` | content | tool call |
//! | `final` | content | tool call if the recipient says `functions.` |
//! | unknown or none | content | tool call if the recipient says `functions.` |
//!
//! whatever the channel, a message under another role than the assistant's (a user's turn or a tool's result that the
//! model made up) is reasoning: it is not the answer. Two messages of one kind are set apart by a blank line.
//!
//! Source: openai-harmony 0.0.8, `StreamableParser`, but where that gives up on a header or takes structural tokens for
//! text, this goes on.

use bulkhead_shared::message::Piece;

use crate::text::detokenizer::Detokenizer;
use crate::text::harmony::header::{Channel, Header, Kind};
use crate::text::harmony::{Marker, Markers};
use crate::text::listing::Listing;

/// Bytes of the arguments of one tool call, at most: a call travels as one piece. A longer one comes out as content.
const ARGUMENTS_BYTES_MAX: usize = bulkhead_shared::limits::DELTA_TEXT_BYTES_MAX / 2;

/// What sets two messages of one kind apart.
const BETWEEN_MESSAGES: &str = "\n\n";

/// Reads one answer.
#[derive(Clone, Debug)]
pub struct Parser {
    markers: Markers,
    state: State,
    calls: u32,
    reasoning: Progress,
    content: Progress,
    listing: Listing,
}

#[derive(Clone, Debug)]
enum State {
    /// In a header, or between messages, which is a header whose `<|start|>` has not come.
    Header(Header),
    Message {
        channel: Channel,
        text: Detokenizer,
    },
    Call {
        name: String,
        text: Detokenizer,
        arguments: String,
    },
}

/// What has come out on one of the two channels of text.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    has_text: bool,
    /// A message ended since the last text.
    is_interrupted: bool,
}

/// What one token brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// What can be told now, in order.
    pub pieces: Vec<Piece>,
    /// The token is part of the text of a message that is reasoning.
    pub is_reasoning: bool,
}

/// How the tokens of an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The model ended its turn.
    Complete,
    /// Something else ended it: an unfinished tool call is dropped.
    Cut,
}

impl Parser {
    /// Starts behind `<|start|>assistant`, where a prompt ends.
    #[must_use]
    pub fn new(markers: Markers) -> Parser {
        Parser {
            markers,
            state: State::Header(Header::implied()),
            calls: 0,
            reasoning: Progress::default(),
            content: Progress::default(),
            listing: Listing::default(),
        }
    }

    /// Gives the books on which tokens are in the content.
    pub fn listing(&mut self) -> &mut Listing {
        &mut self.listing
    }

    /// Counts the tool calls that have come out.
    #[must_use]
    pub fn calls(&self) -> u32 {
        self.calls
    }

    /// Takes the next token: its id, and its bytes if it is an ordinary one.
    pub fn push(&mut self, token: u32, bytes: Option<&[u8]>) -> Parsed {
        let mut parsed = Parsed::default();
        match (self.markers.marker(token), bytes) {
            (Some(marker), _) => self.push_marker(marker, &mut parsed.pieces),
            (None, Some(bytes)) => parsed.is_reasoning = self.push_text(bytes, &mut parsed.pieces),
            // Reserved and other special tokens mean nothing here.
            (None, None) => {}
        }
        parsed
    }

    /// Ends the answer and gives what was held back.
    pub fn finish(&mut self, ending: Ending) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let is_dropped = match (&self.state, ending) {
            (_, Ending::Complete) | (State::Message { .. }, Ending::Cut) => false,
            (State::Call { .. }, Ending::Cut) => true,
            // Half a header is no text, unless it never looked like a header.
            (State::Header(header), Ending::Cut) => header.is_structured(),
        };
        if is_dropped {
            self.state = State::Header(Header::implied());
            self.listing.discard();
        } else {
            self.end_message(Header::implied(), &mut pieces);
        }
        pieces
    }

    fn push_marker(&mut self, marker: Marker, pieces: &mut Vec<Piece>) {
        match (marker, &mut self.state) {
            (Marker::End, _) => self.end_message(Header::implied(), pieces),
            (Marker::Start, _) => self.end_message(Header::started(), pieces),
            (Marker::Channel, State::Header(header)) => header.open_channel(),
            (Marker::Channel, State::Message { .. } | State::Call { .. }) => {
                let mut header = Header::implied();
                header.open_channel();
                self.end_message(header, pieces);
            }
            (Marker::Constrain, State::Header(header)) => header.open_format(),
            (Marker::Message, State::Header(header)) => {
                self.listing.discard();
                self.state = match header.read() {
                    Kind::Text(channel) => State::message(channel),
                    Kind::Call(name) => State::Call { name, text: Detokenizer::default(), arguments: String::new() },
                };
            }
            // Inside of a text they change nothing: it goes on behind them.
            (Marker::Constrain | Marker::Message, State::Message { .. } | State::Call { .. }) => {}
        }
    }

    /// Takes the bytes of an ordinary token; says whether they are reasoning.
    fn push_text(&mut self, bytes: &[u8], pieces: &mut Vec<Piece>) -> bool {
        match &mut self.state {
            State::Header(header) => {
                header.push(bytes);
                self.listing.push(bytes);
                if !header.is_text() {
                    return false;
                }
                let text = header.text_behind();
                let channel = match header.read() {
                    Kind::Text(channel) => channel,
                    Kind::Call(_) => Channel::Content,
                };
                self.push_header(channel, &text, pieces);
                channel == Channel::Reasoning
            }
            State::Message { channel: Channel::Reasoning, .. } => {
                self.push_message(bytes, pieces);
                true
            }
            State::Message { channel: Channel::Content, .. } => {
                self.listing.push(bytes);
                self.push_message(bytes, pieces);
                false
            }
            State::Call { text, arguments, .. } => {
                self.listing.push(bytes);
                let (more, own) = text.push_from(bytes);
                if !more.is_empty() {
                    self.listing.decoded(arguments.len(), own);
                    arguments.push_str(&more);
                }
                if arguments.len() > ARGUMENTS_BYTES_MAX {
                    let (text, arguments) = (std::mem::take(text), std::mem::take(arguments));
                    self.state = State::Message { channel: Channel::Content, text };
                    self.emit(Channel::Content, &arguments, pieces);
                }
                false
            }
        }
    }

    /// What stood where a header should be begins a message.
    fn push_header(&mut self, channel: Channel, mut text: &[u8], pieces: &mut Vec<Piece>) {
        self.state = State::message(channel);
        if channel == Channel::Reasoning {
            self.listing.discard();
            return self.push_message(text, pieces);
        }
        for bytes in self.listing.take(text.len()) {
            let (token, rest) = text.split_at(bytes);
            text = rest;
            self.listing.put_back(bytes);
            self.push_message(token, pieces);
        }
        assert!(text.is_empty(), "the bytes of a header are those of its tokens");
    }

    /// The message at hand goes on with the bytes of the last token.
    fn push_message(&mut self, bytes: &[u8], pieces: &mut Vec<Piece>) {
        let State::Message { channel, text } = &mut self.state else { return };
        let (channel, (text, own)) = (*channel, text.push_from(bytes));
        if !text.is_empty() && channel == Channel::Content {
            self.listing.decoded(0, own);
        }
        self.emit(channel, &text, pieces);
    }

    /// Ends the message or header at hand; `next` is the header that follows.
    fn end_message(&mut self, next: Header, pieces: &mut Vec<Piece>) {
        self.end_header(pieces);
        match std::mem::replace(&mut self.state, State::Header(next)) {
            State::Header(_) => {}
            State::Message { channel, mut text } => {
                if let Some(replacement) = text.finish() {
                    self.listing.decoded(0, 0);
                    self.emit(channel, replacement.encode_utf8(&mut [0; 4]), pieces);
                }
            }
            State::Call { name, mut text, mut arguments } => {
                arguments.extend(text.finish());
                self.emit_call(name, arguments, pieces);
            }
        }
        self.listing.discard();
        self.reasoning.is_interrupted = true;
        self.content.is_interrupted = true;
    }

    /// Makes a header that ends without `<|message|>` the message that it may be.
    fn end_header(&mut self, pieces: &mut Vec<Piece>) {
        let State::Header(header) = &self.state else { return };
        let text = header.text_behind();
        match header.read() {
            Kind::Call(name) if text.starts_with(b"{") => {
                self.emit_call(name, String::from_utf8_lossy(&text).into_owned(), pieces);
            }
            Kind::Call(_) => self.push_header(Channel::Content, &text, pieces),
            Kind::Text(channel) => self.push_header(channel, &text, pieces),
        }
    }

    fn emit_call(&mut self, name: String, arguments: String, pieces: &mut Vec<Piece>) {
        pieces.push(Piece::ToolCall { index: self.calls, name, arguments });
        self.calls += 1;
    }

    fn emit(&mut self, channel: Channel, text: &str, pieces: &mut Vec<Piece>) {
        if text.is_empty() {
            return;
        }
        let (progress, piece): (_, fn(String) -> Piece) = match channel {
            Channel::Reasoning => (&mut self.reasoning, Piece::Reasoning),
            Channel::Content => (&mut self.content, Piece::Content),
        };
        let between = if progress.has_text && progress.is_interrupted { BETWEEN_MESSAGES } else { "" };
        *progress = Progress { has_text: true, is_interrupted: false };
        if channel == Channel::Content {
            self.listing.gap(between.len());
            self.listing.place(text.len());
        }
        pieces.push(piece(format!("{between}{text}")));
    }
}

impl State {
    fn message(channel: Channel) -> State {
        State::Message { channel, text: Detokenizer::default() }
    }
}
