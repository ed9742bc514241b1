//! What is refused before anything moves: the guest runs on, untouched.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use e2e::gateways::Gateways;
use e2e::streams::{STREAM, stream};
use e2e::watched::Watched;
use e2e::{PATIENCE, Rig, free_address, in_turn};
use framework::{Backend, Pki, QemuKind, Vm, VmSpec, wait};

/// Longest time until something is refused.
const REFUSED_WITHIN: Duration = Duration::from_secs(20);

fn private(kind: QemuKind) -> VmSpec {
    VmSpec::new("refused", kind).backend(Backend::Private)
}

#[test]
fn a_destination_of_another_shape_refuses() -> Result<()> {
    in_turn(|| {
        let mut watched = Watched::boot(private(QemuKind::V7_2))?;
        let next = watched.next(QemuKind::V7_2);
        for memory_mib in [192, 384] {
            let shape = next.clone().memory_mib(memory_mib);
            watched.refused_by(shape, STREAM, &["destination refuses", "memory"])?;
        }
        let machine = VmSpec { machine: "pc-i440fx-7.1".to_owned(), ..next };
        watched.refused_by(machine, STREAM, &["machine type", "pc-i440fx-7.2"])
    })
}

#[test]
fn who_is_not_the_right_receiver_gets_no_guest() -> Result<()> {
    in_turn(|| {
        let mut watched = Watched::boot(private(QemuKind::V10_0))?;
        let began = Instant::now();
        let nobody = free_address()?;
        watched.refused("nobody", &["Nobody answers at", "migrate receive"], |rig, vm| {
            rig.send(vm, &nobody, STREAM)?.wait(PATIENCE)
        })?;
        ensure!(began.elapsed() < REFUSED_WITHIN, "It took {:?}", began.elapsed());

        let mut gateways = Gateways::start(&watched.rig)?;
        let at = gateways.destination.wait_line("listening on ", PATIENCE)?;
        watched.refused("a gateway", &["gateway", "migrate receive"], |rig, vm| {
            rig.send(vm, &at, STREAM)?.wait(PATIENCE)
        })?;
        ensure!(gateways.destination.running()?, "It ended: {}", gateways.said());
        drop(gateways);

        let destination = Vm::start(&watched.rig.env, watched.next(QemuKind::V10_0))?;
        let others = Pki::init(&watched.rig.migrate)?;
        let stranger = others.issue("host-b")?;
        let at = free_address()?;
        let mut receive = watched.rig.receive_as(&stranger, &destination, &at, &[])?;
        watched.refused("of another authority", &["certificate", "authority"], |rig, vm| {
            rig.send(vm, &at, STREAM)?.wait(PATIENCE)
        })?;
        ensure!(receive.running()?, "It ended: {}", receive.stderr());
        drop(receive);

        let at = free_address()?;
        let mut receive = watched.rig.receive(&destination, &at, &[])?;
        watched.refused("of another name", &["certificate"], |rig, vm| {
            rig.send(vm, &at, &stream(&["--peer", "host-z"]))?.wait(PATIENCE)
        })?;
        ensure!(receive.running()?, "It ended: {}", receive.stderr());
        Ok(())
    })
}

/// Pages of private memory cannot be compared; nor can they be read without QEMU.
#[test]
fn what_the_stream_cannot_do_is_refused() -> Result<()> {
    in_turn(|| {
        let mut watched = Watched::boot(private(QemuKind::V7_2))?;
        let destination = Vm::start(&watched.rig.env, watched.next(QemuKind::V7_2))?;
        let at = free_address()?;
        let mut receive = watched.rig.receive(&destination, &at, &[])?;
        for words in [&["--path", "stream", "--verify"][..], &["--verify"]] {
            watched.vm.qmp().clear_events();
            let from_us = wait::monotonic_us();
            let ended = watched.rig.send(&watched.vm, &at, words)?.wait(REFUSED_WITHIN)?;
            ensure!([Some(1), Some(2)].contains(&ended.code), "{words:?}: {ended:?}");
            for word in ["--verify", "--path"] {
                ensure!(ended.stderr.contains(word), "{words:?}: {word} is not in {ended:?}");
            }
            watched.untouched(from_us)?;
        }
        let words = ["private memory", "memory-backend-file,share=on"];
        watched.refused("direct", &words, |rig, vm| {
            rig.send(vm, &at, &["--path", "direct"])?.wait(PATIENCE)
        })?;
        ensure!(receive.running()?, "The destination ended: {}", receive.stderr());
        Ok(())
    })
}

/// Not refused, since most moves go well: QEMU itself is to blame.
#[test]
fn that_an_older_qemu_without_kvm_forgets_writes_is_said() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let nobody = free_address()?;
        for (spec, is_said) in [
            (private(QemuKind::V7_2), true),
            (private(QemuKind::V7_2).odd_memory(), false),
            (private(QemuKind::V10_0), false),
        ] {
            let what = format!("{:?} and {} KiB", spec.qemu, spec.extra_kib);
            let vm = Vm::start(&rig.env, spec)?;
            let sent = rig.send(&vm, &nobody, STREAM)?.wait(PATIENCE)?;
            ensure!(sent.code == Some(1), "{what}: {sent:?}");
            ensure!(sent.stderr.contains("forgets writes") == is_said, "{what}: {sent:?}");
        }
        Ok(())
    })
}
