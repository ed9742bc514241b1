//! Compression of batches: LZ4 a batch at a time, or one Zstandard stream a lane.
//!
//! A lane's Zstandard stream goes on from batch to batch, with a window of 8 MiB and long-distance
//! matching: what a page shares with a page sent some thousand pages before is found, which blocks
//! of their own cannot. Batches that travel plain or by LZ4 in between are not part of the stream.
//!
//! Invariants: a decoder gets the batches of its lane in the order in which they were encoded; it
//! writes no more than the announced length and reads no more than it was given; its memory is
//! bounded by the window.

use std::io;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use zstd::stream::raw::{CParameter, DParameter, Decoder, Encoder, InBuffer, Operation, OutBuffer};

use crate::error::{Classify, ErrorBin};

/// Binary logarithm of the Zstandard stream's window: what either end keeps of every lane.
pub const ZSTD_WINDOW_LOG: u32 = 23;

/// Level of the Zstandard stream.
const ZSTD_LEVEL: i32 = 1;

/// Binary logarithm of how many earlier places with the same hash are compared: where memory repeats itself
/// often, more of them cost time and find nothing better.
const ZSTD_LDM_BUCKET_LOG: u32 = 1;

/// How a batch's contents are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Codec {
    /// As they are.
    #[default]
    Plain,
    /// An LZ4 block of its own.
    Lz4,
    /// The next part of the lane's Zstandard stream.
    Zstd,
}

impl Codec {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Plain, Self::Lz4, Self::Zstd];
}

/// Contents that could not be packed or unpacked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CodecError {
    /// They are damaged.
    #[error("Packed contents do not unpack: {0}")]
    Damaged(String),
    /// They are longer or shorter than announced.
    #[error("Packed contents have another length than the {announced_bytes} bytes announced")]
    Length {
        /// The announced length in bytes.
        announced_bytes: usize,
    },
    /// The library failed to pack.
    #[error("Contents cannot be packed")]
    Pack(#[source] io::Error),
}

impl Classify for CodecError {
    fn bin(&self) -> ErrorBin {
        match self {
            Self::Damaged(_) | Self::Length { .. } => ErrorBin::PeerMisbehaved,
            Self::Pack(_) => ErrorBin::System,
        }
    }
}

/// Bytes that packing `content_bytes` may take.
pub fn packed_bytes_max(content_bytes: usize) -> usize {
    let zstd = zstd::zstd_safe::compress_bound(content_bytes) + 64;
    zstd.max(lz4_flex::block::get_maximum_output_size(content_bytes))
}

/// Packs the batches of one lane.
#[derive(Default)]
pub struct Packer {
    zstd: Option<Encoder<'static>>,
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer").field("zstd", &self.zstd.is_some()).finish()
    }
}

impl Packer {
    /// Packs `content` into `out`, which is at least [`packed_bytes_max`] long, and returns the
    /// packed length in bytes. [`Codec::Plain`] copies.
    ///
    /// # Errors
    /// [`CodecError::Pack`]: out of memory.
    pub fn pack(
        &mut self,
        codec: Codec,
        content: &[u8],
        out: &mut [u8],
    ) -> Result<usize, CodecError> {
        match codec {
            Codec::Plain => {
                let target = out.get_mut(..content.len());
                target.ok_or_else(too_small)?.copy_from_slice(content);
                Ok(content.len())
            }
            Codec::Lz4 => lz4_flex::block::compress_into(content, out)
                .map_err(|error| CodecError::Pack(io::Error::other(error))),
            Codec::Zstd => self.pack_zstd(content, out).map_err(CodecError::Pack),
        }
    }

    fn pack_zstd(&mut self, content: &[u8], out: &mut [u8]) -> io::Result<usize> {
        let encoder = match &mut self.zstd {
            Some(encoder) => encoder,
            none => none.insert(new_encoder()?),
        };
        let mut input = InBuffer::around(content);
        let mut output = OutBuffer::around(out);
        while input.pos() < content.len() {
            let (read, written) = (input.pos(), output.pos());
            encoder.run(&mut input, &mut output)?;
            if (input.pos(), output.pos()) == (read, written) {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        match encoder.flush(&mut output)? {
            0 => Ok(output.pos()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }
}

fn too_small() -> CodecError {
    CodecError::Pack(io::ErrorKind::WriteZero.into())
}

fn new_encoder() -> io::Result<Encoder<'static>> {
    let mut encoder = Encoder::new(ZSTD_LEVEL)?;
    encoder.set_parameter(CParameter::WindowLog(ZSTD_WINDOW_LOG))?;
    encoder.set_parameter(CParameter::EnableLongDistanceMatching(true))?;
    encoder.set_parameter(CParameter::LdmBucketSizeLog(ZSTD_LDM_BUCKET_LOG))?;
    // The transport's encryption already proves that nothing was changed.
    encoder.set_parameter(CParameter::ChecksumFlag(false))?;
    Ok(encoder)
}

/// Unpacks the batches of one lane.
#[derive(Default)]
pub struct Unpacker {
    zstd: Option<Decoder<'static>>,
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpacker").field("zstd", &self.zstd.is_some()).finish()
    }
}

impl Unpacker {
    /// Unpacks contents that came in `pieces` and fills `out` with them exactly.
    ///
    /// # Errors
    /// [`CodecError::Damaged`] or [`CodecError::Length`]; the lane cannot go on then.
    pub fn unpack<'a>(
        &mut self,
        codec: Codec,
        mut pieces: impl Iterator<Item = &'a [u8]>,
        out: &mut [u8],
    ) -> Result<(), CodecError> {
        let announced_bytes = out.len();
        let wrong_length = CodecError::Length { announced_bytes };
        match codec {
            Codec::Plain => {
                let mut rest = out;
                for piece in pieces {
                    let Some((target, left)) = rest.split_at_mut_checked(piece.len()) else {
                        return Err(wrong_length);
                    };
                    target.copy_from_slice(piece);
                    rest = left;
                }
                if rest.is_empty() { Ok(()) } else { Err(wrong_length) }
            }
            Codec::Lz4 => {
                let packed = pieces.collect::<Vec<_>>().concat();
                match lz4_flex::block::decompress_into(&packed, out) {
                    Ok(bytes) if bytes == announced_bytes => Ok(()),
                    Ok(_) => Err(wrong_length),
                    Err(error) => Err(CodecError::Damaged(error.to_string())),
                }
            }
            Codec::Zstd => self.unpack_zstd(&mut pieces, out),
        }
    }

    fn unpack_zstd(
        &mut self,
        pieces: &mut dyn Iterator<Item = &[u8]>,
        out: &mut [u8],
    ) -> Result<(), CodecError> {
        let damaged = |error: io::Error| CodecError::Damaged(error.to_string());
        let announced_bytes = out.len();
        let decoder = match &mut self.zstd {
            Some(decoder) => decoder,
            none => none.insert(new_decoder().map_err(damaged)?),
        };
        let mut output = OutBuffer::around(out);
        for piece in pieces {
            let mut input = InBuffer::around(piece);
            while input.pos() < piece.len() {
                let (read, written) = (input.pos(), output.pos());
                decoder.run(&mut input, &mut output).map_err(damaged)?;
                if (input.pos(), output.pos()) == (read, written) {
                    return Err(CodecError::Length { announced_bytes });
                }
            }
        }
        // All input is read, but contents may wait for room that there is not.
        let mut beyond = [0];
        let mut more = OutBuffer::around(&mut beyond);
        decoder.run(&mut InBuffer::around(&[]), &mut more).map_err(damaged)?;
        if output.pos() == announced_bytes && more.pos() == 0 {
            Ok(())
        } else {
            Err(CodecError::Length { announced_bytes })
        }
    }
}

fn new_decoder() -> io::Result<Decoder<'static>> {
    let mut decoder = Decoder::new()?;
    decoder.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG))?;
    Ok(decoder)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_codec() -> impl Strategy<Value = Codec> {
        prop::sample::select(&Codec::ALL[..])
    }

    /// Contents that compress, that do not, or that repeat others.
    fn any_content() -> impl Strategy<Value = Vec<u8>> {
        (any::<u64>(), 0u8..4, 1usize..40_000).prop_map(|(seed, kind, bytes)| {
            let mut state = seed % 4 + 1;
            let mut next = move || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            };
            (0..bytes).map(|_| if kind == 0 { next() } else { next() % (kind * 2) }).collect()
        })
    }

    fn pack(packer: &mut Packer, codec: Codec, content: &[u8]) -> Vec<u8> {
        let mut out = vec![0; packed_bytes_max(content.len())];
        let bytes = packer.pack(codec, content, &mut out).unwrap();
        out.truncate(bytes);
        out
    }

    proptest! {
        #[test]
        fn a_lanes_batches_come_back(
            batches in prop::collection::vec((any_codec(), any_content()), 1..12),
            piece in 1usize..3000,
        ) {
            let (mut packer, mut unpacker) = (Packer::default(), Unpacker::default());
            for (codec, content) in batches {
                let packed = pack(&mut packer, codec, &content);
                let mut out = vec![0; content.len()];
                unpacker.unpack(codec, packed.chunks(piece), &mut out).unwrap();
                prop_assert_eq!(out, content);
            }
        }

        #[test]
        fn another_length_is_refused(codec in any_codec(), content in any_content(), more in any::<bool>()) {
            let packed = pack(&mut Packer::default(), codec, &content);
            let announced_bytes = if more { content.len() + 1 } else { content.len() - 1 };
            let unpacked = Unpacker::default().unpack(codec, [&packed[..]].into_iter(), &mut vec![0; announced_bytes]);
            prop_assert!(unpacked.is_err());
        }

        #[test]
        fn any_bytes_are_refused_or_fill_what_was_announced(
            codec in any_codec(),
            batches in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..300), 0usize..5000), 1..4),
        ) {
            let mut unpacker = Unpacker::default();
            for (packed, bytes) in batches {
                let _refused = unpacker.unpack(codec, packed.chunks(50), &mut vec![0; bytes]);
            }
        }
    }

    #[test]
    fn the_stream_remembers_earlier_batches() {
        let content: Vec<u8> =
            (0..50_000u64).flat_map(|n| (n * n * 0x9e37_79b9).to_le_bytes()).collect();
        let mut packer = Packer::default();
        let first = pack(&mut packer, Codec::Zstd, &content).len();
        pack(&mut packer, Codec::Lz4, &content);
        let again = pack(&mut packer, Codec::Zstd, &content).len();
        assert!(again < first / 100, "{first} bytes, then {again}");
    }

    #[test]
    fn a_window_beyond_the_limit_is_refused() {
        let mut encoder = Encoder::new(1).unwrap();
        encoder.set_parameter(CParameter::WindowLog(ZSTD_WINDOW_LOG + 1)).unwrap();
        let content = vec![7; 1000];
        let mut packed = vec![0; 2000];
        let mut out = OutBuffer::around(&mut packed[..]);
        encoder.run(&mut InBuffer::around(&content), &mut out).unwrap();
        encoder.flush(&mut out).unwrap();
        let bytes = out.pos();
        let unpacked = Unpacker::default().unpack(
            Codec::Zstd,
            [&packed[..bytes]].into_iter(),
            &mut vec![0; 1000],
        );
        assert!(matches!(unpacked, Err(CodecError::Damaged(_))), "{unpacked:?}");
    }
}
