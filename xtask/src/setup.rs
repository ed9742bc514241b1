//! `setup`: everything under target/godwit that guests need.
//!
//! ```text
//! target/godwit/vmlinuz  modules/  initrd.gz  vmlinuz-6.12  initrd-plain.gz  qemu-10.0/  etcd  env.json
//! ```
//! Idempotent; without a network it works as long as everything was fetched once.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use anyhow::{Context as _, Result, bail};

use crate::apt::{self, PrivateApt};
use crate::initrd::Initrds;
use crate::qemu::Qemu;
use crate::{etcd, initrd, kernel, qemu};

/// From the system's own package sources. libclang is what the userfaultfd bindings are made with;
/// libc6-dev has the static C library of the guest's programs. Of libvirt only programs are taken: the
/// package with its services, libvirt-daemon-system, is not, so that none is started. protobuf-compiler and
/// libprotobuf-dev are what etcd's client is made with; nftables counts what guests send to each other. The scheduler's
/// page is tested in Chromium, of which the shell without windows is the smaller package: 100 MB with what it needs.
const PACKAGES: [&str; 14] = [
    "qemu-system-x86",
    "busybox-static",
    "iproute2",
    "nftables",
    "util-linux",
    "gcc",
    "libc6-dev",
    "libclang-dev",
    "protobuf-compiler",
    "libprotobuf-dev",
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "libvirt-clients",
    "chromium-headless-shell",
];

/// What tests are told, also written to env.json.
#[derive(Debug)]
pub(crate) struct Environment {
    pub(crate) file: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    /// The kernel of backports, and an initramfs without modules.
    pub(crate) newer_kernel: PathBuf,
    pub(crate) plain_initrd: PathBuf,
    pub(crate) qemu_7_2: Qemu,
    pub(crate) qemu_10_0: Qemu,
    pub(crate) etcd: PathBuf,
}

impl Environment {
    /// Names everything to a program that is started.
    pub(crate) fn pass_to(&self, command: &mut Command) {
        command
            .env("GODWIT_ENV", &self.file)
            .env("GODWIT_QEMU_7_2", &self.qemu_7_2.bin)
            .env("GODWIT_QEMU_10_0", &self.qemu_10_0.bin)
            .env("GODWIT_QEMU_10_0_DATA", &self.qemu_10_0.data)
            .env("GODWIT_ETCD", &self.etcd);
    }

    fn json(&self) -> String {
        let quote = |path: &Path| quoted(&path.to_string_lossy());
        let qemu = |qemu: &Qemu| {
            format!("{{\"bin\": {}, \"data\": {}}}", quote(&qemu.bin), quote(&qemu.data))
        };
        format!(
            "{{\n  \"kernel\": {},\n  \"initrd\": {},\n  \"newer_kernel\": {},\n  \
             \"plain_initrd\": {},\n  \"etcd\": {},\n  \"qemu\": {{\n    \"7.2\": {},\n    \
             \"10.0\": {}\n  }}\n}}\n",
            quote(&self.kernel),
            quote(&self.initrd),
            quote(&self.newer_kernel),
            quote(&self.plain_initrd),
            quote(&self.etcd),
            qemu(&self.qemu_7_2),
            qemu(&self.qemu_10_0),
        )
    }
}

/// A JSON string.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => out.extend(['\\', character]),
            control if control < ' ' => out.push_str(&format!("\\u{:04x}", control as u32)),
            plain => out.push(plain),
        }
    }
    out.push('"');
    out
}

/// Provides everything. Two setups at the same time wait for each other.
pub(crate) fn setup(root: &Path) -> Result<Environment> {
    if !apt::is_debian() {
        bail!("dpkg is missing: the setup is written for Debian 12 (see docs for a container)");
    }
    let godwit = root.join("target/godwit");
    fs::create_dir_all(&godwit).with_context(|| format!("Cannot create {godwit:?}"))?;
    let lock = File::create(godwit.join("setup.lock")).context("Cannot create the lock file")?;
    lock.lock().context("Cannot lock the setup")?;
    apt::install(&PACKAGES)?;
    let folder = godwit.join("apt");
    // Opened by the first that needs it: that costs a download of package lists.
    let mut opened = None;
    let mut open = || {
        if opened.is_none() {
            opened = Some(Rc::new(PrivateApt::open(&folder)?));
        }
        opened.clone().context("No apt configuration")
    };
    let qemu_7_2 = qemu::system()?;
    let qemu_10_0 = qemu::backport(&godwit, &mut open)?;
    let kernel = kernel::provide(&godwit, &mut open)?;
    let newer_kernel = kernel::newer(&godwit, &mut open)?;
    let etcd = etcd::provide(&godwit, &mut open)?;
    let Initrds { with_modules, plain } = initrd::provide(root, &godwit, &kernel)?;
    let environment = Environment {
        file: godwit.join("env.json"),
        kernel: kernel.image,
        initrd: with_modules,
        newer_kernel,
        plain_initrd: plain,
        qemu_7_2,
        qemu_10_0,
        etcd,
    };
    let json = environment.json();
    if fs::read_to_string(&environment.file).ok().as_deref() != Some(json.as_str()) {
        fs::write(&environment.file, json).context("Cannot write env.json")?;
    }
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_for_json() {
        assert_eq!(quoted("a\"b\\c\n"), "\"a\\\"b\\\\c\\u000a\"");
    }
}
