//! What belongs to a guest that runs here while its pages come in, whatever session they come over; and
//! how it is taken over from an engine that died.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use migrate_core::page_table::DestinationPages;
use migrate_core::pageset::PageSet;
use qemu_glue::attach;
use qemu_glue::pager::{Duty, Pager, PagerError};
use qemu_glue::ram::GuestRam;
use transport::{ControlSender, DestinationSession};

use super::faults::{FaultThread, Route};
use super::fetcher::Fetcher;
use super::intake::Intake;
use super::owner::Voice;
use crate::blocking::on_thread;
use crate::error::EngineError;
use crate::journal::{Entry, PagingEntry};
use crate::missing;
use crate::tell;

/// A guest's missing pages and what brings them.
#[derive(Debug)]
pub struct Paging {
    fetcher: Arc<Fetcher>,
    ram: Arc<GuestRam>,
    /// Serves faults; gone once it has failed.
    faults: Option<FaultThread>,
    intake: Option<Intake>,
}

/// Returns when pages can no longer be taken in or faults not be served; never where nothing is paged.
/// Cancel-safe.
pub async fn failed(paging: &mut Option<Paging>) -> EngineError {
    match paging {
        Some(paging) => paging.failed().await,
        None => std::future::pending().await,
    }
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
                let pager = Pager::start(pid, uffd, &ram, Duty::Fill)?;
                let fetcher = Arc::new(Fetcher::new(pager, remote_fd, Some(missing), verify_seed)?);
                Ok((FaultThread::start(Arc::clone(&fetcher))?, fetcher))
            })
        };
        match started.await.and_then(|started| started) {
            Ok((faults, fetcher)) => {
                intake.applier().fetch(Arc::clone(&fetcher));
                Ok(Self { fetcher, ram, faults: Some(faults), intake: Some(intake) })
            }
            Err(error) => Err((error, intake)),
        }
    }

    /// Takes over what an engine that died left. Nothing if that had begun to end paging, because
    /// every page was in place.
    ///
    /// # Errors
    /// What kept it from that: the guest's threads wait on.
    pub async fn take_over(
        left: &PagingEntry,
        ram: Arc<GuestRam>,
    ) -> Result<Option<Self>, EngineError> {
        let (pid, remote_fd) = (ram.identity().pid(), left.remote_fd);
        let paged = Arc::clone(&ram);
        let taken = on_thread(move || {
            let uffd = attach::take_descriptor(pid, remote_fd)?;
            Ok::<_, EngineError>(Pager::resume(pid, uffd, &paged, Duty::Fill))
        });
        let pager = match taken.await?? {
            Ok(pager) => pager,
            Err(PagerError::NotRegistered { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let fetcher = Arc::new(Fetcher::new(pager, remote_fd, None, None)?);
        let faults = Some(FaultThread::start(Arc::clone(&fetcher))?);
        Ok(Some(Self { fetcher, ram, faults, intake: None }))
    }

    /// Asks in the session whose lanes are taken in, over its control stream if there is no better way.
    ///
    /// # Errors
    /// If the lane for that has ended.
    pub async fn connect(&mut self, control: ControlSender) -> Result<(), EngineError> {
        let (Some(faults), Some(intake)) = (&mut self.faults, &mut self.intake) else {
            return Err(EngineError::Internal("there is nothing to ask for".into()));
        };
        faults.connect(match intake.urgent().await? {
            Some(lane) => Route::Lane(lane, Arc::clone(intake.applier())),
            None => Route::Control(control),
        });
        Ok(())
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
        let pages = self.ram.layout().pages();
        let next = async || Ok(receiver.recv().await?);
        let may_lack = missing::receive(pages, "what may be missing", next).await?;
        if !self.fetcher.knows_missing() {
            let fetcher = Arc::clone(&self.fetcher);
            let present = on_thread(move || fetcher.present()).await??;
            let mut missing = may_lack;
            missing.subtract(&present);
            self.fetcher.set_missing(missing)?;
        }
        let wanted = self.fetcher.still_missing().unwrap_or_else(|| PageSet::new(0));
        tell!("the source is back; {} pages are missing", wanted.len());
        for message in missing::messages(&wanted) {
            control.send(&message).await?;
        }
        let none = Arc::new(DestinationPages::new(0));
        let ram = Arc::clone(&self.ram);
        let intake = Intake::start(ram, none, session.lanes, control.clone(), &session.closer);
        intake.applier().fetch(Arc::clone(&self.fetcher));
        self.intake = Some(intake);
        self.connect(control.clone()).await?;
        Ok(Voice { control, receiver, closer: session.closer })
    }

    async fn failed(&mut self) -> EngineError {
        let Self { faults, intake, .. } = self;
        let taking = async {
            match intake {
                Some(intake) => intake.applier().failed().await,
                None => std::future::pending().await,
            }
        };
        let served = async {
            match faults {
                Some(faults) => faults.failed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            error = taking => error.into(),
            error = served => {
                self.faults = None;
                error
            }
        }
    }

    /// Whether pages come in.
    pub fn is_connected(&self) -> bool {
        self.intake.is_some()
    }

    /// Takes nothing in until the source is back.
    pub async fn stop_intake(&mut self) {
        if let Some(faults) = &self.faults {
            faults.disconnect();
        }
        if let Some(mut intake) = self.intake.take() {
            intake.stop().await;
        }
    }

    /// Ends paging: every page is here, or the guest is not wanted.
    pub async fn end(mut self) {
        self.stop_intake().await;
        let Self { fetcher, faults, .. } = self;
        let ended = on_thread(move || {
            drop(faults);
            fetcher.end();
        });
        let _ended = ended.await;
    }
}

/// Ends the paging that an engine left which died before its guest ran: threads of QEMU may wait.
pub async fn release_abandoned(entry: &Entry) {
    let Some(left) = &entry.paging else { return };
    let ended = async {
        let ram = Arc::new(GuestRam::open(entry.qemu_pid, &left.regions, true)?);
        // Where nothing was registered, the next attachment closes the descriptor.
        if let Some(paging) = Paging::take_over(left, ram).await? {
            paging.end().await;
        }
        Ok::<_, EngineError>(())
    };
    if let Err(error) = ended.await {
        tracing::warn!(error = %error.tell(), "paging was not ended");
    }
}
