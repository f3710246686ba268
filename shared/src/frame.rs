//! Frames: a length of four bytes, little endian, then one message in bincode's standard encoding.
//!
//! Pure: the two processes do their own reading and writing. The length is checked before anything is reserved, decoding
//! is limited in the memory that it claims, and a frame with bytes left over is malformed.

use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use bincode::error::DecodeError;

use crate::limits::DECODE_BYTES_MAX;

/// Bytes of the length that stands before each message.
pub const LENGTH_BYTES: usize = 4;

const CONFIG: Configuration<LittleEndian, Varint, Limit<DECODE_BYTES_MAX>> =
    bincode::config::standard().with_limit::<DECODE_BYTES_MAX>();

/// Why bytes are not a frame, or a message cannot become one.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length is above the limit of its direction.
    #[error("frame of {bytes} bytes exceeds {max}")]
    TooLong {
        /// The length claimed or needed.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The length is zero: every message takes at least its tag.
    #[error("frame is empty")]
    Empty,
    /// The bytes are no message.
    #[error("frame is malformed: {0}")]
    Malformed(#[source] DecodeError),
    /// A whole message was read and bytes are left.
    #[error("frame has {left} bytes behind its message")]
    Trailing {
        /// How many.
        left: usize,
    },
    /// The message cannot be encoded.
    #[error("message cannot be encoded: {0}")]
    Encode(#[source] bincode::error::EncodeError),
}

/// Encodes a message with its length in front.
///
/// # Errors
/// `TooLong` when the message needs more than `bytes_max`; `Encode` when bincode refuses it.
pub fn encode<T: bincode::Encode>(message: &T, bytes_max: usize) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; LENGTH_BYTES];
    bincode::encode_into_std_write(message, &mut frame, CONFIG).map_err(FrameError::Encode)?;
    let bytes = frame.len() - LENGTH_BYTES;
    let too_long = FrameError::TooLong { bytes, max: bytes_max };
    if bytes > bytes_max {
        return Err(too_long);
    }
    let length = u32::try_from(bytes).map_err(|_| too_long)?;
    frame[..LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
    Ok(frame)
}

/// Reads the length in front of a message and checks it, before anything is reserved for it.
///
/// # Errors
/// `TooLong` above `bytes_max`; `Empty` for zero.
pub fn decode_length(prefix: [u8; LENGTH_BYTES], bytes_max: usize) -> Result<usize, FrameError> {
    let bytes = u32::from_le_bytes(prefix) as usize;
    match bytes {
        0 => Err(FrameError::Empty),
        _ if bytes > bytes_max => Err(FrameError::TooLong { bytes, max: bytes_max }),
        _ => Ok(bytes),
    }
}

/// Decodes the message of a frame, its length taken off.
///
/// # Errors
/// `Malformed` when the bytes are no message or claim too much memory; `Trailing` when bytes are left.
pub fn decode<T: bincode::Decode<()>>(payload: &[u8]) -> Result<T, FrameError> {
    let (message, used) = bincode::decode_from_slice(payload, CONFIG).map_err(FrameError::Malformed)?;
    match payload.len() - used {
        0 => Ok(message),
        left => Err(FrameError::Trailing { left }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{FROM_WORKER_FRAME_BYTES_MAX, TO_WORKER_FRAME_BYTES_MAX};
    use crate::message::{FromWorker, Logprobs, Piece, ToWorker, TokenLogprob, TokenRun, TokenText};
    use crate::units::RequestId;

    fn ping() -> Vec<u8> {
        encode(&ToWorker::Ping { nonce: 7 }, TO_WORKER_FRAME_BYTES_MAX).expect("a ping fits")
    }

    #[test]
    fn a_message_comes_back_as_it_went() {
        let message = FromWorker::Delta {
            id: RequestId(3),
            tokens: vec![1, 200_002],
            pieces: vec![Piece::Content("grüß dich".into()), Piece::Reasoning(String::new())],
            logprobs: vec![Logprobs {
                chosen: TokenLogprob { token: TokenText::Bytes(vec![0xc3]), logprob: -0.25 },
                top: vec![TokenLogprob { token: TokenText::Special("<|return|>".into()), logprob: -9999.0 }],
            }],
            runs: vec![TokenRun { skipped: 0, listed: 1 }],
        };
        let frame = encode(&message, FROM_WORKER_FRAME_BYTES_MAX).expect("a delta fits");
        let prefix = frame[..LENGTH_BYTES].try_into().expect("four bytes");
        assert_eq!(decode_length(prefix, FROM_WORKER_FRAME_BYTES_MAX).expect("in bounds"), frame.len() - LENGTH_BYTES);
        assert_eq!(decode::<FromWorker>(&frame[LENGTH_BYTES..]).expect("whole"), message);
    }

    #[test]
    fn a_length_is_checked_at_its_bounds() {
        assert!(matches!(decode_length(0u32.to_le_bytes(), 10), Err(FrameError::Empty)));
        assert!(matches!(decode_length(10u32.to_le_bytes(), 10), Ok(10)));
        assert!(matches!(decode_length(11u32.to_le_bytes(), 10), Err(FrameError::TooLong { bytes: 11, max: 10 })));
        assert!(matches!(decode_length([0xff; 4], 10), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn a_message_over_the_limit_is_not_sent() {
        let message = ToWorker::Ping { nonce: u64::MAX };
        let bytes = encode(&message, 100).expect("fits").len() - LENGTH_BYTES;
        assert!(encode(&message, bytes).is_ok());
        assert!(matches!(encode(&message, bytes - 1), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn bytes_behind_a_message_are_an_error() {
        let mut payload = ping()[LENGTH_BYTES..].to_vec();
        payload.push(0);
        assert!(matches!(decode::<ToWorker>(&payload), Err(FrameError::Trailing { left: 1 })));
    }

    #[test]
    fn a_cut_message_is_an_error() {
        let payload = ping();
        for cut in LENGTH_BYTES..payload.len() {
            assert!(decode::<ToWorker>(&payload[LENGTH_BYTES..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn a_claimed_length_reserves_nothing() {
        // Tag of Delta, id 0, then a vector that claims 2^62 token ids.
        let mut payload = vec![5, 0, 253];
        payload.extend((1u64 << 62).to_le_bytes());
        assert!(matches!(decode::<FromWorker>(&payload), Err(FrameError::Malformed(DecodeError::LimitExceeded))));
    }

    #[test]
    fn an_unknown_tag_is_an_error() {
        assert!(matches!(decode::<ToWorker>(&[99]), Err(FrameError::Malformed(_))));
    }
}
