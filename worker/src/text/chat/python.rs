//! What templates expect of the Python that they were written for: `tojson` as transformers defines it, and `strftime`.
//!
//! Source: transformers 5, `utils/chat_template_utils.py`; Python's `json.dumps` and `datetime.strftime` in the C locale.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// How deep a value may be nested that a template writes as JSON.
const DEPTH_MAX: usize = 160;

/// Spaces of one level of indentation, at most.
const INDENT_MAX: usize = 16;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

fn failed(detail: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail)
}

/// The filter `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let is_ascii: Option<bool> = options.get("ensure_ascii")?;
    let is_sorted: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    if indent.is_some_and(|indent| indent > INDENT_MAX) {
        return Err(failed(format!("tojson: indent above {INDENT_MAX}")));
    }
    let (item, key) = match separators.as_deref() {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(failed("tojson: separators are not two")),
    };
    let mut writer = Writer {
        indent,
        item,
        key,
        is_ascii: is_ascii.unwrap_or(false),
        is_sorted: is_sorted.unwrap_or(false),
        json: String::new(),
    };
    writer.value(value, 0)?;
    Ok(writer.json)
}

struct Writer {
    indent: Option<usize>,
    /// Between items.
    item: String,
    /// Between a key and its value.
    key: String,
    is_ascii: bool,
    is_sorted: bool,
    json: String,
}

impl Writer {
    #[expect(clippy::wildcard_enum_match_arm, reason = "minijinja may add kinds, and none of them would be JSON")]
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(failed(format!("tojson: nested more than {DEPTH_MAX} levels deep")));
        }
        match value.kind() {
            ValueKind::None => self.json.push_str("null"),
            ValueKind::Bool => self.json.push_str(if value.is_true() { "true" } else { "false" }),
            // Numbers print as Python prints them.
            ValueKind::Number => self.json.push_str(&value.to_string()),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(('[', ']'), &items, depth, |writer, item| writer.value(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.is_sorted {
                    keys.sort();
                }
                self.list(('{', '}'), &keys, depth, |writer, key| {
                    writer.string(&key.to_string());
                    writer.json.push_str(&writer.key.clone());
                    writer.value(&value.get_item(key)?, depth + 1)
                })?;
            }
            kind => return Err(failed(format!("tojson: {kind} is no JSON"))),
        }
        Ok(())
    }

    fn list(
        &mut self,
        (open, close): (char, char),
        items: &[Value],
        depth: usize,
        mut write: impl FnMut(&mut Writer, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.json.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                self.json.push_str(&self.item.clone());
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.line(depth);
        }
        self.json.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.json.push('\n');
            self.json.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.json.push('"');
        for c in text.chars() {
            match c {
                '"' => self.json.push_str("\\\""),
                '\\' => self.json.push_str("\\\\"),
                '\n' => self.json.push_str("\\n"),
                '\r' => self.json.push_str("\\r"),
                '\t' => self.json.push_str("\\t"),
                '\u{8}' => self.json.push_str("\\b"),
                '\u{c}' => self.json.push_str("\\f"),
                c if c < ' ' || (self.is_ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.json.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.json.push(c),
            }
        }
        self.json.push('"');
    }
}

/// A day of the calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Date {
    year: u32,
    /// From 1.
    month: usize,
    /// From 1.
    day: u32,
}

impl Date {
    /// Reads `YYYY-MM-DD`.
    pub(super) fn parse(text: &str) -> Option<Date> {
        let mut numbers = text.split('-').map(|part| part.parse::<u32>().ok());
        let date = Date {
            year: numbers.next()?.filter(|year| (1..=9999).contains(year))?,
            month: usize::try_from(numbers.next()??).ok()?,
            day: numbers.next()??,
        };
        let is_sound = (1..=12).contains(&date.month) && date.day >= 1 && date.day <= days_of(date.year, date.month);
        (is_sound && numbers.next().is_none()).then_some(date)
    }

    /// Writes the date, at midnight, as Python does.
    pub(super) fn strftime(self, format: &str) -> Result<String, Error> {
        let mut text = String::new();
        let mut rest = format.chars();
        while let Some(c) = rest.next() {
            if c != '%' {
                text.push(c);
                continue;
            }
            let mut directive = rest.next();
            let is_unpadded = directive == Some('-');
            if is_unpadded {
                directive = rest.next();
            }
            let two = |number: u32| if is_unpadded { number.to_string() } else { format!("{number:02}") };
            let month = MONTHS[self.month - 1];
            let day = DAYS[self.weekday()];
            let written = match directive {
                Some('Y') => self.year.to_string(),
                Some('y') => two(self.year % 100),
                Some('m') => two(self.month as u32),
                Some('d') => two(self.day),
                Some('e') => format!("{:>2}", self.day),
                Some('B') => month.to_owned(),
                Some('b' | 'h') => month[..3].to_owned(),
                Some('A') => day.to_owned(),
                Some('a') => day[..3].to_owned(),
                Some('j') if is_unpadded => self.day_of_year().to_string(),
                Some('j') => format!("{:03}", self.day_of_year()),
                Some('H' | 'M' | 'S') => two(0),
                Some('I') => "12".to_owned(),
                Some('p') => "AM".to_owned(),
                Some('F') => format!("{:04}-{:02}-{:02}", self.year, self.month, self.day),
                Some('%') => "%".to_owned(),
                other => return Err(failed(format!("strftime_now: %{} is not supported", other.unwrap_or(' ')))),
            };
            text.push_str(&written);
        }
        Ok(text)
    }

    fn day_of_year(self) -> u32 {
        (1..self.month).map(|month| days_of(self.year, month)).sum::<u32>() + self.day
    }

    /// Counts from Sunday.
    fn weekday(self) -> usize {
        let before = self.year - 1;
        // 1 January of year 1 was a Monday.
        ((before + before / 4 - before / 100 + before / 400 + self.day_of_year()) % 7) as usize
    }
}

fn days_of(year: u32, month: usize) -> u32 {
    let is_leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if is_leap => 29,
        2 => 28,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_written_as_python_writes_them() {
        let write = |date: &str, format: &str| Date::parse(date).expect(date).strftime(format);
        for (date, format, expected) in [
            ("2026-11-25", "%d %b %Y", "25 Nov 2026"),
            ("2026-11-25", "%A, %B %-d, %y %j", "Wednesday, November 25, 26 329"),
            ("2024-02-29", "%a %d/%m/%Y %H:%M:%S %%", "Thu 29/02/2024 00:00:00 %"),
            ("2000-03-01", "%a %j %F", "Wed 061 2000-03-01"),
            ("0001-01-01", "%A", "Monday"),
        ] {
            assert_eq!(write(date, format).expect(format), expected);
        }
        assert!(write("2026-11-25", "%Q").is_err() && write("2026-11-25", "%").is_err());
        for text in ["", "2026", "2026-13-01", "2026-02-29", "2026-1-0", "2026-01-01-01", "x-y-z", "-1-1-1"] {
            assert_eq!(Date::parse(text), None, "{text}");
        }
    }
}
