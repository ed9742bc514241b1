//! Commands to the programs inside the guest, over the third serial port.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::wait;

/// Longest line and answer that are believed.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// A connection to a guest's command channel.
#[derive(Debug)]
pub struct Guest {
    socket: UnixStream,
    received: Vec<u8>,
    next_id: u64,
}

impl Guest {
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let what = format!("the socket {}", path.display());
        let socket =
            wait::until(&what, Duration::from_secs(10), || Ok(UnixStream::connect(path).ok()))?;
        socket.set_read_timeout(Some(Duration::from_millis(50))).context("Cannot set a timeout")?;
        // Ids must not repeat among the clients of one guest, which migrates between sockets.
        let next_id = wait::monotonic_us();
        Ok(Self { socket, received: Vec::new(), next_id })
    }

    fn line(&mut self, end: Instant) -> Result<Option<String>> {
        let mut chunk = [0; 4096];
        loop {
            if let Some(at) = self.received.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=at).collect();
                return Ok(Some(String::from_utf8_lossy(&line).trim_end().to_owned()));
            }
            if Instant::now() >= end {
                return Ok(None);
            }
            match self.socket.read(&mut chunk) {
                Ok(0) => bail!("QEMU closed the guest's command port"),
                Ok(count) if self.received.len() + count <= ANSWER_BYTES_MAX => {
                    self.received.extend_from_slice(&chunk[..count]);
                }
                Ok(_) => bail!("The guest sent a line of more than {ANSWER_BYTES_MAX} bytes"),
                Err(error)
                    if [ErrorKind::WouldBlock, ErrorKind::TimedOut, ErrorKind::Interrupted]
                        .contains(&error.kind()) => {}
                Err(error) => return Err(error).context("Cannot read the guest's answer"),
            }
        }
    }

    /// Asks and waits up to `timeout` for the answer, which may have several lines.
    ///
    /// # Errors
    /// The guest refused, did not answer in time (it may be paused), or is gone.
    pub fn ask(&mut self, command: &str, timeout: Duration) -> Result<String> {
        let id = self.next_id;
        self.next_id += 1;
        self.socket
            .write_all(format!("#{id} {command}\n").as_bytes())
            .with_context(|| format!("Cannot send {command:?} to the guest"))?;
        let (content, last) = (format!("#{id} = "), format!("#{id} . "));
        let end = Instant::now() + timeout;
        let mut answer = Vec::new();
        loop {
            let Some(line) = self.line(end)? else {
                bail!("The guest did not answer {command:?} in {:.1} s", timeout.as_secs_f64());
            };
            if let Some(text) = line.strip_prefix(&content) {
                answer.push(text.to_owned());
            } else if let Some(outcome) = line.strip_prefix(&last) {
                let answer = answer.join("\n");
                if outcome != "ok" {
                    bail!("The guest refused {command:?}: {answer}");
                }
                return Ok(answer);
            }
        }
    }
}

/// The number after `key=` in an answer such as `CHECKER OK passes=3 pages=2048`.
///
/// # Errors
/// The key is absent or has no number.
pub fn number(answer: &str, key: &str) -> Result<u64> {
    let mut words = answer.split_ascii_whitespace();
    let value = words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    let text = value.with_context(|| format!("No {key}= in {answer:?}"))?;
    text.parse().with_context(|| format!("{key} is no number in {answer:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_numbers() {
        let answer = "CHECKER OK passes=3 pages=2048";
        assert_eq!(number(answer, "passes").unwrap(), 3);
        assert_eq!(number(answer, "pages").unwrap(), 2048);
        assert!(number(answer, "page").is_err());
    }
}
