//! What can be wrong with a text, or with the files that say how a model writes text.

use std::path::PathBuf;

/// Why text could not become tokens, or a model's text files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file of the model folder cannot be read.
    #[error("{} cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file of the model folder is larger than any sound one.
    #[error("{} has {bytes} bytes, more than {max}", path.display())]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// The tokenizer's file is no tokenizer.
    #[error("{} is no tokenizer: {source}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// Why, by the tokenizers crate.
        source: tokenizers::Error,
    },
    /// The tokenizer decodes in a way that is not supported.
    #[error("{} decodes tokens by {decoder}: only byte-level tokenizers (decoder `ByteLevel`) are supported", path.display())]
    Decoder {
        /// The file.
        path: PathBuf,
        /// The decoder it names, `none` where it names none.
        decoder: &'static str,
    },
    /// The tokenizer has no token for a byte, so it would lose that byte.
    #[error("{} has no token for the byte {byte:#04x}: only byte-level tokenizers are supported", path.display())]
    Alphabet {
        /// The file.
        path: PathBuf,
        /// The first such byte.
        byte: u8,
    },
    /// The tokenizer has an id that no vocabulary of a sound size has.
    #[error("{} gives a token the id {id}, but ids stay below {max}", path.display())]
    TokenId {
        /// The file.
        path: PathBuf,
        /// The id.
        id: u32,
        /// The limit, exclusive.
        max: u32,
    },
    /// A text has a stretch without a word boundary that is too long to be split into tokens.
    #[error("the text has {bytes} bytes without a word boundary, more than {max}: break it up with white space")]
    Unbroken {
        /// Length of the stretch.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The tokenizer refused a text.
    #[error("the text cannot be split into tokens: {source}")]
    Encode {
        /// Why, by the tokenizers crate.
        source: tokenizers::Error,
    },
    /// The tokenizer made a special token of ordinary text. Such a prompt is refused, since it could forge structure.
    #[error("the tokenizer reads part of the text as its special token {id}: this model cannot take that text")]
    SpecialFromText {
        /// The token.
        id: u32,
    },
    /// The model cannot hold a conversation in harmony.
    #[error("this model's tokenizer has no harmony tokens (`{token}` is missing): use /v1/completions")]
    NoHarmony {
        /// The first token that is missing.
        token: &'static str,
    },
    /// The model has no template to write a conversation with.
    #[error(
        "this model has no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json): \
         use /v1/completions"
    )]
    NoTemplate,
    /// The model's template cannot be compiled.
    #[error("the model's chat template {reason}: use /v1/completions")]
    TemplateUnusable {
        /// What is wrong with it.
        reason: String,
    },
    /// The model's template refuses the conversation.
    #[error("the model's chat template refuses the conversation: {message}")]
    TemplateRaised {
        /// What it says.
        message: String,
    },
    /// The model's template does more work than a conversation is worth.
    #[error("the model's chat template was stopped after more work than this conversation may take")]
    TemplateFuel,
    /// The model's template writes more than a prompt may have.
    #[error("the model's chat template writes {bytes} bytes, more than {max}")]
    TemplateOutput {
        /// What it wrote.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The model's template cannot render the conversation.
    #[error("the model's chat template cannot render the conversation: {reason}")]
    TemplateFailed {
        /// Why, by the template engine.
        reason: String,
    },
    /// The model's template makes special tokens of a message's text. Such a prompt could forge structure.
    #[error("the model's chat template makes special tokens of a message's text: this model cannot take that text")]
    TemplateForged,
    /// The model's template is for conversations without tools.
    #[error("this model cannot be given tools: its chat template {reason}")]
    ToolsNotSupported {
        /// What the template does instead.
        reason: &'static str,
    },
    /// A tool's name would break the header that it stands in.
    #[error("tool name `{name}` must be 1 to {max} letters, digits, `_`, `-` or `.`")]
    ToolName {
        /// The name, cut to the limit.
        name: String,
        /// Bytes that a name may have.
        max: usize,
    },
    /// The schema of a tool's parameters is no JSON.
    #[error("the parameters of tool `{tool}` are no JSON: {source}")]
    ToolSchemaSyntax {
        /// The tool.
        tool: String,
        /// Why, by the JSON parser.
        source: serde_json::Error,
    },
    /// The schema of a tool's parameters is something else than an object.
    #[error("the parameters of tool `{tool}` must be a JSON schema, which is an object, but are {found}")]
    ToolSchema {
        /// The tool.
        tool: String,
        /// What they are.
        found: &'static str,
    },
    /// The schema of a tool's parameters is longer than any sound one.
    #[error("the parameters of tool `{tool}` have {bytes} bytes, more than {max}")]
    ToolSchemaTooLong {
        /// The tool.
        tool: String,
        /// Their length.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// A configuration file of the model is no JSON of the expected form.
    #[error("{} is malformed: {source}", path.display())]
    ConfigSyntax {
        /// The file.
        path: PathBuf,
        /// Why, by the JSON parser.
        source: serde_json::Error,
    },
    /// A sampling default of the model is out of its bounds.
    #[error("{} sets {name} to {value}, which is not {bounds}", path.display())]
    ConfigValue {
        /// The file.
        path: PathBuf,
        /// The key.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What it may be.
        bounds: &'static str,
    },
}

/// Who has to act on an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The request; another one can succeed.
    Client,
    /// The model folder; no request can succeed.
    Model,
}

impl TextError {
    /// Says whose fault the error is.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            TextError::Unbroken { .. }
            | TextError::Encode { .. }
            | TextError::SpecialFromText { .. }
            | TextError::NoHarmony { .. }
            | TextError::NoTemplate
            | TextError::TemplateUnusable { .. }
            | TextError::TemplateRaised { .. }
            | TextError::TemplateFuel
            | TextError::TemplateOutput { .. }
            | TextError::TemplateFailed { .. }
            | TextError::TemplateForged
            | TextError::ToolsNotSupported { .. }
            | TextError::ToolName { .. }
            | TextError::ToolSchemaSyntax { .. }
            | TextError::ToolSchema { .. }
            | TextError::ToolSchemaTooLong { .. } => Fault::Client,
            TextError::Read { .. }
            | TextError::FileTooLarge { .. }
            | TextError::Tokenizer { .. }
            | TextError::Decoder { .. }
            | TextError::Alphabet { .. }
            | TextError::TokenId { .. }
            | TextError::ConfigSyntax { .. }
            | TextError::ConfigValue { .. } => Fault::Model,
        }
    }

    /// Names the parameter of the request that a client would have to change.
    #[must_use]
    pub fn param(&self) -> &'static str {
        match self {
            TextError::ToolsNotSupported { .. }
            | TextError::ToolName { .. }
            | TextError::ToolSchemaSyntax { .. }
            | TextError::ToolSchema { .. }
            | TextError::ToolSchemaTooLong { .. } => "tools",
            TextError::NoHarmony { .. }
            | TextError::NoTemplate
            | TextError::TemplateUnusable { .. }
            | TextError::TemplateRaised { .. }
            | TextError::TemplateFuel
            | TextError::TemplateOutput { .. }
            | TextError::TemplateFailed { .. }
            | TextError::TemplateForged => "messages",
            TextError::Unbroken { .. } | TextError::Encode { .. } | TextError::SpecialFromText { .. } => "prompt",
            TextError::Read { .. }
            | TextError::FileTooLarge { .. }
            | TextError::Tokenizer { .. }
            | TextError::Decoder { .. }
            | TextError::Alphabet { .. }
            | TextError::TokenId { .. }
            | TextError::ConfigSyntax { .. }
            | TextError::ConfigValue { .. } => "model",
        }
    }
}
