//! Debian packages: installed into the system, or only downloaded and unpacked beside it.
//!
//! What is unpacked beside the system (a newer QEMU, a guest kernel) comes from the mirror that the
//! machine itself is configured for: its entry for `bookworm` is copied into a private apt
//! configuration and given the suite `bookworm-backports` as well. The system's own configuration
//! and package lists stay as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::run::{output, run, succeeds};

const SUITE: &str = "bookworm";
/// The suite with the newer QEMU.
pub(crate) const BACKPORTS: &str = "bookworm-backports";

/// One package source: what a one-line entry holds apart from suite and components.
#[derive(Debug, PartialEq, Eq)]
struct Source {
    /// `[signed-by=...]` with its brackets, or nothing.
    options: String,
    uri: String,
}

fn one_line_source(line: &str) -> Option<Source> {
    let rest = line.trim().strip_prefix("deb")?;
    let rest = rest.strip_prefix([' ', '\t'])?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        None => (String::new(), rest),
        Some(inner) => {
            let (inside, rest) = inner.split_once(']')?;
            (format!("[{}] ", inside.trim()), rest)
        }
    };
    let mut words = rest.split_ascii_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    (suite == SUITE).then(|| Source { options, uri: uri.to_owned() })
}

fn stanza_source(stanza: &str) -> Option<Source> {
    let field = |name: &str| {
        let lines = stanza.lines().filter(|line| !line.starts_with('#'));
        let found = lines.filter_map(|line| line.split_once(':')).find(|(key, _)| *key == name);
        found.map(|(_, value)| value.trim().to_owned())
    };
    let has = |name: &str, wanted: &str| {
        field(name).is_some_and(|text| text.split_ascii_whitespace().any(|word| word == wanted))
    };
    if !has("Types", "deb") || !has("Suites", SUITE) || has("Enabled", "no") {
        return None;
    }
    let uri = field("URIs")?.split_ascii_whitespace().next()?.to_owned();
    let mut options = String::new();
    // A key given in place (not as a file) is left out: apt then uses the system's trusted keys.
    if let Some(key) = field("Signed-By").filter(|key| key.starts_with('/')) {
        options.push_str(&format!("signed-by={key} "));
    }
    if has("Trusted", "yes") {
        options.push_str("trusted=yes ");
    }
    if !options.is_empty() {
        options = format!("[{}] ", options.trim());
    }
    Some(Source { options, uri })
}

/// The first entry for the suite in text of either format.
fn find_source(text: &str, deb822: bool) -> Option<Source> {
    if deb822 {
        let mut stanzas = vec![String::new()];
        for line in text.lines() {
            if line.trim().is_empty() {
                stanzas.push(String::new());
            } else if let Some(last) = stanzas.last_mut() {
                last.push_str(line);
                last.push('\n');
            }
        }
        stanzas.iter().find_map(|stanza| stanza_source(stanza))
    } else {
        text.lines().find_map(one_line_source)
    }
}

fn system_source() -> Result<Source> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.sort();
    for file in files {
        let extension = file.extension().and_then(|text| text.to_str()).unwrap_or_default();
        let Ok(text) = fs::read_to_string(&file) else { continue };
        if !["list", "sources"].contains(&extension) {
            continue;
        }
        if let Some(source) = find_source(&text, extension == "sources") {
            return Ok(source);
        }
    }
    bail!(
        "No package source for {SUITE} in /etc/apt: this needs Debian 12, or an entry for it in \
         /etc/apt/sources.list.d"
    )
}

/// Installs those of `packages` that the system lacks, with sudo where we are not root.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    let installed = |name: &&str| {
        let query = ["-W", "-f=${db:Status-Status}\n", name];
        let text = output(Command::new("dpkg-query").args(query)).unwrap_or_default();
        text.lines().any(|line| line == "installed")
    };
    let missing: Vec<&str> = packages.iter().copied().filter(|name| !installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("   installing {}", missing.join(" "));
    let root = output(Command::new("id").arg("-u"))?.trim() == "0";
    let apt = || {
        let mut command = Command::new(if root { "apt-get" } else { "sudo" });
        if !root {
            command.arg("apt-get");
        }
        command.args(["-q", "-y"]).env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    let attempt =
        || run(apt().args(["install", "--no-install-recommends"]).args(missing.iter().copied()));
    if attempt().is_err() {
        println!("   that failed; with fresh package lists again");
        run(apt().arg("update"))?;
        attempt().with_context(|| {
            format!("Packages are missing; install them by hand: {}", missing.join(" "))
        })?;
    }
    Ok(())
}

/// A private apt configuration with its own package lists.
#[derive(Debug)]
pub(crate) struct PrivateApt {
    folder: PathBuf,
}

impl PrivateApt {
    /// Writes the configuration under `folder` and fetches the package lists.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        for name in ["lists/partial", "cache/archives/partial"] {
            let path = folder.join(name);
            fs::create_dir_all(&path).with_context(|| format!("Cannot create {path:?}"))?;
        }
        let Source { options, uri } = system_source()?;
        let sources =
            [SUITE, BACKPORTS].map(|suite| format!("deb {options}{uri} {suite} main\n")).concat();
        fs::write(folder.join("sources.list"), sources).context("Cannot write apt's sources")?;
        let at = folder.display();
        let configuration = format!(
            "Dir::Etc::sourcelist \"{at}/sources.list\";\n\
             Dir::Etc::sourceparts \"-\";\n\
             Dir::State::lists \"{at}/lists\";\n\
             Dir::Cache \"{at}/cache\";\n\
             Acquire::Languages \"none\";\n\
             Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
             APT::Sandbox::User \"\";\n"
        );
        fs::write(folder.join("apt.conf"), configuration)
            .context("Cannot write apt's configuration")?;
        let apt = Self { folder: folder.to_owned() };
        println!("   fetching the package lists of {SUITE} and {BACKPORTS}");
        output(apt.command("apt-get").args(["-q", "update"])).context(
            "The package mirror cannot be read; check the network and /etc/apt, then try again",
        )?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.folder.join("apt.conf")).env("LC_ALL", "C");
        command
    }

    /// `name=version` of every package that installing `package` from `suite` would bring or change.
    pub(crate) fn closure(&self, package: &str, suite: &str) -> Result<Vec<String>> {
        let simulate = ["-s", "install", "--no-install-recommends", "-t", suite, package];
        let text = output(self.command("apt-get").args(simulate))?;
        let names = text.lines().filter_map(|line| {
            let rest = line.strip_prefix("Inst ")?;
            let (name, rest) = rest.split_once(' ')?;
            let version = rest.split_once('(')?.1.split_ascii_whitespace().next()?;
            Some(format!("{name}={version}"))
        });
        Ok(names.collect())
    }

    /// The first dependency of `package` that starts with `prefix`.
    pub(crate) fn dependency(&self, package: &str, prefix: &str) -> Result<String> {
        let text = output(self.command("apt-cache").args(["depends", package]))?;
        let mut names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        let found = names.find(|name| name.starts_with(prefix));
        found.map(str::to_owned).with_context(|| format!("{package} depends on no {prefix}*"))
    }

    /// Downloads packages (`name` or `name=version`) and unpacks them into `folder`.
    pub(crate) fn unpack(&self, packages: &[String], folder: &Path) -> Result<()> {
        let archives = self.folder.join("download");
        if archives.exists() {
            fs::remove_dir_all(&archives).context("Cannot clear the download folder")?;
        }
        for path in [archives.as_path(), folder] {
            fs::create_dir_all(path).with_context(|| format!("Cannot create {path:?}"))?;
        }
        println!("   downloading {}", packages.join(" "));
        output(
            self.command("apt-get").current_dir(&archives).arg("-q").arg("download").args(packages),
        )
        .context("Packages cannot be downloaded; check the network, then try again")?;
        for entry in fs::read_dir(&archives).context("Cannot list the downloads")? {
            let archive = entry.context("Cannot list the downloads")?.path();
            output(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(folder))?;
        }
        fs::remove_dir_all(&archives).context("Cannot remove the downloads")
    }
}

/// True if dpkg is there: otherwise nothing of this can work.
pub(crate) fn is_debian() -> bool {
    succeeds(Command::new("dpkg-query").arg("--version"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_one_line_entries() {
        let text = "# deb http://a/x bookworm main\ndeb-src http://a/x bookworm main\n\
                    deb http://a/x bookworm-updates main\n\
                    deb [ arch=amd64 signed-by=/k.gpg ] http://b/y bookworm main contrib\n";
        let found = find_source(text, false).unwrap();
        assert_eq!(found.options, "[arch=amd64 signed-by=/k.gpg] ");
        assert_eq!(found.uri, "http://b/y");
        assert_eq!(find_source("deb http://a/x trixie main", false), None);
    }

    #[test]
    fn reads_stanzas() {
        let text = "Types: deb\nURIs: http://no/x\nSuites: bookworm\nEnabled: no\n\n\
                    Types: deb deb-src\n# URIs: http://comment/x\nURIs: http://b/y\n\
                    Suites: bookworm bookworm-updates\nComponents: main\nSigned-By: /k.gpg\n";
        let found = find_source(text, true).unwrap();
        assert_eq!(
            found,
            Source { options: "[signed-by=/k.gpg] ".into(), uri: "http://b/y".into() }
        );
        assert_eq!(find_source("Types: deb\nURIs: http://b/y\nSuites: trixie\n", true), None);
    }

    #[test]
    fn leaves_out_a_key_in_place() {
        let text = "Types: deb\nURIs: http://b/y\nSuites: bookworm\nSigned-By:\n -----BEGIN\n";
        assert_eq!(find_source(text, true).unwrap().options, "");
    }
}
