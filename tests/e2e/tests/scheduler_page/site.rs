//! An agent behind `godwit-scheduler web`, on loopback.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use scheduler::api::{self, Client, web::Web};
use scheduler_api::View;
use scheduler_api::sample::Remembering;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use transport::Identity;
use transport::pki::{self, InitOptions, IssueOptions};

/// An agent and its page.
pub(crate) struct Site {
    runtime: Runtime,
    identity: Arc<Identity>,
    pub(crate) agent: Arc<Remembering>,
    addr: String,
    serving: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
    /// What is opened in the browser.
    pub(crate) url: String,
    _pki: TempDir,
}

impl Site {
    pub(crate) fn begin(view: View) -> Result<Self> {
        let runtime = Runtime::new()?;
        let dir = TempDir::new()?;
        pki::init(dir.path(), &InitOptions::default())?;
        let identity = |name: &str| -> Result<Arc<Identity>> {
            let issued = pki::issue(dir.path(), name, &IssueOptions::default())?;
            Ok(Arc::new(Identity::load(&issued)?))
        };
        let (host, operator) = (identity("host-001")?, identity("operator")?);
        let agent = Arc::new(Remembering::new(view));
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
        let addr = listener.local_addr()?.to_string();
        let listen = "127.0.0.1:0".parse()?;
        let web = runtime.block_on(Web::bind(listen, Client::new(operator), vec![addr.clone()]))?;
        let url = web.url();
        runtime.spawn(web.serve(std::future::pending()));
        let mut site = Self { runtime, identity: host, agent, addr, serving: None, url, _pki: dir };
        site.serve(listener);
        Ok(site)
    }

    fn serve(&mut self, listener: TcpListener) {
        let (stop, stopped) = oneshot::channel();
        let (identity, agent) = (Arc::clone(&self.identity), Arc::clone(&self.agent));
        let serving = self.runtime.spawn(async move {
            let stopped = async { stopped.await.unwrap_or_default() };
            api::serve(listener, &identity, agent, stopped).await.unwrap();
        });
        self.serving = Some((stop, serving));
    }

    /// Ends the agent; the page's own server goes on.
    pub(crate) fn end_agent(&mut self) -> Result<()> {
        let (stop, serving) = self.serving.take().context("The agent has ended already")?;
        // If it is gone it needs not be told.
        let _told = stop.send(());
        Ok(self.runtime.block_on(serving)?)
    }

    /// Begins the agent again where it was.
    pub(crate) fn begin_agent(&mut self) -> Result<()> {
        let listener = self.runtime.block_on(TcpListener::bind(&self.addr))?;
        self.serve(listener);
        Ok(())
    }
}
