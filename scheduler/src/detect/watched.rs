//! What is known of a host or a guest.

use super::level::{Level, Risen};
use super::settings::Settings;
use super::threshold::{Exceeded, Threshold};
use super::{Metric, words};
use crate::model::{HostIndex, Resource, Vm, VmIndex};
use crate::plan::Hotspot;

/// Its meters.
#[derive(Debug, Default)]
pub(super) struct Watched {
    host: Option<String>,
    seen_in: u64,
    meters: Vec<Meter>,
}

#[derive(Debug)]
struct Meter {
    metric: Metric,
    threshold: Threshold,
    level: Level,
}

/// Too much, by which detector.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Verdict {
    pub(super) threshold: f64,
    pub(super) reason: Reason,
}

/// What a verdict rests on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Reason {
    Exceeded(Exceeded),
    Risen(Risen),
}

impl Watched {
    pub(super) const fn seen_in(&mut self, round: u64) {
        self.seen_in = round;
    }

    pub(super) const fn was_seen_in(&self, round: u64) -> bool {
        self.seen_in == round
    }

    /// Forgets all figures.
    pub(super) fn begin_anew(&mut self) {
        self.meters.clear();
    }

    /// Remembers on which host a guest runs; whether it ran on another one before.
    pub(super) fn has_moved_to(&mut self, host: &str) -> bool {
        if self.host.as_deref() == Some(host) {
            return false;
        }
        self.host.replace(host.to_owned()).is_some()
    }

    /// Takes a figure and says whether it is too much.
    pub(super) fn judge(
        &mut self,
        settings: &Settings,
        metric: Metric,
        figure: f64,
        now_s: f64,
    ) -> Option<Verdict> {
        let meter = self.meter(settings, metric);
        let limit = threshold_of(settings, metric);
        let exceeded = settings.kind.has_threshold() || is_promise(metric);
        let exceeded = exceeded
            .then(|| meter.threshold.judge(settings, limit, figure, now_s))
            .flatten()
            .map(|exceeded| Verdict { threshold: limit, reason: Reason::Exceeded(exceeded) });
        let level = settings.kind.has_cusum().then(|| level_of(settings, metric)).flatten();
        let risen = level.and_then(|limit| {
            let limits = (limit, settings.gap_s);
            let risen = meter.level.judge(&settings.cusum, limits, figure, now_s)?;
            Some(Verdict { threshold: limit, reason: Reason::Risen(risen) })
        });
        exceeded.or(risen)
    }

    fn meter(&mut self, settings: &Settings, metric: Metric) -> &mut Meter {
        let place = self.meters.iter().position(|meter| meter.metric == metric);
        let place = place.unwrap_or_else(|| {
            let (threshold, level) = (Threshold::new(settings), Level::new(&settings.cusum));
            self.meters.push(Meter { metric, threshold, level });
            self.meters.len() - 1
        });
        &mut self.meters[place]
    }
}

/// What was promised is judged by every kind of detector in the same way.
const fn is_promise(metric: Metric) -> bool {
    matches!(metric, Metric::Response | Metric::Drops)
}

fn threshold_of(settings: &Settings, metric: Metric) -> f64 {
    match metric {
        Metric::Share(resource) => settings.threshold.shares()[resource],
        Metric::SwapWrites => settings.threshold.swap_writes_per_s,
        Metric::Steal => settings.threshold.steal,
        Metric::Response | Metric::Drops => 1.0,
    }
}

/// The thesis takes steal, not utilisation, for the sign that there are too few processors.
const fn level_of(settings: &Settings, metric: Metric) -> Option<f64> {
    match metric {
        Metric::Share(Resource::Memory) => Some(settings.cusum.memory),
        Metric::Share(Resource::Network) => Some(settings.cusum.network),
        Metric::Share(Resource::Disk) => Some(settings.cusum.disk),
        Metric::Steal => Some(settings.cusum.steal),
        _ => None,
    }
}

/// A guest's figures that are judged.
pub(super) fn figures(vm: &Vm) -> Vec<(Metric, f64)> {
    let mut figures =
        vec![(Metric::SwapWrites, vm.memory.swap_writes_per_s), (Metric::Steal, vm.steal)];
    if let Some(gray_box) = vm.gray_box {
        let requests_per_s = gray_box.served_per_s + gray_box.dropped_per_s;
        if gray_box.promised_response_s > 0.0 {
            figures.push((Metric::Response, gray_box.response_s / gray_box.promised_response_s));
        }
        if gray_box.promised_drops < 1.0 && requests_per_s > 0.0 {
            // A promise of no drops at all is broken by one in a thousand.
            let promised = gray_box.promised_drops.max(0.001);
            figures.push((Metric::Drops, gray_box.dropped_per_s / requests_per_s / promised));
        }
    }
    figures
}

/// Who is judged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) host: HostIndex,
    pub(super) vm: Option<VmIndex>,
    pub(super) host_name: &'a str,
    pub(super) name: &'a str,
}

impl Subject<'_> {
    pub(super) fn hotspot(&self, metric: Metric, resource: Resource, verdict: &Verdict) -> Hotspot {
        let (current, predicted, since_s) = match verdict.reason {
            Reason::Exceeded(exceeded) => (exceeded.current, exceeded.predicted, exceeded.since_s),
            Reason::Risen(risen) => (risen.current, risen.mean, risen.since_s),
        };
        Hotspot {
            host: self.host,
            vm: self.vm,
            resource,
            current,
            predicted,
            threshold: verdict.threshold,
            since_s,
            why: words::why(self, metric, resource, verdict),
        }
    }
}
