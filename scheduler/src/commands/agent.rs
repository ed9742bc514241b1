//! `godwit-scheduler agent`.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use scheduler::agent::Agent;
use scheduler::agent::config::{Config, ConfigError, EXAMPLE, StoreSettings};
use scheduler::agent::control::Asked;
use scheduler::api::server;
use scheduler::store::{AnyStore, Embedded, Etcd, StoreError, etcd};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use transport::Identity;

use crate::args::AgentArgs;

/// Pause before a store is tried again that could not be reached at the beginning.
const STORE_AGAIN_AFTER: Duration = Duration::from_secs(2);

/// Where the configuration comes from.
struct Source {
    path: PathBuf,
    /// Stronger than the file.
    is_dry_run: bool,
}

impl Source {
    fn read(&self) -> Result<Config, ConfigError> {
        let mut config = Config::read(&self.path)?;
        config.policy.dry_run |= self.is_dry_run;
        Ok(config)
    }
}

/// Runs the agent until it is told to end.
///
/// # Errors
/// What kept it from beginning.
pub(crate) fn run(args: &AgentArgs) -> Result<()> {
    if args.example {
        print!("{EXAMPLE}");
        return Ok(());
    }
    let path = args.config.clone().context("Name the configuration: --config FILE")?;
    let source = Source { path, is_dry_run: args.dry_run };
    let config = source.read()?;
    let identity = Arc::new(Identity::load(&config.identity)?);
    if args.check {
        println!("{} makes sense; this host is {}", source.path.display(), identity.name());
        return Ok(());
    }
    let log = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        );
    log.init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ran = runtime.block_on(serve(config, source, identity));
    // A question to a monitor that hangs must not keep the process.
    runtime.shutdown_background();
    ran
}

async fn serve(config: Config, source: Source, identity: Arc<Identity>) -> Result<()> {
    for folder in [config.state.clone(), config.state.join("journal")] {
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("{} cannot be made", folder.display()))?;
    }
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("{} cannot be listened on (`listen`)", config.listen))?;
    eprintln!("listening on {}", listener.local_addr()?);
    let (stop, stopped) = watch::channel(false);
    let (tell, told) = watch::channel(None);
    let listening = config.listen;
    tokio::spawn(async move {
        if let Err(error) = hear_signals(&stop, &tell, &source, listening).await {
            tracing::error!(%error, "Signals cannot be heard");
        }
    });
    let Some(store) = open_store(&config.store, stopped.clone()).await? else { return Ok(()) };
    let agent = Agent::new(config, Arc::clone(&identity), store);
    let asked = Arc::new(Asked(agent.shared()));
    let mut ending = stopped.clone();
    let stop_serving = async move {
        // The sender lives as long as signals are heard.
        let _gone = ending.wait_for(|stop| *stop).await;
    };
    let (served, ()) = tokio::join!(
        server::serve(listener, &identity, asked, stop_serving),
        agent.run(stopped, told)
    );
    served?;
    eprintln!("ended; guests run on, and migrations under way go on without this agent");
    Ok(())
}

/// SIGINT and SIGTERM end the agent, SIGHUP has it read its configuration again.
async fn hear_signals(
    stop: &watch::Sender<bool>,
    tell: &watch::Sender<Option<Config>>,
    source: &Source,
    listening: std::net::SocketAddr,
) -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    loop {
        tokio::select! {
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            _ = hangup.recv() => match source.read() {
                Ok(config) => reload(tell, config, listening),
                Err(error) => tracing::error!(%error, "The configuration stays as it was"),
            },
        }
    }
    stop.send_replace(true);
    Ok(())
}

fn reload(tell: &watch::Sender<Option<Config>>, config: Config, listening: std::net::SocketAddr) {
    if config.listen != listening {
        tracing::warn!("`listen`, `identity` and [store] are heeded at the next start only");
    }
    tracing::info!("The configuration was read again");
    tell.send_replace(Some(config));
}

/// Opens the store; one that cannot be reached is tried again until it can, or the agent is told to end.
async fn open_store(
    settings: &StoreSettings,
    mut stopped: watch::Receiver<bool>,
) -> Result<Option<AnyStore>> {
    loop {
        let why = match try_store(settings).await? {
            Ok(store) => return Ok(Some(store)),
            Err(error) => error,
        };
        tracing::warn!("{why}");
        tokio::select! {
            () = tokio::time::sleep(STORE_AGAIN_AFTER) => {}
            _ = stopped.wait_for(|stop| *stop) => return Ok(None),
        }
    }
}

async fn try_store(settings: &StoreSettings) -> Result<Result<AnyStore, StoreError>> {
    match settings {
        StoreSettings::Embedded { path } => {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder)
                    .with_context(|| format!("{} cannot be made", folder.display()))?;
            }
            Ok(Ok(AnyStore::Embedded(Embedded::open(path)?)))
        }
        StoreSettings::Etcd { endpoints, authority, certificate, key } => {
            let read = |path: &Path| {
                std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))
            };
            let tls = match (authority, certificate, key) {
                (Some(authority), Some(certificate), Some(key)) => Some(etcd::Tls {
                    authority: read(authority)?,
                    certificate: read(certificate)?,
                    key: read(key)?,
                }),
                _ => None,
            };
            Ok(Etcd::connect(endpoints, tls.as_ref()).await.map(Box::new).map(AnyStore::Etcd))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dry_run_is_one_whatever_the_file_says() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.toml");
        std::fs::write(&path, EXAMPLE).unwrap();
        for is_dry_run in [false, true] {
            let config = Source { path: path.clone(), is_dry_run }.read().unwrap();
            assert_eq!(config.policy.dry_run, is_dry_run);
        }
    }
}
