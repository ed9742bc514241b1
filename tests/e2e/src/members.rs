//! Members of etcd, one on each host.

use std::time::Duration;

use anyhow::{Context as _, Result};
use framework::{Cluster, Engine, Env};

const CLIENTS: u16 = 2379;
const PEERS: u16 = 2380;

/// What a member says when it serves.
const READY: &str = "serving client traffic";

/// Longest time until a member serves, on a loaded machine.
const UP_WITHIN: Duration = Duration::from_secs(60);

/// The members; dropping them kills them.
#[derive(Debug)]
pub struct Members {
    processes: Vec<Option<Engine>>,
    urls: Vec<(String, String)>,
    env: Env,
}

impl Members {
    /// One on each host of a cluster.
    ///
    /// # Errors
    /// One does not start.
    pub fn start(cluster: &Cluster) -> Result<Self> {
        let url = |host: &framework::ClusterHost, port| format!("http://{}:{port}", host.address());
        let urls = cluster.hosts().iter().map(|host| (url(host, CLIENTS), url(host, PEERS)));
        let mut members = Self { processes: vec![], urls: urls.collect(), env: Env::load()? };
        for number in 0..members.urls.len() {
            let member = members.member(number, cluster)?;
            members.processes.push(Some(member));
        }
        for member in members.processes.iter_mut().flatten() {
            member.wait_stderr(READY, UP_WITHIN)?;
        }
        Ok(members)
    }

    fn member(&self, number: usize, cluster: &Cluster) -> Result<Engine> {
        let host = cluster.host(number);
        let (clients, peers) = &self.urls[number];
        let all: Vec<String> = (0..)
            .zip(&self.urls)
            .map(|(number, (_, peers)): (usize, _)| format!("m{number}={peers}"))
            .collect();
        let name = format!("m{number}");
        let (all, folder) = (all.join(","), host.folder().join("etcd").display().to_string());
        let words = [
            ["--name", &name],
            ["--initial-cluster", &all],
            ["--listen-client-urls", clients],
            ["--advertise-client-urls", clients],
            ["--listen-peer-urls", peers],
            ["--initial-advertise-peer-urls", peers],
            ["--data-dir", &folder],
            ["--logger", "zap"],
            ["--log-level", "info"],
        ];
        host.run(&self.env.etcd, &[&words.concat()[..], &["--unsafe-no-fsync"]].concat())
    }

    /// The table `store` for agents.
    #[must_use]
    pub fn store(&self) -> String {
        let endpoints: Vec<&str> = self.urls.iter().map(|(clients, _)| clients.as_str()).collect();
        format!("kind = \"etcd\"\nendpoints = {endpoints:?}")
    }

    /// A member dies.
    ///
    /// # Errors
    /// It is dead already.
    pub fn kill(&mut self, number: usize) -> Result<()> {
        self.processes[number].take().context("It is dead already").map(drop)
    }

    /// It comes back.
    ///
    /// # Errors
    /// It does not start.
    pub fn restart(&mut self, number: usize, cluster: &Cluster) -> Result<()> {
        let mut member = self.member(number, cluster)?;
        member.wait_stderr(READY, UP_WITHIN)?;
        self.processes[number] = Some(member);
        Ok(())
    }
}
