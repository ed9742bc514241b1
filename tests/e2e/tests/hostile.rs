//! Peers that lie, break the protocol or fall silent, against the real command with real QEMUs.
//!
//! The rogue speaks the real session (the transport crate) and misbehaves in what it says; strangers
//! do not get that far. Afterwards the command still does its job: a receiver takes an honest guest,
//! a sender's guest runs on, was never left stopped, and carries no trace.

#[path = "hostile/loading.rs"]
mod loading;

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use e2e::untouched::{Before, assert_detached};
use e2e::{PATIENCE, Rig, free_address, turn};
use framework::{Engine, Pki, QemuKind, Vm, VmSpec};
use migrate_core::batch::{LAST_VERSION, PageRun, RunKind};
use migrate_core::codec::Codec;
use migrate_core::layout::{BlockSpec, PAGE_BYTES, PageIndex};
use nix::sys::signal::Signal;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::runtime::Runtime;
use transport::messages::{
    Accept, Ask, Commit, Describe, DeviceState, Intent, Load, MigrationId, Missing, MissingEnd,
    Prepare, Progress, Ready, RefuseCode, Running, Sync, Synced, Verdict,
};
use transport::pki::{IssueOptions, issue};
use transport::{
    Batch, DestinationSession, Identity, Listener, Message, Offer, Options, SourceSession, connect,
};

const MEMORY_MIB: u64 = 192;
const PAGES: u64 = MEMORY_MIB << 20 >> 12;

/// Most memory that a sender may need beside what it maps: tables, queues, buffers of lanes.
const ENGINE_KIB_MAX: u64 = 400 << 10;

fn guest(name: &str) -> VmSpec {
    VmSpec::new(name, QemuKind::V7_2).memory_mib(MEMORY_MIB)
}

fn in_turn<T>(work: impl FnOnce(&Runtime) -> Result<T>) -> Result<T> {
    let _turn = turn();
    work(&Runtime::new().context("No runtime")?)
}

fn load(folder: &Path) -> Result<Identity> {
    Ok(Identity::load(folder)?)
}

/// A receiver with a waiting QEMU, for strangers and rogues.
struct Target {
    rig: Rig,
    vm: Vm,
    receive: Engine,
    listen: String,
    addr: SocketAddr,
}

impl Target {
    fn start() -> Result<Self> {
        Self::of(Rig::new()?)
    }

    fn of(rig: Rig) -> Result<Self> {
        let vm = Vm::start(&rig.env, guest("target").successor("target", QemuKind::V7_2))?;
        let listen = free_address()?;
        let receive = rig.receive(&vm, &listen, &["--dead-peer-s", "1", "--lease-s", "2"])?;
        let addr = listen.parse().context("No address")?;
        Ok(Self { rig, vm, receive, listen, addr })
    }

    /// The receiver still takes an honest guest.
    fn takes_an_honest_guest(mut self) -> Result<()> {
        ensure!(self.receive.running()?, "The receiver ended: {}", self.receive.stderr());
        let mut source = Vm::boot(&self.rig.env, guest("honest").with("godwit.checker=size=8"))?;
        let extra = ["--verify", "--max-downtime-ms", "2000"];
        let sent = self.rig.send(&source, &self.listen, &extra)?.wait(PATIENCE)?;
        ensure!(sent.code == Some(0), "send: {sent:?}\nreceive: {}", self.receive.stderr());
        self.receive.wait(PATIENCE)?.success()?;
        e2e::check_alive(&mut source, &mut self.vm).map(drop)
    }

    /// The receiver and its QEMU still wait, whatever was tried.
    fn still_waits(&mut self, after: &str) -> Result<()> {
        let state = self.vm.qmp().run_state()?;
        let said = self.receive.stderr();
        ensure!(state == "inmigrate", "{after}: the target's QEMU is {state}: {said}");
        ensure!(self.receive.running()?, "{after}: the receiver ended: {said}");
        Ok(())
    }
}

/// A client that may lack a certificate or speak another protocol.
fn stranger(ca: &Path, host: Option<&Path>, alpn: &[u8]) -> Result<quinn::Endpoint> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca.join("ca.pem"))?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots);
    let mut config = match host {
        Some(host) => {
            let chain = vec![CertificateDer::from_pem_file(host.join("cert.pem"))?];
            let key = PrivateKeyDer::from_pem_file(host.join("key.pem"))?;
            builder.with_client_auth_cert(chain, key)?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(config)?;
    let mut endpoint = quinn::Endpoint::client("127.0.0.1:0".parse()?)?;
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
    Ok(endpoint)
}

/// Whether the server lets the client in far enough to open a stream and be answered.
async fn is_let_in(endpoint: &quinn::Endpoint, addr: SocketAddr) -> Result<bool> {
    let Ok(connection) = endpoint.connect(addr, "host-b")?.await else { return Ok(false) };
    // With TLS 1.3 the server's refusal of a certificate comes after the client's handshake.
    let closed = tokio::time::timeout(Duration::from_secs(3), connection.closed()).await;
    Ok(closed.is_err())
}

#[test]
fn strangers_do_not_get_in_and_do_no_harm() -> Result<()> {
    in_turn(|runtime| {
        let mut target = Target::start()?;
        let ca = target.rig.source.parent().context("No authority")?.to_owned();
        runtime.block_on(async {
            let nobody = stranger(&ca, None, b"godwit/1")?;
            ensure!(!is_let_in(&nobody, target.addr).await?, "Let in without a certificate");
            let other = stranger(&ca, Some(&target.rig.source), b"h3")?;
            ensure!(!is_let_in(&other, target.addr).await?, "Let in with another protocol");
            Ok(())
        })?;
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        for length in 0..1400_usize {
            // Long and short headers, valid lengths and none; the same in every run.
            let garbage: Vec<u8> = (0..length).map(|at| (at * 31 + length * 7) as u8).collect();
            socket.send_to(&garbage, target.addr)?;
        }
        let mut offer = Offer::new("rogue", MigrationId([1; 16]), Intent::Migrate);
        offer.versions = vec![99];
        let identity = load(&target.rig.source)?;
        let options = Options { lanes: 1, ..Options::default() };
        let other_version = runtime.block_on(connect(target.addr, &identity, &options, offer));
        let told = other_version.err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(told.contains("protocol versions"), "Another version: {told:?}");
        target.still_waits("strangers")?;
        bad_identities(&target, &ca)?;
        target.still_waits("bad identities")?;
        target.takes_an_honest_guest()
    })
}

/// `send` with identities that the receiver must not take, and with a receiver that it must not.
fn bad_identities(target: &Target, ca: &Path) -> Result<()> {
    let mut vm = Vm::start(&target.rig.env, guest("pretender"))?;
    let other = Pki::init(&target.rig.migrate)?;
    let old = IssueOptions { days: 5, backdate_days: 10, out_dir: None };
    let cases: [(PathBuf, &[&str], &str); 3] = [
        (other.issue("host-a")?, &[], "wrong authority"),
        (issue(ca, "old", &old)?, &[], "expired"),
        (target.rig.source.clone(), &["--peer", "host-c"], "another name"),
    ];
    for (identity, extra, what) in cases {
        let (qmp, identity) =
            (vm.qmp_engine().display().to_string(), identity.display().to_string());
        let journal = target.rig.journal("source");
        let words =
            ["send", "--json", "--to", &target.listen, "--qmp", &qmp, "--identity", &identity];
        let words = [&words[..], &["--journal", &journal], extra].concat();
        let ended = Engine::run(&target.rig.migrate, &words, None, PATIENCE)?;
        ensure!(ended.code == Some(1), "{what}: {ended:?}");
        let message = ended.json()?["error"]["message"].as_str().unwrap_or_default().to_owned();
        ensure!(message.contains("TLS") || message.contains("certificate"), "{what}: {message}");
        println!("{what}: {message}");
    }
    ensure!(vm.qmp().run_state()? == "running", "The pretender's guest does not run");
    assert_detached(vm.pid())
}

fn description() -> Describe {
    Describe {
        vm_name: "rogue".to_owned(),
        vm_uuid: None,
        machine: framework::spec::MACHINE.to_owned(),
        qemu_version: (7, 2, 0),
        page_bytes: PAGE_BYTES as u32,
        blocks: vec![BlockSpec {
            name: "m0".to_owned(),
            length_bytes: MEMORY_MIB << 20,
            page_bytes: PAGE_BYTES as u64,
        }],
        verify: false,
        post_copy: false,
    }
}

/// A source of the authority that says what it likes.
struct Rogue {
    session: SourceSession,
    migration: MigrationId,
}

impl Rogue {
    async fn connect(target: &Target, number: u8) -> Result<Self> {
        let migration = MigrationId([number; 16]);
        let offer = Offer::new("rogue", migration, Intent::Migrate);
        let options = Options { lanes: 1, dead_peer: Duration::from_secs(1), ..Options::default() };
        let identity = load(&target.rig.source)?;
        let session = connect(target.addr, &identity, &options, offer).await?;
        Ok(Self { session, migration })
    }

    async fn say(&self, message: Message) -> Result<()> {
        Ok(self.session.control_sender.send(&message).await?)
    }

    async fn accepted(target: &Target, number: u8) -> Result<Self> {
        match Self::described(target, number, description()).await? {
            (rogue, Message::Accept(_)) => Ok(rogue),
            (_, other) => bail!("Not accepted: {other:?}"),
        }
    }

    /// Describes a guest; asks again while the receiver still clears the last one away.
    async fn described(target: &Target, number: u8, guest: Describe) -> Result<(Self, Message)> {
        for _ in 0..50 {
            let mut rogue = Self::connect(target, number).await?;
            rogue.say(Message::Describe(guest.clone())).await?;
            match rogue.next().await? {
                Message::Refuse(refuse) if refuse.code == RefuseCode::Busy => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                answer => return Ok((rogue, answer)),
            }
        }
        bail!("The receiver stays busy")
    }

    async fn next(&mut self) -> Result<Message> {
        let next = self.session.control_receiver.recv();
        let next = tokio::time::timeout(Duration::from_secs(30), next).await;
        Ok(next.context("The receiver says nothing")??)
    }

    /// Waits until the receiver gives this migration up, and returns what it says.
    async fn given_up(mut self) -> String {
        let mut said = String::new();
        loop {
            match self.next().await {
                Ok(Message::Progress(_) | Message::Prepared(_)) => {}
                Ok(message) => {
                    said.push_str(&format!("{message:?} "));
                    if !matches!(message, Message::Synced(_)) {
                        return said;
                    }
                }
                Err(error) => return format!("{said}{error:#}"),
            }
        }
    }

    async fn batch(&mut self, first: u64, pages: u16, version: u32, kind: RunKind) -> Result<()> {
        let run = PageRun { first: PageIndex(first), pages, kind, version };
        self.send(Batch::plain(vec![run], vec![0xee; run.content_bytes().0], 1)).await
    }

    async fn send(&mut self, batch: Batch) -> Result<()> {
        let lane = self.session.lanes.first_mut().context("No lane")?;
        Ok(lane.send(batch).await?)
    }
}

#[test]
fn a_rogue_source_is_refused_and_the_next_honest_one_is_not() -> Result<()> {
    in_turn(|runtime| {
        let mut target = Target::start()?;
        runtime.block_on(async {
            wrong_descriptions(&mut target).await?;
            wrong_pages(&mut target).await?;
            wrong_gaps(&mut target).await?;
            wrong_words(&mut target).await
        })?;
        target.takes_an_honest_guest()
    })
}

async fn wrong_descriptions(target: &mut Target) -> Result<()> {
    let block = |name: &str, length_bytes| BlockSpec {
        name: name.to_owned(),
        length_bytes,
        page_bytes: PAGE_BYTES as u64,
    };
    let with = |blocks| Describe { blocks, ..description() };
    let half = MEMORY_MIB << 19;
    let cases = [
        ("other length", with(vec![block("m0", 64 << 20)]), "Layout"),
        ("unknown block", with(vec![block("m7", MEMORY_MIB << 20)]), "Layout"),
        ("two blocks", with(vec![block("m0", half), block("m1", half)]), "Layout"),
        ("petabytes", with(vec![block("m0", 60 << 40)]), "Layout"),
        ("machine", Describe { machine: "q35".to_owned(), ..description() }, "machine type"),
        ("version", Describe { qemu_version: (99, 0, 0), ..description() }, "older"),
    ];
    for (number, (what, described, word)) in (1..).zip(cases) {
        let (_rogue, answer) = Rogue::described(target, number, described).await.context(what)?;
        let said = format!("{answer:?}");
        ensure!(said.contains("Refuse") && said.contains(word), "{what}: {said}");
        target.still_waits(what)?;
    }
    // Nothing of the last one is left to clear away by then.
    drop(Rogue::accepted(target, 19).await?);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let rogue = Rogue::connect(target, 20).await?;
    rogue.say(Message::Commit(Commit { migration: rogue.migration, resume: true })).await?;
    let said = rogue.given_up().await;
    ensure!(said.contains("Describe was due"), "A commit first: {said}");
    target.still_waits("a commit first")
}

/// Runs that must not be written: (first page, pages, version, kind), and the word for it.
async fn wrong_pages(target: &mut Target) -> Result<()> {
    type Run = (u64, u16, u32, RunKind);
    let cases: [(&str, &[Run], &str); 7] = [
        ("outside RAM", &[(PAGES, 1, 1, RunKind::Raw)], "outside the guest's RAM"),
        ("across its end", &[(PAGES - 1, 2, 1, RunKind::Raw)], "outside the guest's RAM"),
        ("far outside", &[(1 << 33, 1, 1, RunKind::Zero)], "outside"),
        ("repeated", &[(5, 1, 1, RunKind::Raw), (5, 1, 1, RunKind::Raw)], "version 2 was due"),
        ("too new", &[(6, 1, 2, RunKind::Raw)], "version 1 was due"),
        ("reordered", &[(7, 1, 1, RunKind::Raw), (7, 1, 3, RunKind::Raw)], "version 2 was due"),
        ("zeros outside", &[(PAGES - 1, 300, 1, RunKind::Zero)], "outside the guest's RAM"),
    ];
    for (number, (what, runs, word)) in (30..).zip(cases) {
        let mut rogue = Rogue::accepted(target, number).await.context(what)?;
        for (first, pages, version, kind) in runs.iter().copied() {
            rogue.batch(first, pages, version, kind).await.context(what)?;
        }
        let said = rogue.given_up().await;
        ensure!(said.contains("Protocol") && said.contains(word), "{what}: {said}");
        target.still_waits(what)?;
    }
    wrong_contents(target).await
}

/// Batches whose contents are not what their head says.
async fn wrong_contents(target: &mut Target) -> Result<()> {
    // A mask of two lines with room for one, and a mask of none.
    let (short, empty) = ([3u8, 0, 0, 0, 0, 0, 0, 0], [0; 8]);
    let delta = |mask: [u8; 8]| [&mask[..], &[7; 64]].concat();
    let page = |page: u64| page.to_le_bytes().to_vec();
    type Case = (&'static str, RunKind, Codec, Vec<u8>, usize, &'static str);
    let cases: [Case; 9] = [
        (
            "a delta cut short",
            RunKind::Delta,
            Codec::Plain,
            delta(short),
            72,
            "fewer or more bytes",
        ),
        ("an empty delta", RunKind::Delta, Codec::Plain, delta(empty), 72, "changes nothing"),
        ("no LZ4", RunKind::Raw, Codec::Lz4, vec![0xff; 40], PAGE_BYTES, "do not unpack"),
        ("no stream", RunKind::Raw, Codec::Zstd, vec![0xff; 40], PAGE_BYTES, "do not unpack"),
        ("nothing", RunKind::Raw, Codec::Zstd, vec![], PAGE_BYTES, "another length"),
        ("too short", RunKind::Raw, Codec::Lz4, vec![0x10, 7], PAGE_BYTES, "another length"),
        ("itself", RunKind::Same, Codec::Plain, page(9), 8, "which is itself"),
        ("a page that never came", RunKind::Same, Codec::Plain, page(10), 8, "which never came"),
        ("no page", RunKind::Same, Codec::Plain, page(PAGES), 8, "outside the guest's RAM"),
    ];
    for (number, (what, kind, codec, payload, content_bytes, word)) in (40..).zip(cases) {
        let mut rogue = Rogue::accepted(target, number).await.context(what)?;
        let run = PageRun { first: PageIndex(9), pages: 1, kind, version: 1 };
        let payload = payload.into();
        rogue.send(Batch { runs: vec![run], payload, codec, content_bytes, round: 1 }).await?;
        let said = rogue.given_up().await;
        ensure!(said.contains("Protocol") && said.contains(word), "{what}: {said}");
        target.still_waits(what)?;
    }
    Ok(())
}

/// What is said of missing pages and does not fit.
async fn wrong_gaps(target: &mut Target) -> Result<()> {
    let part = |first_page| Message::Missing(Missing { first_page, words: vec![5] });
    let end = |pages| Message::MissingEnd(MissingEnd { pages });
    let prepare = || Message::Prepare(Prepare {});
    let cases: [(&str, Vec<Message>, &str); 4] = [
        ("unprepared", vec![part(0), end(2)], "MissingEnd while"),
        ("out of order", vec![part(64), part(0)], "out of order"),
        ("outside RAM", vec![prepare(), part(PAGES & !63), end(2)], "0 of which exist"),
        ("another number", vec![prepare(), part(0), end(3)], "2 of which exist"),
    ];
    for (number, (what, words, word)) in (70..).zip(cases) {
        let rogue = Rogue::accepted(target, number).await.context(what)?;
        for message in words {
            // It may have been given up at an earlier word.
            let _ = rogue.say(message).await;
        }
        let said = rogue.given_up().await;
        ensure!(said.contains("Protocol") && said.contains(word), "{what}: {said}");
        target.still_waits(what)?;
    }
    // Missing pages before anything is missing.
    let mut rogue = Rogue::accepted(target, 75).await?;
    rogue.batch(5, 1, LAST_VERSION, RunKind::Raw).await?;
    let said = rogue.given_up().await;
    ensure!(said.contains("version 1 was due"), "A missing page: {said}");
    assert_detached(target.vm.pid())
}

async fn wrong_words(target: &mut Target) -> Result<()> {
    let commit =
        |rogue: &Rogue| Message::Commit(Commit { migration: rogue.migration, resume: true });
    let rogue = Rogue::accepted(target, 50).await?;
    let early = commit(&rogue);
    rogue.say(early).await?;
    let said = rogue.given_up().await;
    ensure!(said.contains("Commit while"), "A commit before everything: {said}");
    target.still_waits("an early commit")?;

    let rogue = Rogue::accepted(target, 51).await?;
    rogue.say(Message::Sync(Sync { sequence: 1, batches: vec![1, 2, 3] })).await?;
    let said = rogue.given_up().await;
    ensure!(said.contains("number of lanes"), "Lanes that do not exist: {said}");

    let rogue = Rogue::accepted(target, 52).await?;
    rogue
        .say(Message::DeviceState(DeviceState { offset: 4096, part_bytes: 16, bytes: vec![1; 16] }))
        .await?;
    let said = rogue.given_up().await;
    ensure!(said.contains("goes on at byte"), "Device state with a gap: {said}");

    let rogue = Rogue::accepted(target, 58).await?;
    let part = DeviceState { offset: 0, part_bytes: 4096, bytes: vec![0xff; 16] };
    rogue.say(Message::DeviceState(part)).await?;
    let said = rogue.given_up().await;
    ensure!(said.contains("do not unpack"), "Device state that is not packed: {said}");

    let rogue = Rogue::accepted(target, 53).await?;
    let load = Load { total_bytes: 1 << 20, digest: 1, version_digest: 1 };
    rogue.say(Message::Load(load)).await?;
    let said = rogue.given_up().await;
    ensure!(said.contains("another device state"), "Device state that never came: {said}");

    let rogue = Rogue::accepted(target, 54).await?;
    rogue.say(Message::Describe(description())).await?;
    let said = rogue.given_up().await;
    ensure!(said.contains("Describe while"), "Described twice: {said}");

    let rogue = Rogue::accepted(target, 55).await?;
    rogue.say(Message::Running(Running { resume_us: 1, faults: None })).await?;
    let said = rogue.given_up().await;
    ensure!(said.contains("Running while"), "The destination's own word: {said}");

    // One that falls silent and one that vanishes make room for the next.
    let silent = Rogue::accepted(target, 56).await?;
    drop(silent);
    let again = Rogue::accepted(target, 57).await?;
    again.session.closer.close_now(77, "gone");
    target.still_waits("rogues")
}

/// What a rogue destination does with a source's session once the guest was described.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Trick {
    /// Takes pages and says nothing more, but stays alive.
    ReadsNothing,
    ClaimsTooMuch,
    GoesBack,
    ReadyAtOnce,
    RunningAtOnce,
    VerdictAtOnce,
    /// Accepts everything, then says that other pages are in place.
    WrongDigest,
    /// Accepts, then closes the session.
    Leaves,
}

/// Plays the destination of one session; returns when the source has gone.
async fn play(mut session: DestinationSession, trick: Trick) -> Result<()> {
    let say = |message: Message| {
        let sender = session.control_sender.clone();
        async move { sender.send(&message).await }
    };
    loop {
        let message = match session.control_receiver.recv().await {
            Ok(message) => message,
            Err(_) => return Ok(()),
        };
        match message {
            Message::Describe(_) => {
                let accept =
                    Accept { qemu_version: (7, 2, 0), resident_bytes: 0, no_post_copy: None };
                say(Message::Accept(accept)).await?;
                let ready = Ready { load_us: 1, version_digest: 0, run_state: "paused".into() };
                let progress = |applied_bytes| {
                    Message::Progress(Progress { applied_bytes, applied_batches: vec![1] })
                };
                match trick {
                    Trick::ClaimsTooMuch => say(progress(u64::MAX / 4)).await?,
                    Trick::ReadyAtOnce => say(Message::Ready(ready)).await?,
                    Trick::RunningAtOnce => {
                        say(Message::Running(Running { resume_us: 1, faults: None })).await?;
                    }
                    Trick::VerdictAtOnce => {
                        let state = migrate_core::handover::DestinationState::Running;
                        say(Message::Verdict(Verdict { state, text: String::new() })).await?;
                    }
                    Trick::Leaves => {
                        session.closer.close_now(1, "leaving");
                        return Ok(());
                    }
                    Trick::ReadsNothing | Trick::GoesBack | Trick::WrongDigest => {}
                }
                if trick != Trick::ReadsNothing {
                    let lanes = std::mem::take(&mut session.lanes);
                    for lane in lanes {
                        let sender = session.control_sender.clone();
                        tokio::spawn(take_pages(lane, sender, trick == Trick::GoesBack));
                    }
                }
            }
            Message::Sync(sync) => {
                let synced = Synced { sequence: sync.sequence, version_digest: 0xbad };
                say(Message::Synced(synced)).await?;
            }
            Message::Load(_) => {
                let ready = Ready { load_us: 1, version_digest: 0xbad, run_state: "paused".into() };
                say(Message::Ready(ready)).await?;
            }
            _ => {}
        }
    }
}

async fn take_pages(
    mut lane: transport::LaneReceiver,
    sender: transport::ControlSender,
    goes_back: bool,
) {
    let (mut bytes, mut batches) = (0, 0);
    while let Ok(Some(batch)) = lane.recv().await {
        bytes += migrate_core::batch::wire_bytes(batch.runs.len(), batch.payload.len());
        batches += 1;
        let applied_bytes = if goes_back && batches > 2 { 1 } else { bytes };
        let progress = Progress { applied_bytes, applied_batches: vec![batches] };
        if sender.send(&Message::Progress(progress)).await.is_err() {
            return;
        }
    }
}

#[test]
fn a_rogue_destination_costs_the_guest_nothing() -> Result<()> {
    in_turn(|runtime| {
        let rig = Rig::new()?;
        let spec = guest("source").with("godwit.writer=fill=60,hot=4,rate=500,bytes=64,seed=7");
        let mut vm = Vm::boot(&rig.env, spec)?;
        let before = Before::of(&mut vm)?;
        let identity = load(&rig.destination)?;
        let cases = [
            (Trick::ClaimsTooMuch, "more than were sent"),
            (Trick::GoesBack, "before"),
            (Trick::ReadyAtOnce, "sent Ready while"),
            (Trick::RunningAtOnce, "sent Running while"),
            (Trick::VerdictAtOnce, "sent Verdict while"),
            (Trick::WrongDigest, "other pages are in place"),
            (Trick::Leaves, "leaving"),
            (Trick::ReadsNothing, "progress with pages"),
        ];
        for (trick, word) in cases {
            let began = Instant::now();
            let (task, addr) = runtime.block_on(async {
                let options = Options { dead_peer: Duration::from_secs(2), ..Options::default() };
                let mut listener = Listener::bind("127.0.0.1:0".parse()?, &identity, &options)?;
                let addr = listener.local_addr().to_string();
                let task = tokio::spawn(async move {
                    let session = listener.accept().await?;
                    play(session, trick).await
                });
                Ok::<_, anyhow::Error>((task, addr))
            })?;
            let extra = ["--dead-peer-s", "2", "--max-downtime-ms", "2000", "--lane-count", "1"];
            let mut send = rig.send(&vm, &addr, &extra)?;
            let peak_kib = watch_memory(&mut send)?;
            let sent = send.wait(PATIENCE)?;
            task.abort();
            ensure!(sent.code == Some(1), "{trick:?}: {sent:?}");
            let message = sent.json()?["error"]["message"].as_str().unwrap_or_default().to_owned();
            ensure!(message.contains(word), "{trick:?}: {message}");
            ensure!(peak_kib < ENGINE_KIB_MAX, "{trick:?}: the engine took {peak_kib} KiB");
            ensure!(began.elapsed() < Duration::from_secs(50), "{trick:?}: {:?}", began.elapsed());
            let journals = PathBuf::from(rig.journal("source"));
            before.assert_untouched(&mut vm, &journals).with_context(|| format!("{trick:?}"))?;
            println!("{trick:?}: {:.1} s, {peak_kib} KiB", began.elapsed().as_secs_f64());
        }
        rig.migrate(vm, QemuKind::V7_2, &["--max-downtime-ms", "2000"]).map(drop)
    })
}

/// Follows an engine to its end; returns the most memory that it had, in KiB.
fn watch_memory(engine: &mut Engine) -> Result<u64> {
    let status = format!("/proc/{}/status", engine.pid());
    let mut peak_kib = 0;
    let end = Instant::now() + PATIENCE;
    while engine.running()? && Instant::now() < end {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let peak = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = peak.and_then(|peak| peak.split_whitespace().next()?.parse().ok());
        peak_kib = peak_kib.max(kib.unwrap_or(0));
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(peak_kib)
}

#[test]
fn a_destination_that_hangs_is_given_up_in_time() -> Result<()> {
    in_turn(|_| {
        let rig = Rig::new()?;
        let spec = guest("source").with("godwit.writer=fill=60,hot=4,rate=500,bytes=64,seed=7");
        let mut vm = Vm::boot(&rig.env, spec)?;
        let before = Before::of(&mut vm)?;
        let destination = Vm::start(&rig.env, vm.spec().successor("hangs", QemuKind::V7_2))?;
        let listen = free_address()?;
        let mut receive = rig.receive(&destination, &listen, &["--dead-peer-s", "2"])?;
        // Slow enough that it is still under way when the destination hangs.
        let extra = ["--dead-peer-s", "2", "--max-bandwidth", "100M"];
        let mut send = rig.send(&vm, &listen, &extra)?;
        receive.wait_stderr("session from", PATIENCE)?;
        std::thread::sleep(Duration::from_secs(1));
        receive.signal(Signal::SIGSTOP)?;
        let hung = Instant::now();
        let peak_kib = watch_memory(&mut send)?;
        let took = hung.elapsed();
        let sent = send.wait(PATIENCE)?;
        ensure!(sent.code == Some(1), "{sent:?}");
        ensure!(took < Duration::from_secs(6), "Given up after {took:?}");
        ensure!(peak_kib < ENGINE_KIB_MAX, "The engine took {peak_kib} KiB");
        let journals = PathBuf::from(rig.journal("source"));
        before.assert_untouched(&mut vm, &journals)?;
        // It wakes up, finds its source gone, and takes the guest at the second attempt.
        receive.signal(Signal::SIGCONT)?;
        receive.wait_stderr("refused:", PATIENCE)?;
        let sent = rig.send(&vm, &listen, &["--max-downtime-ms", "2000"])?.wait(PATIENCE)?;
        ensure!(sent.code == Some(0), "The second attempt: {sent:?}\n{}", receive.stderr());
        receive.wait(PATIENCE)?.success().map(drop)
    })
}

/// Anybody of the authority may ask about any migration; that tells nothing and changes nothing.
#[test]
fn questions_do_not_disturb_an_arrival() -> Result<()> {
    in_turn(|runtime| {
        let mut target = Target::start()?;
        let identity = load(&target.rig.source)?;
        runtime.block_on(async {
            let rogue = Rogue::accepted(&target, 90).await?;
            // Sessions that ask nothing, while a guest arrives.
            let mut mute = vec![];
            for number in 1..=3 {
                let offer = Offer::new("rogue", MigrationId([number; 16]), Intent::Ask);
                mute.push(connect(target.addr, &identity, &Options::default(), offer).await?);
            }
            let began = Instant::now();
            rogue.say(Message::Sync(Sync { sequence: 9, batches: vec![0] })).await?;
            let mut rogue = rogue;
            loop {
                match rogue.next().await? {
                    Message::Progress(_) => {}
                    Message::Synced(synced) if synced.sequence == 9 => break,
                    other => bail!("{other:?}"),
                }
            }
            let took = began.elapsed();
            ensure!(took < Duration::from_secs(2), "Mute askers held the arrival up for {took:?}");
            drop(mute);
            rogue.session.closer.close_now(1, "done");
            let offer = Offer::new("rogue", MigrationId([7; 16]), Intent::Ask);
            let mut asker = connect(target.addr, &identity, &Options::default(), offer).await?;
            let ask = Ask { migration: MigrationId([7; 16]) };
            asker.control_sender.send(&Message::Ask(ask)).await?;
            let verdict = asker.control_receiver.recv().await?;
            let unknown = migrate_core::handover::DestinationState::Unknown;
            ensure!(matches!(&verdict, Message::Verdict(v) if v.state == unknown), "{verdict:?}");
            Ok(())
        })?;
        target.still_waits("questions")
    })
}
