//! What belongs to a guest that runs here while its pages come in, whatever session they come over; and
//! how it is taken over from an engine that died.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use migrate_core::page_table::DestinationPages;
use migrate_core::pageset::PageSet;
use qemu_glue::attach;
use qemu_glue::pager::{Pager, PagerError};
use qemu_glue::ram::GuestRam;
use tokio::task::JoinHandle;
use transport::messages::Message;
use transport::{ControlReceiver, DestinationSession};

use super::fetcher::Fetcher;
use super::intake::Intake;
use super::owner::Voice;
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::journal::{Entry, PagingEntry};
use crate::missing::{self, Arriving};

/// Longest wait for the source's list of the pages that may be missing.
const LIST_WITHIN: Duration = Duration::from_secs(20);

/// A guest's missing pages and what brings them.
#[derive(Debug)]
pub struct Paging {
    fetcher: Arc<Fetcher>,
    ram: Arc<GuestRam>,
    /// Serves faults; ends only with an error, and is gone then.
    serving: Option<JoinHandle<Result<(), EngineError>>>,
    intake: Option<Intake>,
}

impl Paging {
    /// Begins to page a guest that lacks the pages `missing`. What comes in by `intake` goes to the
    /// pager from here on.
    ///
    /// # Errors
    /// What the pager says; the memory is then as it was.
    pub async fn start(
        uffd: OwnedFd,
        remote_fd: i32,
        ram: Arc<GuestRam>,
        missing: PageSet,
        verify_seed: Option<u64>,
        intake: Intake,
    ) -> Result<Self, (EngineError, Intake)> {
        let pid = ram.identity().pid();
        let started = {
            let ram = Arc::clone(&ram);
            on_thread(move || {
                let pager = Pager::start(pid, uffd, &ram)?;
                Fetcher::new(pager, remote_fd, Some(missing), verify_seed)
            })
        };
        match started.await.and_then(|started| started) {
            Ok(fetcher) => {
                let fetcher = Arc::new(fetcher);
                intake.applier().fetch(Arc::clone(&fetcher));
                let serving = Some(tokio::spawn(Arc::clone(&fetcher).serve()));
                Ok(Self { fetcher, ram, serving, intake: Some(intake) })
            }
            Err(error) => Err((error, intake)),
        }
    }

    /// Takes over what an engine that died left. Nothing if that had begun to end paging, because
    /// every page was in place.
    ///
    /// # Errors
    /// What kept it from that: the guest's threads wait on.
    pub async fn take_over(entry: &Entry, left: &PagingEntry) -> Result<Option<Self>, EngineError> {
        let (pid, remote_fd) = (entry.qemu_pid, left.remote_fd);
        let regions = left.regions.clone();
        let taken = on_thread(move || {
            let ram = Arc::new(GuestRam::open(pid, &regions, true)?);
            let uffd = attach::take_descriptor(pid, remote_fd)?;
            Ok::<_, EngineError>((Pager::resume(pid, uffd, &ram), ram))
        });
        let (pager, ram) = taken.await??;
        let pager = match pager {
            Ok(pager) => pager,
            Err(PagerError::NotRegistered { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let fetcher = Arc::new(Fetcher::new(pager, remote_fd, None, None)?);
        let serving = Some(tokio::spawn(Arc::clone(&fetcher).serve()));
        Ok(Some(Self { fetcher, ram, serving, intake: None }))
    }

    /// Who serves the faults.
    pub fn fetcher(&self) -> &Arc<Fetcher> {
        &self.fetcher
    }

    /// Goes on in a session that the source opened for it.
    ///
    /// # Errors
    /// If the source misbehaves or contact is lost again.
    pub async fn resume(&mut self, session: DestinationSession) -> Result<Voice, EngineError> {
        self.stop_intake().await;
        let (control, mut receiver) = (session.control_sender, session.control_receiver);
        let may_lack = list(&mut receiver, self.ram.layout().pages()).await?;
        if !self.fetcher.knows_missing() {
            let fetcher = Arc::clone(&self.fetcher);
            let present = on_thread(move || fetcher.present()).await??;
            let mut missing = may_lack;
            missing.subtract(&present);
            self.fetcher.set_missing(missing).await?;
        }
        let wanted = self.fetcher.still_missing().unwrap_or_else(|| PageSet::new(0));
        eprintln!("the source is back; {} pages are missing", wanted.len());
        for message in missing::messages(&wanted) {
            control.send(&message).await?;
        }
        let none = Arc::new(DestinationPages::new(0));
        let ram = Arc::clone(&self.ram);
        let intake = Intake::start(ram, none, session.lanes, control.clone(), &session.closer);
        intake.applier().fetch(Arc::clone(&self.fetcher));
        self.intake = Some(intake);
        self.fetcher.connect(control.clone()).await;
        Ok(Voice { control, receiver, closer: session.closer })
    }

    /// Returns when pages can no longer be taken in or faults not be served. Cancel-safe.
    pub async fn failed(&mut self) -> EngineError {
        let Self { serving, intake, .. } = self;
        let taking = async {
            match intake {
                Some(intake) => intake.applier().failed().await,
                None => std::future::pending().await,
            }
        };
        let served = async {
            match serving {
                Some(serving) => serving.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            error = taking => error.into(),
            ended = served => {
                self.serving = None;
                match ended {
                    Ok(Err(error)) => error,
                    Ok(Ok(())) => EngineError::Internal("faults are not served".into()),
                    Err(error) => EngineError::Internal(error.to_string()),
                }
            }
        }
    }

    /// Whether pages come in.
    pub fn is_connected(&self) -> bool {
        self.intake.is_some()
    }

    /// Takes nothing in until the source is back.
    pub async fn stop_intake(&mut self) {
        if let Some(mut intake) = self.intake.take() {
            intake.stop().await;
        }
    }

    /// Ends paging: every page is here, or the guest is not wanted.
    pub async fn end(mut self) {
        self.stop_intake().await;
        if let Some(serving) = self.serving.take() {
            serving.abort();
        }
        let fetcher = Arc::clone(&self.fetcher);
        let _ended = on_thread(move || fetcher.end()).await;
    }
}

/// The pages that the source says may be missing.
async fn list(receiver: &mut ControlReceiver, pages: u64) -> Result<PageSet, EngineError> {
    let mut arriving = Arriving::new(pages);
    let listed = async {
        loop {
            match receiver.recv().await? {
                Message::Missing(part) => drop(arriving.add(&part)?),
                Message::MissingEnd(end) => return arriving.end(&end),
                other => {
                    return Err(EngineError::OutOfPlace {
                        got: other.name(),
                        wanted: "MissingEnd",
                    });
                }
            }
        }
    };
    let seconds = LIST_WITHIN.as_secs();
    let late = |_| EngineError::TooSlow { wanted: "what may be missing", seconds };
    tokio::time::timeout(LIST_WITHIN, listed).await.map_err(late)?
}

/// Ends the paging that an engine left which died before its guest ran: threads of QEMU may wait.
pub async fn release_abandoned(entry: &Entry) {
    let Some(left) = &entry.paging else { return };
    match Paging::take_over(entry, left).await {
        Ok(Some(paging)) => paging.end().await,
        // Nothing was registered; the next attachment closes the descriptor.
        Ok(None) => {}
        Err(error) => tracing::warn!(error = %error.tell(), "paging was not ended"),
    }
}
