//! What a request asks a worker to generate.
//!
//! Everything here was checked by the supervisor and is checked again by the worker. Whatever is not a function of the
//! request (the date, a seed that the client did not give) was fixed at admission and travels along, so that a request
//! that is replayed on another worker gives the same tokens.

use bincode::{Decode, Encode};

use crate::units::RequestId;

/// One request for tokens.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Generate {
    /// The identity under which every answer comes back.
    pub id: RequestId,
    /// What the model is to continue.
    pub prompt: Prompt,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Strings that end the answer when they appear in content; the match is not part of the answer.
    pub stop: Vec<String>,
    /// Tokens to generate, at most; `None`: until the context is full.
    pub max_tokens: Option<u32>,
    /// Whether the log-probabilities of the tokens of content are told, and those of how many of the most likely tokens in
    /// each one's place.
    pub logprobs: Option<u32>,
    /// Token ids that an earlier worker has produced for this request: they are replayed, and generation goes on behind
    /// them. Empty for a new request.
    pub resume: Vec<u32>,
}

/// What the model is to continue.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum Prompt {
    /// A conversation, rendered by the worker in the model's own format.
    Chat(Chat),
    /// Plain text: no format is added, and text that spells a special token is ordinary text.
    Text(String),
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
}

/// A conversation and what the model may use to answer it.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Chat {
    /// The turns so far, oldest first.
    pub messages: Vec<Message>,
    /// The tools on offer. Empty when the client forbade them (`tool_choice: none`).
    pub tools: Vec<Tool>,
    /// How long the model is asked to think.
    pub effort: ReasoningEffort,
    /// The date that the model is told, `YYYY-MM-DD`, fixed at admission.
    pub date: String,
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub enum Message {
    /// Instructions of the operator, by OpenAI's role `system`.
    System {
        /// The text.
        text: String,
    },
    /// Instructions of the operator, by OpenAI's role `developer`.
    Developer {
        /// The text.
        text: String,
    },
    /// A turn of the person or program that asks.
    User {
        /// The text.
        text: String,
    },
    /// A turn of the model.
    Assistant {
        /// What it thought before, where the client gave it back.
        reasoning: Option<String>,
        /// What it said, where it said something.
        content: Option<String>,
        /// The tools that it called, in order.
        calls: Vec<ToolCall>,
    },
    /// The result of a tool call.
    Tool {
        /// The name of the tool, found by the supervisor from the call's id.
        name: String,
        /// The result as the client sent it.
        text: String,
    },
}

/// A call that the model made in an earlier turn.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct ToolCall {
    /// The tool's name.
    pub name: String,
    /// The arguments as JSON text.
    pub arguments: String,
}

/// A tool on offer.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Tool {
    /// Its name, of letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// What it does, in the client's words.
    pub description: Option<String>,
    /// The JSON schema of its parameters, as text: a parsed value never crosses between the processes.
    pub parameters: Option<String>,
}

/// How long the model is asked to think before it answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub enum ReasoningEffort {
    /// Hardly.
    Low,
    /// Some.
    #[default]
    Medium,
    /// Long.
    High,
}

impl ReasoningEffort {
    /// Gives the word that API and prompt use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            ReasoningEffort::Low => "low",
            ReasoningEffort::Medium => "medium",
            ReasoningEffort::High => "high",
        }
    }
}

/// How the next token is chosen from the logits. `None`: what the model's generation_config.json says, else neutral.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Sampling {
    /// 0 picks the most likely token. Bounds: 0 to 2, inclusive.
    pub temperature: Option<f32>,
    /// Keeps the most likely `top_k` tokens; 0 keeps all.
    pub top_k: Option<u32>,
    /// Keeps the smallest set of tokens whose probability reaches this. Bounds: above 0, to 1.
    pub top_p: Option<f32>,
    /// Drops tokens less likely than this share of the most likely one. Bounds: 0 to 1.
    pub min_p: Option<f32>,
    /// Divides (positive) or multiplies (negative) the logits of tokens that were seen, prompt included. Bounds: above 0.
    pub repetition_penalty: Option<f32>,
    /// Subtracted from a logit once for each time that its token was generated. Bounds: -2 to 2.
    pub frequency_penalty: f32,
    /// Subtracted from a logit once if its token was generated. Bounds: -2 to 2.
    pub presence_penalty: f32,
    /// Together with the position it determines every random choice.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: None,
            top_k: None,
            top_p: None,
            min_p: None,
            repetition_penalty: None,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
        }
    }
}
