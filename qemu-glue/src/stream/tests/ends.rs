//! Where device state ends: in a stream, in a package.

use super::*;

/// A stream up to its device state.
fn before_state() -> Vec<u8> {
    written(&[setup(), end_of_ram().to_vec()].concat())
}

/// Device state and what follows it, of a stream that is read in one piece and in many.
fn tail_of(tail: &[u8]) -> Result<Vec<Owned>, StreamError> {
    let begin = before_state();
    let bytes = [&begin[..], tail].concat();
    let whole = read(&bytes);
    for size in [1, 2, 3, 5, 7, 1000] {
        let pieces = read_with(&mut Reader::new(), bytes.chunks(size));
        assert_eq!(pieces, whole, "in pieces of {size}");
    }
    whole.map(|events| events[setup().len() + 3..].to_vec())
}

fn state(bytes: &[u8]) -> Owned {
    Owned::DeviceState(bytes.to_vec())
}

fn end() -> Owned {
    Owned::Plain(Event::EndOfState)
}

fn text(text: &[u8]) -> Owned {
    Owned::Description(text.to_vec())
}

#[test]
fn with_and_without_a_description() {
    let device = device(b"\0\x06\0\0\0");
    let described = [&device[..], b"\0\x06\0\0\0\x02{}"].concat();
    assert_eq!(tail_of(&described), Ok(vec![state(&device), end(), text(b"{}")]));
    let empty = [&device[..], b"\0\x06\0\0\0\0"].concat();
    assert_eq!(tail_of(&empty), Ok(vec![state(&device), end(), text(b"")]));
    let bare = [&device[..], b"\0"].concat();
    assert_eq!(tail_of(&bare), Ok(vec![state(&device), end()]));
}

#[test]
fn what_looks_like_an_end_is_none_if_more_comes() {
    let mut tail = device(b"\0\x06\0\0\0\x04{\"a}");
    tail.extend(device(b"\0\x06\0\x06\0\0\0\x02{}"));
    let all = [&tail[..], b"\0\x06\0\0\0\x02{}"].concat();
    assert_eq!(tail_of(&all), Ok(vec![state(&tail), end(), text(b"{}")]));
    // One end within the head of another.
    let inner = b"\x04\0\x06\0\x06\0\0\0\x02{}";
    let all = [&inner[..], b"\0\x06\0\0\0\x02{}"].concat();
    assert_eq!(tail_of(&all), Ok(vec![state(inner), end(), text(b"{}")]));
    let nested = b"\x04\0\x06\0\0\0\x06\0\0\0\x02{}";
    assert_eq!(tail_of(nested), Ok(vec![state(b"\x04\0\x06\0\0"), end(), text(b"{}")]));
}

#[test]
fn a_description_that_is_not_complete_is_none() {
    // The number of the last section is 6: its footer and the end look like the beginning of one.
    let last = b"\x04\0\0\0\x06\x01a\0\0\0\0\0\0\0\x01\x7e\0\0\0\x06";
    let bare = [&last[..], b"\0"].concat();
    assert_eq!(tail_of(&bare), Ok(vec![state(last), end()]));
    // A longer one that stops within its text has no end at all.
    let cut = tail_of(b"\x04\0\x06\0\0\0\x09{\"abc");
    assert_eq!(cut.unwrap_err().refusal, Refusal::Cut { place: "within the device state" });
    let damaged = tail_of(b"\x04\0\x06\0\0\0\x02{x");
    assert!(damaged.is_err());
    let long = tail_of(b"\x04\0\x06\x02\0\0\0{\"}");
    assert!(long.is_err(), "longer than any description");
}

#[test]
fn the_end_is_told_when_it_is_seen() {
    let mut reader = Reader::new();
    let mut feed = |bytes: &[u8]| {
        let mut input = bytes;
        while reader.next(&mut input).unwrap().is_some() {}
        reader.end_sign()
    };
    assert_eq!(feed(&before_state()), EndSign::None);
    assert_eq!(feed(&device(b"abc")), EndSign::None);
    assert_eq!(feed(b"\0"), EndSign::Possible);
    assert_eq!(feed(b"\x06\0\0\0\x04{"), EndSign::None);
    assert_eq!(feed(b"\"a}"), EndSign::Described);
    assert_eq!(feed(b"more"), EndSign::None);
    assert!(reader.finish().is_err());
}

#[test]
fn nothing_follows_a_finished_stream() {
    let bytes = [before_state(), device(b""), b"\0\x06\0\0\0\x02{}".to_vec()].concat();
    let mut reader = Reader::new();
    let mut input = &bytes[..];
    while reader.next(&mut input).unwrap().is_some() {}
    reader.finish().unwrap();
    assert_eq!(reader.next(&mut &[][..]).unwrap(), Some(Event::EndOfState));
    let late = reader.next(&mut &b"x"[..]).unwrap_err();
    assert_eq!(late.refusal, Refusal::AfterEnd);
}

#[test]
fn a_long_description_is_looked_at_once() {
    let mut json = b"{\"devices\":".to_vec();
    json.resize(1 << 20, b' ');
    json.push(b'}');
    let length = (json.len() as u32).to_be_bytes();
    let bytes = [&before_state(), &device(b"")[..], b"\0\x06", &length, &json].concat();
    let events = read_with(&mut Reader::new(), bytes.chunks(1)).unwrap();
    assert_eq!(events.last(), Some(&Owned::Description(json)));
}

/// As much as may be a description is held back, and no more.
#[test]
fn what_is_held_back_is_bounded() {
    let begin = [&before_state()[..], b"\x04\0\x06\x01\0\0\0{"].concat();
    let spaces = vec![b' '; 1 << 20];
    let mut reader = Reader::new();
    let (mut held_most, mut handed) = (0, 0);
    for mut piece in std::iter::once(&begin[..]).chain(std::iter::repeat_n(&spaces[..], 40)) {
        while let Some(event) = reader.next(&mut piece).unwrap() {
            if let Event::DeviceState(bytes) = event {
                handed += bytes.len();
            }
        }
        held_most = held_most.max(reader.held_capacity_bytes());
    }
    assert!((DESCRIPTION_BYTES_MAX..3 * DESCRIPTION_BYTES_MAX).contains(&held_most));
    assert_eq!(handed, 8 + (40 << 20));
}

#[test]
fn blocks_are_told_when_all_are_listed() {
    let bytes = written(&setup());
    let mut reader = Reader::new();
    for byte in bytes.chunks(1) {
        let mut input = byte;
        while reader.next(&mut input).unwrap().is_some() {}
        assert!(reader.blocks().is_none_or(|blocks| blocks.blocks().len() == 2));
    }
    assert_eq!((reader.blocks().is_some(), reader.ram_section()), (true, Some(2)));
}

/// What a package of these bytes is read as.
fn package(bytes: &[u8]) -> Vec<Owned> {
    let reader = || Reader::package(bytes.len() as u32);
    let whole = read_with(&mut reader(), [bytes]).unwrap();
    for size in [1, 2, 3, 5, 7, 13] {
        assert_eq!(read_with(&mut reader(), bytes.chunks(size)).unwrap(), whole);
    }
    assert_eq!(written(&whole), bytes);
    whole
}

#[test]
fn the_package_of_post_copy() {
    let command = |command| Owned::Plain(Event::Command(command));
    let (listen, ping, run) = (
        command(Command::PostcopyListen),
        command(Command::Ping(3)),
        command(Command::PostcopyRun),
    );
    for body in [&b""[..], b"\x08\0\x05\0\0", b"\x08\0\x02\0\x04\0\0\0\x03"] {
        let device = state(&device(body));
        let all = [listen.clone(), device.clone(), ping.clone(), run.clone()];
        assert_eq!(package(&written(&all)), all);
        let no_ping = [listen.clone(), device.clone(), run.clone()];
        assert_eq!(package(&written(&no_ping)), no_ping);
        let only_state = [device];
        assert_eq!(package(&written(&only_state)), only_state);
    }
    // Device state shorter than the commands that may follow it.
    assert_eq!(package(b"\x04a"), [state(b"\x04a")]);
    assert_eq!(package(b"\x04\x08\0\x05\0\0"), [state(b"\x04"), run]);
    assert_eq!(package(b""), []);
}

#[test]
fn a_package_is_as_long_as_was_said() {
    let bytes = written(&[Owned::Plain(Event::Command(Command::PostcopyListen))]);
    let cut = read_with(&mut Reader::package(7), [&bytes[..]]).unwrap_err();
    assert!(matches!(cut.refusal, Refusal::Cut { .. }));
    let long = read_with(&mut Reader::package(5), [&bytes[..], b"x"]).unwrap_err();
    assert_eq!(long.refusal, Refusal::AfterEnd);
    for pieces in [1, 5] {
        let across = read_with(&mut Reader::package(3), bytes.chunks(pieces)).unwrap_err();
        assert_eq!((across.refusal, across.at_byte), (Refusal::AfterEnd, 0));
    }
    let mut reader = Reader::package(5);
    let mut input = &bytes[..];
    while reader.next(&mut input).unwrap().is_some() {}
    assert_eq!(reader.end_sign(), EndSign::Certain);
}

#[test]
fn post_copy_ends_without_device_state() {
    let bytes = [before_state(), vec![0]].concat();
    let mut reader = Reader::new();
    let mut input = &bytes[..];
    while reader.next(&mut input).unwrap().is_some() {}
    assert_eq!(reader.end_sign(), EndSign::Certain);
    reader.finish().unwrap();
    assert_eq!(reader.at_byte() as usize, bytes.len());
}
