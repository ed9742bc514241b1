//! Paging of a running QEMU.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use super::*;
use crate::track::tests::Qemu;

const MEBIBYTES: u64 = 64;

/// One command; returns QEMU's answer.
fn command(stream: &mut BufReader<UnixStream>, text: &str) -> String {
    writeln!(stream.get_mut(), "{text}").unwrap();
    loop {
        let mut line = String::new();
        assert_ne!(stream.read_line(&mut line).unwrap(), 0, "QEMU closed its monitor");
        if line.contains("\"return\"") || line.contains("\"error\"") {
            return line;
        }
    }
}

/// QEMU itself reads all of its RAM, which arrives meanwhile, and writes what it sees to a file.
#[test]
fn a_qemu_sees_what_was_placed() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, dump) = (folder.path().join("qmp"), folder.path().join("dump"));
    let monitor = format!("unix:{},server=on,wait=off", socket.display());
    let Some(qemu) = Qemu::start(MEBIBYTES, &["-S", "-qmp", &monitor]) else { return };
    let ram = GuestRam::open(qemu.pid(), std::slice::from_ref(&qemu.region), true).unwrap();
    let pages = ram.layout().pages();
    ram.discard(PageIndex(0), pages).unwrap();
    let attached = userfaultfd(qemu.pid(), None, CloseRemote::No).unwrap();
    let Way::Injection(report) = attached.way else { panic!() };
    let pager = Pager::start(qemu.pid(), attached.uffd, &ram, Duty::Fill).unwrap();
    let mut stream = BufReader::new(UnixStream::connect(&socket).unwrap());
    command(&mut stream, r#"{"execute":"qmp_capabilities"}"#);
    // Below 1 MiB lie firmware and screen instead.
    let (start, length) = (MIB, (MEBIBYTES - 1) * MIB);
    let save = format!(
        r#"{{"execute":"pmemsave","arguments":{{"val":{start},"size":{length},"filename":{dump:?}}}}}"#
    );
    let reader = std::thread::spawn(move || command(&mut stream, &save));
    let (mut served, mut waiting) = (0, Vec::new());
    let mut behind = (0..pages / 8).rev().map(|number| number * 8);
    while !reader.is_finished() {
        poll(&pager, Duration::from_millis(1));
        pager.read_faults(&mut waiting).unwrap();
        for fault in waiting.drain(..) {
            served += pager.place(fault.page, &content(fault.page.0)).unwrap().placed;
        }
        for page in behind.by_ref().take(2) {
            pager.place(PageIndex(page), &contents(page..page + 4)).unwrap();
        }
    }
    let answer = reader.join().unwrap();
    assert!(answer.contains("\"return\""), "{answer}");
    println!("{served} pages placed on a fault of QEMU");
    assert!(served > pages / 4, "QEMU hardly waited");
    let seen = std::fs::read(&dump).unwrap();
    assert_eq!(seen.len() as u64, length);
    let first = start / PAGE;
    for (page, found) in (first..).zip(seen.chunks(PAGE_BYTES)) {
        assert!(found == content(page), "page {page} differs");
    }
    pager.end().unwrap();
    drop(pager);
    close_descriptor(qemu.pid(), report.remote_fd.unwrap()).unwrap();
}
