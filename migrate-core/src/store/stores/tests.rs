//! Random operations of three hosts on three stores, against a model; and threads side by side.

mod limits;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use proptest::prelude::*;

use super::super::arena::SLACK_BYTES;
use super::super::names::LIST_ENTRIES_MAX;
use super::*;

const HOSTS: [&str; 3] = ["a", "b", "c"];
const PAGES: u64 = 300;
const CAPACITY_PAGES: u64 = 250;
const PER_HOST_PAGES: u64 = 180;
const LEASE: Duration = Duration::from_secs(60);

fn bytes(pages: u64) -> u64 {
    pages * PAGE_BYTES as u64
}

/// A page's content: zeros, text that packs to any size, or noise.
fn content(seed: u16) -> Vec<u8> {
    let mut state = u64::from(seed) | 1 << 40;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as u8
    };
    let noisy = match seed % 4 {
        0 => return vec![0; PAGE_BYTES],
        1 => PAGE_BYTES,
        _ => usize::from(seed) * 97 % PAGE_BYTES,
    };
    (0..PAGE_BYTES).map(|at| if at < noisy { next() } else { seed as u8 }).collect()
}

fn new_store(store: u8, secret: u8, reserve_pages: u64, hosts: &[&str]) -> NewStore {
    NewStore {
        store: StoreId([store; 16]),
        secret: StoreSecret::new([secret; 32]),
        vm: format!("vm-{store}"),
        pages: PAGES,
        reserve_pages,
        hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
    }
}

#[derive(Debug, Clone)]
enum Op {
    Create { reserve_pages: u64, with: Option<usize> },
    Keep,
    Grant(usize),
    Revoke(usize),
    Put { extents: Vec<Extent>, seed: u16, version: u64 },
    Get { extents: Vec<Extent>, take: bool },
    Drop(Vec<Extent>),
    List { from_page: u64 },
    Stat,
    Reserve(u64),
    Delete,
}

/// Who asks what of which store, with the right secret or a wrong one, and how long after the last.
type Asked = (Op, usize, u8, bool, u16);

fn extents() -> impl Strategy<Value = Vec<Extent>> {
    // Some beyond the end.
    let extent = (0..PAGES + 2, 1u32..40).prop_map(|(first, pages)| {
        let room = (PAGES + 2 - first).max(1) as u32;
        Extent::new(first, pages.min(room))
    });
    prop::collection::vec(extent, 1..4)
}

fn asked() -> impl Strategy<Value = Asked> {
    let host = 0..HOSTS.len();
    let op = prop_oneof![
        4 => (1..140u64, prop::option::of(host.clone()))
            .prop_map(|(reserve_pages, with)| Op::Create { reserve_pages, with }),
        1 => Just(Op::Keep),
        1 => host.clone().prop_map(Op::Grant),
        1 => host.clone().prop_map(Op::Revoke),
        12 => (extents(), any::<u16>(), 1u64..4)
            .prop_map(|(extents, seed, version)| Op::Put { extents, seed, version }),
        10 => (extents(), any::<bool>()).prop_map(|(extents, take)| Op::Get { extents, take }),
        4 => extents().prop_map(Op::Drop),
        4 => (0..PAGES + 2).prop_map(|from_page| Op::List { from_page }),
        2 => Just(Op::Stat),
        4 => (0..PAGES + 2).prop_map(Op::Reserve),
        4 => (1..140u64).prop_map(Op::Reserve),
        1 => Just(Op::Delete),
    ];
    let secret = prop::bool::weighted(0.97);
    (op, prop_oneof![6 => Just(0usize), 1 => host], 0u8..3, secret, 0u16..12)
}

/// A store as it should be.
#[derive(Debug)]
struct Expected {
    creator: usize,
    reserve_pages: u64,
    hosts: BTreeSet<usize>,
    used: Duration,
    kept: bool,
    /// The seed of a page's content, and its version.
    pages: BTreeMap<u64, (u16, u64)>,
}

#[derive(Debug, Default)]
struct Model(BTreeMap<u8, Expected>);

/// What an operation gave: an error's kind, or pages with their contents or versions.
type Outcome = Result<Vec<(u64, Vec<u8>)>, StoreError>;

fn version_bytes(version: u64) -> Vec<u8> {
    version.to_le_bytes().to_vec()
}

fn listed(extents: &[Extent]) -> Vec<u64> {
    extents.iter().flat_map(Extent::iter).collect()
}

/// The seed of a page in a put: differs from page to page.
fn seed_of(seed: u16, page: u64) -> u16 {
    seed.wrapping_add(page as u16 * 5)
}

impl Model {
    fn reserved(&self) -> u64 {
        self.0.values().map(|store| bytes(store.reserve_pages)).sum()
    }

    fn reserved_by(&self, host: usize) -> (usize, u64) {
        let theirs = self.0.values().filter(|store| store.creator == host);
        theirs.fold((0, 0), |(stores, sum), store| (stores + 1, sum + bytes(store.reserve_pages)))
    }

    /// Whether so much more may be reserved for a store of a host.
    fn check_room(&self, creator: usize, pages: u64) -> Result<(), StoreError> {
        let wanted_bytes = bytes(pages);
        let free_bytes = bytes(CAPACITY_PAGES) - self.reserved();
        if wanted_bytes > free_bytes {
            return Err(StoreError::Full { free_bytes, wanted_bytes });
        }
        let free_bytes = bytes(PER_HOST_PAGES) - self.reserved_by(creator).1;
        if wanted_bytes > free_bytes {
            return Err(StoreError::HostFull { free_bytes, wanted_bytes });
        }
        Ok(())
    }

    fn create(&mut self, id: u8, host: usize, op: &Op, right: bool, now: Duration) -> Outcome {
        let Op::Create { reserve_pages, with } = op else { unreachable!("only for this one") };
        if let Some(other) = self.0.get(&id) {
            let may = right && other.hosts.contains(&host);
            return Err(if may { StoreError::Exists } else { StoreError::Unknown });
        }
        self.check_room(host, *reserve_pages)?;
        // The secret that others must know is the right one, whoever creates it.
        let hosts = [Some(host), *with].into_iter().flatten().collect();
        let (reserve_pages, pages) = (*reserve_pages, BTreeMap::new());
        let (creator, used, kept) = (host, now, false);
        self.0.insert(id, Expected { creator, reserve_pages, hosts, used, kept, pages });
        Ok(vec![])
    }

    fn reserve(&mut self, id: u8, pages: u64) -> Outcome {
        if !(1..=PAGES).contains(&pages) {
            let rule = "at least one page and at most the guest's";
            return Err(StoreError::field("reserve_pages", pages, rule));
        }
        let store = &self.0[&id];
        let wanted_pages = store.pages.len() as u64;
        if pages < wanted_pages {
            return Err(StoreError::Reserved { reserve_pages: pages, wanted_pages });
        }
        self.check_room(store.creator, pages.saturating_sub(store.reserve_pages))?;
        self.0.get_mut(&id).unwrap().reserve_pages = pages;
        Ok(vec![])
    }

    fn apply(&mut self, (op, host, id, right, _): &Asked, now: Duration) -> Outcome {
        let store = self.0.get_mut(id).filter(|store| *right && store.hosts.contains(host));
        let store = store.ok_or(StoreError::Unknown)?;
        store.used = now;
        let in_range = |extents: &[Extent]| {
            let beyond = extents.iter().find(|extent| extent.end() > PAGES);
            beyond.map_or(Ok(()), |extent| {
                let page = extent.first_page.max(PAGES);
                Err(StoreError::OutOfRange { page, pages: PAGES })
            })
        };
        match op {
            Op::Create { .. } => unreachable!("has a function of its own"),
            Op::Keep => store.kept = true,
            Op::Grant(other) => {
                store.hosts.insert(*other);
            }
            Op::Revoke(other) if other == host => return Err(StoreError::Itself),
            Op::Revoke(other) => {
                store.hosts.remove(other);
            }
            Op::Put { extents, seed, version } => {
                in_range(extents)?;
                let pages = listed(extents);
                let new = pages.iter().filter(|page| !store.pages.contains_key(page)).count();
                let wanted_pages = (store.pages.len() + new) as u64;
                let reserve_pages = store.reserve_pages;
                if wanted_pages > reserve_pages {
                    return Err(StoreError::Reserved { reserve_pages, wanted_pages });
                }
                let put = |page| (page, (seed_of(*seed, page), *version));
                store.pages.extend(pages.into_iter().map(put));
            }
            Op::Get { extents, take } => {
                in_range(extents)?;
                let pages = listed(extents);
                let got = pages.iter().map(|page| match store.pages.get(page) {
                    Some((seed, _)) => Ok((*page, content(*seed))),
                    None => Err(StoreError::NotStored { page: *page }),
                });
                let got = got.collect::<Result<_, _>>()?;
                if *take {
                    store.pages.retain(|page, _| !pages.contains(page));
                }
                return Ok(got);
            }
            Op::Drop(extents) => {
                in_range(extents)?;
                let dropped = listed(extents);
                store.pages.retain(|page, _| !dropped.contains(page));
            }
            Op::List { from_page } => {
                in_range(&[Extent::new(*from_page, 1)])?;
                let listed = store.pages.range(from_page..);
                return Ok(listed
                    .map(|(page, (_, version))| (*page, version_bytes(*version)))
                    .collect());
            }
            Op::Stat => {}
            Op::Reserve(pages) => return self.reserve(*id, *pages),
            Op::Delete => {
                self.0.remove(id);
            }
        }
        Ok(vec![])
    }
}

/// Reads as a connection does.
fn read(store: &mut OpenStore<'_>, extents: &[Extent], take: bool, now: Duration) -> Outcome {
    let mut reading = store.read(extents, now)?;
    let mut all = vec![];
    while let Some(piece) = store.piece(&mut reading)? {
        assert_eq!(piece.contents.len() as u64, bytes(Extent::count(&piece.extents)));
        let count = Extent::count(&piece.extents) as usize;
        assert!(count <= if all.is_empty() { 1 } else { PIECE_PAGES });
        let contents = piece.contents.chunks_exact(PAGE_BYTES).map(<[u8]>::to_vec);
        all.extend(listed(&piece.extents).into_iter().zip(contents));
        assert_eq!(piece.last, all.len() as u64 == Extent::count(extents));
    }
    if take {
        store.take(&reading)?;
    }
    Ok(all)
}

/// Lists to the end, as a host does.
fn list(
    store: &OpenStore<'_>,
    from_page: u64,
    now: Duration,
) -> Result<Vec<(Extent, u64)>, StoreError> {
    let (mut all, mut next): (Vec<(Extent, u64)>, _) = (vec![], Some(from_page));
    while let Some(from_page) = next {
        let Listing { entries, next_page } = store.list(from_page, now)?;
        assert!(entries.len() <= LIST_ENTRIES_MAX);
        assert!(next_page.is_none() || !entries.is_empty());
        let first = entries.first().map(|(extent, _)| extent.first_page);
        assert!(first.is_none_or(|first| first >= from_page));
        all.extend(entries);
        let end = all.last().map_or(0, |(extent, _)| extent.end());
        assert!(next_page.is_none_or(|next| next >= end));
        next = next_page;
    }
    for pair in all.windows(2) {
        let [(before, one), (after, other)] = pair else { unreachable!("two of them") };
        assert!(
            before.end() < after.first_page || before.end() == after.first_page && one != other
        );
    }
    Ok(all)
}

fn pages_of(entries: &[(Extent, u64)]) -> Vec<(u64, Vec<u8>)> {
    let pages = entries
        .iter()
        .flat_map(|(extent, version)| extent.iter().map(|page| (page, version_bytes(*version))));
    pages.collect()
}

fn carry_out(stores: &Stores, (op, host, id, right, _): &Asked, now: Duration) -> Outcome {
    let host = HOSTS[*host];
    let secret = StoreSecret::new([if *right { 7 } else { 8 }; 32]);
    if let Op::Create { reserve_pages, with } = op {
        let with: Vec<&str> = with.iter().map(|host| HOSTS[*host]).collect();
        let mut wanted = new_store(*id, 7, *reserve_pages, &with);
        if stores.list().iter().any(|other| other.store == wanted.store) {
            wanted.secret = secret;
        }
        return stores.create(wanted, host, now).map(|_| vec![]);
    }
    let mut store = stores.open(StoreId([*id; 16]), &secret, host, now)?;
    match op {
        Op::Create { .. } => unreachable!("returned above"),
        Op::Keep => store.keep(now)?,
        Op::Grant(other) => store.grant(HOSTS[*other], now)?,
        Op::Revoke(other) => store.revoke(HOSTS[*other], now)?,
        Op::Put { extents, seed, version } => {
            let pages = listed(extents);
            let contents: Vec<u8> =
                pages.iter().flat_map(|page| content(seed_of(*seed, *page))).collect();
            store.put(extents, &contents, *version, now)?;
        }
        Op::Get { extents, take } => return read(&mut store, extents, *take, now),
        Op::Drop(extents) => store.drop_pages(extents, now)?,
        Op::List { from_page } => {
            return list(&store, *from_page, now).map(|entries| pages_of(&entries));
        }
        Op::Stat => {
            store.stat(now)?;
        }
        Op::Reserve(pages) => store.reserve(*pages, now)?,
        Op::Delete => store.delete(now)?,
    }
    Ok(vec![])
}

fn check_all(stores: &Stores, model: &Model) {
    assert_eq!(stores.capacity(), (bytes(CAPACITY_PAGES), model.reserved()));
    let shares = (0..HOSTS.len()).map(|host| (HOSTS[host], model.reserved_by(host)));
    let shares: Vec<HostShare> = shares
        .filter(|(_, (stores, _))| *stores > 0)
        .map(|(host, (stores, reserved_bytes))| HostShare {
            host: host.to_owned(),
            stores,
            reserved_bytes,
        })
        .collect();
    assert_eq!(stores.hosts(), shares);
    let listed = stores.list();
    assert_eq!(listed.len(), model.0.len());
    for (info, (id, expected)) in listed.iter().zip(&model.0) {
        assert_eq!((info.store, &info.vm), (StoreId([*id; 16]), &format!("vm-{id}")));
        assert_eq!(info.creator, HOSTS[expected.creator]);
        assert_eq!(info.stat.stored_pages, expected.pages.len() as u64);
        assert_eq!(
            (info.stat.reserve_pages, info.stat.kept),
            (expected.reserve_pages, expected.kept)
        );
        assert!(info.stat.stored_bytes <= bytes(info.stat.stored_pages));
        assert!(info.memory_bytes <= bytes(expected.reserve_pages) + SLACK_BYTES);
        assert!(info.stat.stored_bytes > 0 || info.memory_bytes == 0);
    }
}

proptest! {
    #[test]
    fn behaves_like_the_model(asked in prop::collection::vec(asked(), 1..120), compresses in any::<bool>()) {
        let stores = Stores::new(bytes(CAPACITY_PAGES), LEASE, compresses)
            .with_per_host(bytes(PER_HOST_PAGES));
        let mut model = Model::default();
        let mut now = Duration::ZERO;
        for asked in asked {
            now += Duration::from_secs(u64::from(asked.4));
            let ended: BTreeSet<StoreId> =
                stores.expire(now).into_iter().map(|info| info.store).collect();
            let over = |store: &Expected| !store.kept && now - store.used >= LEASE;
            let expected: BTreeSet<StoreId> =
                model.0.iter().filter(|(_, store)| over(store)).map(|(id, _)| StoreId([*id; 16])).collect();
            prop_assert_eq!(ended, expected);
            model.0.retain(|_, store| !over(store));
            let (op, host, id, right, _) = &asked;
            let expected = match op {
                Op::Create { .. } => model.create(*id, *host, op, *right, now),
                _ => model.apply(&asked, now),
            };
            let got = carry_out(&stores, &asked, now);
            prop_assert_eq!(got, expected, "{:?}", asked);
            check_all(&stores, &model);
        }
    }
}

#[test]
fn others_learn_nothing() {
    let stores = Stores::new(bytes(100), LEASE, true);
    let now = Duration::ZERO;
    let right = StoreSecret::new([7; 32]);
    let store = stores.create(new_store(1, 7, 10, &["b"]), "a", now).unwrap();
    let open = |id, secret: &StoreSecret, host| {
        stores.open(StoreId([id; 16]), secret, host, now).map(|_| ())
    };
    assert_eq!(open(1, &right, "b"), Ok(()));
    let wrong = StoreSecret::new([6; 32]);
    for refused in [open(2, &right, "a"), open(1, &wrong, "a"), open(1, &right, "c")] {
        assert_eq!(refused, Err(StoreError::Unknown));
    }
    // A store that is open does not stay so for a host that was revoked.
    let theirs = stores.open(StoreId([1; 16]), &right, "b", now).unwrap();
    theirs.keep(now).unwrap();
    store.revoke("b", now).unwrap();
    assert_eq!(theirs.stat(now), Err(StoreError::Unknown));
    assert_eq!(stores.create(new_store(1, 7, 1, &[]), "b", now).unwrap_err(), StoreError::Unknown);
    assert_eq!(stores.create(new_store(1, 7, 1, &[]), "a", now).unwrap_err(), StoreError::Exists);
    store.delete(now).unwrap();
    assert_eq!(store.delete(now), Err(StoreError::Unknown));
}

/// A list that is longer than a part, or than what is looked at under one lock.
#[test]
fn long_lists_come_in_parts() {
    let most = LIST_ENTRIES_MAX as u64;
    let pages = 3 * most;
    let stores = Stores::new(bytes(pages), LEASE, false);
    let now = Duration::ZERO;
    let wanted = NewStore { pages, reserve_pages: pages, ..new_store(1, 7, 1, &[]) };
    let mut store = stores.create(wanted, "a", now).unwrap();
    let put = |store: &mut OpenStore<'_>, first, count: u32, version| {
        let contents = vec![0; count as usize * PAGE_BYTES];
        store.put(&[Extent::new(first, count)], &contents, version, now).unwrap();
    };
    assert_eq!(store.list(0, now), Ok(Listing { entries: vec![], next_page: None }));
    put(&mut store, 0, pages as u32, 9);
    // A higher version does not keep a lower one away.
    put(&mut store, 5000, 2, 3);
    let runs = [(Extent::new(0, 5000), 9), (Extent::new(5000, 2), 3), (Extent::new(5002, 7286), 9)];
    assert_eq!(store.list(0, now), Ok(Listing { entries: runs.to_vec(), next_page: None }));
    let within = vec![(Extent::new(5001, 1), 3), runs[2]];
    assert_eq!(store.list(5001, now), Ok(Listing { entries: within, next_page: None }));
    // No two neighbours share an entry, and there is one entry more than a part has.
    for page in 0..=most {
        put(&mut store, page, 1, 1 + page % 2);
    }
    store.drop_pages(&[Extent::new(most + 1, (pages - most) as u32 - 1)], now).unwrap();
    let first = store.list(0, now).unwrap();
    assert_eq!((first.entries.len(), first.next_page), (LIST_ENTRIES_MAX, Some(most)));
    let rest = Listing { entries: vec![(Extent::new(most, 1), 1)], next_page: None };
    assert_eq!(store.list(most, now), Ok(rest));
    let beyond = StoreError::OutOfRange { page: pages, pages };
    assert_eq!(store.list(pages, now), Err(beyond));
}

/// What was put while it was being sent is not dropped with what was sent.
#[test]
fn a_page_that_is_put_again_is_not_taken() {
    let stores = Stores::new(bytes(100), LEASE, true);
    let now = Duration::ZERO;
    let mut store = stores.create(new_store(1, 7, 10, &[]), "a", now).unwrap();
    let both = [Extent::new(4, 2)];
    store.put(&both, &[content(1), content(2)].concat(), 1, now).unwrap();
    let mut reading = store.read(&both, now).unwrap();
    while store.piece(&mut reading).unwrap().is_some() {}
    store.put(&[Extent::new(5, 1)], &content(3), 1, now).unwrap();
    store.take(&reading).unwrap();
    let got = read(&mut store, &[Extent::new(5, 1)], false, now);
    assert_eq!(got, Ok(vec![(5, content(3))]));
    let gone = read(&mut store, &both, false, now);
    assert_eq!(gone, Err(StoreError::NotStored { page: 4 }));
}

/// Threads that put, get, drop and create at the same time: every page read is one that was put, and
/// nothing is reserved or claimed in the end that should not be.
#[test]
fn threads_do_not_disturb_one_another() {
    let stores = Stores::new(bytes(400), LEASE, true);
    let now = Duration::ZERO;
    let ends = AtomicBool::new(false);
    let secret = StoreSecret::new([7; 32]);
    stores.create(new_store(1, 7, 200, &[]), "a", now).unwrap();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..3u64)
            .map(|worker| {
                let (stores, secret) = (&stores, &secret);
                scope.spawn(move || {
                    let mut store = stores.open(StoreId([1; 16]), secret, "a", now).unwrap();
                    for round in 0..300u64 {
                        let first = (worker * 31 + round * 17) % 150;
                        let extents = [Extent::new(first, 50)];
                        let contents: Vec<u8> = listed(&extents)
                            .iter()
                            .flat_map(|page| content(*page as u16))
                            .collect();
                        match store.put(&extents, &contents, round, now) {
                            Ok(()) | Err(StoreError::Reserved { .. }) => {}
                            Err(other) => panic!("{other}"),
                        }
                        match read(&mut store, &extents, round % 3 == 0, now) {
                            Ok(got) => {
                                got.iter().for_each(|(page, got)| {
                                    assert_eq!(*got, content(*page as u16));
                                });
                            }
                            Err(StoreError::NotStored { .. }) => {}
                            Err(other) => panic!("{other}"),
                        }
                        store.drop_pages(&[Extent::new(first + 10, 5)], now).unwrap();
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !ends.load(Ordering::Relaxed) {
                let other = stores.create(new_store(2, 7, 200, &[]), "a", now).unwrap();
                assert!(stores.create(new_store(3, 7, 1, &[]), "a", now).is_err());
                other.delete(now).unwrap();
            }
        });
        let ended: Vec<_> = workers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        ends.store(true, Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok));
    });
    let store = stores.open(StoreId([1; 16]), &secret, "a", now).unwrap();
    assert_eq!(store.store.inner.lock().claimed_pages, 0);
    assert!(store.stat(now).unwrap().stored_pages <= 200);
    store.delete(now).unwrap();
    assert_eq!(stores.capacity().1, 0);
}
