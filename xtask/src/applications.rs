//! `applications`: Debian's programs that benchmarks run inside the guest, in an initramfs of their
//! own, so that the ordinary guest stays small and `setup` fast.
//!
//! ```text
//!  packages ── unpack ──> programs, and the libraries that their loader finds ──> applications.gz
//!  initrd.gz + applications.gz ──> initrd-applications.gz (the kernel unpacks both)
//! ```
//! Nothing is installed. The packages are named here one by one, because a resolver would leave
//! out those that this machine has installed; that none is missing is asked of the loader.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::apt::PrivateApt;
use crate::initrd::{Archive, compress};
use crate::run::output;
use crate::setup;

/// Programs and their libraries, of the suite `bookworm`.
const PACKAGES: [&str; 22] = [
    "redis-server",
    "redis-tools",
    "sqlite3",
    "xz-utils",
    "libatomic1",
    "libc6",
    "libcap2",
    "libgcc-s1",
    "libgcrypt20",
    "libgpg-error0",
    "libjemalloc2",
    "liblz4-1",
    "liblzf1",
    "liblzma5",
    "libreadline8",
    "libsqlite3-0",
    "libssl3",
    "libstdc++6",
    "libsystemd0",
    "libtinfo6",
    "libzstd1",
    "zlib1g",
];

/// What goes into the guest's /app/bin.
const PROGRAMS: [&str; 4] = ["redis-server", "redis-benchmark", "sqlite3", "xz"];

/// Where the guest looks for the loader, as every program says.
const LOADER: &str = "lib64/ld-linux-x86-64.so.2";

/// Where the packages' libraries lie.
const LIBRARIES: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

/// Fetches and packs what is missing; the initramfs that has everything.
pub(crate) fn provide(root: &Path) -> Result<PathBuf> {
    let environment = setup::setup(root)?;
    let godwit = root.join("target/godwit");
    let lock = File::create(godwit.join("setup.lock")).context("Cannot create the lock file")?;
    lock.lock().context("Cannot lock the setup")?;
    let packed = godwit.join("applications.gz");
    if !packed.exists() {
        fetch(&godwit, &packed)?;
    }
    let joined = godwit.join("initrd-applications.gz");
    let parts = [&environment.initrd, &packed];
    let bytes = parts.map(|part| fs::read(part).with_context(|| format!("Cannot read {part:?}")));
    let [base, applications] = bytes;
    let wanted = [base?, applications?].concat();
    if fs::read(&joined).ok().as_ref() != Some(&wanted) {
        println!("   writing {}", joined.display());
        replace(&joined, &wanted)?;
    }
    Ok(joined)
}

fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let draft = path.with_extension("draft");
    let mut file = File::create(&draft).with_context(|| format!("Cannot create {draft:?}"))?;
    file.write_all(bytes).with_context(|| format!("Cannot write {draft:?}"))?;
    fs::rename(&draft, path).with_context(|| format!("Cannot put {path:?} in place"))
}

fn fetch(godwit: &Path, packed: &Path) -> Result<()> {
    let tree = godwit.join("applications.unpacked");
    if tree.exists() {
        fs::remove_dir_all(&tree).context("Cannot remove what was half unpacked")?;
    }
    let apt = PrivateApt::open(&godwit.join("apt"))?;
    let packages: Vec<String> = PACKAGES.iter().map(|name| format!("{name}/bookworm")).collect();
    apt.unpack(&packages, &tree)?;
    let bytes = archive(&tree)?;
    println!("   writing {}", packed.display());
    compress(&bytes, packed)?;
    fs::remove_dir_all(&tree).context("Cannot remove the unpacked packages")
}

/// A path of the tree as the guest has it, its links resolved within the tree.
fn program(tree: &Path, name: &str) -> Result<PathBuf> {
    let path = tree.join("usr/bin").join(name);
    match fs::read_link(&path) {
        Ok(target) => Ok(tree.join("usr/bin").join(target)),
        Err(_) if path.exists() => Ok(path),
        Err(_) => bail!("The packages hold no program {name}"),
    }
}

/// The loader of the tree.
fn loader(tree: &Path) -> Result<PathBuf> {
    // The tree's /lib64 has a link to an absolute path, which leads out of the tree.
    let name = "ld-linux-x86-64.so.2";
    let found = LIBRARIES.map(|folder| tree.join(folder).join(name));
    let found = found.into_iter().find(|path| path.exists());
    found.context("The packages hold no loader")
}

/// The libraries that a program needs, by their names, as the tree's own loader finds them.
fn libraries(tree: &Path, program: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let folders = LIBRARIES.map(|folder| tree.join(folder).display().to_string()).join(":");
    let mut command = Command::new(loader(tree)?);
    command.args(["--inhibit-cache", "--library-path", &folders, "--list"]).arg(program);
    let text = output(&mut command)
        .with_context(|| format!("{} cannot be loaded: a package is missing", program.display()))?;
    let found = parse_list(&text)?;
    for (name, path) in &found {
        if !path.starts_with(tree) {
            bail!("{name} is not of the packages but {}: name its package", path.display());
        }
    }
    Ok(found)
}

/// Reads lines such as `libm.so.6 => /tree/lib/libm.so.6 (0x7f00)`.
fn parse_list(text: &str) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let Some((name, rest)) = line.trim().split_once(" => ") else { continue };
        let path = rest.split(" (").next().unwrap_or(rest);
        if !path.starts_with('/') {
            bail!("No package has the library {name}");
        }
        found.insert(name.to_owned(), PathBuf::from(path));
    }
    Ok(found)
}

fn archive(tree: &Path) -> Result<Vec<u8>> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("Cannot read {path:?}"));
    let mut archive = Archive::default();
    for folder in ["lib64", "app", "app/bin", "app/lib"] {
        archive.folder(folder)?;
    }
    archive.program(LOADER, &read(&loader(tree)?)?)?;
    let mut all: BTreeMap<String, PathBuf> = BTreeMap::new();
    for name in PROGRAMS {
        let path = program(tree, name)?;
        archive.program(&format!("app/bin/{name}"), &read(&path)?)?;
        all.extend(libraries(tree, &path)?);
    }
    // The loader lists itself by its path.
    for (name, path) in all.iter().filter(|(name, _)| !name.contains('/')) {
        archive.program(&format!("app/lib/{name}"), &read(path)?)?;
    }
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_loader_lists() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                    \tlibm.so.6 => /t/lib/libm.so.6 (0x00007f1)\n\
                    \t/lib64/ld-linux-x86-64.so.2 => /t/lib/ld-linux-x86-64.so.2 (0x00007f3)\n";
        let found = parse_list(text).unwrap();
        assert_eq!(found["libm.so.6"], Path::new("/t/lib/libm.so.6"));
        assert_eq!(found.len(), 2);
        let error = parse_list("\tliblzf.so.1 => not found\n").unwrap_err().to_string();
        assert!(error.contains("liblzf.so.1"), "{error}");
    }

    #[test]
    fn packages_are_in_order_and_unique() {
        assert!(PACKAGES[4..].is_sorted());
        let mut sorted = PACKAGES;
        sorted.sort_unstable();
        assert!(sorted.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
