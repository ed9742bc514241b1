//! The guests' kernels: Debian's packages, unpacked, and the modules that guests load of the older one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context as _, Result, bail};

use crate::apt::{BACKPORTS, PrivateApt};

const META_PACKAGE: &str = "linux-image-amd64";
const PREFIX: &str = "linux-image-6.1.";
/// The kernel of backports, for guests that need no modules.
const NEWER_PREFIX: &str = "linux-image-6.12.";
/// Loaded by the guest's init, with what they depend on.
const MODULES: [&str; 5] =
    ["virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon", "virtio_mem"];

/// Where the kernel's parts lie under target/godwit.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) image: PathBuf,
    /// The modules and the file `modules.list`, which has one file name a line in load order.
    pub(crate) modules: PathBuf,
}

/// Fetches the kernel unless it is there.
pub(crate) fn provide(
    godwit: &Path,
    apt: &mut dyn FnMut() -> Result<Rc<PrivateApt>>,
) -> Result<Kernel> {
    let kernel = Kernel { image: godwit.join("vmlinuz"), modules: godwit.join("modules") };
    // The list is written last: where it is, everything is.
    if kernel.image.exists() && kernel.modules.join("modules.list").exists() {
        return Ok(kernel);
    }
    let apt = apt()?;
    let package = apt.dependency(META_PACKAGE, PREFIX)?;
    let tree = godwit.join("kernel.unpacked");
    let version = unpack_image(&apt, &package, &tree, &kernel.image)?;
    let mut files = BTreeMap::new();
    find_modules(&tree, &mut files)?;
    let order = load_order(&files)?;
    fs::create_dir_all(&kernel.modules).context("Cannot create the modules' folder")?;
    let mut list = String::new();
    for name in order {
        let file = format!("{name}.ko");
        let source = files.get(&name).with_context(|| format!("No module {name}"))?;
        fs::copy(source, kernel.modules.join(&file))
            .with_context(|| format!("Cannot copy {source:?}"))?;
        list.push_str(&file);
        list.push('\n');
    }
    fs::write(godwit.join("kernel.version"), format!("{version}\n"))
        .context("Cannot note the kernel's version")?;
    fs::write(kernel.modules.join("modules.list"), list).context("Cannot write modules.list")?;
    fs::remove_dir_all(&tree).context("Cannot remove the unpacked kernel")?;
    Ok(kernel)
}

/// Fetches the kernel of backports unless it is there.
pub(crate) fn newer(
    godwit: &Path,
    apt: &mut dyn FnMut() -> Result<Rc<PrivateApt>>,
) -> Result<PathBuf> {
    let image = godwit.join("vmlinuz-6.12");
    if image.exists() {
        return Ok(image);
    }
    let apt = apt()?;
    let packages = apt.closure(META_PACKAGE, BACKPORTS)?;
    let package = packages.into_iter().find(|package| package.starts_with(NEWER_PREFIX));
    let package = package.with_context(|| format!("{BACKPORTS} has no {NEWER_PREFIX}*"))?;
    let tree = godwit.join("kernel-6.12.unpacked");
    unpack_image(&apt, &package, &tree, &image)?;
    fs::remove_dir_all(&tree).context("Cannot remove the unpacked kernel")?;
    Ok(image)
}

/// Unpacks a package (`name` or `name=version`) and puts its kernel at `image`. Returns the kernel's version.
fn unpack_image(apt: &PrivateApt, package: &str, tree: &Path, image: &Path) -> Result<String> {
    apt.unpack(&[package.to_owned()], tree)?;
    let name = package.split('=').next().unwrap_or(package);
    let version = name.trim_start_matches("linux-image-");
    let unpacked = tree.join(format!("boot/vmlinuz-{version}"));
    // In place once it is whole.
    let draft = image.with_extension("draft");
    fs::copy(&unpacked, &draft).with_context(|| format!("No kernel at {unpacked:?}"))?;
    fs::rename(&draft, image).with_context(|| format!("Cannot put {image:?} in place"))?;
    Ok(version.to_owned())
}

fn find_modules(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("Cannot list {folder:?}"))? {
        let entry = entry.with_context(|| format!("Cannot list {folder:?}"))?;
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            find_modules(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "ko")
            && let Some(stem) = path.file_stem().and_then(|stem| stem.to_str())
        {
            files.insert(stem.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// The wanted modules and their dependencies, each after what it needs.
fn load_order(files: &BTreeMap<String, PathBuf>) -> Result<Vec<String>> {
    let mut order = Vec::new();
    for name in MODULES {
        add_module(name, files, &mut order, 0)?;
    }
    Ok(order)
}

fn add_module(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    order: &mut Vec<String>,
    depth: u32,
) -> Result<()> {
    if order.iter().any(|known| known == name) {
        return Ok(());
    }
    if depth > 16 {
        bail!("Modules depend on each other in a circle, at {name}");
    }
    let path = files.get(name).with_context(|| {
        format!("The kernel package has no module {name}.ko; compressed modules are not supported")
    })?;
    let bytes = fs::read(path).with_context(|| format!("Cannot read {path:?}"))?;
    for needed in dependencies(&bytes) {
        add_module(&needed, files, order, depth + 1)?;
    }
    order.push(name.to_owned());
    Ok(())
}

/// The `depends=` entry of a module's .modinfo section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module.get(at + KEY.len()..).unwrap_or_default();
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(0);
    let text = String::from_utf8_lossy(value.get(..end).unwrap_or_default()).replace('-', "_");
    text.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_dependencies() {
        assert_eq!(dependencies(b"x\0depends=virtio,virtio-ring\0y"), ["virtio", "virtio_ring"]);
        assert!(dependencies(b"x\0depends=\0y").is_empty());
        assert!(dependencies(b"nothing").is_empty());
        assert!(dependencies(b"\0depends=cut").is_empty());
    }

    #[test]
    fn orders_modules_after_what_they_need() {
        let folder = std::env::temp_dir().join(format!("xtask-modules-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let mut files = BTreeMap::new();
        for name in MODULES.iter().chain(&["virtio", "virtio_ring"]) {
            let needs = match *name {
                "virtio_ring" => "virtio",
                "virtio" => "",
                _ => "virtio_ring,virtio",
            };
            let path = folder.join(name);
            fs::write(&path, format!("\0depends={needs}\0")).unwrap();
            files.insert((*name).to_owned(), path);
        }
        let order = load_order(&files).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(order[..3], ["virtio", "virtio_ring", "virtio_pci"]);
        assert_eq!(order.len(), 7);
    }
}
