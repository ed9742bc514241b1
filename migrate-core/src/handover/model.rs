//! Random histories of both ends over a link that fails: never two guests run, and once everything
//! works again exactly one does.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::destination::{Input as ToDestination, Output as FromDestination};
use super::source::{Input as ToSource, Output as FromSource};
use super::{Destination, DestinationRecord, DestinationState, Outcome, Source, SourceRecord};

#[derive(Debug, Clone, Copy, PartialEq)]
enum ToPeer {
    Load,
    Commit,
    Abort,
    Ask,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum FromPeer {
    Ready { agrees: bool },
    State(DestinationState),
}

/// One end's engine: alive with a state and work to do, or dead (only its journal is left).
#[derive(Debug)]
struct Engine<S, O> {
    alive: Option<S>,
    todo: VecDeque<O>,
}

#[derive(Debug)]
struct World {
    source: Engine<Source, FromSource>,
    destination: Engine<Destination, FromDestination>,
    source_journal: SourceRecord,
    destination_journal: DestinationRecord,
    source_guest_runs: bool,
    destination_guest_runs: bool,
    destination_loaded: bool,
    to_destination: VecDeque<ToPeer>,
    to_source: VecDeque<FromPeer>,
    link_up: bool,
    fail_next_record: bool,
    fail_next_resume: bool,
    /// Pages are missing at the destination when the guest is resumed there (post-copy).
    missing: bool,
    /// The guest arrived, and its user stopped it or moved it on since.
    moved_on: bool,
    digests_agree: bool,
}

#[derive(Debug, Clone, Copy)]
enum Op {
    /// The engine does the next thing on its list.
    SourceWork,
    DestinationWork,
    DeliverToDestination,
    DeliverToSource,
    CutLink,
    MendLink,
    KillSource,
    KillDestination,
    RestartSource,
    RestartDestination,
    Cancel,
    LeaseEnds,
    Retry,
    GiveUpAsking,
    FailNextRecord,
    ResumeFails,
    UserStopsGuest,
    DigestsDiffer,
    /// The rest of the pages goes over.
    Fetch,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            source: Engine { alive: Some(Source::Moving), todo: VecDeque::new() },
            destination: Engine { alive: Some(Destination::Receiving), todo: VecDeque::new() },
            source_journal: SourceRecord::Moving,
            destination_journal: DestinationRecord::Receiving,
            // Stopped for the last pages: the interesting part begins here.
            source_guest_runs: false,
            destination_guest_runs: false,
            destination_loaded: false,
            to_destination: VecDeque::new(),
            to_source: VecDeque::new(),
            link_up: true,
            fail_next_record: false,
            fail_next_resume: false,
            missing: false,
            moved_on: false,
            digests_agree: true,
        };
        world.to_destination.push_back(ToPeer::Load);
        world
    }

    fn tell_source(&mut self, input: ToSource) {
        if let Some(state) = self.source.alive {
            let (next, outputs) = state.handle(input);
            self.source.alive = Some(next);
            self.source.todo.extend(outputs);
        }
    }

    fn tell_destination(&mut self, input: ToDestination) {
        if let Some(state) = self.destination.alive {
            let (next, outputs) = state.handle(input);
            self.destination.alive = Some(next);
            self.destination.todo.extend(outputs);
        }
    }

    fn send_to_destination(&mut self, message: ToPeer) {
        if self.link_up && self.destination.alive.is_some() {
            self.to_destination.push_back(message);
        } else {
            self.tell_source(ToSource::Lost);
        }
    }

    fn source_work(&mut self) {
        match self.source.todo.pop_front() {
            None => {}
            Some(FromSource::Record(record)) => {
                if std::mem::take(&mut self.fail_next_record) {
                    self.tell_source(ToSource::RecordFailed);
                } else {
                    self.source_journal = record;
                    self.tell_source(ToSource::Recorded);
                }
            }
            Some(FromSource::SendCommit) => self.send_to_destination(ToPeer::Commit),
            Some(FromSource::SendAbort) => {
                let reachable = self.link_up && self.destination.alive.is_some();
                self.to_destination.extend(reachable.then_some(ToPeer::Abort));
            }
            Some(FromSource::Ask) => self.send_to_destination(ToPeer::Ask),
            Some(FromSource::ResumeGuest) => {
                assert!(!self.destination_guest_runs, "resumed although it has run there");
                self.source_guest_runs = true;
            }
            Some(FromSource::ReleaseGuest) => {
                assert!(!self.source_guest_runs, "a running guest was released");
                assert!(!self.missing, "pages were released that the destination lacks");
            }
        }
    }

    fn destination_work(&mut self) {
        match self.destination.todo.pop_front() {
            None => {}
            Some(FromDestination::Record(record)) => {
                if std::mem::take(&mut self.fail_next_record) {
                    self.tell_destination(ToDestination::RecordFailed);
                } else {
                    self.destination_journal = record;
                    self.tell_destination(ToDestination::Recorded);
                }
            }
            Some(FromDestination::SayReady) => {
                self.say_to_source(FromPeer::Ready { agrees: self.digests_agree });
            }
            Some(FromDestination::Say(state)) => self.say_to_source(FromPeer::State(state)),
            Some(FromDestination::ResumeGuest) => {
                assert!(self.destination_loaded, "resumed without its state");
                assert!(!self.moved_on, "resumed although it has moved on");
                if std::mem::take(&mut self.fail_next_resume) {
                    self.tell_destination(ToDestination::ResumeFailed);
                    return;
                }
                self.destination_guest_runs = true;
                self.tell_destination(ToDestination::Resumed { complete: !self.missing });
            }
            Some(FromDestination::DiscardGuest) => {
                assert!(!self.destination_guest_runs, "a running guest was discarded");
                self.destination_loaded = false;
            }
        }
    }

    fn say_to_source(&mut self, message: FromPeer) {
        if self.link_up {
            self.to_source.push_back(message);
        }
    }

    fn deliver_to_destination(&mut self) {
        match self.to_destination.pop_front() {
            None => {}
            Some(ToPeer::Load) => {
                self.destination_loaded = true;
                self.tell_destination(ToDestination::Loaded);
            }
            Some(ToPeer::Commit) => self.tell_destination(ToDestination::Commit),
            Some(ToPeer::Abort) => self.tell_destination(ToDestination::PeerAborted),
            Some(ToPeer::Ask) => self.tell_destination(ToDestination::Asked),
        }
    }

    fn deliver_to_source(&mut self) {
        match self.to_source.pop_front() {
            None => {}
            Some(FromPeer::Ready { agrees }) => self.tell_source(ToSource::Ready { agrees }),
            Some(FromPeer::State(state)) => self.tell_source(ToSource::Verdict(state)),
        }
    }

    fn lose_contact(&mut self) {
        self.to_destination.clear();
        self.to_source.clear();
        self.tell_source(ToSource::Lost);
        self.tell_destination(ToDestination::Lost);
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::SourceWork => self.source_work(),
            Op::DestinationWork => self.destination_work(),
            Op::DeliverToDestination => self.deliver_to_destination(),
            Op::DeliverToSource => self.deliver_to_source(),
            Op::CutLink => {
                self.link_up = false;
                self.lose_contact();
            }
            Op::MendLink => self.link_up = true,
            Op::KillSource => {
                self.source.alive = None;
                self.source.todo.clear();
                self.lose_contact();
            }
            Op::KillDestination => {
                self.destination.alive = None;
                self.destination.todo.clear();
                self.lose_contact();
            }
            Op::RestartSource => self.restart_source(),
            Op::RestartDestination => self.restart_destination(),
            Op::Cancel => self.tell_source(ToSource::Cancel),
            Op::LeaseEnds => self.tell_destination(ToDestination::LeaseEnded),
            Op::Retry => self.tell_destination(ToDestination::Retry),
            Op::GiveUpAsking => self.tell_source(ToSource::GiveUpAsking),
            Op::FailNextRecord => self.fail_next_record = true,
            Op::ResumeFails => self.fail_next_resume = true,
            Op::UserStopsGuest => self.user_stops_guest(),
            Op::DigestsDiffer => self.digests_agree = false,
            Op::Fetch => self.fetch(),
        }
        assert!(
            !(self.source_guest_runs && self.destination_guest_runs),
            "two guests run after {op:?}: {self:?}"
        );
    }

    /// Pages go over while both engines are at it; a destination that was restarted finds out by
    /// itself whether any is missing.
    fn fetch(&mut self) {
        let served = matches!(self.source.alive, Some(Source::HandedOver | Source::Serving));
        if self.destination.alive == Some(Destination::Fetching)
            && (!self.missing || served && self.link_up)
        {
            self.missing = false;
            self.tell_destination(ToDestination::Fetched);
        }
    }

    /// A guest that arrived for good is its user's, who may stop it or move it on: no journal
    /// resumes it then. A guest whose arrival is still being recorded is left alone.
    fn user_stops_guest(&mut self) {
        if self.destination_journal == DestinationRecord::Running {
            self.destination_guest_runs = false;
            self.moved_on = true;
        }
    }

    fn restart_source(&mut self) {
        let given_up = self.source.alive == Some(Source::Ended(Outcome::InDoubt));
        if self.source.alive.is_none() || given_up {
            let state = Source::recovered(self.source_journal);
            self.source.alive = Some(state);
            match state {
                // What a restarted engine does: take back what is its own, ask about the rest.
                Source::Moving => self.tell_source(ToSource::Cancel),
                Source::HandedOver | Source::Serving => self.tell_source(ToSource::Lost),
                Source::Ended(Outcome::RolledBack) => {
                    self.source.todo.push_back(FromSource::ResumeGuest);
                }
                _ => {}
            }
        }
    }

    fn restart_destination(&mut self) {
        if self.destination.alive.is_none() {
            let (state, outputs) = Destination::recovered(self.destination_journal);
            self.destination.alive = Some(state);
            self.destination.todo.extend(outputs);
        }
    }

    /// Everything works again: whatever the history, the guest must come out once.
    fn settle(&mut self) {
        self.fail_next_record = false;
        self.fail_next_resume = false;
        self.link_up = true;
        for _ in 0..20 {
            self.apply(Op::RestartDestination);
            self.apply(Op::RestartSource);
            self.apply(Op::Retry);
            for _ in 0..20 {
                self.apply(Op::SourceWork);
                self.apply(Op::DestinationWork);
                self.apply(Op::DeliverToDestination);
                self.apply(Op::DeliverToSource);
                self.apply(Op::Fetch);
            }
            if matches!(self.source.alive, Some(Source::HandedOver | Source::Serving)) {
                self.tell_source(ToSource::Lost);
            }
            // A silent peer is noticed in the end.
            if self.source.alive == Some(Source::Moving) {
                self.tell_source(ToSource::Lost);
            }
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => Just(Op::SourceWork),
        8 => Just(Op::DestinationWork),
        8 => Just(Op::DeliverToDestination),
        8 => Just(Op::DeliverToSource),
        1 => Just(Op::CutLink),
        2 => Just(Op::MendLink),
        1 => Just(Op::KillSource),
        1 => Just(Op::KillDestination),
        2 => Just(Op::RestartSource),
        2 => Just(Op::RestartDestination),
        1 => Just(Op::Cancel),
        1 => Just(Op::LeaseEnds),
        1 => Just(Op::Retry),
        1 => Just(Op::GiveUpAsking),
        1 => Just(Op::ResumeFails),
        1 => Just(Op::UserStopsGuest),
        1 => Just(Op::FailNextRecord),
        1 => Just(Op::DigestsDiffer),
        2 => Just(Op::Fetch),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]
    #[test]
    fn at_most_one_runs_and_in_the_end_exactly_one(
        ops in prop::collection::vec(op(), 0..60),
        missing in any::<bool>(),
    ) {
        let mut world = World { missing, ..World::new() };
        for op in ops {
            world.apply(op);
        }
        world.settle();
        prop_assert!(
            world.source_guest_runs ^ (world.destination_guest_runs || world.moved_on),
            "nobody runs after everything works again: {world:?}"
        );
        let arrived = world.destination_guest_runs || world.moved_on;
        prop_assert!(!(arrived && world.missing), "pages are missing for ever: {world:?}");
    }
}

#[test]
fn the_undisturbed_history_completes() {
    let mut world = World::new();
    for _ in 0..10 {
        world.apply(Op::DeliverToDestination);
        world.apply(Op::DestinationWork);
        world.apply(Op::DeliverToSource);
        world.apply(Op::SourceWork);
    }
    assert_eq!(world.source.alive, Some(Source::Ended(Outcome::Completed)));
    assert_eq!(world.destination.alive, Some(Destination::Running));
    assert!(world.destination_guest_runs && !world.source_guest_runs);
}
