//! Parts of the device state, packed for the wire: on a slow link the guest would wait for them.

use migrate_core::codec::{Codec, CodecError, Packer, Unpacker, packed_bytes_max};
use transport::messages::{DEVICE_CHUNK_BYTES_MAX, DeviceState};

/// The part of a device state that begins at `offset`, in messages.
pub fn messages(part: &[u8], mut offset: u64) -> impl Iterator<Item = DeviceState> {
    part.chunks(DEVICE_CHUNK_BYTES_MAX).map(move |part| {
        let begins = offset;
        offset += part.len() as u64;
        let bytes = packed(part).unwrap_or_else(|| part.to_vec());
        DeviceState { offset: begins, part_bytes: part.len() as u32, bytes }
    })
}

/// Nothing if it does not become shorter.
fn packed(part: &[u8]) -> Option<Vec<u8>> {
    let mut packed = vec![0; packed_bytes_max(part.len())];
    let bytes = Packer::default().pack(Codec::Lz4, part, &mut packed).ok()?;
    packed.truncate(bytes);
    (bytes < part.len()).then_some(packed)
}

/// The part that a message holds.
///
/// # Errors
/// If it is none.
pub fn unpacked(message: DeviceState) -> Result<Vec<u8>, CodecError> {
    let bytes = message.part_bytes as usize;
    if message.bytes.len() == bytes {
        return Ok(message.bytes);
    }
    let mut part = vec![0; bytes];
    let pieces = std::iter::once(message.bytes.as_slice());
    Unpacker::default().unpack(Codec::Lz4, pieces, &mut part)?;
    Ok(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_out_as_they_went_in() {
        let noise = (0..100_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8);
        let zeros = vec![0; 2 * DEVICE_CHUNK_BYTES_MAX + 1];
        for (state, is_shorter) in
            [(noise.collect::<Vec<u8>>(), false), (zeros, true), (vec![7], false)]
        {
            let (mut out, mut packed) = (vec![], 0);
            for message in messages(&state, 0) {
                assert_eq!(message.offset, out.len() as u64);
                packed += message.bytes.len();
                out.extend(unpacked(message).expect("a part"));
            }
            assert!(out == state);
            assert_eq!(packed < state.len() / 100, is_shorter);
        }
    }

    #[test]
    fn a_part_of_another_length_is_damaged() {
        let mut message = messages(&[0; 5000], 0).next().expect("a message");
        message.part_bytes -= 1;
        assert!(unpacked(message.clone()).is_err());
        message.part_bytes += 2;
        assert!(unpacked(message.clone()).is_err());
        message.bytes = vec![0xff; 16];
        assert!(matches!(unpacked(message), Err(CodecError::Damaged(_))));
    }
}
