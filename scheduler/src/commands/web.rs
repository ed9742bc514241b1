//! `godwit-scheduler web`.

use std::io::Write as _;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use scheduler::api::Client;
use scheduler::api::web::Web;
use tokio::signal::unix::{SignalKind, signal};
use transport::Identity;

use crate::args::WebArgs;

/// Runs it.
pub(crate) fn run(args: WebArgs) -> Result<()> {
    let identity = Arc::new(Identity::load(&args.identity)?);
    super::runtime()?.block_on(async {
        let web = Web::bind(args.listen, Client::new(identity), args.agent).await?;
        let mut interrupt = signal(SignalKind::interrupt()).context("Cannot watch for Ctrl-C")?;
        let mut terminate = signal(SignalKind::terminate()).context("Cannot watch for SIGTERM")?;
        let mut out = std::io::stdout();
        writeln!(out, "{}", web.url()).and_then(|()| out.flush()).context("Cannot write")?;
        eprintln!("Whoever has this address may do what the identity may. Ctrl-C ends it.");
        web.serve(async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        })
        .await;
        Ok(())
    })
}
