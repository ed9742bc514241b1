//! What an agent does, from a file in TOML: a table for each of its parts, with the options of the command that does
//! the same.
//!
//! Invariant: what a command's own parser refuses is refused here, in the same words.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::{Args, FromArgMatches};
use serde::Deserialize;
use toml::{Table, Value};

use crate::args::{MemoryServerArgs, ReceiveArgs};
use crate::error::EngineError;

/// Largest file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Most receivers.
const RECEIVERS_MAX: usize = 256;

/// The file as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    identity: PathBuf,
    journal: Option<PathBuf>,
    metrics: Option<SocketAddr>,
    memory_server: Option<Table>,
    #[serde(default)]
    receive: Vec<Table>,
}

/// What an agent does.
#[derive(Debug)]
pub struct Config {
    /// Where metrics of all parts are told.
    pub metrics: Option<SocketAddr>,
    /// What it keeps for others.
    pub memory_server: Option<MemoryServerArgs>,
    /// The VMs that it receives guests into.
    pub receive: Vec<ReceiveArgs>,
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// [`EngineError::Misuse`] with the place and the remedy.
    pub fn read(path: &Path) -> Result<Self, EngineError> {
        let refused = |what: String, remedy: &str| EngineError::Misuse {
            what: format!("{}: {what}", path.display()),
            remedy: remedy.into(),
        };
        let bytes = fs::metadata(path).map(|metadata| metadata.len());
        if bytes.as_ref().is_ok_and(|bytes| *bytes > FILE_BYTES_MAX) {
            return Err(refused("the file is too long".into(), "Is it the agent's configuration?"));
        }
        let text = bytes.and_then(|_| fs::read_to_string(path));
        let text = text.map_err(|error| {
            refused(error.to_string(), "`migrate agent --help` shows what to write there")
        })?;
        Self::parse(&text).map_err(|what| refused(what, "`migrate agent --help` shows an example"))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
        if file.memory_server.is_none() && file.receive.is_empty() {
            return Err("neither [memory-server] nor [[receive]] is there".into());
        }
        if file.receive.len() > RECEIVERS_MAX {
            return Err(format!("more than {RECEIVERS_MAX} times [[receive]]"));
        }
        let identity = Value::String(file.identity.to_string_lossy().into_owned());
        let journal = file.journal.map(|path| path.to_string_lossy().into_owned());
        let memory_server = file.memory_server.map(|mut table| {
            table.entry("identity").or_insert_with(|| identity.clone());
            options::<MemoryServerArgs>("[memory-server]", &table)
        });
        let receive = file.receive.into_iter().enumerate().map(|(at, mut table)| {
            table.entry("identity").or_insert_with(|| identity.clone());
            if let Some(journal) = &journal {
                table.entry("journal").or_insert_with(|| Value::String(journal.clone()));
            }
            let args: ReceiveArgs = options(&format!("[[receive]] number {}", at + 1), &table)?;
            // Questions are answered only while somebody may have some.
            Ok::<_, String>(ReceiveArgs { once: true, ..args })
        });
        let receive = receive.collect::<Result<Vec<_>, _>>()?;
        check_apart(&receive)?;
        Ok(Self { metrics: file.metrics, memory_server: memory_server.transpose()?, receive })
    }
}

/// Has a command's own parser read a table.
fn options<T: Args + FromArgMatches>(place: &str, table: &Table) -> Result<T, String> {
    let mut words = vec![];
    for (name, value) in table {
        let fault = match name.as_str() {
            "once" => Some("an agent receives again and again, without `once`"),
            "metrics" => Some("metrics of all parts are told together: put it first"),
            _ => None,
        };
        if let Some(fault) = fault {
            return Err(format!("{place}: {fault}"));
        }
        let values = match value {
            Value::Array(values) => values.as_slice(),
            value => std::slice::from_ref(value),
        };
        for value in values {
            let text = match value {
                Value::String(text) => text.clone(),
                Value::Integer(number) => number.to_string(),
                _ => return Err(format!("{place}: {name} is neither a text nor a whole number")),
            };
            words.push(format!("--{name}={text}"));
        }
    }
    let command =
        T::augment_args(clap::Command::new("").no_binary_name(true).disable_help_flag(true));
    let parsed = command.try_get_matches_from(words).and_then(|found| T::from_arg_matches(&found));
    parsed.map_err(|error| {
        let text = error.to_string();
        let fault = text.strip_prefix("error: ").unwrap_or(&text);
        let fault = fault.split("\n\n").next().unwrap_or(fault).replace("\n  ", " ");
        format!("{place}: {fault}")
    })
}

/// Two receivers must not want the same VM or port.
fn check_apart(receive: &[ReceiveArgs]) -> Result<(), String> {
    let (mut monitors, mut ports) = (BTreeSet::new(), BTreeSet::new());
    for args in receive {
        let qmp = &args.common.qmp;
        if !monitors.insert(std::path::absolute(qmp).unwrap_or_else(|_| qmp.clone())) {
            return Err(format!("two [[receive]] have the qmp {}", qmp.display()));
        }
        if args.listen.port() != 0 && !ports.insert(args.listen) {
            return Err(format!("two [[receive]] listen on {}", args.listen));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"
        identity = "/etc/godwit/host-a"
        journal = "/tmp/journal"
        metrics = "127.0.0.1:9700"

        [memory-server]
        listen = "0.0.0.0:7701"
        capacity = "8G"
        peer = ["host-b", "host-c"]

        [[receive]]
        qmp = "/run/a.qmp"
        listen = "0.0.0.0:7710"
        lease-s = 30

        [[receive]]
        qmp = "/run/b.qmp"
        listen = "0.0.0.0:7711"
        identity = "/etc/godwit/other"
    "#;

    #[test]
    fn tables_are_the_options_of_commands() {
        let config = Config::parse(WHOLE).unwrap();
        let server = config.memory_server.unwrap();
        assert_eq!((server.capacity, server.lease_s), (8 << 30, 60));
        assert_eq!(server.peer, ["host-b", "host-c"]);
        assert_eq!(server.identity, Path::new("/etc/godwit/host-a"));
        let [a, b] = config.receive.try_into().unwrap();
        assert_eq!((a.lease_s, b.lease_s, a.once), (30, 20, true));
        assert_eq!(a.common.journal.as_deref(), Some(Path::new("/tmp/journal")));
        assert_eq!(b.common.identity, Path::new("/etc/godwit/other"));
        assert_eq!(config.metrics, Some("127.0.0.1:9700".parse().unwrap()));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_place() {
        for (from, to, told) in [
            ("capacity = \"8G\"", "capacity = \"lots\"", "[memory-server]: invalid value 'lots'"),
            ("capacity = \"8G\"", "", "[memory-server]: the following required"),
            ("lease-s = 30", "lease-s = 0", "number 1: invalid value '0'"),
            ("lease-s = 30", "lease-s = 3.5", "number 1: lease-s is neither"),
            ("lease-s = 30", "leese-s = 30", "number 1: unexpected argument '--leese-s'"),
            ("lease-s = 30", "once = true", "without `once`"),
            ("lease-s = 30", "metrics = \"127.0.0.1:1\"", "put it first"),
            ("/run/b.qmp", "/run/a.qmp", "two [[receive]]"),
            ("7711", "7710", "listen on 0.0.0.0:7710"),
            ("identity = \"/etc/godwit/host-a\"", "", "missing field `identity`"),
            ("journal = ", "jornal = ", "unknown field `jornal`"),
        ] {
            assert!(WHOLE.contains(from), "{from}");
            let fault = Config::parse(&WHOLE.replacen(from, to, 1)).unwrap_err();
            assert!(fault.contains(told), "{told:?} is not in {fault:?}");
        }
        let nothing = Config::parse("identity = \"x\"").unwrap_err();
        assert!(nothing.contains("neither"), "{nothing}");
    }

    #[test]
    fn a_file_that_is_not_there_is_told() {
        let text = Config::read(Path::new("/nowhere/agent.toml")).unwrap_err().tell();
        assert!(text.contains("/nowhere/agent.toml") && text.contains("--help"), "{text}");
    }
}
