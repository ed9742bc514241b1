//! Recorded streams of QEMU through a pair of gateways, whole and damaged: what arrives is what left, and what is not
//! a stream ends both connections with the reason named, while the gateways go on.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::gateways::Gateways;
use e2e::{PATIENCE, Rig, in_turn};
use framework::{Engine, wait};
use migrate_core::layout::PAGE_BYTES;
use migrate_core::xbzrle;
use nix::sys::signal::Signal;
use qemu_glue::stream::{Event, PageContent, PageRecord, Reader};
use serde_json::Value;

/// Longest silence of a gateway at either end.
const SILENCE: Duration = Duration::from_secs(20);

/// Guests whose QEMUs end their connections one after the other.
const ENDINGS: usize = 6;

/// Silence after which a taker has what there is.
const LOADED_AFTER: Duration = Duration::from_millis(150);

fn recorded(name: &str) -> Result<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../qemu-glue/tests/data/stream");
    let file = std::fs::File::open(folder.join(format!("{name}.zst")))
        .with_context(|| format!("No recording {name}"))?;
    Ok(zstd::decode_all(file)?)
}

/// What a QEMU has after it has loaded a stream.
#[derive(Debug, Default, PartialEq, Eq)]
struct Loaded {
    pages: BTreeMap<(u16, u64), Box<[u8; PAGE_BYTES]>>,
    /// Sections before the device state, and commands, in their order.
    before: Vec<String>,
    /// What is in such sections.
    early: Vec<u8>,
    state: Vec<u8>,
    description: Vec<u8>,
}

impl Loaded {
    fn of(mut stream: &[u8]) -> Result<Self> {
        let (mut loaded, mut reader) = (Self::default(), Reader::open_ended());
        while let Some(event) = reader.next(&mut stream)? {
            loaded.take(&event)?;
        }
        reader.finish()?;
        while let Some(event) = reader.next(&mut &[][..])? {
            loaded.take(&event)?;
        }
        Ok(loaded)
    }

    fn take(&mut self, event: &Event<'_>) -> Result<()> {
        match event {
            Event::Page(page) => self.page(page)?,
            Event::DeviceState(bytes) => self.state.extend(*bytes),
            Event::Description(text) => self.description.extend(*text),
            Event::Bytes(bytes) => self.early.extend(*bytes),
            Event::RamBlocks(list) => self.before.push(format!("{:?}", list.blocks())),
            Event::Header(_)
            | Event::Command(_)
            | Event::SectionStart(_)
            | Event::SectionFull(_) => self.before.push(format!("{event:?}")),
            _ => {}
        }
        Ok(())
    }

    fn page(&mut self, record: &PageRecord<'_>) -> Result<()> {
        let place = (record.block.0, record.offset_bytes);
        let page = self.pages.entry(place).or_insert_with(|| Box::new([0; PAGE_BYTES]));
        match record.content {
            PageContent::Zero { fill } => page.fill(fill),
            PageContent::Whole(content) => page.copy_from_slice(content),
            PageContent::Xbzrle(delta) => {
                xbzrle::decode(delta, page)?;
            }
        }
        Ok(())
    }
}

/// A QEMU that waits for a guest and takes whatever comes.
fn taker(into: &Path) -> Result<JoinHandle<Vec<u8>>> {
    let _left_from_before = std::fs::remove_file(into);
    let listener = UnixListener::bind(into)?;
    Ok(thread::spawn(move || {
        let Ok((mut stream, _)) = listener.accept() else { return vec![] };
        let mut taken = vec![];
        let _ends_early = stream.read_to_end(&mut taken);
        taken
    }))
}

/// Passes a stream: what the gateway reported, and what arrived if it got as far as a QEMU.
fn passed(gateways: &Gateways, stream: &[u8], number: usize) -> Result<(Value, Vec<u8>)> {
    let taker = taker(&gateways.into)?;
    let mut socket = UnixStream::connect(&gateways.out)?;
    socket.set_read_timeout(Some(SILENCE))?;
    // A gateway that refuses it ends the connection before everything was written.
    let _refused = socket.write_all(stream).and_then(|()| socket.shutdown(Shutdown::Write));
    let mut answer = vec![];
    let ended = socket.read_to_end(&mut answer);
    let is_silent = ended.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
    ensure!(!is_silent, "The source's gateway keeps the connection: {}", gateways.said());
    let report = wait::until("a report", PATIENCE, || {
        Ok(gateways.source.stdout().lines().nth(number).map(str::to_owned))
    });
    let report = serde_json::from_str(&report.with_context(|| gateways.said())?)?;
    if !taker.is_finished() {
        // It may never have been reached; if it was, this connection is not accepted.
        let _woken = UnixStream::connect(&gateways.into);
    }
    let taken = taker.join().ok().context("The taker panicked")?;
    Ok((report, taken))
}

#[test]
fn whole_streams_arrive_as_they_left() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let gateways = Gateways::start(&rig)?;
        let names = ["plain", "no-description", "ignore-shared", "return-path", "advised"];
        let all = ["7.2", "10.0"].map(|version| names.map(|name| format!("{version}-{name}")));
        let all = all.as_flattened().iter().cloned().chain(["10.0-virtio-mem".to_owned()]);
        for (number, name) in all.enumerate() {
            let stream = recorded(&name)?;
            let (report, arrived) = passed(&gateways, &stream, number)?;
            ensure!(report["outcome"] == "completed", "{name}: {report} {}", gateways.said());
            let (left, arrived) = (Loaded::of(&stream)?, Loaded::of(&arrived)?);
            ensure!(left.before == arrived.before, "{name}: other sections arrived");
            ensure!(left.early == arrived.early, "{name}: other contents of sections arrived");
            ensure!(left.state == arrived.state, "{name}: another device state arrived");
            ensure!(left.description == arrived.description, "{name}: another description");
            ensure!(left.pages == arrived.pages, "{name}: other pages arrived");
            ensure!(!left.state.is_empty(), "{name} has no device state");
        }
        Ok(())
    })
}

/// Waits until a gateway has said of so many guests how they ended.
fn ended(gateway: &Engine, how: &str, guests: usize) -> Result<()> {
    let all = || Ok((gateway.stderr().matches(how).count() == guests).then_some(()));
    wait::until("a guest's end", PATIENCE, all).with_context(|| gateway.stderr())
}

/// As a QEMU with a return path does: it ends its connection when it has the guest, and the source's QEMU follows.
#[test]
fn who_ends_last_is_heard_at_both_ends() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let mut gateways = Gateways::start(&rig)?;
        let stream = recorded("7.2-return-path")?;
        for number in 1..=ENDINGS {
            let _left_from_before = std::fs::remove_file(&gateways.into);
            let listener = UnixListener::bind(&gateways.into)?;
            let mut left = UnixStream::connect(&gateways.out)?;
            left.write_all(&stream)?;
            let (mut arrived, _) = listener.accept()?;
            arrived.set_read_timeout(Some(LOADED_AFTER))?;
            let mut taken = vec![];
            let more = arrived.read_to_end(&mut taken);
            ensure!(more.is_err(), "{} bytes came, and the end: {}", taken.len(), gateways.said());
            drop(arrived);
            left.set_read_timeout(Some(SILENCE))?;
            ensure!(left.read(&mut [0])? == 0, "The QEMU said nothing, and something came");
            // What the source says last and that it goes are seen at once.
            gateways.destination.signal(Signal::SIGSTOP)?;
            drop(left);
            ended(&gateways.source, "passed on", number)?;
            gateways.destination.signal(Signal::SIGCONT)?;
            ended(&gateways.destination, "a guest from ", number)?;
        }
        let count = |engine: &Engine, how: &str| engine.stderr().matches(how).count();
        let handed = count(&gateways.destination, "was handed to its QEMU");
        ensure!(handed == ENDINGS, "{handed} of {ENDINGS}: {}", gateways.said());
        let lost = count(&gateways.source, "not passed on");
        ensure!(lost == 0, "{lost} of {ENDINGS}: {}", gateways.said());
        Ok(())
    })
}

#[test]
fn damaged_streams_end_with_a_reason_and_the_gateways_go_on() -> Result<()> {
    in_turn(|| {
        let rig = Rig::new()?;
        let gateways = Gateways::start(&rig)?;
        let whole = recorded("10.0-return-path")?;
        let mut damaged: Vec<(String, Vec<u8>)> = vec![];
        // Before the device state, where a stream's end is known by what comes before it.
        let state = Loaded::of(&whole)?.state.len() + Loaded::of(&whole)?.description.len();
        let ram_bytes = whole.len() - state;
        for part in 1..12 {
            let bytes = ram_bytes * part / 12;
            damaged.push((format!("cut after {bytes} bytes"), whole[..bytes].to_vec()));
        }
        for (what, at, byte) in
            [("magic", 0, b'X'), ("version", 7, 9), ("configuration", 8, 0), ("length", 12, 0xff)]
        {
            let mut stream = whole.clone();
            stream[at] = byte;
            damaged.push((format!("another {what}"), stream));
        }
        let second = [&whole[..8], &whole[..]].concat();
        damaged.push(("its beginning twice".to_owned(), second));
        for refused in ["7.2-compress", "10.0-multifd-channel", "10.0-huge-pages"] {
            damaged.push((refused.to_owned(), recorded(refused)?));
        }
        for (number, (what, stream)) in damaged.iter().enumerate() {
            let (report, _) = passed(&gateways, stream, number).with_context(|| what.clone())?;
            let error = report["error"].as_str().unwrap_or_default();
            ensure!(report["outcome"] == "failed" && !error.is_empty(), "{what}: {report}");
            println!("{what}: {error}");
        }
        let (report, arrived) = passed(&gateways, &whole, damaged.len())?;
        ensure!(report["outcome"] == "completed", "{report} {}", gateways.said());
        ensure!(Loaded::of(&arrived)? == Loaded::of(&whole)?, "It arrived as another one");
        Ok(())
    })
}
