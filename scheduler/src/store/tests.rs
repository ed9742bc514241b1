//! What every store must do, and what agents make of it, side by side and in several processes' place.

use std::time::Duration;

use super::claims::{Claim, ClaimError, Claims, Presence, Promise};
use super::*;
use crate::model::Amounts;

const LONG: Duration = Duration::from_secs(60);

fn put(key: &str, value: &str, lease: Option<Lease>) -> Change {
    Change::Put { key: key.into(), value: value.into(), lease }
}

fn text(entry: Option<Entry>) -> Option<String> {
    entry.map(|entry| String::from_utf8(entry.value).unwrap())
}

/// The rules at the top of the module, for a store and another handle of it.
pub(super) async fn conforms(one: impl Store, other: impl Store) {
    let first =
        one.commit(&[], &[put("a/1", "x", None), put("b", "y", None)]).await.unwrap().unwrap();
    assert_eq!(text(other.get("a/1").await.unwrap()).as_deref(), Some("x"));
    let absent = Condition::Absent("a/1".into());
    assert_eq!(one.commit(&[absent], &[put("a/2", "z", None)]).await.unwrap(), None);
    assert_eq!(one.get("a/2").await.unwrap(), None, "all or nothing");
    let unchanged = Condition::Unchanged("a/1".into(), first);
    let second = other.commit(std::slice::from_ref(&unchanged), &[put("a/1", "w", None)]).await;
    let second = second.unwrap().unwrap();
    assert!(second > first);
    assert_eq!(one.commit(&[unchanged], &[put("a/1", "v", None)]).await.unwrap(), None);
    let (listed, revision) = one.list("a/").await.unwrap();
    assert_eq!((listed.len(), listed[0].revision), (1, second));
    assert!(revision >= second);

    let mut watch = one.watch("a/", second).await.unwrap();
    let lease = one.grant(Duration::from_secs(1)).await.unwrap();
    other.commit(&[], &[put("a/3", "leased", Some(lease)), put("c", "aside", None)]).await.unwrap();
    let event = tokio::time::timeout(LONG, watch.recv()).await.unwrap().unwrap().unwrap();
    assert!(matches!(&event, Event::Put(entry) if entry.key == "a/3"), "{event:?}");
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(400)).await;
        one.keep(lease).await.unwrap();
    }
    assert!(other.get("a/3").await.unwrap().is_some(), "kept");
    let event = tokio::time::timeout(LONG, watch.recv()).await.unwrap().unwrap().unwrap();
    assert!(matches!(&event, Event::Gone { key, .. } if key == "a/3"), "{event:?}");
    assert_eq!(other.get("a/3").await.unwrap(), None);
    assert!(matches!(one.keep(lease).await, Err(StoreError::LeaseEnded)));
    let late = other.commit(&[], &[put("a/4", "late", Some(lease))]).await;
    assert!(matches!(late, Err(StoreError::LeaseEnded)), "{late:?}");

    let lease = other.grant(LONG).await.unwrap();
    other.commit(&[], &[put("a/5", "leased", Some(lease))]).await.unwrap();
    one.revoke(lease).await.unwrap();
    assert_eq!(other.get("a/5").await.unwrap(), None);
    let long = put(&"k".repeat(KEY_BYTES_MAX + 1), "", None);
    assert!(matches!(one.commit(&[], &[long]).await, Err(StoreError::TooLong { .. })));
}

/// Increments by many at once: none is lost.
pub(super) async fn counts(stores: Vec<impl Store>) {
    let mut tasks = tokio::task::JoinSet::new();
    for store in &stores {
        let store = store.clone();
        tasks.spawn(async move {
            for _ in 0..20 {
                loop {
                    let entry = store.get("count").await.unwrap();
                    let number: u64 = text(entry.clone()).map_or(0, |text| text.parse().unwrap());
                    let condition = match entry {
                        Some(entry) => Condition::Unchanged("count".into(), entry.revision),
                        None => Condition::Absent("count".into()),
                    };
                    let change = put("count", &(number + 1).to_string(), None);
                    if store.commit(&[condition], &[change]).await.unwrap().is_some() {
                        break;
                    }
                }
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    let number = text(stores[0].get("count").await.unwrap()).unwrap();
    assert_eq!(number, (20 * stores.len()).to_string());
}

fn claim(vm: &str, from: &str, to: &str, memory_mib: f64) -> Claim {
    let takes = Amounts { memory_mib, ..Amounts::ZERO };
    let [vm, from, to] = [vm, from, to].map(str::to_owned);
    Claim { vm, from, to, agent: String::new(), takes, reason: "test".into() }
}

/// A host with room for 1000 MiB.
fn room(promises: &[Promise]) -> Result<(), String> {
    let sum: f64 = promises.iter().map(|promise| promise.takes.memory_mib).sum();
    if sum <= 1000.0 { Ok(()) } else { Err(format!("{sum} MiB")) }
}

pub(super) async fn claims_hold<S: Store>(store: S, other: S) {
    let [one, two] = [Claims::new(store.clone(), "h1"), Claims::new(other, "h2")];
    let presence =
        |host: &str| Presence { host: host.into(), api: "[::1]:1".into(), version: "1".into() };
    let lease = store.grant(Duration::from_secs(1)).await.unwrap();
    one.present(&presence("h1"), lease).await.unwrap();

    one.begin(&claim("vm1", "h1", "h3", 600.0), room).await.unwrap();
    one.begin(&claim("vm1", "h1", "h3", 600.0), room).await.expect("the same again");
    let taken = two.begin(&claim("vm1", "h1", "h4", 1.0), room).await.unwrap_err();
    assert!(matches!(&taken, ClaimError::Taken { agent, .. } if agent == "h1"), "{taken}");
    let busy = two.begin(&claim("vm2", "h2", "h3", 1.0), room).await.unwrap_err();
    assert!(matches!(&busy, ClaimError::Busy { host, .. } if host == "h3"), "{busy}");
    let foreign = two.end("vm1").await.unwrap_err();
    assert!(matches!(foreign, ClaimError::NotOurs { .. }), "{foreign}");
    let early = two.take_over("vm1").await.unwrap_err();
    assert!(matches!(early, ClaimError::NotOurs { .. }), "its agent is there: {early}");
    assert_eq!(two.orphans().await.unwrap(), []);
    let large = two.begin(&claim("vm2", "h2", "h4", 1001.0), room).await.unwrap_err();
    assert!(matches!(large, ClaimError::NoRoom { .. }), "{large}");

    // Its agent falls silent; of two who would go on, one does.
    let silent = async {
        while two.orphans().await.unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(LONG, silent).await.unwrap();
    let third = Claims::new(store.clone(), "h5");
    let lease = store.grant(LONG).await.unwrap();
    two.present(&presence("h2"), lease).await.unwrap();
    third.present(&presence("h5"), lease).await.unwrap();
    let (here, there) = tokio::join!(two.take_over("vm1"), third.take_over("vm1"));
    assert!(here.is_ok() != there.is_ok(), "{here:?} {there:?}");
    let [winner, loser] = if here.is_ok() { [&two, &third] } else { [&third, &two] };
    assert!(matches!(loser.end("vm1").await, Err(ClaimError::NotOurs { .. })));
    winner.end("vm1").await.unwrap();
    store.revoke(lease).await.unwrap();
    assert_eq!(two.all().await.unwrap(), []);
    two.begin(&claim("vm2", "h2", "h3", 900.0), room).await.unwrap();
    two.end("vm2").await.unwrap();
    assert_eq!(store.list(claims::ROOT).await.unwrap().0, []);
}

/// Many agents claim at once: a guest is moved by one, a host takes part in one migration.
pub(super) async fn nobody_overbooks(stores: Vec<impl Store>) {
    let mut tasks = tokio::task::JoinSet::new();
    for (number, store) in stores.iter().cloned().enumerate() {
        tasks.spawn(async move {
            let claims = Claims::new(store, format!("h{number}"));
            let mut won = 0;
            for turn in 0..12 {
                let vm = format!("vm{}", turn % 3);
                let want = claim(&vm, &format!("s{}", turn % 2), &format!("d{}", turn % 3), 600.0);
                match claims.begin(&want, room).await {
                    Ok(()) => {
                        let all = claims.all().await.unwrap();
                        let mut hosts: Vec<&str> =
                            all.iter().flat_map(|claim| [&*claim.from, &*claim.to]).collect();
                        let count = hosts.len();
                        hosts.sort_unstable();
                        hosts.dedup();
                        assert_eq!(hosts.len(), count, "a host twice: {all:?}");
                        claims.end(&vm).await.unwrap();
                        won += 1;
                    }
                    Err(ClaimError::Store(error)) => panic!("{error}"),
                    Err(_) => tokio::time::sleep(Duration::from_millis(3)).await,
                }
            }
            won
        });
    }
    let mut won = 0;
    while let Some(ended) = tasks.join_next().await {
        won += ended.unwrap();
    }
    assert!(won > 0);
    assert_eq!(stores[0].list(claims::ROOT).await.unwrap().0, []);
}

fn files(path: &std::path::Path, count: usize) -> Vec<Embedded> {
    (0..count).map(|_| Embedded::open(path).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_file_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let [one, other] = <[Embedded; 2]>::try_from(files(&path, 2)).unwrap();
    conforms(one, other).await;
    counts(files(&path, 4)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_hold_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let [one, other] = <[Embedded; 2]>::try_from(files(&path, 2)).unwrap();
    claims_hold(one, other).await;
    nobody_overbooks(files(&path, 4)).await;
}

#[tokio::test]
async fn what_is_no_store_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text");
    std::fs::write(&path, "this is not a database, it is a text that is long enough").unwrap();
    assert!(matches!(Embedded::open(&path), Err(StoreError::Unavailable { .. })));
    let path = folder.path().join("later");
    rusqlite::Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
    assert!(matches!(Embedded::open(&path), Err(StoreError::Foreign { .. })));
    let nowhere = folder.path().join("no/where");
    let error = Embedded::open(&nowhere).unwrap_err().to_string();
    assert!(error.contains("no/where"), "{error}");
}
