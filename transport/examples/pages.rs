//! What a memory server does for one client: latency of single pages, throughput of many.
//!
//! ```sh
//! migrate memory-server --listen 127.0.0.1:7900 --identity host-b --capacity 1G &
//! cargo run --release -p transport --example pages -- 127.0.0.1:7900 host-a
//! ```
//!
//! Contents are noise, text or zeros, as they are or packed on the way. Text and zeros are kept
//! compressed unless the server has `--compress off`.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use migrate_core::layout::PAGE_BYTES;
use transport::pages::wire::REQUEST_PAGES_MAX;
use transport::pages::{Extent, NewStore, StoreId, StoreSecret};
use transport::{Identity, Options, PageAnswer, PageClient, PageRequest};

/// Pages that are put and got: 128 MiB.
const PAGES: u64 = 32 << 10;

/// Single pages that are got.
const GETS: u64 = 20_000;

/// Version of all pages that are put.
const VERSION: u64 = 1;

/// Requests of 256 pages that are under way.
const UNDER_WAY: usize = 8;

#[derive(Debug, Clone, Copy)]
enum Kind {
    Noise,
    Text,
    Zeros,
}

impl Kind {
    fn content(self, page: u64) -> Vec<u8> {
        let mut state = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        match self {
            Self::Noise => (0..PAGE_BYTES / 8).flat_map(|_| next().to_le_bytes()).collect(),
            Self::Text => {
                let words = ["guest ", "page ", "memory ", "server ", "of ", "the ", "a ", "host "];
                let mut text = Vec::with_capacity(PAGE_BYTES + 8);
                while text.len() < PAGE_BYTES {
                    let word = words.get((next() % 8) as usize).copied().unwrap_or_default();
                    text.extend_from_slice(word.as_bytes());
                }
                text.truncate(PAGE_BYTES);
                text
            }
            Self::Zeros => vec![0; PAGE_BYTES],
        }
    }
}

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let (Some(addr), Some(identity)) = (words.next(), words.next()) else {
        bail!("usage: pages ADDR IDENTITY");
    };
    let addr: SocketAddr = addr.parse().context("ADDR is no address")?;
    let identity = Identity::load(Path::new(&identity))?;
    for kind in [Kind::Noise, Kind::Text, Kind::Zeros] {
        for packed in [false, true] {
            measure(addr, &identity, kind, packed)?;
        }
    }
    Ok(())
}

fn measure(addr: SocketAddr, identity: &Identity, kind: Kind, packed: bool) -> Result<()> {
    let mut client = PageClient::connect(addr, identity, None, &Options::default())?;
    done(client.call(&PageRequest::Create(NewStore {
        store: StoreId(std::array::from_fn(|at| at as u8)),
        secret: StoreSecret::new([1; 32]),
        vm: "measured".into(),
        pages: PAGES,
        reserve_pages: PAGES,
        hosts: vec![],
    }))?)?;
    let extents = (0..PAGES).step_by(REQUEST_PAGES_MAX as usize);
    let extents = extents.map(|first| vec![Extent::new(first, REQUEST_PAGES_MAX as u32)]);
    let puts = extents.clone().map(|extents| {
        let contents = extents.iter().flat_map(Extent::iter).flat_map(|page| kind.content(page));
        PageRequest::Put { contents: Bytes::from_iter(contents), extents, version: VERSION, packed }
    });
    // Made before the clock runs.
    let puts: Vec<PageRequest> = puts.collect();
    let before = client.bytes();
    let put = pipelined(&mut client, puts.into_iter())?;
    let put_bytes = client.bytes().0 - before.0;

    let mut took = Vec::with_capacity(GETS as usize);
    for number in 0..GETS {
        let page = number.wrapping_mul(7919) % PAGES;
        let get = PageRequest::Get { extents: vec![Extent::new(page, 1)], take: false, packed };
        let began = Instant::now();
        let answer = client.call(&get)?;
        took.push(began.elapsed());
        if number % 100 == 0 {
            ensure!(contents(&answer)? == kind.content(page), "page {page} is another");
        }
    }
    took.sort_unstable();
    let us = |part: f64| {
        let at = ((took.len() - 1) as f64 * part) as usize;
        took.get(at).map_or(f64::NAN, |took| took.as_secs_f64() * 1e6)
    };

    let gets = extents.map(|extents| PageRequest::Get { extents, take: false, packed });
    let got = pipelined(&mut client, gets)?;
    let PageAnswer::Stat { stat, .. } = client.call(&PageRequest::Stat)? else {
        bail!("no statistics");
    };
    let PageAnswer::Listed { entries, .. } = client.call(&PageRequest::List { from_page: 0 })?
    else {
        bail!("no list");
    };
    ensure!(entries == [(Extent::new(0, PAGES as u32), VERSION)], "{entries:?} are stored");
    let stored = stat.store.map_or(0, |store| store.stored_bytes);
    done(client.call(&PageRequest::Delete)?)?;
    let mb = (PAGES * PAGE_BYTES as u64) as f64 / 1e6;
    println!(
        "{:<6} {:<6} get 1: p50 {:.0} us, p99 {:.0} us, max {:.0} us; put 256: {:.0} MB/s; get 256: \
         {:.0} MB/s; {mb:.0} MB as {:.1} MB on the wire, {:.1} MB stored",
        format!("{kind:?}").to_lowercase(),
        if packed { "packed" } else { "plain" },
        us(0.5),
        us(0.99),
        us(1.0),
        mb / put.as_secs_f64(),
        mb / got.as_secs_f64(),
        put_bytes as f64 / 1e6,
        stored as f64 / 1e6,
    );
    Ok(())
}

/// Sends all requests, some ahead of the answers, and returns how long that took.
fn pipelined(
    client: &mut PageClient,
    requests: impl Iterator<Item = PageRequest>,
) -> Result<Duration> {
    let began = Instant::now();
    let mut due = VecDeque::new();
    let mut answers = vec![];
    for request in requests {
        due.push_back(client.send(&request)?);
        while due.len() >= UNDER_WAY {
            take(client, &mut due, &mut answers)?;
        }
    }
    while !due.is_empty() {
        take(client, &mut due, &mut answers)?;
    }
    Ok(began.elapsed())
}

fn take(
    client: &mut PageClient,
    due: &mut VecDeque<u32>,
    answers: &mut Vec<PageAnswer>,
) -> Result<()> {
    client.receive(answers)?;
    for answer in answers.drain(..) {
        if let PageAnswer::Failed { error, .. } = &answer {
            bail!("{error}");
        }
        if answer.is_last() {
            due.pop_front();
        }
    }
    Ok(())
}

fn done(answer: PageAnswer) -> Result<()> {
    match answer {
        PageAnswer::Failed { error, .. } => Err(error.into()),
        _ => Ok(()),
    }
}

fn contents(answer: &PageAnswer) -> Result<Bytes> {
    match answer {
        PageAnswer::Pages { contents, .. } => Ok(contents.clone()),
        PageAnswer::Failed { error, .. } => Err(error.clone().into()),
        other => bail!("{other:?} instead of pages"),
    }
}
