//! Text to token ids and token ids to bytes, by the model's tokenizer.json.
//!
//! Owns: the tokenizer and a table of the bytes of every ordinary token. Refuses: tokenizers that cannot write every byte.
//! Two kinds can: byte-level ones, which write each byte as a character, and those of SentencePiece's form with a token for
//! each byte as the last resort, which write a space as U+2581.
//! Invariants: ordinary text never becomes a special token, however it is spelled; encoding neither adds tokens nor cuts
//! text off; long texts are encoded chunk by chunk, which bounds memory and the regular expression's backtracking.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use bulkhead_shared::message::TokenText;
use tokenizers::{AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper};

use crate::text::error::TextError;
use crate::text::files::read_capped;

/// Bytes of a tokenizer.json, at most. Those of published models have up to 35 MB.
const FILE_BYTES_MAX: u64 = 128 << 20;

/// Ids of a tokenizer, at most: the tables here are sized by the highest one.
const TOKEN_IDS_MAX: u32 = 1 << 21;

/// Bytes after which a text is cut at the next place where that changes nothing.
const CHUNK_BYTES: usize = 64 << 10;

/// Bytes of a text without such a place, at most. The regular expression engine gives up, by a panic, after ten million
/// steps back in one match, and some runs of one kind of character cost a step for each of them.
const UNBROKEN_BYTES_MAX: usize = 2 << 20;

/// How SentencePiece writes a space.
const SPACE: &str = "\u{2581}";

/// A model's tokenizer. Threads can share it.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    chunking: Chunking,
    special_ids: HashMap<String, u32>,
    structural: Vec<Structural>,
    prefix: Vec<u32>,
    strips_first_space: bool,
    tokens: TokenTable,
    chunks_encoded: AtomicU64,
}

/// A token that ordinary text never becomes, however it is spelled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Structural {
    /// The token.
    pub id: u32,
    /// How it is spelled; never empty.
    pub content: String,
    /// Whether white space before it belongs to it.
    pub takes_left: bool,
    /// Whether white space behind it belongs to it.
    pub takes_right: bool,
}

/// How a tokenizer writes bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ByteForm {
    /// Each byte as a character of its own.
    Alphabet,
    /// Characters as they are, with tokens like `<0x0A>` for the bytes of others.
    Fallback {
        /// Whether the first space of a decoded text is taken away, which encoding put there.
        strips_first_space: bool,
    },
}

/// Whether a text may be cut into chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chunking {
    /// The tokenizer splits words at white space before anything else, so a cut before a space changes nothing.
    AtSpaces,
    /// The tokenizer may join what stands before and behind a space.
    Whole,
}

impl Tokenizer {
    /// Opens the tokenizer.json of a model folder.
    ///
    /// # Errors
    /// `Read`, `FileTooLarge`, `Tokenizer` for a file that is missing, too long or malformed; `Decoder` and `Alphabet` for
    /// one that is not byte-level; `TokenId` for an id that no sound vocabulary has.
    pub fn open(dir: &Path) -> Result<Tokenizer, TextError> {
        let path = dir.join("tokenizer.json");
        let content = read_capped(&path, FILE_BYTES_MAX)?
            .ok_or_else(|| TextError::Read { path: path.clone(), source: std::io::ErrorKind::NotFound.into() })?;
        let malformed = |source| TextError::Tokenizer { path: path.clone(), source };
        let mut inner = tokenizers::Tokenizer::from_bytes(&content).map_err(malformed)?;
        let form = byte_form(&inner, &path)?;
        inner.with_truncation(None).map_err(malformed)?;
        inner.with_padding(None);
        without_dropout(&mut inner);

        let special_ids = special_ids(&inner);
        let tokens = TokenTable::new(&inner, form, &path)?;
        let whole = inner.encode_fast("", true).map_err(malformed)?;
        let prefix = whole.get_ids().iter().copied().take_while(|id| tokens.is_special(*id)).collect();
        make_markers_text(&mut inner).map_err(malformed)?;
        inner.set_encode_special_tokens(true);
        Ok(Tokenizer {
            chunking: chunking(&inner),
            structural: structural(&inner),
            inner,
            special_ids,
            prefix,
            strips_first_space: form == ByteForm::Fallback { strips_first_space: true },
            tokens,
            chunks_encoded: AtomicU64::new(0),
        })
    }

    /// Encodes ordinary text: nothing in it becomes a special token, and nothing is added.
    ///
    /// # Errors
    /// `Unbroken` for a text without word boundaries that is too long; `Encode` and `SpecialFromText` when the tokenizer
    /// is at fault.
    pub fn encode_ordinary(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let bytes = match self.chunking {
                Chunking::AtSpaces => chunk_bytes(rest),
                Chunking::Whole => rest.len(),
            };
            if bytes > UNBROKEN_BYTES_MAX {
                return Err(TextError::Unbroken { bytes, max: UNBROKEN_BYTES_MAX });
            }
            let (chunk, behind) = rest.split_at(bytes);
            let encoding = self.inner.encode_fast(chunk, false).map_err(|source| TextError::Encode { source })?;
            ids.extend_from_slice(encoding.get_ids());
            self.chunks_encoded.fetch_add(1, Ordering::Relaxed);
            rest = behind;
        }
        match ids.iter().find(|id| self.is_special(**id)) {
            Some(id) => Err(TextError::SpecialFromText { id: *id }),
            None => Ok(ids),
        }
    }

    /// Counts the chunks of text that were encoded so far: it moves for as long as a long text is being encoded.
    #[must_use]
    pub fn chunks_encoded(&self) -> u64 {
        self.chunks_encoded.load(Ordering::Relaxed)
    }

    /// Gives the bytes of an ordinary token: `None` for special ones and for ids that no token has. They need not be
    /// whole characters.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.tokens.bytes(id)
    }

    /// Gives what a token stands for, for people: its bytes, or the name of one that has no text.
    #[must_use]
    pub fn token_text(&self, id: u32) -> TokenText {
        let name = || self.structural.iter().find(|token| token.id == id).map(|token| token.content.clone());
        match self.token_bytes(id) {
            Some(bytes) => TokenText::Bytes(bytes.to_vec()),
            // A model may have more rows than its tokenizer has tokens.
            None => TokenText::Special(name().unwrap_or_else(|| format!("token_id:{id}"))),
        }
    }

    /// Gives the length of the longest text or name of a token.
    #[must_use]
    pub fn token_bytes_max(&self) -> usize {
        let lengths = self.tokens.places.iter().map(|place| match place {
            Place::Ordinary { length, .. } => *length as usize,
            Place::Special | Place::Unused => 0,
        });
        lengths.chain(self.structural.iter().map(|token| token.content.len())).max().unwrap_or(0)
    }

    /// Finds a special token by how it is spelled.
    #[must_use]
    pub fn special_id(&self, token: &str) -> Option<u32> {
        self.special_ids.get(token).copied()
    }

    /// Gives the tokens that ordinary text never becomes, in the order of their ids.
    #[must_use]
    pub fn structural(&self) -> &[Structural] {
        &self.structural
    }

    /// Gives the special tokens that the tokenizer puts in front of a text that is no conversation.
    #[must_use]
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// Says whether the first space of a text that stands alone is the tokenizer's and not the text's.
    #[must_use]
    pub fn strips_first_space(&self) -> bool {
        self.strips_first_space
    }

    /// Says whether a token is special: a marker that stands for no text.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.tokens.is_special(id)
    }

    /// Gives the number of ids, gaps included: one more than the highest. The model may have more rows than that.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.places.len()
    }

    /// Says whether the vocabulary is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What each id stands for.
#[derive(Debug)]
struct TokenTable {
    bytes: Vec<u8>,
    /// One for each id.
    places: Vec<Place>,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// No token has this id.
    Unused,
    Special,
    Ordinary {
        start: u32,
        length: u32,
    },
}

impl TokenTable {
    fn new(tokenizer: &tokenizers::Tokenizer, form: ByteForm, path: &Path) -> Result<TokenTable, TextError> {
        let byte_of = byte_alphabet();
        let mut vocabulary: Vec<(String, u32)> = tokenizer.get_vocab(true).into_iter().collect();
        vocabulary.sort_unstable_by_key(|(_, id)| *id);
        if let Some((_, id)) = vocabulary.last().filter(|(_, id)| *id >= TOKEN_IDS_MAX) {
            return Err(TextError::TokenId { path: path.to_owned(), id: *id, max: TOKEN_IDS_MAX });
        }
        let added = tokenizer.get_added_tokens_decoder();
        let mut table = TokenTable { bytes: Vec::new(), places: Vec::new() };
        for (token, id) in vocabulary {
            table.places.resize(table.places.len().max(id as usize + 1), Place::Unused);
            table.places[id as usize] = match added.get(&id) {
                Some(added) if added.special => Place::Special,
                Some(added) => table.append(added.content.as_bytes()),
                None => match form {
                    // A character outside of the alphabet stands for itself.
                    ByteForm::Alphabet => {
                        let bytes: Vec<u8> = token.chars().flat_map(|c| decode(c, &byte_of)).collect();
                        table.append(&bytes)
                    }
                    ByteForm::Fallback { .. } => match fallback_byte(&token) {
                        Some(byte) => table.append(&[byte]),
                        None => table.append(token.replace(SPACE, " ").as_bytes()),
                    },
                },
            };
        }
        Ok(table)
    }

    fn append(&mut self, bytes: &[u8]) -> Place {
        let place = |length: usize| u32::try_from(length).expect("the file and so its tokens are shorter than 4 GiB");
        let place = Place::Ordinary { start: place(self.bytes.len()), length: place(bytes.len()) };
        self.bytes.extend_from_slice(bytes);
        place
    }

    fn bytes(&self, id: u32) -> Option<&[u8]> {
        match self.places.get(usize::try_from(id).ok()?)? {
            Place::Ordinary { start, length } => Some(&self.bytes[*start as usize..(*start + *length) as usize]),
            Place::Special | Place::Unused => None,
        }
    }

    fn is_special(&self, id: u32) -> bool {
        matches!(self.places.get(id as usize), Some(Place::Special))
    }
}

/// Gives the character that stands for each byte in a byte-level vocabulary: printable ones for themselves, the others
/// from U+0100 on, in order.
///
/// Source: openai/gpt-2 `encoder.py`, `bytes_to_unicode`.
fn byte_alphabet() -> HashMap<char, u8> {
    let mut next = 0x100;
    (0..=255u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => (char::from(byte), byte),
            _ => {
                next += 1;
                (char::from_u32(next - 1).expect("below U+0200 every number is a character"), byte)
            }
        })
        .collect()
}

fn decode(character: char, byte_of: &HashMap<char, u8>) -> Vec<u8> {
    match byte_of.get(&character) {
        Some(byte) => vec![*byte],
        None => character.to_string().into_bytes(),
    }
}

/// Finds out how a tokenizer writes bytes, and refuses one that would lose some.
fn byte_form(tokenizer: &tokenizers::Tokenizer, path: &Path) -> Result<ByteForm, TextError> {
    let form = match tokenizer.get_decoder() {
        Some(DecoderWrapper::ByteLevel(_)) => Ok(ByteForm::Alphabet),
        Some(DecoderWrapper::Sequence(_)) => fallback_form(tokenizer).ok_or("Sequence"),
        Some(DecoderWrapper::Metaspace(_)) => Err("Metaspace"),
        Some(DecoderWrapper::WordPiece(_)) => Err("WordPiece"),
        Some(_) => Err("another decoder"),
        None => Err("none"),
    };
    let form = form.map_err(|decoder| TextError::Decoder { path: path.to_owned(), decoder })?;
    let has = |token: String| tokenizer.token_to_id(&token).is_some();
    let missing = match form {
        // Without the bare character, text with this byte would lose it.
        ByteForm::Alphabet => {
            let missing = byte_alphabet().into_iter().filter(|(character, _)| !has(character.to_string()));
            missing.map(|(_, byte)| byte).min()
        }
        ByteForm::Fallback { .. } => (0..=255u8).find(|byte| !has(format!("<0x{byte:02X}>"))),
    };
    match missing {
        Some(byte) => Err(TextError::Alphabet { path: path.to_owned(), byte }),
        None => Ok(form),
    }
}

/// Recognises the decoder of SentencePiece's form: U+2581 to spaces, byte tokens to bytes, all in one, and perhaps
/// without the first space.
fn fallback_form(tokenizer: &tokenizers::Tokenizer) -> Option<ByteForm> {
    let ModelWrapper::BPE(bpe) = tokenizer.get_model() else { return None };
    if !bpe.byte_fallback {
        return None;
    }
    let decoder = serde_json::to_value(tokenizer.get_decoder()?).ok()?;
    let usual = [
        serde_json::json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        serde_json::json!({"type": "ByteFallback"}),
        serde_json::json!({"type": "Fuse"}),
    ];
    let strip = serde_json::json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
    let (first, last) = decoder["decoders"].as_array()?.split_at_checked(usual.len())?;
    match last {
        _ if first != usual => None,
        [] => Some(ByteForm::Fallback { strips_first_space: false }),
        [only] if *only == strip => Some(ByteForm::Fallback { strips_first_space: true }),
        _ => None,
    }
}

/// Reads a token like `<0x0A>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>').filter(|digits| digits.len() == 2)?;
    u8::from_str_radix(digits, 16).ok()
}

fn structural(tokenizer: &tokenizers::Tokenizer) -> Vec<Structural> {
    let added = tokenizer.get_added_tokens_decoder().into_iter();
    let mut structural: Vec<Structural> = added
        .filter(|(_, token)| token.special && !token.content.is_empty())
        .map(|(id, token)| Structural {
            id,
            content: token.content,
            takes_left: token.lstrip,
            takes_right: token.rstrip,
        })
        .collect();
    structural.sort_unstable_by_key(|token| token.id);
    structural
}

/// Takes away the random choice that some tokenizers keep from their training.
fn without_dropout(tokenizer: &mut tokenizers::Tokenizer) {
    if let ModelWrapper::BPE(bpe) = tokenizer.get_model()
        && bpe.dropout.is_some()
    {
        let mut bpe = bpe.clone();
        bpe.dropout = None;
        tokenizer.with_model(bpe);
    }
}

fn special_ids(tokenizer: &tokenizers::Tokenizer) -> HashMap<String, u32> {
    let added = tokenizer.get_added_tokens_decoder();
    added.into_iter().filter(|(_, token)| token.special).map(|(id, token)| (token.content, id)).collect()
}

/// Makes ordinary text also of added tokens that look like markers and are not declared special, `<tool_call>` for one:
/// a prompt must not forge them. Their ids still decode to their text.
fn make_markers_text(tokenizer: &mut tokenizers::Tokenizer) -> tokenizers::Result<()> {
    let is_marker = |content: &str| {
        (content.starts_with('<') && content.ends_with('>')) || (content.starts_with('[') && content.ends_with(']'))
    };
    let markers: Vec<AddedToken> = tokenizer
        .get_added_tokens_decoder()
        .into_values()
        .filter(|token| !token.special && is_marker(&token.content))
        .map(|token| token.special(true))
        .collect();
    tokenizer.add_special_tokens(markers)?;
    Ok(())
}

/// Finds out whether long texts may be cut before spaces.
///
/// All published byte-level patterns (GPT-2, Llama 3, Qwen, o200k and their kin) end a piece at a space that follows
/// something else than white space, and composing characters never reaches over a space.
fn chunking(tokenizer: &tokenizers::Tokenizer) -> Chunking {
    let normalizes_by_character = match tokenizer.get_normalizer() {
        None | Some(NormalizerWrapper::NFC(_)) => true,
        Some(_) => false,
    };
    let splits_words = |pre_tokenizer: &PreTokenizerWrapper| {
        matches!(pre_tokenizer, PreTokenizerWrapper::Split(_))
            || matches!(pre_tokenizer, PreTokenizerWrapper::ByteLevel(level) if level.use_regex)
    };
    let splits_at_spaces = match tokenizer.get_pre_tokenizer() {
        Some(PreTokenizerWrapper::Sequence(sequence)) => sequence.as_ref().iter().any(splits_words),
        Some(pre_tokenizer) => splits_words(pre_tokenizer),
        None => false,
    };
    if normalizes_by_character && splits_at_spaces { Chunking::AtSpaces } else { Chunking::Whole }
}

/// Gives the length of the next chunk: up to the first place behind `CHUNK_BYTES` where a space follows something else than
/// white space.
fn chunk_bytes(text: &str) -> usize {
    let bytes = text.as_bytes();
    let is_cut = |at: &usize| bytes[*at] == b' ' && text[..*at].chars().next_back().is_some_and(|c| !c.is_whitespace());
    (CHUNK_BYTES..bytes.len()).find(is_cut).unwrap_or(bytes.len())
}
