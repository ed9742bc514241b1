//! How many stores and hosts there may be, what one host may have, and reservations that change.

use super::*;

const NOW: Duration = Duration::ZERO;

fn share(host: &str, stores: usize, pages: u64) -> HostShare {
    HostShare { host: host.to_owned(), stores, reserved_bytes: bytes(pages) }
}

#[test]
fn numbers_of_stores_and_hosts_are_bounded() {
    let stores = Stores::new(u64::MAX, LEASE, false);
    let create = |number: usize, host: &str| {
        let mut wanted = new_store(0, 0, 1, &[]);
        wanted.store = StoreId((number as u128).to_le_bytes());
        stores.create(wanted, host, NOW)
    };
    for number in 0..STORES_MAX {
        let host = format!("a{}", number / STORES_PER_HOST_MAX);
        let store = create(number, &host).unwrap();
        for other in 1..HOSTS_MAX {
            store.grant(&format!("b{other}"), NOW).unwrap();
        }
        store.grant("b1", NOW).unwrap();
        let more = store.grant("c", NOW);
        assert_eq!(more, Err(StoreError::TooManyHosts { max: HOSTS_MAX as u64 }));
        if number + 1 == STORES_PER_HOST_MAX {
            let max = STORES_PER_HOST_MAX as u64;
            let more = create(STORES_MAX, &host).unwrap_err();
            assert_eq!(more, StoreError::HostStores { max });
        }
    }
    let more = create(STORES_MAX, "d").unwrap_err();
    assert_eq!(more, StoreError::TooManyStores { max: STORES_MAX as u64 });
    let first = stores.list()[0].store;
    let store = stores.open(first, &StoreSecret::new([0; 32]), "a0", NOW).unwrap();
    store.delete(NOW).unwrap();
    create(STORES_MAX, "a0").unwrap();
}

/// A store takes the share of the host that created it, whoever uses it and asks for more.
#[test]
fn one_host_does_not_take_all() {
    let stores = Stores::new(bytes(100), LEASE, true).with_per_host(bytes(60));
    let first = stores.create(new_store(1, 7, 40, &["b"]), "a", NOW).unwrap();
    let more = stores.create(new_store(2, 7, 21, &[]), "a", NOW).unwrap_err();
    let full = StoreError::HostFull { free_bytes: bytes(20), wanted_bytes: bytes(21) };
    assert_eq!(more, full);
    assert_eq!(stores.hosts(), [share("a", 1, 40)]);
    let theirs = stores.create(new_store(3, 7, 30, &[]), "b", NOW).unwrap();
    // Of both that are exceeded, the server's limit is told: no share would help.
    let more = stores.create(new_store(2, 7, 31, &[]), "a", NOW).unwrap_err();
    assert_eq!(more, StoreError::Full { free_bytes: bytes(30), wanted_bytes: bytes(31) });
    let granted = stores.open(StoreId([1; 16]), &StoreSecret::new([7; 32]), "b", NOW).unwrap();
    assert_eq!(granted.reserve(61, NOW), Err(full));
    granted.reserve(60, NOW).unwrap();
    assert_eq!(stores.hosts(), [share("a", 1, 60), share("b", 1, 30)]);
    granted.revoke("a", NOW).unwrap();
    assert_eq!(first.reserve(1, NOW), Err(StoreError::Unknown));
    let info = stores.list().remove(0);
    assert_eq!((&*info.host, &*info.creator), ("b", "a"));
    granted.delete(NOW).unwrap();
    theirs.keep(NOW).unwrap();
    assert_eq!(stores.hosts(), [share("b", 1, 30)]);
    stores.create(new_store(2, 7, 60, &[]), "a", NOW).unwrap();
    stores.expire(LEASE);
    assert_eq!((stores.hosts(), stores.capacity().1), (vec![share("b", 1, 30)], bytes(30)));
}

/// Pages dropped here and there leave chunks that are nearly empty: their memory is back before others
/// get what is no longer reserved.
#[test]
fn memory_follows_the_reservation() {
    const MANY: u64 = 16_384;
    const FEW: u64 = MANY / 8;
    let stores = Stores::new(bytes(MANY), LEASE, false);
    let wanted = NewStore { pages: MANY, reserve_pages: MANY, ..new_store(1, 7, 1, &[]) };
    let mut store = stores.create(wanted, "a", NOW).unwrap();
    let noise: Vec<u8> = (0..256u16).flat_map(|page| content(page * 4 + 1)).collect();
    for first in (0..MANY).step_by(256) {
        store.put(&[Extent::new(first, 256)], &noise, 1, NOW).unwrap();
    }
    // Taken, not dropped one by one: that tidies all along.
    let gone: Vec<Extent> = (0..MANY / 8).map(|part| Extent::new(part * 8, 7)).collect();
    let reading = store.read(&gone, NOW).unwrap();
    store.take(&reading).unwrap();
    assert!(stores.list()[0].memory_bytes > bytes(FEW) + 2 * SLACK_BYTES);
    let stored = StoreError::Reserved { reserve_pages: FEW - 1, wanted_pages: FEW };
    assert_eq!(store.reserve(FEW - 1, NOW), Err(stored));
    assert_eq!(stores.capacity().1, bytes(MANY));
    store.reserve(FEW, NOW).unwrap();
    assert_eq!(stores.capacity().1, bytes(FEW));
    let memory_bytes = stores.list()[0].memory_bytes;
    assert!(memory_bytes <= bytes(FEW) + SLACK_BYTES, "{memory_bytes}");
    let kept: Vec<Extent> = (0..MANY / 8).map(|part| Extent::new(part * 8 + 7, 1)).collect();
    for (page, got) in read(&mut store, &kept, false, NOW).unwrap() {
        assert_eq!(got, content(page as u16 % 256 * 4 + 1), "page {page}");
    }
    let full = StoreError::Reserved { reserve_pages: FEW, wanted_pages: FEW + 1 };
    assert_eq!(store.put(&[Extent::new(0, 1)], &content(1), 1, NOW), Err(full));
    // And up again.
    store.reserve(MANY, NOW).unwrap();
    for first in (0..MANY).step_by(256) {
        store.put(&[Extent::new(first, 256)], &noise, 1, NOW).unwrap();
    }
    let stat = store.stat(NOW).unwrap();
    assert_eq!((stat.stored_pages, stat.reserve_pages), (MANY, MANY));
}

/// Threads change a store's reservation while others put and one deletes it: what is reserved is what the
/// stores have in the end, and puts are refused as a whole or find room.
#[test]
fn reservations_change_under_way() {
    let stores = Stores::new(bytes(1000), LEASE, true);
    let secret = StoreSecret::new([7; 32]);
    for round in 0..20u64 {
        stores.create(new_store(1, 7, 100, &[]), "a", NOW).unwrap();
        let open = || stores.open(StoreId([1; 16]), &secret, "a", NOW).unwrap();
        thread::scope(|scope| {
            for worker in 0..2u64 {
                let store = open();
                scope.spawn(move || {
                    for step in 0..200 {
                        let pages = 1 + (worker * 91 + step * 37) % PAGES;
                        match store.reserve(pages, NOW) {
                            Ok(()) | Err(StoreError::Reserved { .. }) => {}
                            Err(StoreError::Unknown) if round % 2 == 1 => {}
                            Err(other) => panic!("{other}"),
                        }
                    }
                });
                let mut store = open();
                scope.spawn(move || {
                    for step in 0..100 {
                        let extents = [Extent::new((worker * 67 + step * 29) % 250, 40)];
                        let contents = vec![step as u8; 40 * PAGE_BYTES];
                        let put = store.put(&extents, &contents, 1, NOW);
                        let dropped = store.drop_pages(&extents, NOW);
                        match put.and(dropped) {
                            Ok(()) | Err(StoreError::Reserved { .. }) => {}
                            Err(StoreError::Unknown) if round % 2 == 1 => {}
                            Err(other) => panic!("{other}"),
                        }
                    }
                });
            }
            if round % 2 == 1 {
                let store = open();
                scope.spawn(move || {
                    thread::sleep(Duration::from_millis(1 + round % 5));
                    store.delete(NOW).unwrap();
                });
            }
        });
        if round % 2 == 0 {
            let store = open();
            assert_eq!(store.store.inner.lock().claimed_pages, 0);
            let stat = store.stat(NOW).unwrap();
            assert!(stat.stored_pages <= stat.reserve_pages);
            assert_eq!(stores.capacity().1, bytes(stat.reserve_pages));
            store.delete(NOW).unwrap();
        }
        assert_eq!((stores.capacity().1, stores.hosts()), (0, vec![]));
    }
}
