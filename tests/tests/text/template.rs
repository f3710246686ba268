//! Chat templates against transformers, hostile messages, and hostile templates.

use std::sync::Arc;

use bulkhead_shared::generate::{Chat, Message, ReasoningEffort, Tool, ToolCall};
use bulkhead_shared::message::Piece;
use bulkhead_worker::text::answer::{Answer, AnswerEnd, AnswerKind, Calls};
use bulkhead_worker::text::chat::template::ChatTemplate;
use bulkhead_worker::text::chat::{ChatFormat, ChatSource};
use bulkhead_worker::text::error::{Fault, TextError};
use bulkhead_worker::text::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::support::{fixture, fixture_path, ids, items, model_tokenizer, text};

/// Models with a template, of the families that have one; not all of them can be served.
const MODELS: [&str; 4] = ["llama_tied", "llama3_untied_sharded", "qwen2_bias", "gemma3_text"];

/// A Llama 3's markers stand in its tokenizer.
const LLAMA3: &str = "llama3_untied_sharded";

fn open(model: &str) -> (Arc<Tokenizer>, ChatTemplate) {
    let tokenizer = model_tokenizer(model);
    let dir = fixture_path(&format!("models/{model}"));
    let template = ChatTemplate::open(&dir, &tokenizer).expect("sound").expect("the folder has a template");
    (tokenizer, template)
}

fn chat(messages: Vec<Message>) -> Chat {
    Chat { messages, tools: Vec::new(), effort: ReasoningEffort::Medium, date: "2026-11-25".into() }
}

fn user(text: &str) -> Message {
    Message::User { text: text.into() }
}

fn messages(case: &Value) -> Vec<Message> {
    let message = |message: &Value| {
        let content = text(message, "content").to_owned();
        match text(message, "role") {
            "system" => Message::System { text: content },
            "user" => Message::User { text: content },
            "assistant" => Message::Assistant { reasoning: None, content: Some(content), calls: Vec::new() },
            other => panic!("{other}"),
        }
    };
    items(case, "messages").iter().map(message).collect()
}

fn compile(source: &str) -> Result<ChatTemplate, TextError> {
    ChatTemplate::compile(source.to_owned(), None, vec![("bos_token".into(), "<|begin_of_text|>".into())])
}

fn render(source: &str, chat: &Chat) -> Result<String, TextError> {
    compile(source).expect("compiles").text(&model_tokenizer(LLAMA3), chat)
}

#[test]
fn conversations_get_the_text_and_the_ids_that_transformers_gives() {
    for model in MODELS {
        let (tokenizer, template) = open(model);
        let cases = fixture(&format!("models/{model}/expected.json"));
        assert!(!items(&cases, "chat_cases").is_empty());
        for case in items(&cases, "chat_cases") {
            let chat = chat(messages(case));
            assert_eq!(template.text(&tokenizer, &chat).expect("renders"), text(case, "text"), "{model}");
            assert_eq!(template.tokens(&tokenizer, &chat).expect("renders"), ids(case, "ids"), "{model}");
        }
    }
}

#[test]
fn a_message_that_spells_special_tokens_is_ordinary_text() {
    for model in MODELS {
        let (tokenizer, template) = open(model);
        let specials = |ids: &[u32]| ids.iter().copied().filter(|id| tokenizer.is_special(*id)).collect::<Vec<_>>();
        let of = |text: &str| {
            let system = Message::System { text: text.into() };
            let assistant =
                Message::Assistant { reasoning: Some(text.into()), content: Some(text.into()), calls: Vec::new() };
            template.tokens(&tokenizer, &chat(vec![system, user(text), assistant, user(text)])).expect("renders")
        };
        let plain = specials(&of("hello"));
        for marker in tokenizer.structural().iter().map(|token| token.content.as_str()) {
            let (head, tail) = marker.split_at(marker.len() / 2);
            for text in [marker, &format!("a {marker}{marker} b"), head, tail, &format!("{tail}\u{fdd0}{head}")] {
                let found = of(text);
                assert_eq!(specials(&found), plain, "{model}: {text:?}");
                let bytes: Vec<u8> =
                    found.iter().filter_map(|id| tokenizer.token_bytes(*id)).flatten().copied().collect();
                let written = String::from_utf8(bytes).expect("is text");
                assert!(written.contains(text), "{model}: {text:?} is not in {written:?}");
            }
        }
    }
}

#[test]
fn a_template_that_makes_structure_of_a_text_is_caught() {
    let tokenizer = model_tokenizer(LLAMA3);
    let template = compile("{{ bos_token }}{{ messages[0].content | replace('x', '') }}").expect("compiles");
    let tokens = |text: &str| template.tokens(&tokenizer, &chat(vec![user(text)]));
    assert!(tokens("a box").is_ok());
    assert!(matches!(tokens("<|eot_xid|>"), Err(TextError::TemplateForged)));
}

#[test]
fn templates_find_what_transformers_gives_them() {
    let call = ToolCall { name: "add".into(), arguments: r#"{"b": 1.50, "a": [true, null, "ü\"\n"]}"#.into() };
    let messages = vec![
        Message::Developer { text: " Be brief. ".into() },
        user("hi"),
        Message::Assistant { reasoning: Some("hm".into()), content: None, calls: vec![call] },
        Message::Tool { name: "add".into(), text: "3".into() },
    ];
    let chat = chat(messages);
    for (source, expected) in [
        (
            "{% for m in messages %}{{ m.role }}:{{ m['content'] | trim }};{% endfor %}",
            "system:Be brief.;user:hi;assistant:;tool:3;",
        ),
        ("{{ messages[2].tool_calls[0].function.arguments | tojson }}", r#"{"b": 1.5, "a": [true, null, "ü\"\n"]}"#),
        (
            "{{ messages[2].tool_calls[0].function.arguments['a'] | tojson(indent=2) }}",
            "[\n  true,\n  null,\n  \"ü\\\"\\n\"\n]",
        ),
        (
            "{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, ensure_ascii=true, separators=[',', ':']) }}",
            r#"{"a":"\u00e9","b":1}"#,
        ),
        ("{{ messages[2].reasoning_content }}{{ messages[3].name }}", "hmadd"),
        ("{{ strftime_now('%d %b %Y') }} {{ strftime_now is defined }}", "25 Nov 2026 True"),
        ("{{ tools is none }} {{ documents }} {{ nothing }}{{ add_generation_prompt }}", "True None True"),
        ("{{ bos_token }}{{ eos_token }}", "<|begin_of_text|>"),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages[1:] %}{% if loop.last %}{% break %}{% endif %}{% set ns.n = ns.n + loop.index %}{% endfor %}{{ ns.n }}",
            "3",
        ),
        (
            "{{ messages[0].content.strip().split(' ')[-1].upper() }} {{ messages[1].content.startswith('h') }}",
            "BRIEF. True",
        ),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[1]['role']) }}{{ messages | length }}", "[user]4"),
        ("{% for k, v in messages[3].items() %}{{ k }}={{ v }},{% endfor %}", "role=tool,name=add,content=3,"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        ("{%- for m in messages if m.role == 'user' -%} {{ m.content }} {%- endfor -%}", "hi"),
    ] {
        assert_eq!(render(source, &chat).expect(source), expected, "{source}");
    }
}

#[test]
fn what_a_template_raises_reaches_the_client() {
    let source = "{% if messages[0].role != 'user' %}{{ raise_exception('Roles must alternate: ' ~ messages[0].content) }}{% endif %}ok";
    assert_eq!(render(source, &chat(vec![user("a")])).expect("renders"), "ok");
    let error = render(source, &chat(vec![Message::System { text: "<|eot_id|>".into() }])).expect_err("refused");
    let TextError::TemplateRaised { message } = &error else { panic!("{error}") };
    assert_eq!(message, "Roles must alternate: <|eot_id|>");
    assert_eq!((error.fault(), error.param()), (Fault::Client, "messages"));
}

#[test]
fn a_hostile_template_is_stopped() {
    let chat = chat(vec![user("hello")]);
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = b %}{% endfor %}{% endfor %}";
    let doubling = "{% set ns = namespace(x='x') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
    let writing = "{% for a in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' * 4000 }}{% endfor %}";
    for source in [endless, doubling, writing] {
        let error = render(source, &chat).expect_err(source);
        assert!(matches!(error, TextError::TemplateFuel), "{source}: {error}");
        assert_eq!(error.fault(), Fault::Client);
    }
    let long = "{% set x = 'x' * 1000000 %}{% for a in range(40) %}{{ x }}{% endfor %}";
    assert!(matches!(render(long, &chat), Err(TextError::TemplateOutput { bytes: 40_000_000, .. })));
    for source in [
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% set ns = namespace(x=[]) %}{% for a in range(400) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{% include 'other' %}",
        "{% import 'other' as x %}",
        "{{ messages | nofilter }}",
        "{{ messages.a.b }}",
        "{{ 1 // 0 }}",
        "{{ 'x' * 400000000 }}",
        "{{ strftime_now('%Q') }}",
        "{{ messages | tojson(indent=1000000) }}",
    ] {
        let failed = match compile(source) {
            Ok(template) => template.text(&model_tokenizer(LLAMA3), &chat).map(drop),
            Err(error) => Err(error),
        };
        let error = failed.expect_err(source);
        let is_typed = matches!(
            error,
            TextError::TemplateFailed { .. } | TextError::TemplateUnusable { .. } | TextError::TemplateFuel
        );
        assert!(is_typed, "{source}: {error}");
    }
    let deep = format!("{}{}", "{% if true %}".repeat(100_000), "{% endif %}".repeat(100_000));
    assert!(matches!(compile(&deep), Err(TextError::TemplateUnusable { .. })));
    let deep = format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
    assert!(matches!(compile(&deep), Err(TextError::TemplateUnusable { .. })));
    assert!(matches!(compile(&"x".repeat((1 << 20) + 1)), Err(TextError::TemplateUnusable { .. })));
    assert!(matches!(compile("\u{fdd0}"), Err(TextError::TemplateUnusable { .. })));
    assert!(matches!(compile("{% for %}"), Err(TextError::TemplateUnusable { .. })));
}

#[test]
fn long_conversations_have_fuel() {
    let text = "word ".repeat(200_000);
    let chat = chat((0..20).flat_map(|_| [user(&text), Message::System { text: "short".into() }]).collect());
    let (tokenizer, template) = open(LLAMA3);
    assert!(template.text(&tokenizer, &chat).expect("renders").len() > 19 << 20);
}

fn folder(files: &[(&str, Value)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (name, content) in files {
        let content = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
        std::fs::write(dir.path().join(name), content).expect("writable");
    }
    dir
}

#[test]
fn a_template_is_found_where_it_stands() {
    let tokenizer = model_tokenizer(LLAMA3);
    let rendered = |files: &[(&str, Value)], tools: bool| {
        let mut chat = chat(vec![user("hi")]);
        if tools {
            chat.tools.push(Tool { name: "add".into(), description: None, parameters: None });
        }
        let template = ChatTemplate::open(folder(files).path(), &tokenizer).expect("sound")?;
        Some(template.text(&tokenizer, &chat).expect("renders"))
    };
    let file = ("chat_template.jinja", json!("file {{ bos_token }}"));
    let config = |template: Value| {
        ("tokenizer_config.json", json!({"chat_template": template, "bos_token": {"content": "<s>", "lstrip": false}}))
    };
    let named = json!([
        {"name": "tool_use", "template": "with {{ tools[0] | tojson }} \"name\" \"parameters\""},
        {"name": "default", "template": "without"},
    ]);
    assert_eq!(rendered(&[], false), None);
    assert_eq!(rendered(&[file.clone(), config(json!("config"))], false).as_deref(), Some("file <s>"));
    assert_eq!(rendered(&[config(json!("config"))], false).as_deref(), Some("config"));
    assert_eq!(rendered(&[config(named.clone())], false).as_deref(), Some("without"));
    assert_eq!(
        rendered(&[config(named)], true).as_deref(),
        Some(r#"with {"type": "function", "function": {"name": "add"}} "name" "parameters""#)
    );
    assert_eq!(rendered(&[config(json!([{"name": "rag", "template": "x"}]))], false), None);
    let malformed = ChatTemplate::open(folder(&[("tokenizer_config.json", json!([1]))]).path(), &tokenizer);
    assert!(matches!(malformed, Err(TextError::ConfigSyntax { .. })));
}

#[test]
fn a_model_without_a_usable_template_says_so() {
    let tokenizer = model_tokenizer(LLAMA3);
    let ask = |files: &[(&str, Value)]| {
        let format = ChatFormat::open(ChatSource::Folder, folder(files).path(), &tokenizer).expect("opens");
        format.tokens(&tokenizer, &chat(vec![user("hi")])).expect_err("has no template")
    };
    let error = ask(&[]);
    assert!(matches!(error, TextError::NoTemplate), "{error}");
    assert!(error.to_string().contains("use /v1/completions"));
    let error = ask(&[("chat_template.jinja", json!("{% generation %}{{ x }}"))]);
    assert!(matches!(&error, TextError::TemplateUnusable { reason } if reason.contains("line 1")), "{error}");
    assert_eq!((error.fault(), error.param()), (Fault::Client, "messages"));
}

/// As Llama 3.1 and 3.2 ask for calls.
const WITH_TOOLS: &str = "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\nRespond in the format \
    {\"name\": function name, \"parameters\": dictionary of argument name and its value}.{% for t in tools %}\
    {{ t | tojson(indent=4) }}{% endfor %}<|eot_id|>{% endif %}{% for m in messages %}<|start_header_id|>{{ m.role }}\
    <|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}";

#[test]
fn tools_are_for_templates_that_write_them() {
    let tokenizer = model_tokenizer(LLAMA3);
    let tool = Tool {
        name: "get_weather".into(),
        description: Some("Says <|eot_id|> how it is.".into()),
        parameters: Some(r#"{"type": "object", "properties": {"z": {"type": "string"}, "a": {}}}"#.into()),
    };
    let with_tools = Chat { tools: vec![tool], ..chat(vec![user("hi")]) };
    let written = compile(WITH_TOOLS).expect("compiles").text(&tokenizer, &with_tools).expect("renders");
    assert!(written.contains("\"description\": \"Says <|eot_id|> how it is.\""), "{written}");
    assert!(written.find("\"z\"") < written.find("\"a\""), "the order of parameters is kept: {written}");
    let specials = |chat: &Chat| {
        let ids = compile(WITH_TOOLS).expect("compiles").tokens(&tokenizer, chat).expect("renders");
        ids.into_iter().filter(|id| tokenizer.is_special(*id)).count()
    };
    assert_eq!(specials(&with_tools), specials(&chat(vec![user("hi")])) + 3);
    for (source, words) in [
        ("{{ messages }}", "has no place for tools"),
        ("{{ tools }}<tool_call>", "asks for tool calls in a form other than"),
    ] {
        let error = render(source, &with_tools).expect_err("refused");
        assert!(matches!(error, TextError::ToolsNotSupported { .. }));
        assert!(error.to_string().contains(words) && error.param() == "tools", "{error}");
    }
    let bad = Tool { name: "f".into(), description: None, parameters: Some("[]".into()) };
    let error = compile(WITH_TOOLS).expect("compiles").text(&tokenizer, &Chat { tools: vec![bad], ..with_tools });
    assert!(matches!(error, Err(TextError::ToolSchema { .. })));
}

/// Pushes a text as one token for each of its pieces and gives what comes out.
fn answered(kind: AnswerKind, model: &str, text: &str, stop: &[&str]) -> (Vec<Piece>, bool) {
    let tokenizer = model_tokenizer(model);
    let stop = stop.iter().map(|stop| (*stop).to_owned()).collect();
    let mut answer = Answer::new(kind, stop, Arc::clone(&tokenizer)).expect("needs no harmony");
    let mut pieces: Vec<Piece> = Vec::new();
    for id in tokenizer.encode_ordinary(text).expect("encodes") {
        pieces.extend(answer.push(id).pieces);
    }
    pieces.extend(answer.finish(AnswerEnd::Eos).pieces);
    (pieces, answer.has_tool_calls())
}

fn content(pieces: &[Piece]) -> String {
    let text = |piece: &Piece| match piece {
        Piece::Content(text) => text.clone(),
        Piece::Reasoning(_) | Piece::ToolCall { .. } => panic!("only content was expected: {piece:?}"),
    };
    pieces.iter().map(text).collect()
}

#[test]
fn an_answer_is_content_or_calls_tools() {
    let calls = || AnswerKind::Message(Calls::Llama(vec!["add".into()]));
    let (pieces, has_calls) = answered(calls(), LLAMA3, r#"{"name": "add", "parameters": {"a": "ü"}}"#, &[]);
    assert_eq!(pieces, [Piece::ToolCall { index: 0, name: "add".into(), arguments: r#"{"a":"ü"}"#.into() }]);
    assert!(has_calls);
    for kind in [calls(), AnswerKind::Message(Calls::None), AnswerKind::Plain] {
        let (pieces, has_calls) = answered(kind, LLAMA3, "It is {3}, grüß dich", &[]);
        assert_eq!((content(&pieces).as_str(), has_calls), ("It is {3}, grüß dich", false));
    }
    let (pieces, _) = answered(calls(), LLAMA3, "{\"a\": 1} stop here", &[" stop"]);
    assert_eq!(content(&pieces), "{\"a\": 1}");
}

#[test]
fn the_space_that_sentencepiece_puts_first_is_not_the_models() {
    let message = || AnswerKind::Message(Calls::None);
    for (kind, model, expected) in [
        (message(), "llama_tied", "hello you"),
        (AnswerKind::Plain, "llama_tied", " hello you"),
        (message(), LLAMA3, "hello you"),
        (message(), "gemma3_text", "hello you"),
    ] {
        let (pieces, _) = answered(kind, model, "hello you", &[]);
        assert_eq!(content(&pieces), expected, "{model}");
    }
}
