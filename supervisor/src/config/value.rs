//! What a setting may be: the kinds of values, from text and back.

use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeValue;

/// What kind of value a setting takes, with its bounds, inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Text,
    Path,
    Flag,
    List,
    Choice(&'static [&'static str]),
    Number {
        min: u64,
        max: u64,
    },
    /// A number of 32 bits, or nothing.
    Maybe,
    Duration {
        min: Duration,
        max: Duration,
    },
}

/// A checked value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Text(String),
    Path(PathBuf),
    Flag(bool),
    List(Vec<String>),
    Number(u64),
    Maybe(Option<u32>),
    Duration(Duration),
}

impl Kind {
    /// Reads a flag's, a variable's or a default's text. Relative paths count from `base`.
    pub(crate) fn parse(self, text: &str, base: &Path) -> Result<Value, String> {
        match self {
            Kind::Text => Ok(Value::Text(text.to_owned())),
            Kind::Path if text.is_empty() => Ok(Value::Path(PathBuf::new())),
            Kind::Path => Ok(Value::Path(base.join(text))),
            Kind::Flag => match text {
                "true" | "1" | "yes" | "on" => Ok(Value::Flag(true)),
                "false" | "0" | "no" | "off" | "" => Ok(Value::Flag(false)),
                _ => Err(format!("{text:?} is neither true nor false")),
            },
            Kind::List => Ok(Value::List(names(text.split(',')))),
            Kind::Choice(choices) if choices.contains(&text) => Ok(Value::Text(text.to_owned())),
            Kind::Choice(choices) => Err(format!("{text:?} is none of {}", choices.join(", "))),
            Kind::Number { min, max } => match text.replace('_', "").parse::<u64>() {
                Ok(number) if (min..=max).contains(&number) => Ok(Value::Number(number)),
                Ok(number) => Err(format!("{number} is not from {min} to {max}")),
                Err(_) => Err(format!("{text:?} is not a whole number from {min} to {max}")),
            },
            Kind::Maybe if text.is_empty() => Ok(Value::Maybe(None)),
            Kind::Maybe => match text.replace('_', "").parse() {
                Ok(number) => Ok(Value::Maybe(Some(number))),
                Err(_) => Err(format!("{text:?} is not a whole number from 0 to {}", u32::MAX)),
            },
            Kind::Duration { min, max } => match parse_duration(text) {
                Some(time) if (min..=max).contains(&time) => Ok(Value::Duration(time)),
                Some(time) => Err(format!("{} is not from {} to {}", print(time), print(min), print(max))),
                None => Err(format!("{text:?} is not a time: use seconds, or a number with ms, s, m or h")),
            },
        }
    }

    /// Reads a value of the file.
    pub(crate) fn read(self, value: &DeValue<'_>, base: &Path) -> Result<Value, String> {
        match (self, value) {
            (Kind::List, DeValue::Array(items)) => {
                let texts: Option<Vec<&str>> = items.iter().map(|item| item.get_ref().as_str()).collect();
                texts.map(|texts| Value::List(names(texts))).ok_or_else(|| "is not a list of strings".to_owned())
            }
            (Kind::Flag, DeValue::Boolean(is_set)) => Ok(Value::Flag(*is_set)),
            (Kind::Number { .. } | Kind::Maybe | Kind::Duration { .. }, DeValue::Integer(number)) => {
                self.parse(number.as_str(), base)
            }
            (Kind::Text | Kind::Path | Kind::Choice(_) | Kind::Duration { .. }, DeValue::String(text)) => {
                self.parse(text, base)
            }
            _ => Err(format!("is a {}, not a {}", value.type_str(), self.describe())),
        }
    }

    fn describe(self) -> &'static str {
        match self {
            Kind::Text | Kind::Path | Kind::Choice(_) => "string",
            Kind::Flag => "boolean",
            Kind::List => "list of strings",
            Kind::Number { .. } | Kind::Maybe => "whole number",
            Kind::Duration { .. } => "time, such as 30 (seconds) or \"5m\"",
        }
    }
}

impl Value {
    /// Prints the value as TOML.
    pub(crate) fn toml(&self) -> String {
        match self {
            Value::Text(text) => quote(text),
            Value::Path(path) => quote(&path.display().to_string()),
            Value::Flag(is_set) => is_set.to_string(),
            Value::List(items) => format!("[{}]", items.iter().map(|item| quote(item)).collect::<Vec<_>>().join(", ")),
            Value::Number(number) => number.to_string(),
            Value::Maybe(number) => number.map_or_else(|| quote(""), |number| number.to_string()),
            Value::Duration(time) => quote(&print(*time)),
        }
    }
}

fn names<'a>(texts: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    texts.into_iter().map(str::trim).filter(|text| !text.is_empty()).map(str::to_owned).collect()
}

fn quote(text: &str) -> String {
    // Every JSON string is a TOML string too.
    serde_json::Value::from(text).to_string()
}

fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let ms = match text[digits..].trim() {
        "ms" => number,
        "" | "s" => number.checked_mul(1000)?,
        "m" | "min" => number.checked_mul(60_000)?,
        "h" => number.checked_mul(3_600_000)?,
        _ => return None,
    };
    Some(Duration::from_millis(ms))
}

fn print(time: Duration) -> String {
    match time.as_millis() {
        ms if ms % 1000 == 0 => format!("{}s", ms / 1000),
        ms => format!("{ms}ms"),
    }
}
