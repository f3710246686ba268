//! Folders that load and strike with a request: templates and patterns without end. The request fails, or is set aside with
//! the workers that it cost; the next one is answered.

use std::path::Path;

use bulkhead_tests::oracle;
use bulkhead_tests::talk::{CHAT, check_error, greedy, with};
use serde_json::{Value, json};

use crate::damage::{json as edit_json, write};
use crate::stage::Stage;

/// Ends each prompt as the model's own template does, so that what a case adds is all that is strange.
const REST: &str = "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}";

/// Asks in a conversation, and gives status and error.
fn ask(stage: &Stage) -> (u16, Value) {
    let answer = stage.server.post(CHAT, &with(greedy("Hello there"), json!({"max_tokens": 4})));
    let answer = answer.read_whole().expect("whole");
    let body = answer.json();
    if answer.status != 200 {
        check_error(&body);
    }
    (answer.status, body["error"].clone())
}

fn with_template(stage: &Stage, template: &str) {
    let came = stage.load(|folder| write(folder, "chat_template.jinja", template));
    assert!(came.is_running() && came.tries == 1, "{template}: {came:?}");
}

#[test]
fn templates_without_end_cost_their_request_alone() {
    let stage = Stage::new(oracle::model("llama3_untied_sharded"));
    for (template, word) in [
        ("{% for i in range(1000000000) %}{% endfor %}", ""),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more work"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", ""),
        (
            "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "more work",
        ),
        ("{{ 'x' * 1000000000000 }}", ""),
        ("{{ 'x'.center(1000000000000) }}", ""),
        ("{{ range(1000000000) | list | length }}", ""),
        ("{{ '%1000000000000d' % 1 }}", ""),
        ("{{ raise_exception('no') }}", "refuses the conversation: no"),
        ("{% include '/etc/passwd' %}", ""),
        ("{% import 'os' as os %}{{ os.environ }}", ""),
        ("{% extends '../../config.json' %}", ""),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", ""),
        ("{{ ''.__class__.__base__.__subclasses__()[0] }}", ""),
        ("{{ self.__init__.__globals__ }}{{ cycler.__init__.__globals__.os.popen('id').read() }}", ""),
        ("{{ lipsum.__globals__['os'].environ }}", ""),
        ("{% if %}", "use /v1/completions"),
        ("\u{0}\u{1}{{", "use /v1/completions"),
    ] {
        with_template(&stage, template);
        let worker = stage.server.worker().expect("one runs").pid;
        let (status, error) = ask(&stage);
        assert_eq!(status, 400, "{template}: {error}");
        let message = error["message"].as_str().expect("text");
        assert!(message.contains("chat template") && message.contains(word), "{template}: {message}");
        assert!(!message.contains("root:"), "{template}: {message}");
        assert_eq!(stage.complete("Hello").status, 200, "{template}");
        assert_eq!(stage.server.worker().map(|worker| worker.pid), Some(worker), "{template}: one worker is enough");
    }
    // What would be somewhere else's attributes is nothing here.
    with_template(
        &stage,
        &format!("{{{{ messages.__class__ }}}}{{{{ namespace.__globals__ }}}}{{{{ environ }}}}{REST}"),
    );
    assert_eq!(ask(&stage).0, 200);
    stage.goes_on();
}

#[test]
fn a_template_that_cannot_be_read_is_named() {
    const TEMPLATE: &str = "chat_template.jinja";
    let stage = Stage::new(oracle::model("llama3_untied_sharded"));
    stage.refuses("two megabytes", |folder| write(folder, TEMPLATE, vec![b' '; 2 << 20]), &[TEMPLATE, "2097152"]);
    let pipe = |folder: &Path| {
        std::fs::remove_file(folder.join(TEMPLATE)).expect("it is there");
        nix::unistd::mkfifo(&folder.join(TEMPLATE), nix::sys::stat::Mode::S_IRUSR).expect("ours");
    };
    stage.refuses("a pipe", pipe, &[TEMPLATE, "not a regular file"]);
    let came = stage.load(|folder| write(folder, TEMPLATE, b"\xff\xfe{{ messages }}"));
    assert!(came.is_running(), "{came:?}");
    assert_eq!(ask(&stage).0, 400);
    stage.goes_on();
}

/// Each costs workers, which are replaced; the request is found and set aside, and others are answered.
#[test]
fn what_ends_its_worker_is_set_aside() {
    let stage = Stage::new(oracle::model("llama3_untied_sharded"));
    // A list in a list in a list, deeper than the stack.
    let deep = "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | length }}";
    with_template(&stage, deep);
    let (status, error) = ask(&stage);
    assert_eq!((status, &error["code"]), (500, &json!("request_quarantined")), "{error}\n{}", stage.server.log());
    assert_eq!(stage.complete("Hello").status, 200);
    stage.goes_on();
}

fn pattern(folder: &Path, pattern: &str) {
    edit_json(folder, "tokenizer.json", |tokenizer| {
        tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!(pattern);
    });
}

/// Patterns whose matching takes time that doubles with each character.
#[test]
fn patterns_without_end_cost_their_request_alone() {
    let stage = Stage::new(oracle::model("llama3_untied_sharded"));
    for expression in ["(a+)+$", "(a|aa)+$", "(a|a?)+$", "(.*a){20}$", "^(([a-z])+.)+[A-Z]([a-z])+$", "(x+x+)+y|\\w+"] {
        let came = stage.load(|folder| pattern(folder, expression));
        assert!(came.is_running() || came.is_named(), "{expression}: {came:?}");
        if !came.is_running() {
            println!("{expression}: {came:?}");
            continue;
        }
        let answer = stage.complete(&format!("{}!", "a".repeat(40)));
        println!("{expression}: {} {}", answer.status, answer.text);
        if answer.status != 200 {
            check_error(&answer.json());
        }
        assert_eq!(stage.complete("Hello").status, 200, "{expression}");
    }
    stage.goes_on();
}

/// Each word takes long and none too long: together they would take hours. A worker that does nothing else is hung, and the request is
/// found.
#[test]
fn a_text_that_takes_hours_is_a_hang() {
    const WORDS: usize = 40_000;
    let stage = Stage::with(oracle::model("llama3_untied_sharded"), &["--hang-timeout", "1500ms"]);
    let came = stage.load(|folder| pattern(folder, "(?:\\w|\\w)*#|\\w+|."));
    assert!(came.is_running(), "{came:?}");
    let answer = stage.complete(&"abcdefghijklmnopqrst ".repeat(WORDS));
    assert_eq!(answer.status, 500, "{answer:?}\n{}", stage.server.log());
    assert_eq!(answer.json()["error"]["code"], json!("request_quarantined"));
    assert!(stage.server.log().contains("killed: it hung"), "{}", stage.server.log());
    assert_eq!(stage.complete("Hello").status, 200);
    stage.goes_on();
}

/// A normalizer that makes of each character two, thirty times over: two gigabytes of one.
#[test]
fn a_text_that_grows_without_end_ends_at_the_plan() {
    let stage = Stage::new(oracle::model("llama3_untied_sharded"));
    let came = stage.load(|folder| {
        edit_json(folder, "tokenizer.json", |tokenizer| {
            let double = json!({"type": "Replace", "pattern": {"String": "z"}, "content": "zz"});
            tokenizer["normalizer"] = json!({"type": "Sequence", "normalizers": vec![double; 30]});
        });
    });
    assert!(came.is_running(), "{came:?}");
    let answer = stage.complete("zz");
    assert_eq!(answer.status, 500, "{answer:?}\n{}", stage.server.log());
    assert_eq!(answer.json()["error"]["code"], json!("request_quarantined"));
    assert!(stage.server.log().contains("it held more memory than planned"), "{}", stage.server.log());
    assert_eq!(stage.complete("Hello").status, 200);
    stage.goes_on();
}
