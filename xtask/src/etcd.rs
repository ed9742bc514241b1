//! etcd, unpacked beside the system: installing its package would start a service.

use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context as _, Result};

use crate::apt::PrivateApt;

/// etcd's server under `godwit`, fetched unless it is there.
pub(crate) fn provide(
    godwit: &Path,
    apt: &mut dyn FnMut() -> Result<Rc<PrivateApt>>,
) -> Result<PathBuf> {
    let program = godwit.join("etcd");
    if program.exists() {
        return Ok(program);
    }
    let tree = godwit.join("etcd.unpacked");
    apt()?.unpack(&["etcd-server".to_owned()], &tree)?;
    // Put in place last: where it is, it is whole.
    fs::rename(tree.join("usr/bin/etcd"), &program).context("The package has no usr/bin/etcd")?;
    fs::remove_dir_all(&tree).context("Cannot remove the unpacked etcd")?;
    Ok(program)
}
