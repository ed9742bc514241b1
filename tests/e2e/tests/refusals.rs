//! What cannot be migrated is refused before the guest is touched, with the remedy; what is checked of each refusal is
//! said in [`e2e::watched`].

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::watched::Watched;
use e2e::{PATIENCE, Rig, free_address, in_turn};
use framework::{Backend, Engine, EngineOutput, QemuKind, Vm, VmSpec};

fn spec() -> VmSpec {
    VmSpec::new("refused", QemuKind::V7_2)
}

#[test]
fn a_destination_of_another_shape_refuses() -> Result<()> {
    in_turn(|| {
        let mut watched = Watched::boot(spec())?;
        let next = || spec().successor("other", QemuKind::V7_2);
        let fits = "the source's memory options";
        watched.refused_by(
            next().memory_mib(384),
            &[],
            &["destination refuses", "bytes here", fits],
        )?;
        let numa = next().backend(Backend::Numa2);
        watched.refused_by(numa, &[], &["destination refuses", "m0", fits])?;
        let machine = VmSpec { machine: "pc-i440fx-7.1".to_owned(), ..next() };
        watched.refused_by(machine, &[], &["machine type", "-machine pc-i440fx-7.2"])
    })
}

#[test]
fn a_destination_with_an_older_qemu_refuses() -> Result<()> {
    in_turn(|| {
        let mut watched = Watched::boot(VmSpec { qemu: QemuKind::V10_0, ..spec() })?;
        let older = watched.vm.spec().successor("older", QemuKind::V7_2);
        watched.refused_by(older, &[], &["comes from QEMU 10.0", "older versions only"])
    })
}

#[test]
fn what_is_asked_for_in_vain_is_refused() -> Result<()> {
    in_turn(|| {
        let mut watched = Watched::boot(spec())?;
        let nowhere = free_address()?;
        let cases: [(&[&str], &[&str]); 5] = [
            (&["--path", "stream", "--verify"], &["--verify", "--path direct"]),
            (&["--max-downtime-ms", "100"], &["Nobody answers at", "migrate receive"]),
            (&["--keep-source", "--journal-is-no-word"], &[]),
            (&["--peer", "no/name"], &["expected_peer"]),
            (&["--preload-socket", "/nonexistent"], &["no socket of the preloaded library"]),
        ];
        for (extra, words) in cases {
            if words.is_empty() {
                let usage = watched.rig.send(&watched.vm, &nowhere, extra)?.wait(PATIENCE)?;
                ensure!(usage.code == Some(2), "{usage:?}");
                continue;
            }
            let began = Instant::now();
            let what = format!("{extra:?}");
            watched
                .refused(&what, words, |rig, vm| rig.send(vm, &nowhere, extra)?.wait(PATIENCE))?;
            ensure!(began.elapsed() < Duration::from_secs(20), "{what}: {:?}", began.elapsed());
        }
        for to in ["no host at all", "127.0.0.1", "nowhere.invalid:7700"] {
            let words = ["is no address", "HOST:PORT"];
            watched.refused(to, &words, |rig, vm| rig.send(vm, to, &[])?.wait(PATIENCE))?;
        }
        usage_errors(&watched.rig, &watched.vm)
    })
}

fn usage_errors(rig: &Rig, vm: &Vm) -> Result<()> {
    let bad: [&[&str]; 6] = [
        &["--mode", "teleport"],
        &["--max-bandwidth", "5"],
        &["--max-downtime-ms", "0"],
        &["--lanes", "sctp"],
        &["--lane-count", "65"],
        &["--dead-peer-s", "never"],
    ];
    for extra in bad {
        let ended = rig.send(vm, "127.0.0.1:7700", extra)?.wait(PATIENCE)?;
        ensure!(ended.code == Some(2), "{extra:?}: {ended:?}");
        ensure!(ended.stderr.contains(extra[0]), "{extra:?}: {ended:?}");
    }
    let ended = Engine::run(&rig.migrate, &["send"], None, PATIENCE)?;
    ensure!(ended.code == Some(2) && ended.stderr.contains("--qmp"), "{ended:?}");
    Ok(())
}

#[test]
fn a_monitor_that_is_gone_or_busy_is_told() -> Result<()> {
    in_turn(|| {
        let mut watched = Watched::boot(spec())?;
        let socket = watched.vm.qmp_engine();
        let other = UnixStream::connect(&socket).context("No QMP socket")?;
        // The greeting shows that QEMU serves it.
        let mut greeting = [0; 16];
        (&other).read_exact(&mut greeting).context("No greeting")?;
        let words = ["another client holds this monitor", "-qmp socket for this engine"];
        watched.refused("busy", &words, |rig, vm| {
            rig.send(vm, "127.0.0.1:7700", &[])?.wait(PATIENCE)
        })?;
        let check = check(&watched.rig, &socket)?;
        ensure!(check.code == Some(1) && check.stdout.contains("no other client"), "{check:?}");
        drop(other);
        let gone = Engine::run(
            &watched.rig.migrate,
            &["check", "--qmp", "/nonexistent/vm.qmp"],
            None,
            PATIENCE,
        )?;
        ensure!(gone.code == Some(1) && gone.stdout.contains("could not be opened"), "{gone:?}");
        let good = self::check(&watched.rig, &socket)?;
        ensure!(good.code == Some(0) && good.stdout.contains("a migration will work"), "{good:?}");
        Ok(())
    })
}

fn check(rig: &Rig, qmp: &Path) -> Result<EngineOutput> {
    let qmp = qmp.display().to_string();
    Engine::run(&rig.migrate, &["check", "--qmp", &qmp], None, PATIENCE)
}

#[test]
fn a_receiver_needs_a_qemu_that_waits() -> Result<()> {
    in_turn(|| {
        let watched = Watched::boot(spec())?;
        let receive = watched.rig.receive_unchecked(&watched.vm, "127.0.0.1:0", &[], None)?;
        let ended = receive.wait(PATIENCE)?;
        ensure!(ended.code == Some(1), "{ended:?}");
        ensure!(ended.stderr.contains("does not wait for a guest"), "{ended:?}");
        ensure!(ended.stderr.contains("-incoming defer"), "{ended:?}");
        let journals = Path::new(&watched.rig.journal("destination")).to_owned();
        ensure!(!journals.exists() || journals.read_dir()?.next().is_none(), "A journal was made");
        Ok(())
    })
}

/// VMs that the direct path cannot move, what `check` and `send` say about each, and how `check` ends.
fn indirect(spec: VmSpec, words: &[&str], (code, end): (i32, &str)) -> Result<()> {
    let rig = Rig::new()?;
    let vm = Vm::start(&rig.env, spec)?;
    let checked = check(&rig, &vm.qmp_engine())?;
    ensure!(checked.code == Some(code), "{checked:?}");
    let sent = rig.send(&vm, "127.0.0.1:7700", &["--path", "direct"])?.wait(PATIENCE)?;
    ensure!(sent.code == Some(1), "{sent:?}");
    let message = sent.json()?["error"]["message"].as_str().unwrap_or_default().to_owned();
    for word in words {
        ensure!(checked.stdout.contains(word), "{word:?} is not in {}", checked.stdout);
        ensure!(message.contains(word), "{word:?} is not in {message}");
    }
    ensure!(checked.stdout.contains(end), "{checked:?}");
    Ok(())
}

#[test]
fn memory_that_is_not_in_shared_files_has_no_direct_path() -> Result<()> {
    in_turn(|| {
        let words = ["private memory", "memory-backend-file,share=on"];
        let end = (0, "a migration will work, by QEMU's stream");
        indirect(spec().backend(Backend::Private), &words, end)?;
        let memfd = VmSpec { qemu: QemuKind::V10_0, ..spec() }.backend(Backend::Memfd);
        let words = ["memory-backend-memfd", "QEMU 10.0", "memory-backend-file,share=on"];
        indirect(memfd, &words, end)
    })
}

/// Enough of a vhost-user back end for QEMU to start: it says which features it has.
fn serve_vhost_user(listener: &UnixListener) -> std::io::Result<()> {
    const GET_FEATURES: u32 = 1;
    const VERSION_1: u64 = 1 << 32;
    let (mut socket, _) = listener.accept()?;
    loop {
        let mut header = [0; 12];
        socket.read_exact(&mut header)?;
        let number = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let mut payload = vec![0; (number(8) as usize).min(4096)];
        socket.read_exact(&mut payload)?;
        if number(0) == GET_FEATURES {
            let mut answer = header.to_vec();
            // Version 1, and the mark of an answer.
            answer[4..8].copy_from_slice(&5_u32.to_le_bytes());
            answer[8..12].copy_from_slice(&8_u32.to_le_bytes());
            answer.extend(VERSION_1.to_le_bytes());
            socket.write_all(&answer)?;
        }
    }
}

#[test]
fn a_vhost_user_device_has_no_direct_path() -> Result<()> {
    in_turn(|| {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("vhost.sock");
        let listener = UnixListener::bind(&path)?;
        // Ends with an error when QEMU does.
        let server = std::thread::spawn(move || serve_vhost_user(&listener));
        let chardev = format!("socket,id=vhost0,path={}", path.display());
        let words = [
            "-chardev",
            &chardev,
            "-netdev",
            "vhost-user,chardev=vhost0,id=net0",
            "-device",
            "virtio-net-pci,netdev=net0,romfile=",
        ];
        // This back end cannot tell QEMU what it writes, so that QEMU itself refuses as well.
        let end = (1, "a migration would fail");
        indirect(spec().extra(&words), &["vhost-user", "writes guest memory itself"], end)?;
        ensure!(server.join().is_ok_and(|served| served.is_err()), "The back end panicked");
        Ok(())
    })
}

/// Runs `send` by way of another program that takes something away from it.
fn send_through(
    rig: &Rig,
    vm: &Vm,
    to: &str,
    through: &[&str],
    extra: &[&str],
) -> Result<EngineOutput> {
    let (qmp, identity) = (vm.qmp_engine().display().to_string(), rig.source.display().to_string());
    let (journal, migrate) = (rig.journal("source"), rig.migrate.display().to_string());
    let [program, words @ ..] = through else { anyhow::bail!("No program") };
    let send = [&migrate, "send", "--json", "--to", to, "--qmp", &qmp, "--identity", &identity];
    let words = [words, &send, &["--journal", &journal], extra].concat();
    Engine::run(Path::new(program), &words, None, PATIENCE)
}

#[test]
fn an_engine_that_may_not_trace_qemu_has_no_direct_path() -> Result<()> {
    in_turn(|| {
        let mut watched = Watched::boot(spec())?;
        let weak = ["setpriv", "--inh-caps=-sys_ptrace", "--bounding-set=-sys_ptrace"];
        watched.refused(
            "without CAP_SYS_PTRACE",
            &["may not trace QEMU", "CAP_SYS_PTRACE"],
            |rig, vm| send_through(rig, vm, "127.0.0.1:7700", &weak, &["--path", "direct"]),
        )
    })
}

#[test]
fn a_full_disk_for_the_journal_is_refused_at_both_ends() -> Result<()> {
    in_turn(|| {
        let mut watched = Watched::boot(spec())?;
        let spec = watched.vm.spec().successor("there", QemuKind::V7_2);
        let destination = Vm::start(&watched.rig.env, spec)?;
        let listen = free_address()?;
        let mut receive = watched.rig.receive(&destination, &listen, &[])?;
        let journal = watched.rig.journal("source");
        std::fs::create_dir_all(&journal)?;
        // Room for the file but not for what is in it; seen by this one process only.
        let full = format!("mount -t tmpfs -o size=4k none {journal} && exec \"$@\"");
        let through = ["unshare", "--mount", "sh", "-c", &full, "sh"];
        let words = ["journal", "cannot be written", "free space", "--journal DIR"];
        watched.refused("full here", &words, |rig, vm| {
            send_through(rig, vm, &listen, &through, &[])
        })?;
        ensure!(receive.running()?, "The destination ended: {}", receive.stderr());
        drop(receive);

        let (qmp, identity) =
            (destination.qmp_engine().display().to_string(), watched.rig.destination.clone());
        let (identity, there) =
            (identity.display().to_string(), watched.rig.journal("destination-full"));
        std::fs::create_dir_all(&there)?;
        let full = format!("mount -t tmpfs -o size=4k none {there} && exec \"$@\"");
        let migrate = watched.rig.migrate.display().to_string();
        let words = ["--mount", "sh", "-c", &full, "sh", &migrate, "receive", "--listen", &listen];
        let words =
            [&words[..], &["--qmp", &qmp, "--identity", &identity, "--journal", &there]].concat();
        let mut receive = Engine::start(Path::new("unshare"), &words, None)?;
        receive.wait_stderr("listening on", PATIENCE)?;
        let words = ["destination refuses", "journal", "free space"];
        watched.refused("full there", &words, |rig, vm| rig.send(vm, &listen, &[])?.wait(PATIENCE))
    })
}
