//! The page with a cluster that does not exist, for looking at it: `cargo run -p scheduler --example page -- 200 2000`.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use scheduler::api::web::Web;
use scheduler::api::{Client, serve};
use scheduler_api::sample::{self, Remembering};
use tokio::net::TcpListener;
use transport::Identity;
use transport::pki::{self, InitOptions, IssueOptions};

#[tokio::main]
async fn main() -> Result<()> {
    let mut numbers = std::env::args().skip(1);
    let mut number = |default: usize| match numbers.next() {
        Some(text) => text.parse().context("HOSTS and GUESTS are numbers"),
        None => Ok(default),
    };
    let (hosts, guests) = (number(20)?, number(200)?);
    let dir = tempfile::tempdir()?;
    pki::init(dir.path(), &InitOptions::default())?;
    let identity =
        Arc::new(Identity::load(&pki::issue(dir.path(), "host-001", &IssueOptions::default())?)?);
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let agent = Arc::new(Remembering::new(sample::view(hosts, guests, now())));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let addr = listener.local_addr()?.to_string();
    let client = Client::new(Arc::clone(&identity));
    let web = Web::bind("127.0.0.1:0".parse()?, client, vec![addr.clone()]).await?;
    println!("agent {addr}, identity {}", dir.path().join("host-001").display());
    println!("{}", web.url());
    let telling = Arc::clone(&agent);
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(5)).await;
            telling.set(sample::view(hosts, guests, now()));
        }
    });
    tokio::spawn(web.serve(std::future::pending()));
    serve(listener, &identity, agent, std::future::pending()).await?;
    Ok(())
}
