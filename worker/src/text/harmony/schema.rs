//! Writes the JSON schema of a tool's parameters as a type in the manner of TypeScript, which is how the model was trained
//! to read it.
//!
//! Never refuses what a schema may hold: what it cannot say it writes as `any`. Bounded: below `TOOL_SCHEMA_DEPTH_MAX`
//! everything is `any`.
//!
//! Source: openai-harmony 0.0.8, `json_schema_to_typescript`, its odd line breaks included, byte for byte. One addition:
//! `anyOf`, which is `any` there, is written like a list of types, since that is how Python's tools say `string | null`.

use std::collections::HashSet;

use bulkhead_shared::limits::{TOOL_SCHEMA_BYTES_MAX, TOOL_SCHEMA_DEPTH_MAX};

use crate::text::error::TextError;
use crate::text::json::Json;

const ANY: &str = "any";

/// Writes the schema of a tool, given as JSON text.
///
/// # Errors
/// `ToolSchemaTooLong` above `TOOL_SCHEMA_BYTES_MAX`; `ToolSchemaSyntax` for text that is no JSON or is nested without
/// measure; `ToolSchema` for a value that is no object.
pub(super) fn typescript(tool: &str, schema: &str) -> Result<String, TextError> {
    let tool = || tool.to_owned();
    if schema.len() > TOOL_SCHEMA_BYTES_MAX {
        return Err(TextError::ToolSchemaTooLong { tool: tool(), bytes: schema.len(), max: TOOL_SCHEMA_BYTES_MAX });
    }
    let schema = serde_json::from_str(schema).map_err(|source| TextError::ToolSchemaSyntax { tool: tool(), source })?;
    if !matches!(schema, Json::Object(_)) {
        return Err(TextError::ToolSchema { tool: tool(), found: schema.type_name() });
    }
    Ok(type_of(&schema, "", 0))
}

fn type_of(schema: &Json, indent: &str, depth: usize) -> String {
    if depth >= TOOL_SCHEMA_DEPTH_MAX {
        return ANY.to_owned();
    }
    if let Some(variants) = variants_of(schema) {
        return union(variants, indent, depth);
    }
    if let Some(variants @ [_, ..]) = schema.get_array("anyOf") {
        return any_of(variants, indent, depth);
    }
    if let Some(types) = schema.get_array("type") {
        let names: Vec<&str> = types.iter().filter_map(text).collect();
        if !names.is_empty() {
            let mapped: Vec<&str> =
                names.into_iter().map(|name| if name == "integer" { "number" } else { name }).collect();
            return mapped.join(" | ");
        }
    }
    match schema.get_str("type") {
        Some("object") => object(schema, indent, depth),
        Some("string") => strings(schema),
        Some("number" | "integer") => "number".to_owned(),
        Some("boolean") => "boolean".to_owned(),
        Some("array") => match schema.get("items") {
            Some(items) => format!("{}[]", type_of(items, indent, depth + 1)),
            None => "Array<any>".to_owned(),
        },
        Some(_) | None => ANY.to_owned(),
    }
}

fn variants_of(schema: &Json) -> Option<&[Json]> {
    schema.get_array("oneOf").filter(|variants| !variants.is_empty())
}

fn text(value: &Json) -> Option<&str> {
    if let Json::String(text) = value { Some(text) } else { None }
}

fn union(variants: &[Json], indent: &str, depth: usize) -> String {
    let mut out = String::new();
    for variant in variants {
        out.push_str(&format!("\n{indent} | {}", nullable_type_of(variant, &format!("{indent}   "), depth + 1)));
        let default = variant.get("default").map(|default| match text(default) {
            Some(text) if !is_enum(variant) => format!("default: \"{text}\""),
            Some(_) | None => format!("default: {default}"),
        });
        out.push_str(&trailing_comment([variant.get_str("description").map(str::to_owned), default]));
    }
    out
}

fn any_of(variants: &[Json], indent: &str, depth: usize) -> String {
    let kind = |variant: &Json| match variant.get_str("type") {
        Some("null") => "null".to_owned(),
        Some(_) | None => type_of(variant, indent, depth + 1),
    };
    let kinds: Vec<String> = variants.iter().map(kind).collect();
    kinds.join(" | ")
}

fn strings(schema: &Json) -> String {
    let values = schema.get_array("enum").unwrap_or_default().iter().filter_map(text);
    let values: Vec<String> = values.map(|value| format!("\"{value}\"")).collect();
    if values.is_empty() { "string".to_owned() } else { values.join(" | ") }
}

fn object(schema: &Json, indent: &str, depth: usize) -> String {
    let mut out = String::new();
    if let Some(description) = schema.get_str("description") {
        out.push_str(&format!("{indent}// {description}\n"));
    }
    out.push_str("{\n");
    if let Some(Json::Object(properties)) = schema.get("properties") {
        let required: HashSet<&str> =
            schema.get_array("required").unwrap_or_default().iter().filter_map(text).collect();
        for (name, property) in properties {
            let mark = if required.contains(name.as_str()) { "" } else { "?" };
            comments_above(property, indent, &mut out);
            match variants_of(property) {
                Some(variants) => {
                    out.push_str(&union_property(&format!("{name}{mark}"), property, variants, indent, depth));
                }
                None => {
                    let kind = nullable_type_of(property, &format!("{indent}    "), depth + 1);
                    let default = default_of(property).map(|default| format!(" // {default}")).unwrap_or_default();
                    out.push_str(&format!("{indent}{name}{mark}: {kind},{default}\n"));
                }
            }
        }
    }
    out.push_str(&format!("{indent}}}"));
    out
}

/// Writes the comments that stand above every property.
fn comments_above(property: &Json, indent: &str, out: &mut String) {
    if let Some(title) = property.get_str("title") {
        out.push_str(&format!("{indent}// {title}\n{indent}//\n"));
    }
    if let Some(description) = property.get_str("description").filter(|_| variants_of(property).is_none()) {
        out.push_str(&format!("{indent}// {description}\n"));
    }
    if let Some(examples @ [_, ..]) = property.get_array("examples") {
        out.push_str(&format!("{indent}// Examples:\n"));
        for example in examples {
            out.extend(text(example).map(|example| format!("{indent}// - \"{example}\"\n")));
        }
    }
}

/// Writes a property that has one of several types, a line for each.
fn union_property(name: &str, property: &Json, variants: &[Json], indent: &str, depth: usize) -> String {
    let mut out = String::new();
    let description = property.get_str("description");
    let is_repeated = description.is_some() && variants[0].get_str("description") == description;
    let above = description.filter(|_| !is_repeated);
    if let Some(description) = above {
        out.push_str(&format!("{indent}// {description}\n"));
    }
    if let Some(default) = default_of(property) {
        out.push_str(&format!("{indent}// {default}\n"));
    }
    out.push_str(&format!("{indent}{name}:\n"));
    for (index, variant) in variants.iter().enumerate() {
        let kind = nullable_type_of(variant, &format!("{indent}   "), depth + 1);
        let own = variant.get_str("description").filter(|own| Some(*own) != description);
        // The line above has said it for the first one.
        let own = own.filter(|_| index > 0 || above.is_none());
        let comment = trailing_comment([own.map(str::to_owned), default_of(variant)]);
        out.push_str(&format!("{indent} | {kind}{comment}\n"));
    }
    out.push_str(&format!("{indent},\n"));
    out
}

fn nullable_type_of(schema: &Json, indent: &str, depth: usize) -> String {
    let kind = type_of(schema, indent, depth);
    let is_nullable = matches!(schema.get("nullable"), Some(Json::Bool(true)));
    if is_nullable && !kind.contains("null") { format!("{kind} | null") } else { kind }
}

fn default_of(schema: &Json) -> Option<String> {
    schema.get("default").map(|default| match text(default) {
        Some(text) if is_enum(schema) => format!("default: {text}"),
        Some(text) => format!("default: \"{text}\""),
        None => format!("default: {default}"),
    })
}

fn is_enum(schema: &Json) -> bool {
    schema.get_array("enum").is_some_and(|values| !values.is_empty())
}

fn trailing_comment(parts: [Option<String>; 2]) -> String {
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    if parts.is_empty() { String::new() } else { format!(" // {}", parts.join(" ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(schema: &str, expected: &str) {
        assert_eq!(typescript("f", schema).expect("is a schema"), expected, "{schema}");
    }

    /// The expected types are openai-harmony's own for these schemas.
    #[test]
    fn types_are_written_as_openai_harmony_does() {
        let cases = [
            (r##"{}"##, "any"),
            (r##"{"type":"object"}"##, "{\n}"),
            (
                r##"{"type":"object","properties":{"a":{"type":["integer","null"]},"b":{"enum":["x","y"]},"c":{"type":"string","enum":["x","y"],"default":"x"},"d":{"type":"string","default":"x"},"e":{"type":"array"},"f":{"type":"null"},"g":{"$ref":"#/x"}},"required":["c","zz"]}"##,
                "{\na?: number | null,\nb?: any,\nc: \"x\" | \"y\", // default: x\nd?: string, // default: \"x\"\ne?: Array<any>,\nf?: any,\ng?: any,\n}",
            ),
            (
                r##"{"type":"object","properties":{"a":{"type":"string","title":"A title","description":"What it is","examples":["one","two",3]},"b":{"type":"string","nullable":true},"c":{"type":["string","null"],"nullable":true},"d":{"type":"integer","default":{"k":[1,null,"x"]}}}}"##,
                "{\n// A title\n//\n// What it is\n// Examples:\n// - \"one\"\n// - \"two\"\na?: string,\nb?: string | null,\nc?: string | null,\nd?: number, // default: {\"k\":[1,null,\"x\"]}\n}",
            ),
            (
                r##"{"type":"object","properties":{"u":{"description":"Either","default":"x","oneOf":[{"type":"string","description":"A text"},{"type":"number","description":"A number","default":3,"nullable":true},{"type":"string","enum":["p","q"],"default":"p"}]}},"required":["u"]}"##,
                "{\n// Either\n// default: \"x\"\nu:\n | string\n | number | null // A number default: 3\n | \"p\" | \"q\" // default: p\n,\n}",
            ),
            (
                r##"{"type":"object","properties":{"u":{"description":"Same","oneOf":[{"type":"string","description":"Same"},{"type":"number","description":"Same"}]}}}"##,
                "{\nu?:\n | string\n | number\n,\n}",
            ),
            (
                r##"{"type":"object","properties":{"u":{"type":"array","items":{"oneOf":[{"type":"string","description":"T","default":"z"},{"type":"string","enum":["p"],"default":"p"},{"type":"object","properties":{"x":{"type":"boolean"}}}]}}}}"##,
                "{\nu?: \n     | string // T default: \"z\"\n     | \"p\" // default: \"p\"\n     | {\n       x?: boolean,\n       }[],\n}",
            ),
            (
                r##"{"oneOf":[{"type":"object","description":"First","properties":{"x":{"type":"object","description":"Inner","properties":{}}}},{"type":"integer","nullable":true}]}"##,
                "\n |    // First\n{\n   // Inner\n   x?:        // Inner\n{\n       },\n   } // First\n | number | null",
            ),
            (
                r##"{"type":"object","description":"Top","properties":{"weird":3,"list":[1],"t":{"type":3},"types":{"type":[1]},"e":{"type":"string","enum":[1,2]},"r":{"type":"string","description":"two\nlines"}},"required":"x"}"##,
                "// Top\n{\nweird?: any,\nlist?: any,\nt?: any,\ntypes?: any,\ne?: string,\n// two\nlines\nr?: string,\n}",
            ),
            (
                r##"{"type":"object","properties":{"m":{"type":"array","items":{"type":"string","enum":["a","b"]}},"n":{"type":"array","items":{"type":["string","integer"]}}}}"##,
                "{\nm?: \"a\" | \"b\"[],\nn?: string | number[],\n}",
            ),
        ];
        for (schema, expected) in cases {
            check(schema, expected);
        }
    }

    #[test]
    fn any_of_is_written_like_a_list_of_types() {
        check(r#"{"anyOf":[{"type":"string"},{"type":"null"}]}"#, "string | null");
        check(r#"{"anyOf":[]}"#, "any");
        check(
            r#"{"type":"object","properties":{"a":{"anyOf":[{"type":"integer"},{"type":"null"}],"default":null}}}"#,
            "{\na?: number | null, // default: null\n}",
        );
        check(r#"{"anyOf":[{"type":"array","items":{"$ref":"x"}},{"anyOf":[{"type":"boolean"}]}]}"#, "any[] | boolean");
    }
}
