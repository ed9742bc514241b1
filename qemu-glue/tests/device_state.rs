//! Device state against real QEMUs: hand-over, way back, failure and cleanliness.

mod support;

use std::time::{Duration, Instant};

use migrate_core::error::GuestPlace;
use qemu_glue::device_state;
use qemu_glue::qmp::{Client, RunState};
use serde_json::Value;
use support::{Program, Qemu, copy_memory, folder, programs};

const LIMIT_BYTES: u64 = 64 << 20;

/// The settings that a transfer borrows.
async fn settings(client: &Client) -> (Vec<(String, bool)>, Value) {
    let capabilities = client.capabilities().await.unwrap().into_iter().collect();
    let parameters = client.migrate_parameters().await.unwrap();
    (capabilities, parameters.get("max-bandwidth").cloned().unwrap())
}

fn disk(folder: &std::path::Path) -> String {
    let path = folder.join("disk.raw");
    if !path.exists() {
        std::fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
    }
    format!("driver=file,node-name=disk0,filename={},locking=on", path.display())
}

/// Source and destination share one disk image, whose lock tells who has it.
fn pair(program: &Program, folder: &std::path::Path) -> (Qemu, Qemu) {
    let disk = disk(folder);
    let device = ["-blockdev", disk.as_str(), "-device", "virtio-blk-pci,drive=disk0"];
    let source = Qemu::start_shared(program, folder, "source", &device);
    let incoming = [&device[..], &["-incoming", "defer"]].concat();
    (source, Qemu::start_shared(program, folder, "target", &incoming))
}

async fn hand_over(from: &Program, to: &Program) {
    let folder = folder();
    let (source_qemu, target_qemu) = if from.name == to.name {
        pair(from, folder.path())
    } else {
        let disk = disk(folder.path());
        let device = ["-blockdev", disk.as_str(), "-device", "virtio-blk-pci,drive=disk0"];
        let incoming = [&device[..], &["-incoming", "defer"]].concat();
        (
            Qemu::start_shared(from, folder.path(), "source", &device),
            Qemu::start_shared(to, folder.path(), "target", &incoming),
        )
    };
    let (source, target) = (source_qemu.client().await, target_qemu.client().await);
    let (source_before, target_before) = (settings(&source).await, settings(&target).await);
    tokio::time::sleep(Duration::from_millis(300)).await;

    source.stop().await.unwrap();
    assert_eq!(source.query_status().await.unwrap().state, RunState::Paused);
    let begun = Instant::now();
    let state = device_state::save(&source, LIMIT_BYTES).await.unwrap();
    let saved_after = begun.elapsed();
    assert_eq!(state.header.machine, support::MACHINE);
    assert_eq!(source.query_status().await.unwrap().state, RunState::PostMigrate);
    assert_eq!(settings(&source).await, source_before);

    copy_memory(folder.path(), "source", "target", "ram0");
    let length = state.bytes.len();
    let begun = Instant::now();
    let status = device_state::load(&target, state.bytes).await.unwrap();
    let loaded_after = begun.elapsed();
    println!(
        "{} -> {}: {length} bytes, save {saved_after:?}, load {loaded_after:?}",
        from.name, to.name
    );
    assert_eq!((status.state, status.running), (RunState::Paused, false));
    assert_eq!(settings(&target).await, target_before);

    // Way back: the source runs again although the target has loaded; the disk follows.
    source.cont().await.unwrap();
    assert_eq!(source.query_status().await.unwrap().place(), GuestPlace::Running);
    let refused = target.cont().await.expect_err("the target took a disk that the source holds");
    println!("target while the source runs: {refused}");
    assert!(!target.query_status().await.unwrap().running);

    // Second attempt from the same source, into a fresh target.
    drop(target);
    drop(target_qemu);
    source.stop().await.unwrap();
    let state = device_state::save(&source, LIMIT_BYTES).await.unwrap();
    let disk = disk(folder.path());
    let device = ["-blockdev", disk.as_str(), "-device", "virtio-blk-pci,drive=disk0"];
    let incoming = [&device[..], &["-incoming", "defer"]].concat();
    let target_qemu = Qemu::start_shared(to, folder.path(), "target2", &incoming);
    let target = target_qemu.client().await;
    copy_memory(folder.path(), "source", "target2", "ram0");
    device_state::load(&target, state.bytes).await.unwrap();
    target.cont().await.unwrap();
    assert_eq!(target.query_status().await.unwrap().place(), GuestPlace::Running);
    let refused = source.cont().await.expect_err("the source took back a disk that is in use");
    println!("source while the target runs: {refused}");
    source.quit().await.unwrap();
}

#[tokio::test]
async fn state_moves_and_can_come_back() {
    for program in programs() {
        hand_over(&program, &program).await;
    }
}

#[tokio::test]
async fn state_moves_between_versions() {
    let programs = programs();
    let [old, new] = programs.as_slice() else { return };
    hand_over(old, new).await;
    hand_over(new, old).await;
}
