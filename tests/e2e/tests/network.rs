//! After the move, switches must learn where the guest is: the destination announces its address.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use e2e::{PATIENCE, Rig, free_address};
use framework::{Nic, QemuKind, Vm, VmSpec};

const MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

/// EtherType of reverse ARP, which QEMU announces with (net/announce.c).
const RARP: [u8; 2] = [0x80, 0x35];

/// A card whose frames come out of `wire` as datagrams.
fn card(wire: &UdpSocket) -> Result<Nic> {
    let (to, from) = (wire.local_addr().context("No address")?, free_address()?);
    let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
    Ok(Nic { netdev: format!("socket,udp={to},localaddr={from}"), mac })
}

/// Waits for an announcement of the guest's address.
fn announced(wire: &UdpSocket, within: Duration) -> Result<()> {
    wire.set_read_timeout(Some(Duration::from_millis(100))).context("No timeout")?;
    let until = Instant::now() + within;
    let mut frame = [0; 2048];
    let mut seen = 0;
    while Instant::now() < until {
        let Ok(bytes) = wire.recv(&mut frame) else { continue };
        seen += 1;
        let frame = frame.get(..bytes).context("A frame longer than its buffer")?;
        if frame.get(6..12) == Some(&MAC) && frame.get(12..14) == Some(&RARP) {
            return Ok(());
        }
    }
    bail!("none of {seen} frames announces the guest's address")
}

#[test]
fn the_destination_announces_the_guest() -> Result<()> {
    let rig = Rig::new()?;
    for kind in [QemuKind::V7_2, QemuKind::V10_0] {
        let wires = [UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?];
        let mut spec = VmSpec::new("announced", kind);
        spec.nic = Some(card(&wires[0])?);
        let source = Vm::boot(&rig.env, spec)?;
        let mut spec = source.spec().successor("there", kind);
        spec.nic = Some(card(&wires[1])?);
        let destination = Vm::start(&rig.env, spec)?;
        let listen = free_address()?;
        let receive = rig.receive(&destination, &listen, &[])?;
        let sent = rig.send(&source, &listen, &["--verify"])?.wait(PATIENCE)?;
        ensure!(sent.code == Some(0), "{}", sent.stderr);
        announced(&wires[1], PATIENCE)?;
        receive.wait(PATIENCE)?.success()?;
    }
    Ok(())
}
