//! Telling others that this agent is there, and what it sees.

use std::time::Duration;

use super::board;
use super::shared::Shared;
use crate::api::view::HotspotView;
use crate::profile::HostReport;
use crate::store::claims::{ClaimError, Presence, ROOT};
use crate::store::{Change, Lease, Store, StoreError};

/// Most hotspots of a host that are told.
const HOTSPOTS_MAX: usize = 64;

/// What was told last.
#[derive(Debug, Default)]
pub struct Publisher {
    lease: Option<Lease>,
    report: Option<HostReport>,
    hotspots: Option<Vec<HotspotView>>,
}

impl Publisher {
    /// Says that the agent is there, and what has changed.
    ///
    /// # Errors
    /// The store's. Everything is told again then.
    pub async fn tell(
        &mut self,
        shared: &Shared,
        report: &HostReport,
        hotspots: &[HotspotView],
    ) -> Result<(), StoreError> {
        let told = self.try_tell(shared, report, hotspots).await;
        if told.is_err() {
            (self.report, self.hotspots) = (None, None);
        }
        told
    }

    async fn try_tell(
        &mut self,
        shared: &Shared,
        report: &HostReport,
        hotspots: &[HotspotView],
    ) -> Result<(), StoreError> {
        self.be_present(shared).await?;
        let mut changes = vec![];
        let is_news = self.report.as_ref().is_none_or(|last| board::has_changed(last, report));
        if is_news {
            changes.push(put("reports", &shared.host, report)?);
        }
        let hotspots = hotspots.get(..HOTSPOTS_MAX.min(hotspots.len())).unwrap_or_default();
        let is_told = self.hotspots.as_ref().is_some_and(|last| are_those(last, hotspots));
        if !is_told {
            changes.push(put("hotspots", &shared.host, &hotspots)?);
        }
        if changes.is_empty() {
            return Ok(());
        }
        shared.store.commit(&[], &changes).await?;
        if is_news {
            self.report = Some(report.clone());
        }
        self.hotspots = Some(hotspots.to_vec());
        Ok(())
    }

    async fn be_present(&mut self, shared: &Shared) -> Result<(), StoreError> {
        if let Some(lease) = self.lease {
            match shared.store.keep(lease).await {
                Ok(()) => return Ok(()),
                // This agent stood still for too long; others took it for gone.
                Err(StoreError::LeaseEnded) => self.lease = None,
                Err(error) => return Err(error),
            }
        }
        let config = shared.config();
        let lease = shared.store.grant(Duration::from_secs_f64(config.lease_s)).await?;
        let presence = Presence {
            host: shared.host.clone(),
            api: config.advertise.clone().unwrap_or_else(|| config.listen.to_string()),
            version: env!("CARGO_PKG_VERSION").into(),
        };
        match shared.claims.present(&presence, lease).await {
            Ok(()) => self.lease = Some(lease),
            Err(ClaimError::Store(error)) => return Err(error),
            Err(error) => return Err(StoreError::Unavailable { what: error.to_string() }),
        }
        Ok(())
    }

    /// Says that the agent ends.
    pub async fn leave(&mut self, shared: &Shared) {
        if let Some(lease) = self.lease.take()
            && let Err(error) = shared.store.revoke(lease).await
        {
            tracing::debug!(%error, "Others will notice by the lease that this agent is gone");
        }
    }
}

/// Whether these are the same hotspots, whatever their figures.
fn are_those(last: &[HotspotView], now: &[HotspotView]) -> bool {
    let names = |all: &[HotspotView]| -> Vec<_> {
        all.iter().map(|one| (one.guest.clone(), one.resource, one.since_s.to_bits())).collect()
    };
    names(last) == names(now)
}

fn put(kind: &str, host: &str, value: &impl serde::Serialize) -> Result<Change, StoreError> {
    let value = serde_json::to_vec(value)
        .map_err(|error| StoreError::Unavailable { what: error.to_string() })?;
    Ok(Change::Put { key: format!("{ROOT}{kind}/{host}"), value, lease: None })
}
