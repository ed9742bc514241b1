//! What stands against moving a VM, by the direct path or at all.

use migrate_core::error::GuestPlace;
use serde_json::Value;

use super::error::VmError;
use crate::check::{Finding, Severity};
use crate::qmp::{Client, QmpError, RunState, Status};

/// Places of QEMU's object tree in which devices and back ends live.
const OBJECT_FOLDERS: [&str; 4] =
    ["/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached", "/objects"];

/// Most objects of one folder that are looked at.
const OBJECTS_MAX: usize = 65_536;

const STREAM: &str = "use --path stream";
const NO_PATH: &str = "remove it before migrating";

/// Types by a part of their name, with why they block and what helps. The first match counts.
const BLOCKING_TYPES: [(&str, &str, &str); 13] = [
    ("vhost-user", "its back end writes guest memory from another process", STREAM),
    ("vfio", "the device writes guest memory by DMA", NO_PATH),
    ("vhost-vdpa", "the device writes guest memory by DMA", STREAM),
    ("virtio-mem", "plugged memory is kept apart by QEMU", STREAM),
    ("nvdimm", "persistent memory is not moved by the direct path", STREAM),
    ("virtio-pmem", "persistent memory is not moved by the direct path", STREAM),
    ("cxl-type3", "memory behind CXL is not moved by the direct path", STREAM),
    ("ivshmem", "its memory is shared with other processes", STREAM),
    ("pvrdma", "the host's network card writes guest memory by DMA", NO_PATH),
    ("sgx-epc", "enclave memory cannot be read", NO_PATH),
    ("sev-guest", "guest memory is encrypted", NO_PATH),
    ("tdx-guest", "guest memory is encrypted", NO_PATH),
    ("x-pci-proxy-dev", "its device process writes guest memory", NO_PATH),
];

/// Types that pass SCSI commands to the host's device, which then reads and writes by DMA.
const PASSTHROUGH_TYPES: [&str; 3] = ["scsi-generic", "scsi-block", "vhost-scsi"];

/// Network back ends of `info network` that write from elsewhere.
const BLOCKING_NETWORKS: [(&str, &str); 2] =
    [("type=vhost-user", "vhost-user"), ("type=vhost-vdpa", "vhost-vdpa")];

/// Migration capabilities that contradict the direct path.
const BLOCKING_CAPABILITIES: [&str; 4] =
    ["postcopy-ram", "background-snapshot", "x-colo", "mapped-ram"];

/// An object of QEMU: where it is and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Object {
    pub path: String,
    pub kind: String,
}

/// All devices and back ends.
pub(super) async fn device_types(client: &Client) -> Result<Vec<Object>, VmError> {
    let mut objects = Vec::new();
    for folder in OBJECT_FOLDERS {
        let children = match client.qom_list(folder).await {
            Ok(children) => children,
            // A folder that this version does not have.
            Err(QmpError::Command { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        for child in children.iter().take(OBJECTS_MAX) {
            if let Some(kind) = child.child_type() {
                let path = format!("{folder}/{}", child.name);
                objects.push(Object { path, kind: kind.to_owned() });
            }
        }
    }
    Ok(objects)
}

/// Findings about devices that write past QEMU or whose memory is special.
pub(super) fn devices(objects: &[Object]) -> Vec<Finding> {
    objects.iter().filter_map(device).collect()
}

fn device(object: &Object) -> Option<Finding> {
    let (_, why, remedy) = BLOCKING_TYPES.iter().find(|(part, ..)| object.kind.contains(part))?;
    let what = format!("{} at {}: {why}", object.kind, object.path);
    let severity = if *remedy == STREAM { Severity::Indirect } else { Severity::Blocker };
    Some(Finding::new(severity, what, *remedy))
}

/// Disks whose SCSI commands go to the host's device.
pub(super) fn passthrough_disks(objects: &[Object]) -> Vec<String> {
    objects
        .iter()
        .filter(|object| PASSTHROUGH_TYPES.iter().any(|kind| object.kind.starts_with(kind)))
        .map(|object| format!("{}: {} passes I/O to the host's device", object.path, object.kind))
        .collect()
}

/// Whether a device may take pages away from the guest's RAM file while it runs: the dirty tracking
/// does not report a clean page that became a hole.
pub(super) fn discards(objects: &[Object]) -> bool {
    objects.iter().any(|object| object.kind.starts_with("virtio-balloon"))
}

/// Findings about network back ends.
pub(super) async fn network(client: &Client) -> Result<Vec<Finding>, VmError> {
    match client.hmp("info network").await {
        Ok(text) => Ok(network_text(&text)),
        Err(QmpError::Command { .. }) => Ok(vec![Finding::indirect(
            "QEMU does not list its network back ends (info network)",
            STREAM,
        )]),
        Err(error) => Err(error.into()),
    }
}

fn network_text(text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for line in text.lines() {
        for (mark, kind) in BLOCKING_NETWORKS {
            if line.contains(mark) {
                let name = line.trim_start_matches([' ', '\\']).split(':').next();
                let name = name.unwrap_or_default();
                findings.push(Finding::indirect(
                    format!("Network back end {name} is {kind}: it writes guest memory itself"),
                    STREAM,
                ));
            }
        }
    }
    findings
}

/// Findings about migration settings and states.
pub(super) async fn settings(client: &Client, status: &Status) -> Result<Vec<Finding>, VmError> {
    let mut findings: Vec<Finding> = state(status).into_iter().collect();
    let migration = client.query_migrate().await?;
    for reason in &migration.blocked_reasons {
        findings.push(Finding::blocker(
            format!("QEMU refuses to migrate this VM: {reason}"),
            "remove the device or feature that QEMU names",
        ));
    }
    if let Some(state) = migration.status.filter(|state| !state.is_over()) {
        findings.push(Finding::blocker(
            format!("A migration is under way in this QEMU ({state})"),
            "wait for its end or cancel it",
        ));
    }
    let capabilities = client.capabilities().await?;
    for name in BLOCKING_CAPABILITIES {
        if capabilities.get(name) == Some(&true) {
            findings.push(Finding::blocker(
                format!("The migration capability {name} is on"),
                format!("turn {name} off (migrate-set-capabilities)"),
            ));
        }
    }
    if !capabilities.contains_key("x-ignore-shared") {
        findings.push(Finding::indirect(
            format!("QEMU {} cannot leave shared RAM out of its stream", client.version()),
            "use QEMU 4.0 or newer, or --path stream",
        ));
    }
    let parameters = client.migrate_parameters().await?;
    if let Some(mode) = parameters.get("mode").and_then(Value::as_str)
        && mode != "normal"
    {
        findings.push(Finding::blocker(
            format!("The migration mode is {mode}"),
            "set the migration parameter mode to normal",
        ));
    }
    Ok(findings)
}

fn state(status: &Status) -> Option<Finding> {
    let remedy = match (&status.state, status.place()) {
        (_, GuestPlace::Running | GuestPlace::Incoming) => return None,
        (RunState::Paused | RunState::Prelaunch, _) => return None,
        (RunState::PostMigrate, _) => "resume it (cont), unless it runs on another host already",
        (RunState::Suspended, _) => "wake the guest up",
        (
            RunState::Shutdown
            | RunState::GuestPanicked
            | RunState::IoError
            | RunState::InternalError
            | RunState::Watchdog,
            _,
        ) => {
            let what = format!("The VM does not run: it is {}", status.state);
            return Some(Finding::new(Severity::Warning, what, "it will arrive in that state"));
        }
        _ => "wait until it runs or is paused",
    };
    Some(Finding::blocker(format!("The VM is {}", status.state), remedy))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(kind: &str) -> Object {
        Object { path: "/machine/peripheral/x".into(), kind: kind.into() }
    }

    #[test]
    fn devices_that_write_past_qemu_block() {
        use Severity::{Blocker, Indirect};
        for (kind, severity) in [
            ("vhost-user-fs-pci", Indirect),
            ("cryptodev-vhost-user", Indirect),
            ("vfio-pci", Blocker),
            ("vhost-vdpa-device-pci", Indirect),
            ("virtio-mem-pci", Indirect),
            ("nvdimm", Indirect),
            ("ivshmem-plain", Indirect),
        ] {
            let finding = device(&object(kind)).unwrap();
            assert_eq!(finding.severity, severity, "{kind}");
            assert!(finding.what.contains(kind) && finding.remedy.is_some());
        }
        for kind in ["virtio-net-pci", "pc-dimm", "vhost-vsock-pci", "memory-backend-file"] {
            assert_eq!(device(&object(kind)), None, "{kind}");
        }
    }

    #[test]
    fn passed_through_disks_are_direct_io() {
        let objects = [object("scsi-generic"), object("vhost-scsi-pci"), object("scsi-hd")];
        assert_eq!(passthrough_disks(&objects).len(), 2);
    }

    #[test]
    fn network_back_ends_are_found() {
        let text = "nic0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n \
                    \\ net0: index=0,type=vhost-user,fd=20\r\n";
        let findings = network_text(text);
        assert_eq!(findings.len(), 1);
        assert!(findings[0].what.contains("net0"), "{}", findings[0]);
        assert!(network_text("net0: index=0,type=user,net=10.0.2.0\r\n").is_empty());
    }

    #[test]
    fn states_that_cannot_travel_block() {
        let severity = |name: &str, running| {
            state(&Status { running, state: name.into() }).map(|finding| finding.severity)
        };
        assert_eq!(severity("running", true), None);
        assert_eq!(severity("inmigrate", false), None);
        assert_eq!(severity("paused", false), None);
        assert_eq!(severity("postmigrate", false), Some(Severity::Blocker));
        assert_eq!(severity("hibernating", false), Some(Severity::Blocker));
        assert_eq!(severity("guest-panicked", false), Some(Severity::Warning));
    }
}
