//! Device state against real QEMUs: hand-over, way back, failure and cleanliness.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod support;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use migrate_core::error::GuestPlace;
use qemu_glue::device_state::{self, DeviceState, DeviceStateError};
use qemu_glue::qmp::{Client, RunState, Status};
use serde_json::{Value, json};
use support::{Program, Qemu, copy_memory, folder, programs};

const LIMIT_BYTES: u64 = 64 << 20;

/// What [`Qemu::start_shared`] gives a guest.
const RAM_BYTES: u64 = 256 << 20;

/// Saves a guest that is stopped, to the last step.
async fn save(client: &Client, limit_bytes: u64) -> Result<DeviceState, DeviceStateError> {
    let saving = device_state::begin_save(client, RAM_BYTES, limit_bytes).await?;
    let (state, settling) = saving.finish().await?;
    settling.settled().await.map(|()| state)
}

/// Loads, to the last step.
async fn load(client: &Client, bytes: Vec<u8>) -> Result<Status, DeviceStateError> {
    let loading = device_state::prepare_load(client).await?;
    let (status, settling) = loading.load(bytes).await?;
    settling.settled().await.map(|()| status)
}

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
    let state = save(&source, LIMIT_BYTES).await.unwrap();
    let saved_after = begun.elapsed();
    assert_eq!(state.header.machine, support::MACHINE);
    assert_eq!(source.query_status().await.unwrap().state, RunState::PostMigrate);
    assert_eq!(settings(&source).await, source_before);

    copy_memory(folder.path(), "source", "target", "ram0");
    let length = state.bytes.len();
    let begun = Instant::now();
    let status = load(&target, state.bytes).await.unwrap();
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
    let state = save(&source, LIMIT_BYTES).await.unwrap();
    let disk = disk(folder.path());
    let device = ["-blockdev", disk.as_str(), "-device", "virtio-blk-pci,drive=disk0"];
    let incoming = [&device[..], &["-incoming", "defer"]].concat();
    let target_qemu = Qemu::start_shared(to, folder.path(), "target2", &incoming);
    let target = target_qemu.client().await;
    copy_memory(folder.path(), "source", "target2", "ram0");
    load(&target, state.bytes).await.unwrap();
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

#[tokio::test]
async fn saving_begins_while_the_guest_runs() {
    for program in programs() {
        let folder = folder();
        let (source_qemu, target_qemu) = pair(&program, folder.path());
        let (source, target) = (source_qemu.client().await, target_qemu.client().await);
        let before = settings(&source).await;

        // Given up before the stop: the guest never noticed.
        let saving = device_state::begin_save(&source, RAM_BYTES, LIMIT_BYTES).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(source.query_status().await.unwrap().running);
        assert!(source.query_migrate().await.unwrap().is_under_way());
        drop(saving);
        device_state::restore_capabilities(&source).await.unwrap();
        assert_eq!(settings(&source).await, before);
        assert!(source.query_status().await.unwrap().running);

        let saving = device_state::begin_save(&source, RAM_BYTES, LIMIT_BYTES).await.unwrap();
        let ahead = saving.ahead().to_vec();
        assert!(ahead.len() > 64 << 10, "only {} bytes were written ahead", ahead.len());
        tokio::time::sleep(Duration::from_millis(100)).await;
        source.stop().await.unwrap();
        let begun = Instant::now();
        let (state, settling) = saving.finish().await.unwrap();
        println!(
            "{}: {} of {} bytes ahead, the rest after {:?}",
            program.name,
            ahead.len(),
            state.bytes.len(),
            begun.elapsed()
        );
        assert!(state.bytes.starts_with(&ahead));
        settling.settled().await.unwrap();
        assert_eq!(settings(&source).await, before);
        copy_memory(folder.path(), "source", "target", "ram0");
        let status = load(&target, state.bytes).await.unwrap();
        assert_eq!((status.state, status.running), (RunState::Paused, false));
        source.quit().await.unwrap();
        target.cont().await.unwrap();
        assert!(target.query_status().await.unwrap().running);
    }
}

/// A stream of which more is said to be left out than there is cannot be followed.
#[tokio::test]
async fn a_qemu_that_cannot_be_held_begins_after_the_stop() {
    for program in programs() {
        let folder = folder();
        let (source_qemu, target_qemu) = pair(&program, folder.path());
        let (source, target) = (source_qemu.client().await, target_qemu.client().await);
        let before = settings(&source).await;
        let begun = device_state::begin_save(&source, 1 << 40, LIMIT_BYTES).await;
        let saving = begun.unwrap();
        assert_eq!(saving.ahead(), b"");
        assert!(source.query_status().await.unwrap().running);
        assert!(!source.query_migrate().await.unwrap().is_under_way());
        source.stop().await.unwrap();
        let (state, settling) = saving.finish().await.unwrap();
        settling.settled().await.unwrap();
        assert_eq!(settings(&source).await, before);
        copy_memory(folder.path(), "source", "target", "ram0");
        assert_eq!(load(&target, state.bytes).await.unwrap().state, RunState::Paused);
    }
}

#[tokio::test]
async fn preparations_to_load_can_be_undone() {
    for program in programs() {
        let folder = folder();
        let qemu = Qemu::start_shared(&program, folder.path(), "target", &["-incoming", "defer"]);
        let client = qemu.client().await;
        let before = settings(&client).await;
        let loading = device_state::prepare_load(&client).await.unwrap();
        assert_ne!(settings(&client).await, before);
        loading.give_up().await;
        assert_eq!(settings(&client).await, before);
        drop(device_state::prepare_load(&client).await.unwrap());
        device_state::restore_capabilities(&client).await.unwrap();
        assert_eq!(settings(&client).await, before);
        assert_eq!(client.query_status().await.unwrap().state, RunState::InMigrate);
    }
}

#[tokio::test]
async fn a_guest_that_runs_is_refused() {
    for program in programs() {
        let folder = folder();
        let qemu = Qemu::start_shared(&program, folder.path(), "source", &[]);
        let client = qemu.client().await;
        let before = settings(&client).await;
        let error = save(&client, LIMIT_BYTES).await.unwrap_err();
        assert!(matches!(error, DeviceStateError::WrongState { .. }), "{error}");
        assert!(client.query_status().await.unwrap().running);

        client.stop().await.unwrap();
        let state = save(&client, LIMIT_BYTES).await.unwrap();
        let error = save(&client, LIMIT_BYTES).await.unwrap_err();
        assert!(error.to_string().contains("resume and stop"), "{error}");
        let error = load(&client, state.bytes).await.unwrap_err();
        assert!(error.to_string().contains("-incoming defer"), "{error}");
        assert_eq!(settings(&client).await, before);
    }
}

/// The guest can be resumed and saved again, and nothing is left of an attempt.
async fn check_usable(client: &Client, before: &(Vec<(String, bool)>, Value)) {
    assert_eq!(settings(client).await, *before);
    assert!(!client.query_migrate().await.unwrap().is_under_way());
    client.cont().await.unwrap();
    assert!(client.query_status().await.unwrap().running);
    client.stop().await.unwrap();
    save(client, LIMIT_BYTES).await.unwrap();
    assert_eq!(settings(client).await, *before);
    client.cont().await.unwrap();
    client.stop().await.unwrap();
}

#[tokio::test]
async fn a_state_beyond_the_limit_is_given_up_cleanly() {
    for program in programs() {
        let folder = folder();
        let qemu = Qemu::start_shared(&program, folder.path(), "source", &["-device", "VGA"]);
        let client = qemu.client().await;
        let before = settings(&client).await;
        client.stop().await.unwrap();
        for limit_bytes in [0, 1, 100_000] {
            let error = save(&client, limit_bytes).await.unwrap_err();
            assert!(matches!(error, DeviceStateError::TooLarge { .. }), "{error:?}");
            check_usable(&client, &before).await;
        }
        // What QEMU describes of it at its end counts, too, and is not kept. The firmware writes its
        // messages meanwhile, which changes what it needs.
        let kept_bytes = size_of_state(&client, LIMIT_BYTES).await.unwrap();
        let found = size_of_state(&client, kept_bytes).await;
        assert!(matches!(found, Err(DeviceStateError::TooLarge { .. })), "{found:?}");
        size_of_state(&client, kept_bytes + (1 << 20)).await.unwrap();
        println!("{}: with VGA {kept_bytes} bytes", program.name);
    }
}

/// Saves the state of a stopped guest and lets the guest run for a moment.
async fn size_of_state(client: &Client, limit_bytes: u64) -> Result<u64, DeviceStateError> {
    let saved = save(client, limit_bytes).await;
    client.cont().await.unwrap();
    client.stop().await.unwrap();
    saved.map(|state| state.bytes.len() as u64)
}

#[tokio::test]
async fn a_caller_that_gives_up_leaves_nothing_behind() {
    for program in programs() {
        let folder = folder();
        let qemu = Qemu::start_shared(&program, folder.path(), "source", &[]);
        let client = qemu.client().await;
        let before = settings(&client).await;
        client.stop().await.unwrap();
        let mut given_up = 0;
        for step in 0..60 {
            let save = save(&client, LIMIT_BYTES);
            let patience = Duration::from_micros(20 * step * step);
            let abandoned = tokio::time::timeout(patience, save).await.is_err();
            given_up += u32::from(abandoned);
            // The work goes on in the background until everything is as it was; this waits for it.
            device_state::restore_capabilities(&client).await.unwrap();
            assert_ne!(client.query_status().await.unwrap().state, RunState::FinishMigrate);
            check_usable(&client, &before).await;
        }
        println!("{}: {given_up} of 60 attempts were given up", program.name);
        assert!((5..60).contains(&given_up), "the moments do not cover the transfer");
    }
}

/// Runs `save` in a runtime that is torn down after `after`: to QEMU this is a killed engine.
async fn killed_save(socket: PathBuf, after: Duration) {
    let attempt = tokio::task::spawn_blocking(move || {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.unwrap();
        let client = runtime.block_on(Client::connect(&socket)).unwrap();
        runtime.spawn(async move { save(&client, LIMIT_BYTES).await.map(drop) });
        std::thread::sleep(after);
        runtime.shutdown_background();
    });
    attempt.await.unwrap();
}

#[tokio::test]
async fn what_a_killed_engine_left_is_restored() {
    for program in programs() {
        let folder = folder();
        let qemu = Qemu::start_shared(&program, folder.path(), "source", &[]);
        let client = qemu.client().await;
        // As a manager might have it: some of it is switched off while we save.
        let ours = [("events", true), ("return-path", true), ("xbzrle", true)];
        client.set_capabilities(&ours).await.unwrap();
        let before = settings(&client).await;
        client.stop().await.unwrap();
        drop(client);
        let mut changed = 0;
        for step in 0..50 {
            killed_save(qemu.socket.clone(), Duration::from_micros(250 * step)).await;
            let client = qemu.client().await;
            changed += u32::from(settings(&client).await != before);
            let until = Instant::now() + Duration::from_secs(5);
            while let Err(error) = device_state::restore_capabilities(&client).await {
                assert!(matches!(error, DeviceStateError::MigrationActive { .. }), "{error}");
                assert!(Instant::now() < until, "{error}");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            check_usable(&client, &before).await;
        }
        println!("{}: {changed} of 50 attempts left settings changed", program.name);
        assert!(changed > 0, "no attempt was interrupted in the middle");
    }
}

#[tokio::test]
async fn foreign_settings_survive_and_do_not_disturb() {
    for program in programs() {
        let folder = folder();
        let qemu = Qemu::start_shared(&program, folder.path(), "source", &[]);
        let client = qemu.client().await;
        let ours = [("events", true), ("return-path", true), ("pause-before-switchover", true)];
        client.set_capabilities(&ours).await.unwrap();
        client.set_migrate_parameters(json!({ "max-bandwidth": 4096 })).await.unwrap();
        let before = settings(&client).await;
        client.stop().await.unwrap();
        let begun = Instant::now();
        let state = save(&client, LIMIT_BYTES).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(2), "the old limit was in force");
        assert!(state.header.ignores_shared());
        assert_eq!(settings(&client).await, before);
        client.cont().await.unwrap();
        assert!(client.query_status().await.unwrap().running);
    }
}

#[tokio::test]
async fn damaged_state_is_refused() {
    for program in programs() {
        let folder = folder();
        let qemu = Qemu::start_shared(&program, folder.path(), "source", &[]);
        let client = qemu.client().await;
        client.stop().await.unwrap();
        let state = save(&client, LIMIT_BYTES).await.unwrap();

        let mut target =
            Qemu::start_shared(&program, folder.path(), "target", &["-incoming", "defer"]);
        let into = target.client().await;
        let before = settings(&into).await;
        let error = load(&into, b"not a stream".to_vec()).await.unwrap_err();
        assert!(matches!(error, DeviceStateError::Header(_)), "{error}");
        assert_eq!(into.query_status().await.unwrap().state, RunState::InMigrate);

        // Cut short: QEMU itself has to notice.
        let cut = state.bytes[..state.bytes.len() * 19 / 20 - 100_000].to_vec();
        let error = load(&into, cut).await.unwrap_err();
        println!("{}: cut state: {error}", program.name);
        if into.version().at_least(9, 1) {
            assert!(matches!(error, DeviceStateError::Failed { .. }), "{error}");
            assert!(!target.has_exited());
            assert_eq!(settings(&into).await, before);
            assert_ne!(into.query_status().await.unwrap().state, RunState::Running);
            // Known limit of QEMU 10.0: the process has to be started anew.
            copy_memory(folder.path(), "source", "target", "ram0");
            let second = load(&into, state.bytes).await.unwrap_err();
            assert!(matches!(second, DeviceStateError::Qmp(_)), "{second}");
            assert_eq!(settings(&into).await, before);
        } else {
            assert!(matches!(error, DeviceStateError::QemuExited), "{error}");
        }
    }
}
