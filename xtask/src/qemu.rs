//! The two QEMUs: the system's 7.2, and 10.0 from backports unpacked beside it.
//!
//! The unpacked one runs through a script that names its own libraries, modules and firmware and
//! then replaces itself by QEMU, so that the process id is QEMU's.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use anyhow::{Context as _, Result, bail};

use crate::apt::{BACKPORTS, PrivateApt};
use crate::run::output;

const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// A QEMU that can be started.
#[derive(Debug)]
pub(crate) struct Qemu {
    pub(crate) bin: PathBuf,
    /// The folder for `-L`.
    pub(crate) data: PathBuf,
}

fn version(bin: &Path) -> Result<String> {
    let text = output(Command::new(bin).arg("--version"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

fn require(bin: &Path, wanted: &str) -> Result<()> {
    let text = version(bin)?;
    if !text.contains(&format!("version {wanted}")) {
        bail!("{} is {text:?}, but QEMU {wanted} is needed: this needs Debian 12", bin.display());
    }
    Ok(())
}

/// The system's QEMU, which must be 7.2.
pub(crate) fn system() -> Result<Qemu> {
    let bin = PathBuf::from("/usr/bin/qemu-system-x86_64");
    require(&bin, "7.2")?;
    Ok(Qemu { bin, data: PathBuf::from("/usr/share/qemu") })
}

/// Links every firmware file of `folder` into `data`.
fn link_files(folder: &Path, data: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
    for entry in entries.flatten() {
        let link = data.join(entry.file_name());
        if link.symlink_metadata().is_err() {
            symlink(entry.path(), &link).with_context(|| format!("Cannot link {link:?}"))?;
        }
    }
    Ok(())
}

fn libraries_missing(bin: &Path, libraries: &Path) -> Result<Vec<String>> {
    let text = output(Command::new("ldd").arg(bin).env("LD_LIBRARY_PATH", libraries))?;
    let missing = text.lines().filter(|line| line.contains("not found"));
    Ok(missing.map(|line| line.trim().to_owned()).collect())
}

fn unpack(tree: &Path, apt: &PrivateApt) -> Result<()> {
    let packages = apt.closure("qemu-system-x86", BACKPORTS)?;
    if !packages.iter().any(|name| name.starts_with("qemu-system-x86=")) {
        bail!("The mirror's {BACKPORTS} has no newer qemu-system-x86 than the system");
    }
    apt.unpack(&packages, tree)
}

/// QEMU 10.0 under `godwit`, fetched unless it is there.
pub(crate) fn backport(
    godwit: &Path,
    apt: &mut dyn FnMut() -> Result<Rc<PrivateApt>>,
) -> Result<Qemu> {
    let folder = godwit.join("qemu-10.0");
    let qemu = Qemu { bin: folder.join("qemu-system-x86_64"), data: folder.join("data") };
    // The script is written last: where it is, everything is.
    if qemu.bin.exists() {
        return Ok(qemu);
    }
    if folder.exists() {
        fs::remove_dir_all(&folder).context("Cannot remove a half-unpacked QEMU")?;
    }
    let tree = folder.join("tree");
    unpack(&tree, &*apt()?)?;
    fs::create_dir_all(&qemu.data).context("Cannot create the firmware folder")?;
    for at in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
        for base in [tree.as_path(), Path::new("/")] {
            link_usable(&base.join(at), &qemu.data)?;
        }
    }
    let real = tree.join("usr/bin/qemu-system-x86_64");
    let libraries = tree.join(LIBRARIES);
    let missing = libraries_missing(&real, &libraries)?;
    if !missing.is_empty() {
        bail!("QEMU 10.0 lacks libraries: {}", missing.join("; "));
    }
    let script = format!(
        "#!/bin/sh\n\
         # Runs the QEMU unpacked beside the system, with its own libraries, modules and firmware.\n\
         export LD_LIBRARY_PATH='{libraries}' QEMU_MODULE_DIR='{libraries}/qemu'\n\
         exec '{real}' -L '{data}' \"$@\"\n",
        libraries = libraries.display(),
        real = real.display(),
        data = qemu.data.display(),
    );
    let draft = folder.join("draft");
    fs::write(&draft, script).context("Cannot write the start script")?;
    fs::set_permissions(&draft, fs::Permissions::from_mode(0o755))
        .context("Cannot make the start script executable")?;
    require(&draft, "10.0")?;
    fs::rename(&draft, &qemu.bin).context("Cannot put the start script in place")?;
    Ok(qemu)
}

/// As [`link_files`], leaving out links that lead nowhere (they point into other packages).
fn link_usable(folder: &Path, data: &Path) -> Result<()> {
    link_files(folder, data)?;
    for entry in fs::read_dir(data).context("Cannot list the firmware folder")?.flatten() {
        if !entry.path().exists() {
            fs::remove_file(entry.path()).context("Cannot remove a dead link")?;
        }
    }
    Ok(())
}
