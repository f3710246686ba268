//! Reads a JSON object key by key, so that every error can name its parameter.
//!
//! Values stay text until they are asked for: nothing is built for what nobody reads. Of duplicate keys the last counts.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::RequestError;

/// The values of one object that were not taken yet.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    path: String,
    values: BTreeMap<String, &'a RawValue>,
}

impl<'a> Fields<'a> {
    /// Reads a body.
    pub(super) fn body(bytes: &'a [u8]) -> Result<Fields<'a>, RequestError> {
        match serde_json::from_slice(bytes) {
            Ok(values) => Ok(Fields { path: String::new(), values }),
            Err(error) => Err(RequestError::NotJson { reason: error.to_string() }),
        }
    }

    /// Reads an object inside of a body.
    pub(super) fn object(path: &str, value: &'a RawValue) -> Result<Fields<'a>, RequestError> {
        match serde_json::from_str(value.get()) {
            Ok(values) => Ok(Fields { path: format!("{path}."), values }),
            Err(_) => Err(invalid(path, "must be an object")),
        }
    }

    /// Gives the full name of a key.
    pub(super) fn param(&self, key: &str) -> String {
        format!("{}{key}", self.path)
    }

    /// Takes a value as it stands; `null` is no value.
    pub(super) fn raw(&mut self, key: &str) -> Option<&'a RawValue> {
        self.values.remove(key).filter(|value| value.get() != "null")
    }

    /// Takes a value of a type; `null` is no value. `must` completes the sentence `<param> ...` of the error.
    pub(super) fn take<T: DeserializeOwned>(&mut self, key: &str, must: &str) -> Result<Option<T>, RequestError> {
        self.raw(key).map(|value| parse(&self.param(key), value, must)).transpose()
    }

    /// Takes a value that must be there.
    pub(super) fn require<T: DeserializeOwned>(&mut self, key: &str, must: &str) -> Result<T, RequestError> {
        self.take(key, must)?.ok_or_else(|| RequestError::Missing { param: self.param(key) })
    }

    /// Takes a list, its items as they stand.
    pub(super) fn list(&mut self, key: &str) -> Result<Option<Vec<&'a RawValue>>, RequestError> {
        self.raw(key).map(|value| items(&self.param(key), value)).transpose()
    }

    /// Takes an object.
    pub(super) fn inner(&mut self, key: &str) -> Result<Option<Fields<'a>>, RequestError> {
        self.raw(key).map(|value| Fields::object(&self.param(key), value)).transpose()
    }

    /// Gives what was not taken.
    pub(super) fn rest(self) -> impl Iterator<Item = (String, &'a RawValue)> {
        let path = self.path;
        self.values
            .into_iter()
            .filter(|(_, value)| value.get() != "null")
            .map(move |(key, value)| (format!("{path}{key}"), value))
    }
}

/// Reads a value of a type.
pub(super) fn parse<T: DeserializeOwned>(param: &str, value: &RawValue, must: &str) -> Result<T, RequestError> {
    serde_json::from_str(value.get()).map_err(|_| invalid(param, must))
}

/// Reads a list, its items as they stand.
pub(super) fn items<'a>(param: &str, value: &'a RawValue) -> Result<Vec<&'a RawValue>, RequestError> {
    serde_json::from_str(value.get()).map_err(|_| invalid(param, "must be a list"))
}

/// Says that a value has the wrong type or is out of bounds.
pub(super) fn invalid(param: &str, reason: impl Into<String>) -> RequestError {
    RequestError::Invalid { param: param.to_owned(), reason: reason.into() }
}

/// Says that a value cannot be honoured.
pub(super) fn unsupported(param: &str, reason: impl Into<String>) -> RequestError {
    RequestError::Unsupported { param: param.to_owned(), reason: reason.into() }
}
