//! The layers of the configuration: table, file, environment, flags; later ones win.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches};
use toml::de::{DeTable, DeValue};

use super::value::{Kind, Value};
use super::{Fault, KEYS, Key, Origin, SYSTEM_FILE};

/// The flag that names the configuration file.
pub const FLAG_CONFIG: &str = "config";

const VARIABLE_PREFIX: &str = "BULKHEAD_";
const VARIABLE_CONFIG: &str = "BULKHEAD_CONFIG";

/// Edits between a name and a known one, up to which the known one is suggested.
const SUGGESTION_EDITS_MAX: usize = 3;

/// The variables of the environment that are text.
#[derive(Clone, Debug, Default)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// Reads the process's own: the only place that does.
    #[must_use]
    pub fn read() -> Environment {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Environment(std::env::vars_os().filter_map(text).collect())
    }

    /// Takes given variables instead.
    #[must_use]
    pub fn of(variables: &[(&str, &str)]) -> Environment {
        Environment(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    /// Gives a variable that is set and not empty.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Warns of variables that look like settings and are none. Not faults: Kubernetes, for one, makes `BULKHEAD_PORT`
    /// out of the name of a service.
    pub(super) fn unknown(&self) -> Vec<String> {
        let is_known = |name: &str| name == VARIABLE_CONFIG || KEYS.iter().any(|key| key.variable() == name);
        let ours = self.0.keys().filter(|name| name.starts_with(VARIABLE_PREFIX) && !is_known(name));
        ours.map(|name| format!("the variable {name} is no setting and has no effect")).collect()
    }
}

impl Key {
    /// Gives the flag's name, without dashes in front.
    pub(super) fn flag(&self) -> String {
        self.name.replace(['_', '.'], "-")
    }

    /// Gives the variable's name.
    pub(super) fn variable(&self) -> String {
        format!("{VARIABLE_PREFIX}{}", self.name.replace('.', "_").to_uppercase())
    }
}

/// Adds the flags of all settings to a command.
#[must_use]
pub fn flags(command: clap::Command) -> clap::Command {
    let file = Arg::new(FLAG_CONFIG)
        .long(FLAG_CONFIG)
        .value_name("FILE")
        .help(format!("configuration file [{SYSTEM_FILE}, if there is one]"));
    KEYS.iter().fold(command.arg(file), |command, key| {
        let arg = Arg::new(key.name).long(key.flag()).help(help(key)).hide(key.name.contains("fault"));
        command.arg(match key.kind {
            Kind::Flag => arg.action(ArgAction::Set).num_args(0..=1).default_missing_value("true").value_name("BOOL"),
            Kind::Path => arg.value_name("PATH"),
            Kind::Number { .. } | Kind::Maybe => arg.value_name("N"),
            Kind::Duration { .. } => arg.value_name("TIME"),
            Kind::List => arg.value_name("NAME,NAME"),
            Kind::Text | Kind::Choice(_) => arg.value_name("TEXT"),
        })
    })
}

fn help(key: &Key) -> String {
    match key.default {
        "" | "false" => key.help.to_owned(),
        default => format!("{} [{default}]", key.help),
    }
}

/// Finds the configuration file: named by flag, named by variable, or the system's if it exists.
pub(super) fn file(matches: &ArgMatches, environment: &Environment) -> Option<PathBuf> {
    let named = matches.get_one::<String>(FLAG_CONFIG).map(String::as_str).or(environment.get(VARIABLE_CONFIG));
    let system = || Some(PathBuf::from(SYSTEM_FILE)).filter(|path| path.exists());
    named.map(PathBuf::from).or_else(system)
}

/// Every setting with its value and origin.
#[derive(Clone, Debug)]
pub(super) struct Settings(BTreeMap<&'static str, (Value, Origin)>);

/// Goes through the layers. A value that is a fault leaves the one of the layer below in place.
pub(super) fn gather(matches: &ArgMatches, environment: &Environment, file: Option<&Path>) -> (Settings, Vec<Fault>) {
    let here = std::path::absolute(".").unwrap_or_default();
    let mut faults = Vec::new();
    let mut settings = Settings(BTreeMap::new());
    for key in KEYS {
        let value = key.kind.parse(key.default, &here).expect("the table's defaults are within its bounds");
        settings.0.insert(key.name, (value, Origin::Default));
    }
    if let Some(path) = file {
        read_file(&here.join(path), &mut settings, &mut faults);
    }
    for key in KEYS {
        if let Some(text) = environment.get(&key.variable()) {
            settings.put(key, key.kind.parse(text, &here), Origin::Variable(key.variable()), &mut faults);
        }
    }
    for key in KEYS {
        if let Some(text) = matches.get_one::<String>(key.name) {
            let origin = Origin::Flag(format!("--{}", key.flag()));
            settings.put(key, key.kind.parse(text, &here), origin, &mut faults);
        }
    }
    (settings, faults)
}

fn read_file(path: &Path, settings: &mut Settings, faults: &mut Vec<Fault>) {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => return faults.push(Fault::Unreadable { path: path.to_owned(), reason: error.to_string() }),
    };
    let line = |at: usize| Origin::File(path.to_owned(), text[..at.min(text.len())].matches('\n').count() + 1);
    let (table, errors) = DeTable::parse_recoverable(&text);
    for error in &errors {
        let origin = line(error.span().map_or(0, |span| span.start));
        faults.push(Fault::Syntax { origin, reason: error.message().replace('\n', " ") });
    }
    let base = path.parent().unwrap_or(Path::new("/"));
    let mut entries = Vec::new();
    flatten("", table.get_ref(), &mut entries);
    entries.sort_by_key(|(_, at, _)| *at);
    for (name, at, value) in entries {
        match KEYS.iter().find(|key| key.name == name) {
            Some(key) => settings.put(key, key.kind.read(value, base), line(at), faults),
            None => faults.push(Fault::UnknownKey { origin: line(at), nearest: nearest(&name), name }),
        }
    }
}

/// Lists the values of a table and of the tables in it, with dotted names and the places of their keys.
fn flatten<'a>(prefix: &str, table: &'a DeTable<'a>, entries: &mut Vec<(String, usize, &'a DeValue<'a>)>) {
    for (key, value) in table {
        let name = format!("{prefix}{}", key.get_ref());
        if let DeValue::Table(inner) = value.get_ref() {
            flatten(&format!("{name}."), inner, entries);
        } else {
            entries.push((name, key.span().start, value.get_ref()));
        }
    }
}

fn nearest(name: &str) -> Option<&'static str> {
    let distances = KEYS.iter().map(|key| (edits(name, key.name), key.name));
    distances.filter(|(edits, _)| *edits <= SUGGESTION_EDITS_MAX).min().map(|(_, name)| name)
}

/// Counts the insertions, deletions and replacements between two texts (Levenshtein), row by row.
pub(crate) fn edits(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (index, from) in left.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], index + 1);
        for (column, to) in right.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(row[column] + 1).min(diagonal + 1);
        }
    }
    row[right.len()]
}

impl Settings {
    fn put(&mut self, key: &'static Key, value: Result<Value, String>, origin: Origin, faults: &mut Vec<Fault>) {
        match value {
            Ok(value) => drop(self.0.insert(key.name, (value, origin))),
            Err(reason) => faults.push(Fault::Value { origin, name: key.name, reason }),
        }
    }

    pub(super) fn get(&self, name: &'static str) -> &(Value, Origin) {
        self.0.get(name).expect("only settings of the table are asked for")
    }

    pub(super) fn fault(&self, name: &'static str, reason: String) -> Fault {
        Fault::Value { origin: self.get(name).1.clone(), name, reason }
    }

    /// Gives a text; a path counts as one, empty where it is not UTF-8.
    ///
    /// # Panics
    /// Like all that follow: when the table says that the setting is of another kind.
    pub(super) fn text(&self, name: &'static str) -> &str {
        let value = &self.get(name).0;
        if let Value::Path(path) = value {
            return path.to_str().unwrap_or_default();
        }
        let Value::Text(text) = value else { panic!("{name} is no text but {value:?}") };
        text
    }

    pub(super) fn path(&self, name: &'static str) -> Option<PathBuf> {
        let Value::Path(path) = &self.get(name).0 else { panic!("{name} is no path") };
        Some(path.clone()).filter(|path| !path.as_os_str().is_empty())
    }

    pub(super) fn flag(&self, name: &'static str) -> bool {
        self.get(name).0 == Value::Flag(true)
    }

    pub(super) fn list(&self, name: &'static str) -> Vec<String> {
        let Value::List(items) = &self.get(name).0 else { panic!("{name} is no list") };
        items.clone()
    }

    pub(super) fn number(&self, name: &'static str) -> u64 {
        let Value::Number(number) = self.get(name).0 else { panic!("{name} is no number") };
        number
    }

    pub(super) fn maybe(&self, name: &'static str) -> Option<u32> {
        let Value::Maybe(number) = self.get(name).0 else { panic!("{name} is always a number") };
        number
    }

    pub(super) fn small(&self, name: &'static str) -> u32 {
        u32::try_from(self.number(name)).expect("the table bounds it")
    }

    pub(super) fn size(&self, name: &'static str) -> usize {
        usize::try_from(self.number(name)).expect("the table bounds it")
    }

    pub(super) fn duration(&self, name: &'static str) -> Duration {
        let Value::Duration(time) = self.get(name).0 else { panic!("{name} is no time") };
        time
    }
}
