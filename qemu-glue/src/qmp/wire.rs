//! Lines of JSON, and what they mean.

use std::io;

use serde_json::Value;
use tokio::io::{AsyncBufRead, AsyncBufReadExt};

/// Longest message in bytes that is read or written. The largest real one, the schema, is 250 KB.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Longest piece in bytes of a bad message that is repeated in an error.
const QUOTE_BYTES_MAX: usize = 80;

/// Something that QEMU told without having been asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Name, such as `STOP` or `MIGRATION`.
    pub name: String,
    /// Its data; null if it has none.
    pub data: Value,
    /// QEMU's clock at the event: whole seconds since 1970, or negative if it has none.
    pub seconds: i64,
    /// Microseconds to add to `seconds`.
    pub microseconds: i64,
}

/// One message from QEMU.
#[derive(Debug, PartialEq)]
pub(crate) enum Message {
    /// `{"QMP": ...}`: the version and the capabilities on offer.
    Greeting { version: Value, oob: bool },
    /// An answer; without an id if QEMU could not read the command.
    Reply { id: Option<u64>, result: Result<Value, (String, String)> },
    /// An event.
    Event(Event),
    /// An object of another kind; QMP allows new ones.
    Other,
}

/// Reads one line without its end, at most [`MESSAGE_BYTES_MAX`] bytes; none at the end of file.
///
/// # Errors
/// `InvalidData` for a line that is too long, `UnexpectedEof` for one that was cut off.
pub(crate) async fn read_line(
    reader: &mut (impl AsyncBufRead + Unpin),
    line: &mut Vec<u8>,
) -> io::Result<Option<()>> {
    line.clear();
    loop {
        let chunk = reader.fill_buf().await?;
        if chunk.is_empty() {
            if line.is_empty() {
                return Ok(None);
            }
            let text = format!("the connection ended in the middle of a message: {}", quote(line));
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
        }
        let end = chunk.iter().position(|byte| *byte == b'\n');
        let piece = chunk.get(..end.unwrap_or(chunk.len())).unwrap_or_default();
        if line.len() + piece.len() > MESSAGE_BYTES_MAX {
            let text = format!("a message is longer than {MESSAGE_BYTES_MAX} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        line.extend_from_slice(piece);
        let used = piece.len() + usize::from(end.is_some());
        reader.consume(used);
        if end.is_some() {
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            return Ok(Some(()));
        }
    }
}

/// Understands one line.
///
/// # Errors
/// A text that says what is wrong, for a line that is no JSON object.
pub(crate) fn parse(line: &[u8]) -> Result<Message, String> {
    let value: Value = serde_json::from_slice(line)
        .map_err(|error| format!("a line is no JSON ({error}): {}", quote(line)))?;
    let Value::Object(mut fields) = value else {
        return Err(format!("a line is no JSON object: {}", quote(line)));
    };
    if let Some(greeting) = fields.get_mut("QMP") {
        let oob = greeting
            .get("capabilities")
            .and_then(Value::as_array)
            .is_some_and(|offered| offered.iter().any(|name| name == "oob"));
        let version = greeting.get_mut("version").map(Value::take).unwrap_or_default();
        return Ok(Message::Greeting { version, oob });
    }
    let id = fields.get("id").and_then(Value::as_u64);
    if let Some(answer) = fields.remove("return") {
        return Ok(Message::Reply { id, result: Ok(answer) });
    }
    if let Some(error) = fields.get("error") {
        let text =
            |key: &str| error.get(key).and_then(Value::as_str).unwrap_or("(no text)").to_owned();
        return Ok(Message::Reply { id, result: Err((text("class"), text("desc"))) });
    }
    if let Some(Value::String(name)) = fields.remove("event") {
        let time = |key: &str| {
            let time = fields.get("timestamp").and_then(|time| time.get(key));
            time.and_then(Value::as_i64).unwrap_or(-1)
        };
        let (seconds, microseconds) = (time("seconds"), time("microseconds"));
        let data = fields.remove("data").unwrap_or_default();
        return Ok(Message::Event(Event { name, data, seconds, microseconds }));
    }
    Ok(Message::Other)
}

/// The beginning of a message, printable.
pub(crate) fn quote(line: &[u8]) -> String {
    let cut = line.get(..QUOTE_BYTES_MAX).unwrap_or(line);
    let dots = if cut.len() < line.len() { "..." } else { "" };
    format!("\"{}{dots}\"", cut.escape_ascii())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;
    use tokio::io::BufReader;

    use super::*;

    #[test]
    fn messages_are_told_apart() {
        let greeting = br#"{"QMP": {"version": {"qemu": {}}, "capabilities": ["oob"]}}"#;
        assert!(matches!(parse(greeting), Ok(Message::Greeting { oob: true, .. })));
        assert_eq!(
            parse(br#"{"return": {}, "id": 7}"#),
            Ok(Message::Reply { id: Some(7), result: Ok(json!({})) })
        );
        assert_eq!(
            parse(br#"{"error": {"class": "GenericError", "desc": "no"}}"#),
            Ok(Message::Reply { id: None, result: Err(("GenericError".into(), "no".into())) })
        );
        let event = br#"{"event": "STOP", "timestamp": {"seconds": 5, "microseconds": 6}}"#;
        let expected =
            Event { name: "STOP".into(), data: Value::Null, seconds: 5, microseconds: 6 };
        assert_eq!(parse(event), Ok(Message::Event(expected)));
        assert_eq!(parse(br#"{"news": 1}"#), Ok(Message::Other));
        assert!(parse(b"[1]").is_err() && parse(b"\xff{").is_err() && parse(b"").is_err());
    }

    async fn lines_of(bytes: &[u8], capacity: usize) -> (Vec<Vec<u8>>, Option<io::ErrorKind>) {
        let mut reader = BufReader::with_capacity(capacity, bytes);
        let (mut lines, mut line) = (Vec::new(), Vec::new());
        loop {
            match read_line(&mut reader, &mut line).await {
                Ok(Some(())) => lines.push(line.clone()),
                Ok(None) => return (lines, None),
                Err(error) => return (lines, Some(error.kind())),
            }
        }
    }

    #[tokio::test]
    async fn a_line_may_be_as_long_as_the_limit_and_no_longer() {
        let mut bytes = vec![b' '; MESSAGE_BYTES_MAX];
        bytes.push(b'\n');
        let (lines, end) = lines_of(&bytes, 8192).await;
        assert_eq!((lines.len(), end), (1, None));
        bytes.insert(0, b' ');
        assert_eq!(lines_of(&bytes, 8192).await.1, Some(io::ErrorKind::InvalidData));
    }

    proptest! {
        #[test]
        fn lines_do_not_depend_on_how_they_arrive(
            lines in prop::collection::vec("[a-z]{0,40}", 0..8),
            capacity in 1usize..64,
            cut in any::<bool>(),
        ) {
            let mut bytes = Vec::new();
            for line in &lines {
                bytes.extend_from_slice(line.as_bytes());
                bytes.extend_from_slice(b"\r\n");
            }
            if cut {
                bytes.push(b'x');
            }
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (seen, end) = runtime.block_on(lines_of(&bytes, capacity));
            let expected: Vec<Vec<u8>> = lines.into_iter().map(String::into_bytes).collect();
            prop_assert_eq!(seen, expected);
            prop_assert_eq!(end, cut.then_some(io::ErrorKind::UnexpectedEof));
        }

        #[test]
        fn parsing_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
