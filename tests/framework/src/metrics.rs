//! Metrics of commands, over HTTP in Prometheus' text format.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Longest answer that is believed.
const METRICS_BYTES_MAX: u64 = 4 << 20;

/// All metrics of the command that listens at `address`.
///
/// # Errors
/// It does not answer, or otherwise than with metrics.
pub fn get(address: &str) -> Result<String> {
    let what = || format!("No metrics from {address}");
    let mut socket = TcpStream::connect(address).with_context(what)?;
    socket.set_read_timeout(Some(TIMEOUT)).with_context(what)?;
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).with_context(what)?;
    let mut answer = String::new();
    socket.take(METRICS_BYTES_MAX).read_to_string(&mut answer).with_context(what)?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(what)?;
    let status = head.lines().next().unwrap_or_default();
    ensure!(status.contains(" 200 "), "{}: {status}", what());
    Ok(body.to_owned())
}

/// An address on loopback whose TCP port is free at the moment.
///
/// # Errors
/// No port is free.
pub fn free_port() -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").context("No free port on loopback")?;
    Ok(listener.local_addr().context("No address")?.to_string())
}

/// Sum over all samples of a metric; nothing if there is none.
///
/// # Errors
/// A sample is no number.
pub fn sum(metrics: &str, name: &str) -> Result<Option<u64>> {
    let mut sum = None;
    for line in metrics.lines() {
        let Some(rest) = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' '])) else {
            continue;
        };
        let value = rest.rsplit(' ').next().and_then(|text| text.parse::<f64>().ok());
        match value {
            Some(value) if value >= 0.0 => sum = Some(sum.unwrap_or(0) + value as u64),
            _ => bail!("No number in {line:?}"),
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_one_metric_are_added() {
        let text = "# HELP a_pages x\n# TYPE a_pages gauge\na_pages{vm=\"x y\"} 3\n\
                    a_pages{vm=\"z\"} 4\na_pages_max 9\nb 1.5e3\n";
        assert_eq!(sum(text, "a_pages").unwrap(), Some(7));
        assert_eq!(sum(text, "b").unwrap(), Some(1500));
        assert_eq!(sum(text, "a").unwrap(), None);
        assert!(sum("a nonsense\n", "a").is_err());
    }
}
