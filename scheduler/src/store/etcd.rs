//! A store of etcd members, for a cluster: any one may fail, as long as most are there.
//!
//! Every request has a time limit, after which the store counts as out of reach. The client hands each to one of the
//! members, also to one that is away: what did not leave is asked again of another, and so is what may be done twice.
//! etcd counts leases in whole seconds and makes very short ones longer.

use std::error::Error as _;
use std::time::{Duration, Instant};

use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, EventType, GetOptions, KeyValue, PutOptions, Txn,
    TxnOp, WatchOptions, WatchStream,
};
use tokio::sync::mpsc;

use super::{Change, Condition, Entry, Event, Lease, Revision, Store, StoreError, check};

/// Longest wait for an answer.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// Longest wait for a member's connection: of a host that is gone nothing is heard.
const CONNECTS_WITHIN: Duration = Duration::from_secs(1);

/// Pause before a member is asked again.
const AGAIN_AFTER: Duration = Duration::from_millis(50);

/// How often a silent connection is asked whether it is there, and for how long it may say nothing.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(2));

/// Events that wait for a watcher.
const EVENTS: usize = 256;

/// The store.
#[derive(Clone)]
pub struct Etcd {
    client: Client,
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        to.debug_struct("Etcd").finish_non_exhaustive()
    }
}

/// Certificates for members that ask for them.
#[derive(Debug, Clone, Default)]
pub struct Tls {
    /// The authority that signed the members' certificates, PEM.
    pub authority: Vec<u8>,
    /// Our certificate, PEM.
    pub certificate: Vec<u8>,
    /// Its key, PEM.
    pub key: Vec<u8>,
}

impl From<etcd_client::Error> for StoreError {
    fn from(error: etcd_client::Error) -> Self {
        match &error {
            etcd_client::Error::GRpcStatus(status)
                if status.message().contains("requested lease not found") =>
            {
                Self::LeaseEnded
            }
            etcd_client::Error::LeaseKeepAliveError(_) => Self::LeaseEnded,
            _ => Self::Unavailable { what: format!("etcd: {error}") },
        }
    }
}

/// Whether a request has not left, so that no member can have done what it asks for.
fn is_unsent(error: &etcd_client::Error) -> bool {
    let etcd_client::Error::GRpcStatus(status) = error else { return false };
    let mut cause = status.source();
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Asks for something that may be done twice: again until a member answers.
async fn repeated<T, F>(ask: impl FnMut() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, etcd_client::Error>>,
{
    asked(true, ask).await
}

/// Asks for something that must not be done twice: again only what did not leave.
async fn once<T, F>(ask: impl FnMut() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, etcd_client::Error>>,
{
    asked(false, ask).await
}

async fn asked<T, F>(may_repeat: bool, mut ask: impl FnMut() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, etcd_client::Error>>,
{
    let until = Instant::now() + ANSWERS_WITHIN;
    loop {
        let error = match tokio::time::timeout_at(until.into(), ask()).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => error,
            Err(_) => {
                let seconds = ANSWERS_WITHIN.as_secs();
                let what = format!("etcd: no answer within {seconds} s");
                return Err(StoreError::Unavailable { what });
            }
        };
        let is_unsent = is_unsent(&error);
        let error = StoreError::from(error);
        let is_away = matches!(error, StoreError::Unavailable { .. });
        if !(is_unsent || (may_repeat && is_away)) || Instant::now() >= until {
            return Err(error);
        }
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}

impl Etcd {
    /// Of these members, each `http://ADDRESS:PORT`, or `https` with certificates.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] if none is reached.
    pub async fn connect(endpoints: &[String], tls: Option<&Tls>) -> Result<Self, StoreError> {
        let (every, within) = KEEP_ALIVE;
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECTS_WITHIN)
            .with_timeout(ANSWERS_WITHIN)
            .with_keep_alive(every, within)
            .with_keep_alive_while_idle(true);
        if let Some(Tls { authority, certificate, key }) = tls {
            let authority = etcd_client::Certificate::from_pem(authority);
            let identity = etcd_client::Identity::from_pem(certificate, key);
            let tls = etcd_client::TlsOptions::new().ca_certificate(authority).identity(identity);
            options = options.with_tls(tls);
        }
        let client = repeated(|| Client::connect(endpoints, Some(options.clone()))).await?;
        let store = Self { client };
        // The client connects when it is asked.
        store.get("/").await?;
        Ok(store)
    }
}

fn entry(pair: &KeyValue) -> Result<Entry, StoreError> {
    let key =
        pair.key_str().map_err(|_| StoreError::Foreign { what: "a key is no text".into() })?;
    Ok(Entry { key: key.to_owned(), value: pair.value().to_vec(), revision: pair.mod_revision() })
}

fn compare(condition: &Condition) -> Compare {
    match condition {
        Condition::Absent(key) => Compare::create_revision(key.as_str(), CompareOp::Equal, 0),
        Condition::Unchanged(key, revision) => {
            Compare::mod_revision(key.as_str(), CompareOp::Equal, *revision)
        }
    }
}

fn operation(change: &Change) -> TxnOp {
    match change {
        Change::Delete(key) => TxnOp::delete(key.as_str(), None),
        Change::Put { key, value, lease } => {
            let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
            TxnOp::put(key.as_str(), value.clone(), options)
        }
    }
}

impl Store for Etcd {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let ask = || {
            let mut client = self.client.clone();
            async move { client.get(key, None).await }
        };
        let found = repeated(ask).await?;
        found.kvs().first().map(entry).transpose()
    }

    async fn list(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError> {
        let ask = || {
            let mut client = self.client.clone();
            async move { client.get(prefix, Some(GetOptions::new().with_prefix())).await }
        };
        let found = repeated(ask).await?;
        let revision = found.header().map_or(0, etcd_client::ResponseHeader::revision);
        Ok((found.kvs().iter().map(entry).collect::<Result<_, _>>()?, revision))
    }

    async fn commit(
        &self,
        conditions: &[Condition],
        changes: &[Change],
    ) -> Result<Option<Revision>, StoreError> {
        check(changes)?;
        let compared: Vec<Compare> = conditions.iter().map(compare).collect();
        let changes: Vec<TxnOp> = changes.iter().map(operation).collect();
        let transaction = Txn::new().when(compared).and_then(changes);
        let ask = || {
            let (mut client, transaction) = (self.client.clone(), transaction.clone());
            async move { client.txn(transaction).await }
        };
        // Without conditions it comes to the same twice.
        let done = if conditions.is_empty() { repeated(ask).await } else { once(ask).await }?;
        let revision = done.header().map_or(0, etcd_client::ResponseHeader::revision);
        Ok(done.succeeded().then_some(revision))
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let seconds = i64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(i64::MAX);
        // One that nobody heard of ends by itself.
        let ask = || {
            let mut client = self.client.clone();
            async move { client.lease_grant(seconds.max(1), None).await }
        };
        Ok(Lease(repeated(ask).await?.id()))
    }

    async fn keep(&self, lease: Lease) -> Result<(), StoreError> {
        let ask = || {
            let mut client = self.client.clone();
            async move {
                let (mut keeper, mut answers) = client.lease_keep_alive(lease.0).await?;
                keeper.keep_alive().await?;
                answers.message().await
            }
        };
        match repeated(ask).await {
            Ok(Some(answer)) if answer.ttl() > 0 => Ok(()),
            Ok(_) => Err(StoreError::LeaseEnded),
            Err(error) => Err(error),
        }
    }

    async fn revoke(&self, lease: Lease) -> Result<(), StoreError> {
        let ask = || {
            let mut client = self.client.clone();
            async move { client.lease_revoke(lease.0).await }
        };
        match repeated(ask).await {
            Ok(_) | Err(StoreError::LeaseEnded) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn watch(
        &self,
        prefix: &str,
        after: Revision,
    ) -> Result<mpsc::Receiver<Result<Event, StoreError>>, StoreError> {
        let ask = || {
            let options = WatchOptions::new().with_prefix().with_start_revision(after + 1);
            let mut client = self.client.clone();
            async move { client.watch(prefix, Some(options)).await }
        };
        let stream = repeated(ask).await?;
        let (queue, events) = mpsc::channel(EVENTS);
        tokio::spawn(async move {
            tokio::select! {
                error = pass_on(stream, &queue) => drop(queue.send(Err(error)).await),
                () = queue.closed() => {}
            }
        });
        Ok(events)
    }
}

/// Passes events on until that fails, and says why.
async fn pass_on(
    mut stream: WatchStream,
    queue: &mpsc::Sender<Result<Event, StoreError>>,
) -> StoreError {
    loop {
        let answer = match stream.message().await {
            Ok(Some(answer)) => answer,
            Ok(None) => {
                return StoreError::Unavailable { what: "etcd: the watch has ended".into() };
            }
            Err(error) => return error.into(),
        };
        if answer.canceled() {
            let why = answer.cancel_reason();
            return StoreError::Unavailable { what: format!("etcd: the watch has ended: {why}") };
        }
        for event in answer.events() {
            let happened = event.kv().map(entry).transpose().map(|found| {
                found.map(|found| match event.event_type() {
                    EventType::Put => Event::Put(found),
                    EventType::Delete => Event::Gone { key: found.key, revision: found.revision },
                })
            });
            let sent = match happened {
                Ok(Some(happened)) => queue.send(Ok(happened)).await,
                Ok(None) => continue,
                Err(error) => return error,
            };
            if sent.is_err() {
                return StoreError::Unavailable { what: "nobody listens".into() };
            }
        }
    }
}
