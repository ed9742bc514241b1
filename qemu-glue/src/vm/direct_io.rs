//! Disks whose data reaches guest memory past the page cache (design rule 6).

use std::fs;

use serde_json::Value;

use crate::error::ProcError;
use crate::procfs;

/// `O_DIRECT` on x86-64 (asm-generic/fcntl.h).
const O_DIRECT: u64 = 0o40000;

/// Drivers that only reformat what another node reads.
const FORMAT_DRIVERS: [&str; 5] = ["raw", "qcow2", "throttle", "copy-on-read", "qed"];

/// Block nodes with `cache.direct`; where a file has several nodes, the one that reads it.
pub(super) fn block_nodes(nodes: &[Value]) -> Vec<String> {
    let text = |node: &Value, key: &str| {
        node.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let direct: Vec<&Value> = nodes
        .iter()
        .filter(|node| node.pointer("/cache/direct").and_then(Value::as_bool) == Some(true))
        .collect();
    let reads = |node: &Value| !FORMAT_DRIVERS.contains(&text(node, "drv").as_str());
    let describe = |node: &&Value| {
        let (name, file) = (text(node, "node-name"), text(node, "file"));
        format!("{file}: block node {name} bypasses the page cache (cache.direct)")
    };
    let leaves: Vec<String> = direct.iter().filter(|node| reads(node)).map(describe).collect();
    if leaves.is_empty() { direct.iter().map(describe).collect() } else { leaves }
}

/// Files that the process has open with `O_DIRECT`.
pub(super) fn descriptors(pid: i32) -> Result<Vec<String>, ProcError> {
    let mut files = Vec::new();
    for descriptor in procfs::descriptors(pid)? {
        // A descriptor that is closed meanwhile is of no interest.
        let Ok(info) = fs::read_to_string(format!("/proc/{pid}/fdinfo/{descriptor}")) else {
            continue;
        };
        if !is_direct(&info) {
            continue;
        }
        let Ok(path) = fs::read_link(format!("/proc/{pid}/fd/{descriptor}")) else { continue };
        // Pipes and io_uring use the same bit for other things.
        if path.is_absolute() {
            files.push(path.display().to_string());
        }
    }
    files.sort();
    files.dedup();
    Ok(files)
}

/// Whether the `flags` line of an fdinfo file has `O_DIRECT`.
fn is_direct(info: &str) -> bool {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    flags
        .and_then(|flags| u64::from_str_radix(flags.trim(), 8).ok())
        .is_some_and(|flags| flags & O_DIRECT != 0)
}

/// Adds files that no block node has named yet.
pub(super) fn merge(reasons: &mut Vec<String>, files: Vec<String>) {
    for file in files {
        let known = reasons.iter().any(|reason| reason.starts_with(&format!("{file}:")));
        if !known {
            reasons.push(format!("{file}: open with O_DIRECT"));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_reading_node_is_named_once() {
        let node = |name: &str, driver: &str, direct: bool| {
            let cache = json!({ "direct": direct });
            json!({ "node-name": name, "drv": driver, "file": "/d.img", "cache": cache })
        };
        let nodes = [node("top", "raw", true), node("leaf", "file", true)];
        let reasons = block_nodes(&nodes);
        assert_eq!(reasons.len(), 1);
        assert!(reasons[0].contains("leaf"));
        assert_eq!(block_nodes(&nodes[..1]).len(), 1, "a lone format node still counts");
        assert!(block_nodes(&[node("leaf", "file", false), json!({}), json!(7)]).is_empty());
    }

    #[test]
    fn flags_are_octal() {
        assert!(is_direct("pos:\t0\nflags:\t02140002\nmnt_id:\t1\n"));
        assert!(!is_direct("pos:\t0\nflags:\t02100002\n"));
        assert!(!is_direct("flags:\tx\n") && !is_direct(""));
    }

    #[test]
    fn known_files_are_not_repeated() {
        let mut reasons = vec!["/d.img: block node leaf".to_owned()];
        merge(&mut reasons, vec!["/d.img".into(), "/e.img".into()]);
        assert_eq!(reasons.len(), 2);
        assert!(reasons[1].starts_with("/e.img:"));
    }
}
