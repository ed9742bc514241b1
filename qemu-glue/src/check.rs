//! Findings: what this host and VM can do, what is missing, and how to get it.
//!
//! A [`Finding`] is one line of `migrate check`. Whoever examines something returns a list of them;
//! a [`Severity::Blocker`] among them means that a migration would fail or lose data, a [`Severity::Indirect`] that one
//! by the direct path would.

use std::fmt;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Oldest kernel with `PAGEMAP_SCAN` and `UFFD_FEATURE_WP_ASYNC`
/// (Documentation/admin-guide/mm/pagemap.rst).
pub const KERNEL_MIN: (u32, u32) = (6, 7);

/// UDP socket buffer in bytes below which QUIC lanes lose packets on fast links.
pub const SOCKET_BUFFER_WANTED_BYTES: u64 = 8 << 20;

/// How much a finding matters, in ascending order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Severity {
    /// As it should be.
    Ok,
    /// Worth knowing; nothing will fail.
    Note,
    /// It works, but worse than it could, or with a restriction.
    Warning,
    /// The direct path is refused; QEMU's stream is not.
    Indirect,
    /// Either path is refused.
    Blocker,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Indirect => "not by the direct path",
            Self::Blocker => "blocker",
        })
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// What was found, as a sentence.
    pub what: String,
    /// What to do about it, where something can be done.
    pub remedy: Option<String>,
}

impl Finding {
    /// A finding that needs no action.
    pub fn ok(what: impl Into<String>) -> Self {
        Self { severity: Severity::Ok, what: what.into(), remedy: None }
    }

    /// A finding with a remedy.
    pub fn new(severity: Severity, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { severity, what: what.into(), remedy: Some(remedy.into()) }
    }

    /// What stands against the direct path alone, with the remedy for it.
    pub fn indirect(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Severity::Indirect, what, remedy)
    }

    /// A blocker with its remedy.
    pub fn blocker(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Severity::Blocker, what, remedy)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.severity, self.what)?;
        if let Some(remedy) = &self.remedy {
            write!(f, " ({remedy})")?;
        }
        Ok(())
    }
}

/// What this host can do, whatever VM it is about.
pub fn host_findings() -> Vec<Finding> {
    let mut findings = vec![
        kernel_finding(&read_trimmed("/proc/sys/kernel/osrelease")),
        architecture_finding(std::env::consts::ARCH),
    ];
    for name in ["rmem_max", "wmem_max"] {
        let path = format!("/proc/sys/net/core/{name}");
        findings.push(buffer_finding(name, read_trimmed(&path).parse().ok()));
    }
    findings
}

fn read_trimmed(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// The leading `MAJOR.MINOR` of a kernel release such as `6.18.44-amd64`.
fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.splitn(3, '.');
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?;
    let digits = minor.find(|c: char| !c.is_ascii_digit()).unwrap_or(minor.len());
    Some((major, minor.get(..digits)?.parse().ok()?))
}

fn kernel_finding(release: &str) -> Finding {
    let (major, minor) = KERNEL_MIN;
    match kernel_version(release) {
        Some(version) if version >= KERNEL_MIN => Finding::ok(format!("Linux {release}")),
        Some(_) => Finding::indirect(
            format!("Linux {release} cannot report written pages to another process"),
            format!("boot Linux {major}.{minor} or newer, or use --path stream"),
        ),
        None => Finding::new(
            Severity::Warning,
            format!("The kernel release {release:?} was not understood"),
            format!("Linux {major}.{minor} or newer is needed for the direct path"),
        ),
    }
}

fn architecture_finding(architecture: &str) -> Finding {
    match architecture {
        "x86_64" => Finding::ok("x86-64 host"),
        other => Finding::indirect(
            format!("This host is {other}; attaching to QEMU is written for x86-64"),
            "use --path stream",
        ),
    }
}

fn buffer_finding(name: &str, bytes: Option<u64>) -> Finding {
    let remedy = format!("sysctl -w net.core.{name}={SOCKET_BUFFER_WANTED_BYTES}");
    match bytes {
        Some(bytes) if bytes >= SOCKET_BUFFER_WANTED_BYTES => {
            Finding::ok(format!("net.core.{name} is {bytes} bytes"))
        }
        Some(bytes) => Finding::new(
            Severity::Note,
            format!("net.core.{name} is {bytes} bytes: fast links may lose packets"),
            remedy,
        ),
        None => Finding::new(Severity::Note, format!("net.core.{name} could not be read"), remedy),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_compared_as_numbers() {
        for (release, severity) in [
            ("6.18.44", Severity::Ok),
            ("6.7-rc1", Severity::Ok),
            ("7.0.0", Severity::Ok),
            ("6.6.99-generic", Severity::Indirect),
            ("6.1.0-56-amd64", Severity::Indirect),
            ("5.15", Severity::Indirect),
            ("", Severity::Warning),
            ("six.seven", Severity::Warning),
        ] {
            assert_eq!(kernel_finding(release).severity, severity, "{release}");
        }
    }

    #[test]
    fn small_buffers_are_a_note_with_a_command() {
        let finding = buffer_finding("rmem_max", Some(212_992));
        assert_eq!(finding.severity, Severity::Note);
        assert!(finding.to_string().contains("net.core.rmem_max=8388608"), "{finding}");
        assert_eq!(buffer_finding("rmem_max", Some(8 << 20)).severity, Severity::Ok);
    }

    #[test]
    fn a_foreign_architecture_has_no_direct_path() {
        assert_eq!(architecture_finding("aarch64").severity, Severity::Indirect);
    }

    #[test]
    fn this_host_is_described() {
        let findings = host_findings();
        assert_eq!(findings.len(), 4);
        assert!(findings.iter().all(|finding| !finding.what.is_empty()));
    }
}
