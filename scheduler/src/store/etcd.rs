//! A store of etcd members, for a cluster: any one may fail, as long as most are there.
//!
//! Every request has a time limit, after which the store counts as out of reach; the client tries the members in turn.
//! etcd counts leases in whole seconds and makes very short ones longer.

use std::time::{Duration, Instant};

use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, EventType, GetOptions, KeyValue, PutOptions, Txn,
    TxnOp, WatchOptions, WatchStream,
};
use tokio::sync::mpsc;

use super::{Change, Condition, Entry, Event, Lease, Revision, Store, StoreError, check};

/// Longest wait for an answer.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

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

/// Waits for an answer, for so long.
async fn answered<T>(
    answer: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, StoreError> {
    let seconds = ANSWERS_WITHIN.as_secs();
    let late = |_| StoreError::Unavailable { what: format!("etcd: no answer within {seconds} s") };
    Ok(tokio::time::timeout(ANSWERS_WITHIN, answer).await.map_err(late)??)
}

/// Asks again, of members that are there, what can be asked twice.
async fn read<T, F>(ask: impl Fn() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, etcd_client::Error>>,
{
    let began = Instant::now();
    loop {
        match answered(ask()).await {
            Err(StoreError::Unavailable { .. }) if began.elapsed() < ANSWERS_WITHIN => {
                tokio::time::sleep(AGAIN_AFTER).await;
            }
            other => return other,
        }
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
            .with_connect_timeout(ANSWERS_WITHIN)
            .with_timeout(ANSWERS_WITHIN)
            .with_keep_alive(every, within)
            .with_keep_alive_while_idle(true);
        if let Some(Tls { authority, certificate, key }) = tls {
            let authority = etcd_client::Certificate::from_pem(authority);
            let identity = etcd_client::Identity::from_pem(certificate, key);
            let tls = etcd_client::TlsOptions::new().ca_certificate(authority).identity(identity);
            options = options.with_tls(tls);
        }
        let client = answered(Client::connect(endpoints, Some(options))).await?;
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
        let found = read(ask).await?;
        found.kvs().first().map(entry).transpose()
    }

    async fn list(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError> {
        let ask = || {
            let mut client = self.client.clone();
            async move { client.get(prefix, Some(GetOptions::new().with_prefix())).await }
        };
        let found = read(ask).await?;
        let revision = found.header().map_or(0, etcd_client::ResponseHeader::revision);
        Ok((found.kvs().iter().map(entry).collect::<Result<_, _>>()?, revision))
    }

    async fn commit(
        &self,
        conditions: &[Condition],
        changes: &[Change],
    ) -> Result<Option<Revision>, StoreError> {
        check(changes)?;
        let conditions: Vec<Compare> = conditions.iter().map(compare).collect();
        let changes: Vec<TxnOp> = changes.iter().map(operation).collect();
        let transaction = Txn::new().when(conditions).and_then(changes);
        let done = answered(self.client.clone().txn(transaction)).await?;
        let revision = done.header().map_or(0, etcd_client::ResponseHeader::revision);
        Ok(done.succeeded().then_some(revision))
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let seconds = i64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(i64::MAX);
        let lease = answered(self.client.clone().lease_grant(seconds.max(1), None)).await?;
        Ok(Lease(lease.id()))
    }

    async fn keep(&self, lease: Lease) -> Result<(), StoreError> {
        let mut client = self.client.clone();
        let kept = answered(async {
            let (mut keeper, mut answers) = client.lease_keep_alive(lease.0).await?;
            keeper.keep_alive().await?;
            answers.message().await
        });
        match kept.await {
            Ok(Some(answer)) if answer.ttl() > 0 => Ok(()),
            Ok(_) => Err(StoreError::LeaseEnded),
            Err(error) => Err(error),
        }
    }

    async fn revoke(&self, lease: Lease) -> Result<(), StoreError> {
        match answered(self.client.clone().lease_revoke(lease.0)).await {
            Ok(_) | Err(StoreError::LeaseEnded) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn watch(
        &self,
        prefix: &str,
        after: Revision,
    ) -> Result<mpsc::Receiver<Result<Event, StoreError>>, StoreError> {
        let options = WatchOptions::new().with_prefix().with_start_revision(after + 1);
        let stream = answered(self.client.clone().watch(prefix, Some(options))).await?;
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
