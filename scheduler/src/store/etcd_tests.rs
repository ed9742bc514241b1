//! Real etcd members, started and killed.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::tests::{claims_hold, conforms, counts, nobody_overbooks};
use super::*;

/// Longest time until members have found each other, on a loaded machine.
const UP_WITHIN: Duration = Duration::from_secs(60);

/// etcd's program: the one that the setup fetched.
fn program() -> PathBuf {
    let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/godwit/etcd");
    let program = std::env::var_os("GODWIT_ETCD").map_or(fetched, PathBuf::from);
    assert!(program.exists(), "{} is missing: run `cargo xtask setup`", program.display());
    program
}

/// Members on this machine; dropping them kills them.
struct Members {
    folder: tempfile::TempDir,
    /// Of each, what clients and what members connect to.
    ports: Vec<[u16; 2]>,
    children: Vec<Option<Child>>,
}

impl Members {
    fn start(count: usize) -> Self {
        // All at the same time, so that none is given twice.
        let free = || TcpListener::bind("127.0.0.1:0").unwrap();
        let listeners: Vec<[TcpListener; 2]> = (0..count).map(|_| [free(), free()]).collect();
        let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
        let ports = listeners.iter().map(|pair| pair.each_ref().map(port)).collect();
        drop(listeners);
        let folder = tempfile::tempdir().unwrap();
        let mut members = Self { folder, ports, children: vec![] };
        members.children = (0..count).map(|number| Some(members.child(number, "new"))).collect();
        members
    }

    fn child(&self, number: usize, state: &str) -> Child {
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let [client, peer] = self.ports[number].map(url);
        let all: Vec<String> = self
            .ports
            .iter()
            .enumerate()
            .map(|(number, ports)| format!("m{number}={}", url(ports[1])))
            .collect();
        let mut command = Command::new(program());
        command
            .args(["--name", &format!("m{number}"), "--initial-cluster-state", state])
            .args(["--initial-cluster", &all.join(",")])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--unsafe-no-fsync", "--logger", "zap", "--log-level", "error"])
            .arg("--data-dir")
            .arg(self.folder.path().join(format!("m{number}")))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.spawn().unwrap()
    }

    fn kill(&mut self, number: usize) {
        let mut child = self.children[number].take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn restart(&mut self, number: usize) {
        self.children[number] = Some(self.child(number, "existing"));
    }

    async fn store(&self) -> Etcd {
        let url = |ports: &[u16; 2]| format!("http://127.0.0.1:{}", ports[0]);
        let endpoints: Vec<String> = self.ports.iter().map(url).collect();
        let began = Instant::now();
        loop {
            match Etcd::connect(&endpoints, None).await {
                Ok(store) => return store,
                Err(error) => assert!(began.elapsed() < UP_WITHIN, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

impl Drop for Members {
    fn drop(&mut self) {
        for number in 0..self.children.len() {
            if self.children[number].is_some() {
                self.kill(number);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_member_conforms() {
    let members = Members::start(1);
    conforms(members.store().await, members.store().await).await;
    let mut stores = vec![];
    for _ in 0..4 {
        stores.push(members.store().await);
    }
    counts(stores.clone()).await;
    claims_hold(stores[0].clone(), stores[1].clone()).await;
    nobody_overbooks(stores).await;
}

/// What is asked again until it is answered.
async fn put(store: &Etcd, value: &str) -> Duration {
    let began = Instant::now();
    let change = Change::Put { key: "k".into(), value: value.into(), lease: None };
    while let Err(error) = store.commit(&[], std::slice::from_ref(&change)).await {
        assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
        assert!(began.elapsed() < UP_WITHIN, "{error}");
    }
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn any_one_of_three_members_may_die() {
    let mut members = Members::start(3);
    let store = members.store().await;
    for number in 0..3 {
        members.kill(number);
        let took = put(&store, &format!("without {number}")).await;
        println!("without member {number}: {took:.1?}");
        members.restart(number);
        // Until it has caught up, the others must both be there.
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    // Without most of them nothing is decided, and that is said in time.
    members.kill(0);
    members.kill(1);
    let began = Instant::now();
    let change = Change::Put { key: "k".into(), value: "lost".into(), lease: None };
    let error = store.commit(&[], &[change]).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    members.restart(0);
    put(&store, "again").await;
    assert_eq!(store.get("k").await.unwrap().unwrap().value, b"again");
}

/// Requests that are handed to a member that is away go to another, whatever they ask for.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_away_is_not_noticed() {
    let mut members = Members::start(3);
    let store = members.store().await;
    members.kill(1);
    put(&store, "the others have found each other").await;
    let mut revision = None;
    for round in 0..40 {
        let lease = store.grant(Duration::from_secs(30)).await.unwrap();
        store.keep(lease).await.unwrap();
        let condition = match revision {
            None => Condition::Absent("c".into()),
            Some(revision) => Condition::Unchanged("c".into(), revision),
        };
        let put = Change::Put { key: "c".into(), value: vec![round], lease: Some(lease) };
        revision = store.commit(&[condition], &[put]).await.unwrap();
        assert!(revision.is_some(), "round {round}: its own change was not seen");
        assert_eq!(store.get("c").await.unwrap().unwrap().value, [round]);
        store.watch("c", 0).await.unwrap();
    }
}

#[tokio::test]
async fn nobody_there_is_said() {
    let error = Etcd::connect(&["http://127.0.0.1:1".to_owned()], None).await.unwrap_err();
    assert!(error.to_string().contains("etcd"), "{error}");
}
