//! What nft says of its sets.

use serde::Deserialize;
use serde_json::Value;

/// Most elements that are looked at; the set holds no more.
pub const ELEMENTS_MAX: usize = 65_536;

/// Bytes that came in by an interface for somebody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// The interface.
    pub interface: String,
    /// To whom, as `aa:bb:cc:dd:ee:ff`.
    pub to: String,
    /// Bytes since the element came to be, without Ethernet headers.
    pub bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Answer {
    nftables: Vec<Value>,
}

#[derive(Debug, Deserialize)]
struct Element {
    val: Concat,
    counter: Count,
}

#[derive(Debug, Deserialize)]
struct Concat {
    concat: (String, String),
}

#[derive(Debug, Deserialize)]
struct Count {
    bytes: u64,
}

/// The elements of a set of interface and Ethernet address with counters (`nft -j list set`). Elements of other forms are
/// passed over, and so is what goes to more than one (broadcast, multicast).
#[must_use]
pub fn sent(text: &[u8]) -> Option<Vec<Sent>> {
    let answer: Answer = serde_json::from_slice(text).ok()?;
    let set = answer.nftables.iter().find_map(|object| object.get("set"))?;
    let elements = set.get("elem").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let sent = |element: &Value| {
        let element = Element::deserialize(element.get("elem")?).ok()?;
        let (interface, to) = element.val.concat;
        let first = u8::from_str_radix(to.get(..2)?, 16).ok()?;
        (first & 1 == 0).then_some(Sent { interface, to, bytes: element.counter.bytes })
    };
    Some(elements.iter().take(ELEMENTS_MAX).filter_map(sent).collect())
}
