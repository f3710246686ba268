//! The Jinja template of a model folder, rendered by minijinja within bounds.
//!
//! Owns: which template a folder has, the surroundings that transformers gives it, and the limits: fuel, which bounds its
//! time and what it allocates; recursion; the length of what it writes. Refuses: other files (there is no loader), and what
//! a template raises. What clients write reaches the prompt as ordinary text only: see `guard`.
//!
//! Two things are not paid for in minijinja 3.1, and only a template can do them, never a message: a list that is nested a
//! hundred thousand levels deep overflows the stack, which ends this worker and sets the request aside; and one that is
//! added to itself more than thirty times is walked, and copied, until the worker holds more memory than its plan allows, for
//! which the supervisor ends it and sets the request aside likewise.
//!
//! Source: transformers 5, `utils/chat_template_utils.py` (`_compile_jinja_template`, `render_jinja_template`).

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_shared::generate::{Chat, Message};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior, Value};
use serde::Deserialize;

use super::guard::{self, Guard, Mode, Part};
use super::python::{self, Date};
use super::values::{self, Record};
use crate::text::error::TextError;
use crate::text::files::read_capped;
use crate::text::tokenizer::Tokenizer;

/// Bytes of a template, at most, and of the configuration that may hold one. Published ones have up to 20 kB.
const TEMPLATE_BYTES_MAX: usize = 1 << 20;
const CONFIG_BYTES_MAX: u64 = 16 << 20;

/// Fuel of a rendering: one for an instruction or 64 bytes that are written, copied or looked through.
const FUEL: u64 = 1_000_000;

/// Fuel for each byte that a client wrote, as so many bytes for one: some sixteen passes over all of it.
const BYTES_PER_FUEL: u64 = 4;

/// Bytes of a rendered conversation, at most.
const RENDERED_BYTES_MAX: usize = 32 << 20;

/// How deep macros and loops may be nested.
const RECURSION_MAX: usize = 200;

/// The name under which the template is kept.
const NAME: &str = "chat_template";

/// The one among several templates that is used, and the one for requests with tools.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// A chat template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Tokens by the names that templates know them by, such as `bos_token`.
    tokens: Vec<(String, String)>,
    /// Whether there is another template for requests with tools.
    has_tool_use: bool,
    tools: ToolSupport,
}

/// Whether requests may have tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ToolSupport {
    /// The template writes them, and asks for calls in the form that we read.
    Llama,
    /// The template has no place for them.
    NotWritten,
    /// The template asks for calls in another form.
    OtherForm,
}

/// What is read of tokenizer_config.json.
#[derive(Debug, Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<Templates>,
    bos_token: Option<TokenName>,
    eos_token: Option<TokenName>,
    unk_token: Option<TokenName>,
    pad_token: Option<TokenName>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TokenName {
    Plain(String),
    Described { content: String },
}

impl ChatTemplate {
    /// Opens the template of a model folder: chat_template.jinja, or `chat_template` in tokenizer_config.json. `None` where
    /// there is neither.
    ///
    /// # Errors
    /// `Read`, `FileTooLarge` and `ConfigSyntax` for a file that cannot be read; `TemplateUnusable` for a template that
    /// cannot be compiled.
    pub fn open(dir: &Path, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>, TextError> {
        let path = dir.join("tokenizer_config.json");
        let config: TokenizerConfig = match read_capped(&path, CONFIG_BYTES_MAX)? {
            Some(content) => {
                serde_json::from_slice(&content).map_err(|source| TextError::ConfigSyntax { path, source })?
            }
            None => TokenizerConfig::default(),
        };
        let path = dir.join("chat_template.jinja");
        let (main, tool_use) = match (read_capped(&path, TEMPLATE_BYTES_MAX as u64)?, config.chat_template) {
            (Some(file), _) => (Some(String::from_utf8(file).map_err(|_| unusable("is no UTF-8"))?), None),
            (None, Some(Templates::One(template))) => (Some(template), None),
            (None, Some(Templates::Named(all))) => {
                let named = |wanted: &str| {
                    let found = all.iter().find(|template| template.name == wanted);
                    found.map(|template| template.template.clone())
                };
                (named(DEFAULT), named(TOOL_USE))
            }
            (None, None) => (None, None),
        };
        let Some(main) = main else { return Ok(None) };
        let name = |name: &str, token: Option<TokenName>| match token? {
            TokenName::Plain(content) | TokenName::Described { content } => Some((name.to_owned(), content)),
        };
        let names = [
            name("bos_token", config.bos_token),
            name("eos_token", config.eos_token),
            name("unk_token", config.unk_token),
            name("pad_token", config.pad_token),
        ];
        let template = ChatTemplate::compile(main, tool_use, names.into_iter().flatten().collect())?;
        // A tokenizer without a single structural token has nothing that a template could write.
        if tokenizer.structural().is_empty() {
            return Err(unusable("has no special token to write"));
        }
        Ok(Some(template))
    }

    /// Compiles a template, and another one for requests with tools where there is one.
    ///
    /// # Errors
    /// `TemplateUnusable`.
    pub fn compile(
        main: String,
        tool_use: Option<String>,
        tokens: Vec<(String, String)>,
    ) -> Result<ChatTemplate, TextError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| unusable(&error.to_string()))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_recursion_limit(RECURSION_MAX);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", |value: Value, options: Kwargs| python::tojson(&value, options));
        let has_tool_use = tool_use.is_some();
        for (name, source) in [(NAME, Some(main)), (TOOL_USE, tool_use)] {
            let Some(source) = source else { continue };
            if source.len() > TEMPLATE_BYTES_MAX {
                return Err(unusable(&format!("has {} bytes, more than {TEMPLATE_BYTES_MAX}", source.len())));
            }
            if Guard::is_forged_by(&source) {
                return Err(unusable("has noncharacters that are kept for marks"));
            }
            environment.add_template_owned(name, source).map_err(|error| unusable(&describe(&error)))?;
        }
        let tools = tool_support(&environment, if has_tool_use { TOOL_USE } else { NAME });
        Ok(ChatTemplate { environment, tokens, has_tool_use, tools })
    }

    /// Renders a conversation up to where the model's answer begins.
    ///
    /// # Errors
    /// `ToolsNotSupported` for tools that the template does not write; `TemplateRaised` with what the template says;
    /// `TemplateFuel`, `TemplateOutput`, `TemplateFailed` when rendering fails; `TemplateForged` when the template makes
    /// structure of the request's texts; those of the tools' schemas and of `Tokenizer::encode_ordinary`.
    pub fn tokens(&self, tokenizer: &Tokenizer, chat: &Chat) -> Result<Vec<u32>, TextError> {
        let parts = self.parts(tokenizer, chat, Mode::Marked)?;
        let structure = |parts: &[Part]| -> Vec<u32> {
            parts.iter().filter_map(|part| if let Part::Token(id) = part { Some(*id) } else { None }).collect()
        };
        if structure(&parts) != structure(&self.parts(tokenizer, chat, Mode::Blanked)?) {
            return Err(TextError::TemplateForged);
        }
        let mut ids = Vec::new();
        for part in parts {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) => ids.extend(tokenizer.encode_ordinary(&text)?),
            }
        }
        Ok(ids)
    }

    /// Renders a conversation as text, structural tokens spelled out.
    ///
    /// # Errors
    /// As `tokens`, but `TemplateForged`.
    pub fn text(&self, tokenizer: &Tokenizer, chat: &Chat) -> Result<String, TextError> {
        Ok(guard::restore(&self.render(chat, &Guard::new(tokenizer, Mode::Marked))?))
    }

    fn parts(&self, tokenizer: &Tokenizer, chat: &Chat, mode: Mode) -> Result<Vec<Part>, TextError> {
        let guard = Guard::new(tokenizer, mode);
        Ok(guard.split(&self.render(chat, &guard)?))
    }

    fn render(&self, chat: &Chat, guard: &Guard<'_>) -> Result<String, TextError> {
        if !chat.tools.is_empty() {
            self.check_tools()?;
        }
        let raised = Arc::new(Mutex::new(None));
        let mut variables = vec![
            ("messages".to_owned(), values::messages(chat, guard)),
            ("tools".to_owned(), values::tools(&chat.tools, guard)?.unwrap_or(Value::from(()))),
            ("documents".to_owned(), Value::from(())),
            ("add_generation_prompt".to_owned(), Value::from(true)),
            ("raise_exception".to_owned(), raise_exception(&raised)),
        ];
        if let Some(date) = Date::parse(&chat.date) {
            let strftime = Value::from_function(move |format: &str| date.strftime(format));
            variables.push(("strftime_now".to_owned(), strftime));
        }
        variables.extend(self.tokens.iter().map(|(name, token)| (name.clone(), Value::from(token.as_str()))));
        let name = if self.has_tool_use && !chat.tools.is_empty() { TOOL_USE } else { NAME };
        let rendered = self.with_fuel(chat).and_then(|environment| {
            let template = environment.get_template(name)?;
            template.render(Record::of(variables))
        });
        match rendered {
            Ok(text) if text.len() > RENDERED_BYTES_MAX => {
                Err(TextError::TemplateOutput { bytes: text.len(), max: RENDERED_BYTES_MAX })
            }
            Ok(text) => Ok(text),
            Err(error) => Err(self.fault(&error, raised.lock().unwrap_or_else(PoisonError::into_inner).take())),
        }
    }

    /// Gives the environment with as much fuel as the request calls for.
    fn with_fuel(&self, chat: &Chat) -> Result<Environment<'static>, Error> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL + bytes_of(chat) / BYTES_PER_FUEL));
        Ok(environment)
    }

    fn check_tools(&self) -> Result<(), TextError> {
        match self.tools {
            ToolSupport::Llama => Ok(()),
            ToolSupport::NotWritten => Err(TextError::ToolsNotSupported { reason: "has no place for tools" }),
            ToolSupport::OtherForm => Err(TextError::ToolsNotSupported {
                reason: "asks for tool calls in a form other than Llama's JSON of name and parameters",
            }),
        }
    }

    fn fault(&self, error: &Error, raised: Option<String>) -> TextError {
        match (raised, error.kind()) {
            (Some(message), _) => TextError::TemplateRaised { message },
            (None, ErrorKind::OutOfFuel) => TextError::TemplateFuel,
            (None, _) => TextError::TemplateFailed { reason: describe(error) },
        }
    }
}

/// The function by which a template refuses a conversation; what it says is kept.
fn raise_exception(raised: &Arc<Mutex<Option<String>>>) -> Value {
    let raised = Arc::clone(raised);
    Value::from_function(move |message: String| -> Result<Value, Error> {
        *raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(guard::restore(&message));
        Err(Error::new(ErrorKind::InvalidOperation, "the template refuses the conversation"))
    })
}

/// Finds out whether a template writes tools, and asks for calls as Llama's own does.
fn tool_support(environment: &Environment<'_>, name: &str) -> ToolSupport {
    let Ok(template) = environment.get_template(name) else { return ToolSupport::NotWritten };
    if !template.undeclared_variables(false).contains("tools") {
        return ToolSupport::NotWritten;
    }
    let source = template.source();
    let is_llama = ["\"name\"", "\"parameters\""].iter().all(|key| source.contains(key));
    if is_llama { ToolSupport::Llama } else { ToolSupport::OtherForm }
}

/// Counts the bytes that a client wrote.
fn bytes_of(chat: &Chat) -> u64 {
    let optional = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    let message = |message: &Message| match message {
        Message::System { text } | Message::Developer { text } | Message::User { text } => text.len(),
        Message::Assistant { reasoning, content, calls } => {
            let calls = calls.iter().map(|call| call.name.len() + call.arguments.len()).sum::<usize>();
            optional(reasoning) + optional(content) + calls
        }
        Message::Tool { name, text } => name.len() + text.len(),
    };
    let messages = chat.messages.iter().map(message).sum::<usize>();
    let tools =
        chat.tools.iter().map(|tool| tool.name.len() + optional(&tool.description) + optional(&tool.parameters));
    // Writing JSON costs sixteen times as much as text.
    (messages + 16 * tools.sum::<usize>()) as u64
}

fn unusable(reason: &str) -> TextError {
    TextError::TemplateUnusable { reason: reason.to_owned() }
}

/// Says what is wrong and in which line, without the texts that were being rendered.
fn describe(error: &Error) -> String {
    let line = error.line().map(|line| format!(" in line {line}")).unwrap_or_default();
    let detail = error.detail().map(|detail| format!(": {}", guard::restore(detail))).unwrap_or_default();
    format!("{}{line}{detail}", error.kind())
}
