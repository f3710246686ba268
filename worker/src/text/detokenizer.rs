//! Bytes to text while they arrive: always valid UTF-8, and in all what `String::from_utf8_lossy` makes of the whole.
//!
//! Owns: the bytes of an unfinished character, at most three. Invariant: the state depends on the bytes pushed so far and
//! on nothing else, so replaying them restores it.

/// Decodes bytes that arrive in pieces.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    unfinished: Vec<u8>,
}

impl Detokenizer {
    /// Takes more bytes and gives the text that they complete; an unfinished character at the end is held back.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.push_from(bytes).0
    }

    /// Does as `push`, and gives where in that text the part of these bytes begins: at its start, unless bytes from before
    /// turned out to be no character.
    pub fn push_from(&mut self, bytes: &[u8]) -> (String, usize) {
        let mut all = std::mem::take(&mut self.unfinished);
        let before = all.len();
        all.extend_from_slice(bytes);
        let (mut text, mut own) = (String::with_capacity(all.len()), 0);
        let mut rest = all.as_slice();
        for chunk in all.utf8_chunks() {
            text.push_str(chunk.valid());
            rest = &rest[chunk.valid().len() + chunk.invalid().len()..];
            if chunk.invalid().is_empty() {
                continue;
            }
            if rest.is_empty() && is_unfinished(chunk.invalid()) {
                self.unfinished = chunk.invalid().to_vec();
            } else {
                text.push(char::REPLACEMENT_CHARACTER);
            }
            if before > 0 && all.len() - rest.len() == before {
                own = text.len();
            }
        }
        (text, own)
    }

    /// Gives what was held back: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> Option<char> {
        let unfinished = std::mem::take(&mut self.unfinished);
        (!unfinished.is_empty()).then_some(char::REPLACEMENT_CHARACTER)
    }
}

/// Says whether more bytes could complete these to a character.
fn is_unfinished(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every way to cut the bytes in up to three parts, and byte by byte, gives what the standard library gives.
    fn check(bytes: &[u8]) {
        let expected = String::from_utf8_lossy(bytes);
        for first in 0..=bytes.len() {
            for second in first..=bytes.len() {
                let mut decoder = Detokenizer::default();
                let mut text = String::new();
                for part in [&bytes[..first], &bytes[first..second], &bytes[second..]] {
                    text.push_str(&decoder.push(part));
                    assert!(decoder.unfinished.len() <= 3, "held back {:?}", decoder.unfinished);
                }
                text.extend(decoder.finish());
                assert_eq!(text, expected, "{bytes:x?} cut at {first} and {second}");
            }
        }
        let mut decoder = Detokenizer::default();
        let mut text: String = bytes.iter().map(|byte| decoder.push(&[*byte])).collect();
        text.extend(decoder.finish());
        assert_eq!(text, expected, "{bytes:x?} byte by byte");
    }

    #[test]
    fn bytes_begin_behind_those_that_they_do_not_go_on_with() {
        for (before, bytes, expected) in [
            (&b""[..], &b"ab"[..], 0),
            (b"\xe2\x82", b"\xacb", 0),
            (b"\xe2", b"\x82", 0),
            (b"\xe2", b"x", 3),
            (b"\xe2", b"\xe2", 3),
            // The second byte belongs to what is replaced.
            (b"\xf0", b"\x9fx", 0),
            (b"", b"y\xffz", 0),
            (b"a", b"b", 0),
        ] {
            let mut decoder = Detokenizer::default();
            decoder.push(before);
            assert_eq!(decoder.push_from(bytes).1, expected, "{bytes:x?} behind {before:x?}");
        }
    }

    #[test]
    fn any_cut_gives_what_the_whole_gives() {
        for text in ["", "a", "grüß", "你好 👩\u{200d}👩\u{200d}👧", "\u{fffd}", "\0\u{7f}"] {
            check(text.as_bytes());
        }
    }

    #[test]
    fn invalid_bytes_are_replaced_as_the_standard_library_does() {
        let cases: [&[u8]; 12] = [
            b"\xff",
            b"a\xc3",
            b"\xc3(",
            b"\xe2\x82",
            b"\xe2(\xa1",
            b"\xf0\x9f\x98",
            b"\xf0\x9f\x98x\xf0\x9f",
            b"\xf0\xf0\x9f\x98\x80",
            b"\xed\xa0\x80",
            b"\xc0\x80",
            b"\xf8\x88\x80\x80\x80",
            b"\x80\x80\xe2\x82\xac\x80",
        ];
        for bytes in cases {
            check(bytes);
        }
    }
}
