//! The API between real sockets: who gets in, what is answered, what is refused.

mod asked;
mod described;
mod refused;
mod web;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use scheduler::api::{self, Client};
use scheduler_api::sample::{self, Remembering};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use transport::pki::{self, InitOptions, IssueOptions};
use transport::{Identity, IdentityError};

/// An authority that makes identities as they are needed.
struct Authority(TempDir);

impl Authority {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        pki::init(dir.path(), &InitOptions::default()).unwrap();
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn issue(&self, name: &str) -> PathBuf {
        pki::issue(self.path(), name, &IssueOptions::default()).unwrap()
    }

    fn identity(&self, name: &str) -> Arc<Identity> {
        Arc::new(Identity::load(&self.issue(name)).unwrap())
    }
}

/// An agent that is served until it is dropped.
struct Served {
    addr: String,
    agent: Arc<Remembering>,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinHandle<Result<(), IdentityError>>,
}

impl Served {
    /// With the name `host-001`.
    async fn begin(authority: &Authority) -> Self {
        let agent = Arc::new(Remembering::new(sample::view(4, 20, sample::AT_S)));
        let identity = authority.identity("host-001");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let (stop, stopped) = oneshot::channel();
        let control = Arc::clone(&agent);
        let serving = tokio::spawn(async move {
            let stopped = async { stopped.await.unwrap_or_default() };
            api::serve(listener, &identity, control, stopped).await
        });
        Self { addr, agent, stop: Some(stop), serving }
    }

    fn socket(&self) -> SocketAddr {
        self.addr.parse().unwrap()
    }
}

/// An agent and somebody who may ask it.
async fn agent_and_client() -> (Served, Client, Authority) {
    let authority = Authority::new();
    let served = Served::begin(&authority).await;
    let client = Client::new(authority.identity("operator"));
    (served, client, authority)
}
