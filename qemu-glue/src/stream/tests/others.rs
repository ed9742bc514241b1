//! Connections beside the main one.

use super::*;
use channel::{Channel, recognise};
use multifd::{ChannelInit, PACKET_PAGES_MAX, PacketHeader};

#[test]
fn each_kind_of_connection_is_recognised() {
    let cases = [
        (&b"QEVM\0\0\0\x03"[..], Channel::Main),
        (b"\x08\0\x0a\0\x07\x06pc.ram", Channel::Resumed),
        (b"\x11\x22\x33\x44\0\0\0\x01", Channel::Multifd),
        (b"\x16\x03\x01\x02\0\x01\0\x01", Channel::Tls),
        (b"\0\0\0\0\0\x0c\x10\x08\x06pc.ram", Channel::Preempt),
        (b"\0\0\0\0\0\x0c\x10\x02\x06pc.ram", Channel::Preempt),
        (b"\0\0\0\0\0\x0c\x10\x28", Channel::Unknown),
        (b"GET / HTTP/1.1", Channel::Unknown),
    ];
    for (bytes, channel) in cases {
        assert_eq!(recognise(bytes), Some(channel));
        assert_eq!(recognise(&bytes[..3]), None);
        assert_eq!(channel.refusal().is_none(), channel == Channel::Main);
        // The reader of the main stream says the same.
        if channel != Channel::Main {
            assert_eq!(refusal(bytes), channel.refusal().unwrap());
        }
    }
    let remedy = |channel: Channel| channel.refusal().unwrap().to_string();
    assert!(remedy(Channel::Multifd).contains("capability multifd off"));
    assert!(remedy(Channel::Preempt).contains("capability postcopy-preempt off"));
    assert!(remedy(Channel::Tls).contains("tls-creds"));
}

#[test]
fn the_beginning_of_a_multifd_channel_comes_back() {
    let init = ChannelInit { uuid: [7; 16], channel: 3 };
    assert_eq!(ChannelInit::parse(&init.to_bytes()), Ok(init));
    let mut other = init.to_bytes();
    other[7] = 2;
    assert!(matches!(ChannelInit::parse(&other), Err(Refusal::Channel { .. })));
    other[0] = 0;
    assert!(matches!(ChannelInit::parse(&other), Err(Refusal::Channel { .. })));
}

#[test]
fn a_packet_of_multifd_comes_back() {
    let mut packet = PacketHeader {
        flags: 1,
        number: 9,
        block: "pc.ram".to_owned(),
        normal_offsets: (0..100).map(|page| page * 4096).collect(),
        zero_offsets: (200..228).map(|page| page * 4096).collect(),
        payload_bytes: 100 * 4096,
    };
    let bytes = packet.to_bytes().unwrap();
    assert_eq!(PacketHeader::parse(&bytes), Ok(packet.clone()));
    let damaged = |at: usize, value: u8| {
        let mut bytes = bytes;
        bytes[at] = value;
        PacketHeader::parse(&bytes).unwrap_err()
    };
    assert!(matches!(damaged(35, 29), Refusal::Blocks { .. }), "too many pages");
    assert!(matches!(damaged(16, 1), Refusal::Blocks { .. }), "far too many pages");
    assert!(matches!(damaged(327, 1), Refusal::Blocks { .. }), "an odd offset");
    assert!(matches!(damaged(64, 0), Refusal::Name { .. }));
    assert!(matches!(damaged(11, 0x40), Refusal::Channel { .. }));
    packet.zero_offsets.push(0);
    assert!(packet.to_bytes().is_err());
    let sync = PacketHeader {
        block: String::new(),
        normal_offsets: vec![],
        zero_offsets: vec![],
        payload_bytes: 0,
        ..packet
    };
    assert_eq!(PacketHeader::parse(&sync.to_bytes().unwrap()), Ok(sync));
    assert_eq!(PACKET_PAGES_MAX, 128);
}
