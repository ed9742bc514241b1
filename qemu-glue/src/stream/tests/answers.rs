//! The return path.

use proptest::prelude::*;

use super::return_path::{
    BITMAP_BYTES_MAX, PageRequest, ReturnError, ReturnMessage, ReturnReader, ReturnRefusal,
};
use crate::fuzz;

/// Reads answers to the end; what a message is, as text.
fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<String>, ReturnError> {
    let (mut reader, mut found) = (ReturnReader::new(), Vec::new());
    for mut input in pieces {
        while let Some(message) = reader.next(&mut input)? {
            found.push(format!("{message:?}"));
        }
    }
    reader.finish()?;
    Ok(found)
}

fn refusal(bytes: &[u8]) -> ReturnRefusal {
    let whole = read([bytes]).unwrap_err();
    assert_eq!(read(bytes.chunks(1)).unwrap_err(), whole);
    whole.refusal
}

fn written(messages: &[ReturnMessage<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    messages.iter().for_each(|message| message.write(&mut out).unwrap());
    out
}

/// An answer with nothing borrowed; a bitmap as a whole.
#[derive(Debug, Clone)]
enum Draft {
    Plain(ReturnMessage<'static>),
    Request(Option<String>, u64, u32),
    Bitmap(String, Vec<u8>),
}

impl Draft {
    fn messages(&self) -> Vec<ReturnMessage<'_>> {
        match self {
            Self::Plain(message) => vec![*message],
            Self::Request(block, start_bytes, length_bytes) => {
                let (block, start_bytes) = (block.as_deref(), *start_bytes);
                let length_bytes = *length_bytes;
                let request = PageRequest { block, start_bytes, length_bytes };
                vec![ReturnMessage::RequestPages(request)]
            }
            Self::Bitmap(block, bits) => {
                let bits_there = (!bits.is_empty()).then_some(ReturnMessage::BitmapBits(bits));
                let begin = [
                    ReturnMessage::RecvBitmap { block },
                    ReturnMessage::BitmapSize(bits.len() as u64),
                ];
                begin.into_iter().chain(bits_there).chain([ReturnMessage::BitmapEnd]).collect()
            }
        }
    }
}

fn draft() -> impl Strategy<Value = Draft> {
    let plain = prop_oneof![
        any::<u32>().prop_map(|error| ReturnMessage::Shut { error }),
        any::<u32>().prop_map(ReturnMessage::Pong),
        any::<u32>().prop_map(ReturnMessage::ResumeAck),
        Just(ReturnMessage::SwitchoverAck),
    ];
    prop_oneof![
        2 => plain.prop_map(Draft::Plain),
        3 => (prop::option::of("[a-z.]{1,9}"), any::<u64>(), any::<u32>())
            .prop_map(|(block, start, length)| Draft::Request(block, start, length)),
        1 => ("[a-z]{1,9}", 0usize..9).prop_map(|(block, words)| Draft::Bitmap(block, vec![5; words * 8])),
    ]
}

proptest! {
    #[test]
    fn what_is_written_is_read(drafts in prop::collection::vec(draft(), 0..20)) {
        let first = Draft::Request(Some("pc.ram".to_owned()), 0, 4096);
        let messages: Vec<_> = std::iter::once(&first).chain(&drafts).flat_map(Draft::messages).collect();
        let bytes = written(&messages);
        let wanted: Vec<_> = messages.iter().map(|message| format!("{message:?}")).collect();
        prop_assert_eq!(read([&bytes[..]]).unwrap(), wanted);
        prop_assert!(fuzz::return_path(&bytes));
    }

    #[test]
    fn damage_does_no_harm(
        drafts in prop::collection::vec(draft(), 1..10),
        at in any::<prop::sample::Index>(),
        value in any::<u8>(),
    ) {
        let messages: Vec<_> = drafts.iter().flat_map(Draft::messages).collect();
        let mut bytes = written(&messages);
        let at = at.index(bytes.len());
        bytes[at] = value;
        fuzz::return_path(&bytes);
    }
}

#[test]
fn what_is_damaged_is_refused() {
    assert_eq!(refusal(b"\0\x08\0\0"), ReturnRefusal::Unknown { number: 8 });
    assert_eq!(refusal(b"\0\0\0\0"), ReturnRefusal::Unknown { number: 0 });
    assert_eq!(refusal(b"\0\x02\0\x05"), ReturnRefusal::Length { name: "PONG", found: 5 });
    assert_eq!(
        refusal(b"\0\x03\x02\x01"),
        ReturnRefusal::Length { name: "REQ_PAGES_ID", found: 513 }
    );
    let short = b"\0\x03\0\x0f\0\0\0\0\0\0\0\0\0\0\x10\0\x06pc";
    assert_eq!(refusal(short), ReturnRefusal::Length { name: "REQ_PAGES_ID", found: 15 });
    let nameless = b"\0\x03\0\x0d\0\0\0\0\0\0\0\0\0\0\x10\0\0";
    assert_eq!(refusal(nameless), ReturnRefusal::Name { name: "REQ_PAGES_ID" });
    let first = b"\0\x04\0\x0c\0\0\0\0\0\0\0\0\0\0\x10\0";
    assert_eq!(refusal(first), ReturnRefusal::NothingBefore);
    let bitmap = |rest: &[u8]| refusal(&[b"\0\x05\0\x02\x01a", rest].concat());
    assert_eq!(bitmap(&12u64.to_be_bytes()), ReturnRefusal::BitmapSize { found: 12 });
    let found = BITMAP_BYTES_MAX + 8;
    assert_eq!(bitmap(&found.to_be_bytes()), ReturnRefusal::BitmapSize { found });
    assert_eq!(bitmap(&[0; 16]), ReturnRefusal::BitmapEnd);
    assert_eq!(bitmap(&[0; 4]), ReturnRefusal::Cut);
}

#[test]
fn a_refusal_is_final() {
    let mut reader = ReturnReader::new();
    let mut input = &b"\0\x02\0\x04\0\0\0\x01\0\x09\0\0"[..];
    assert_eq!(reader.next(&mut input), Ok(Some(ReturnMessage::Pong(1))));
    let error = reader.next(&mut input).unwrap_err();
    assert_eq!((error.at_byte, reader.at_byte()), (8, 8));
    assert_eq!(reader.next(&mut &[][..]).unwrap_err().refusal, ReturnRefusal::Stopped);
    assert_eq!(reader.finish().unwrap_err().refusal, ReturnRefusal::Stopped);
}

#[test]
fn too_long_a_name_is_not_written() {
    let mut out = Vec::new();
    let block = "x".repeat(256);
    assert!(ReturnMessage::RecvBitmap { block: &block }.write(&mut out).is_err());
    let request = PageRequest { block: Some(&block), start_bytes: 0, length_bytes: 4096 };
    assert!(ReturnMessage::RequestPages(request).write(&mut out).is_err());
    assert!(ReturnMessage::BitmapSize(u64::MAX).write(&mut out).is_err());
    assert!(out.is_empty());
}
