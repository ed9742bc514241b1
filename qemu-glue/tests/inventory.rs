//! The inventory against real QEMUs in many shapes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use qemu_glue::qmp::RunState;
use qemu_glue::vm::{VmInventory, inventory};
use support::{MACHINE, Program, Qemu, folder, programs, shared_file};

const MIB: u64 = 1 << 20;

/// The firmware makes RAM of the ROMs' place within this time.
const SHADOWED_WITHIN: Duration = Duration::from_secs(20);

async fn examine(program: &Program, folder: &Path, name: &str, arguments: &[&str]) -> VmInventory {
    examine_when(program, folder, name, arguments, |_| true).await
}

/// Looks again until the VM `is_ready`, or no longer.
async fn examine_when(
    program: &Program,
    folder: &Path,
    name: &str,
    arguments: &[&str],
    is_ready: impl Fn(&VmInventory) -> bool,
) -> VmInventory {
    let qemu = Qemu::start(program, folder, name, arguments);
    let client = qemu.client().await;
    let deadline = Instant::now() + SHADOWED_WITHIN;
    let mut found = inventory(&client).await.unwrap();
    while !is_ready(&found) && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
        found = inventory(&client).await.unwrap();
    }
    assert_eq!(found.pid, qemu.pid());
    for region in &found.regions {
        let file = folder.join(format!("{name}.{}.ram", region.name));
        if file.exists() {
            check_address(&found, &region.name, file.to_str().unwrap());
        }
    }
    found
}

fn blocks(found: &VmInventory) -> Vec<(&str, u64)> {
    found.regions.iter().map(|region| (region.name.as_str(), region.length_bytes / MIB)).collect()
}

fn blockers(found: &VmInventory) -> String {
    found.blockers.iter().map(|finding| format!("{finding}\n")).collect()
}

/// The region's address is right if QEMU's own maps file has the backing file there.
fn check_address(found: &VmInventory, block: &str, file: &str) {
    let region = found.regions.iter().find(|region| region.name == block).unwrap();
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", found.pid)).unwrap();
    let start = format!("{:x}-", region.hva);
    let line = maps.lines().find(|line| line.starts_with(&start)).unwrap();
    assert!(line.contains(file), "{line}");
}

#[tokio::test]
async fn one_shared_file_is_all_that_is_needed() {
    for program in programs() {
        let folder = folder();
        let memory = shared_file(folder.path(), "vm", "ram0", 256);
        let machine = format!("{MACHINE},memory-backend=ram0");
        let arguments =
            ["-m", "256", "-machine", &machine, "-object", &memory, "-name", "guest=one"];
        let seen = |found: &VmInventory| {
            let ranges = found.guest_physical.iter().filter(|range| range.block == "ram0");
            ranges.map(|range| range.bytes).collect::<Vec<_>>()
        };
        let shadowed = |found: &VmInventory| seen(found) == [256 * MIB];
        let found = examine_when(&program, folder.path(), "vm", &arguments, shadowed).await;
        assert_eq!(blocks(&found), [("ram0", 256)]);
        assert_eq!(blockers(&found), "");
        assert_eq!(found.machine, MACHINE);
        assert_eq!(found.name.as_deref(), Some("one"));
        assert!(found.status.running);
        assert!(found.streamed_blocks.iter().any(|(name, _)| name == "pc.bios"));
        let all = &found.guest_physical;
        assert_eq!(seen(&found), [256 * MIB], "adjacent parts are joined: {all:?}");
        // These say of the firmware, too, where it is.
        let has_firmware = all.iter().any(|range| range.block == "pc.bios");
        assert_eq!(has_firmware, found.qemu.at_least(8, 2), "{all:?}");
    }
}

#[tokio::test]
async fn an_incoming_machine_is_described_as_well() {
    for program in programs() {
        let folder = folder();
        let qemu = Qemu::start_shared(&program, folder.path(), "in", &["-incoming", "defer"]);
        let found = inventory(&qemu.client().await).await.unwrap();
        assert_eq!(blocks(&found), [("ram0", 256)]);
        assert_eq!(found.status.state, RunState::InMigrate);
        assert_eq!(blockers(&found), "");
        assert_eq!(found.machine, MACHINE);
        check_address(&found, "ram0", "in.ram0.ram");
    }
}

#[tokio::test]
async fn nodes_and_dimms_are_blocks_of_their_own() {
    for program in programs() {
        let folder = folder();
        let [n0, n1, d0] = ["n0", "n1", "d0"].map(|id| shared_file(folder.path(), "vm", id, 128));
        let arguments = [
            "-machine",
            "q35",
            "-m",
            "256,slots=2,maxmem=1G",
            "-smp",
            "2",
            "-object",
            &n0,
            "-object",
            &n1,
            "-object",
            &d0,
            "-numa",
            "node,memdev=n0,cpus=0",
            "-numa",
            "node,memdev=n1,cpus=1",
            "-device",
            "pc-dimm,memdev=d0,id=dimm0,node=1",
        ];
        let found = examine(&program, folder.path(), "vm", &arguments).await;
        assert_eq!(blockers(&found), "");
        let mut names = blocks(&found);
        names.sort_unstable();
        assert_eq!(names, [("d0", 128), ("n0", 128), ("n1", 128)]);
        let dimm = found.guest_physical.iter().find(|range| range.block == "d0").unwrap();
        assert_eq!((dimm.gpa, dimm.bytes, dimm.offset), (4 << 30, 128 * MIB, 0));
        // q35's alias has to be resolved.
        assert!(found.machine.starts_with("pc-q35-"), "{}", found.machine);
    }
}

#[tokio::test]
async fn private_memory_blocks() {
    for program in programs() {
        let folder = folder();
        let found =
            examine(&program, folder.path(), "vm", &["-m", "64", "-machine", MACHINE]).await;
        assert!(found.regions.is_empty());
        assert!(
            blockers(&found).contains("pc.ram (64 MiB) is private memory"),
            "{}",
            blockers(&found)
        );
        assert!(blockers(&found).contains("no RAM in a shared file"));
        let placed = found.placed.iter().find(|block| block.name == "pc.ram").unwrap();
        assert_eq!((placed.length_bytes, placed.page_bytes), (64 * MIB, 4096));
        assert!(found.guest_physical.iter().any(|range| range.block == "pc.ram"));
    }
}

#[tokio::test]
async fn a_memfd_is_left_out_up_to_8_0_only() {
    for program in programs() {
        let folder = folder();
        let machine = format!("{MACHINE},memory-backend=ram0");
        let memory = "memory-backend-memfd,id=ram0,size=64M,share=on";
        let arguments = ["-m", "64", "-machine", &machine, "-object", memory];
        let found = examine(&program, folder.path(), "vm", &arguments).await;
        if found.qemu.at_least(8, 1) {
            assert!(found.regions.is_empty());
            assert!(blockers(&found).contains("memory-backend-memfd"), "{}", blockers(&found));
        } else {
            assert_eq!(blocks(&found), [("ram0", 64)]);
            assert_eq!(blockers(&found), "");
        }
    }
}

#[tokio::test]
async fn memory_above_the_hole_is_placed_right() {
    for program in programs() {
        let folder = folder();
        let memory = shared_file(folder.path(), "vm", "ram0", 5 << 10);
        let machine = format!("{MACHINE},memory-backend=ram0");
        let arguments = ["-m", "5G", "-machine", &machine, "-object", &memory, "-device", "VGA"];
        let found = examine(&program, folder.path(), "vm", &arguments).await;
        assert_eq!(blockers(&found), "");
        let high = found.guest_physical.last().unwrap();
        assert_eq!((high.gpa, high.offset, high.bytes), (4 << 30, 3 << 30, 2 << 30));
        assert!(found.streamed_blocks.iter().any(|(name, _)| name.ends_with("vga.vram")));
    }
}

#[tokio::test]
async fn obstacles_are_named() {
    for program in programs() {
        let folder = folder();
        let spare = shared_file(folder.path(), "vm", "spare", 2);
        let nvdimm = shared_file(folder.path(), "vm", "nv0", 128);
        let memory = shared_file(folder.path(), "vm", "ram0", 64);
        let machine = format!("{MACHINE},memory-backend=ram0,nvdimm=on");
        let arguments = [
            "-m",
            "64,slots=2,maxmem=1G",
            "-machine",
            &machine,
            "-object",
            &memory,
            "-object",
            &spare,
            "-device",
            "ivshmem-plain,memdev=spare",
            "-object",
            &nvdimm,
            "-device",
            "nvdimm,memdev=nv0",
        ];
        let qemu = Qemu::start(&program, folder.path(), "vm", &arguments);
        let client = qemu.client().await;
        client.set_capabilities(&[("postcopy-ram", true)]).await.unwrap();
        let found = inventory(&client).await.unwrap();
        let text = blockers(&found);
        for part in ["ivshmem-plain", "nvdimm at", "postcopy-ram is on"] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
    }
}

#[tokio::test]
async fn direct_disks_are_named_with_the_reason() {
    for program in programs() {
        // tmpfs has no O_DIRECT before Linux 6.6, the folder of the build has.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut drives = Vec::new();
        for (name, cache) in [("direct", "none"), ("buffered", "writeback")] {
            let path = folder.path().join(name);
            std::fs::File::create(&path).unwrap().set_len(MIB).unwrap();
            drives.push(format!("if=virtio,format=raw,cache={cache},file={}", path.display()));
        }
        let arguments =
            ["-m", "64", "-machine", MACHINE, "-drive", &drives[0], "-drive", &drives[1]];
        let found = examine(&program, folder.path(), "vm", &arguments).await;
        assert_eq!(found.direct_io.len(), 1, "{:?}", found.direct_io);
        assert!(found.direct_io[0].contains("/direct: block node"), "{:?}", found.direct_io);
    }
}

#[tokio::test]
async fn a_second_writer_of_the_memory_is_noticed() {
    for program in programs() {
        let folder = folder();
        let qemu = Qemu::start_shared(&program, folder.path(), "vm", &[]);
        // A second QEMU on the same file: the mistake that this is for.
        let memory = shared_file(folder.path(), "vm", "ram0", 256);
        let machine = format!("{MACHINE},memory-backend=ram0");
        let arguments = ["-m", "256", "-machine", &machine, "-object", &memory, "-S"];
        let second = Qemu::start(&program, folder.path(), "second", &arguments);
        // It greets when it has its memory.
        drop(second.client().await);
        let found = inventory(&qemu.client().await).await.unwrap();
        let expected = format!("by process {}", second.pid());
        assert!(blockers(&found).contains(&expected), "{}", blockers(&found));
        drop(second);
        let found = inventory(&qemu.client().await).await.unwrap();
        assert_eq!(blockers(&found), "");
    }
}
