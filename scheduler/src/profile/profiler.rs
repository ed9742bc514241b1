//! All figures of a host and its guests, at an interval.
//!
//! Cost: a guest takes some reads of small files and five to seven questions over its monitor for each reading; one
//! program (nft) is started for all. Kernels are looked for, and memory is sampled, in a few guests at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::graybox::{LogProbe, Rule};
use super::guest::{GuestProbe, Moment};
use super::host::{self, HostProbe};
use super::report::{GUESTS_MAX, GuestReport, HostReport, VERSION};
use super::traffic::TrafficProbe;
use super::{parse, read};
use crate::detect::SettingsError;

/// Guests whose kernels are looked for in one reading.
const LOOKS_MAX: usize = 4;

/// Guests of whose memory a sample is begun in one reading.
const SAMPLES_MAX: usize = 2;

/// Settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Settings {
    /// How often everything is read, seconds.
    pub interval_s: f64,
    /// Guests' monitors (`-qmp unix:...`).
    pub sockets: Vec<PathBuf>,
    /// A folder in which every socket, or link to one, is a guest's monitor.
    pub socket_folder: Option<PathBuf>,
    /// Whether guests' memory is looked into.
    pub introspection: bool,
    /// Whether it is counted what guests send to whom.
    pub traffic: bool,
    /// The program that counts it.
    pub nft: PathBuf,
    /// What is known of the host.
    pub host: host::Settings,
    /// Logs of guests' applications.
    pub gray_box: Vec<Rule>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            interval_s: 10.0,
            sockets: vec![],
            socket_folder: None,
            introspection: true,
            traffic: true,
            nft: "nft".into(),
            host: host::Settings::default(),
            gray_box: vec![],
        }
    }
}

impl Settings {
    /// Checks that every setting makes sense.
    ///
    /// # Errors
    /// The first that does not, with its key and what to do.
    pub fn check(&self) -> Result<(), SettingsError> {
        if !(0.5..=3600.0).contains(&self.interval_s) {
            let remedy = "take seconds, from 0.5 to 3600 (papers: 10)";
            return Err(SettingsError { key: "interval-s", value: self.interval_s, remedy });
        }
        for rule in &self.gray_box {
            let (response_s, drops) = (rule.promised_response_s, rule.promised_drops);
            if !(0.0..=86_400.0).contains(&response_s) {
                let (key, remedy) = ("gray-box.promised-response-s", "take seconds, or 0 for none");
                return Err(SettingsError { key, value: response_s, remedy });
            }
            if !(0.0..=1.0).contains(&drops) {
                let (key, remedy) = ("gray-box.promised-drops", "take a share, from 0 to 1");
                return Err(SettingsError { key, value: drops, remedy });
            }
        }
        for (key, value) in [
            ("host.capacity.cpu_cores", self.host.capacity.cpu_cores),
            ("host.capacity.memory_mib", self.host.capacity.memory_mib),
            ("host.capacity.network_mbit", self.host.capacity.network_mbit),
            ("host.capacity.disk_mib", self.host.capacity.disk_mib),
        ] {
            if !(0.0..=1e12).contains(&value) {
                let remedy = "take what the host has, or 0 to find out";
                return Err(SettingsError { key, value, remedy });
            }
        }
        Ok(())
    }
}

/// A host that is looked at.
#[derive(Debug)]
pub struct Profiler {
    settings: Settings,
    name: String,
    boot_id: String,
    seq: u64,
    began: Instant,
    host: HostProbe,
    guests: Vec<GuestProbe>,
    traffic: TrafficProbe,
    left_alone: BTreeSet<PathBuf>,
    logs: Vec<LogProbe>,
}

impl Profiler {
    /// Of the host of this name, as in its certificate. Nothing is read yet.
    #[must_use]
    pub fn new(name: String, settings: Settings) -> Self {
        let boot_id = read::text("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            name,
            boot_id: boot_id.trim().to_owned(),
            seq: 0,
            began: Instant::now(),
            host: HostProbe::new(settings.host.clone()),
            guests: vec![],
            traffic: TrafficProbe::new(settings.nft.clone()),
            left_alone: BTreeSet::new(),
            logs: settings.gray_box.iter().cloned().map(LogProbe::new).collect(),
            settings,
        }
    }

    /// Monitors that are not to be asked now: a migration needs them. What is known of their guests stays.
    pub fn leave_alone(&mut self, sockets: BTreeSet<PathBuf>) {
        self.left_alone = sockets;
    }

    /// Other settings from now on.
    pub fn set(&mut self, settings: Settings) {
        if settings.host != self.settings.host {
            self.host = HostProbe::new(settings.host.clone());
        }
        if settings.gray_box != self.settings.gray_box {
            self.logs = settings.gray_box.iter().cloned().map(LogProbe::new).collect();
        }
        self.settings = settings;
    }

    /// The monitors of the guests that are known, by the guests' names.
    #[must_use]
    pub fn sockets(&self) -> BTreeMap<String, PathBuf> {
        let known = self.guests.iter();
        known
            .filter_map(|guest| Some((guest.name()?.to_owned(), guest.socket().to_owned())))
            .collect()
    }

    /// Reads everything once. Rates are those since the last time, and 0 the first time. To be called at the interval;
    /// whoever does so decides what to do when one takes longer.
    pub async fn report(&mut self) -> HostReport {
        let mut troubles = vec![];
        let moment = self.moment();
        let figures = self.host.read(moment.at_s, &mut troubles);
        self.find_sockets(&mut troubles);
        let mut guests = self.read_guests(&moment, &mut troubles).await;
        if self.settings.traffic {
            self.read_traffic(&mut guests, &mut troubles).await;
        }
        self.read_logs(moment.at_s, &mut guests, &mut troubles);
        self.seq += 1;
        let mut report = HostReport {
            v: VERSION,
            host: self.name.clone(),
            boot_id: self.boot_id.clone(),
            seq: self.seq,
            at_s: moment.unix_s,
            capacity: figures.capacity,
            used: figures.used,
            pressure: figures.pressure,
            guests: guests.into_iter().map(|(_, guest)| guest).collect(),
            troubles,
        };
        report.fit();
        report
    }

    /// Takes the counters of traffic away.
    ///
    /// # Errors
    /// In words.
    pub async fn end(self) -> Result<(), String> {
        if self.settings.traffic { self.traffic.remove().await } else { Ok(()) }
    }

    fn moment(&self) -> Moment {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH);
        Moment {
            began: self.began,
            at_s: self.began.elapsed().as_secs_f64(),
            unix_s: unix.map_or(0.0, |unix| unix.as_secs_f64()),
            ticks_per_s: rustix::param::clock_ticks_per_second() as f64,
            page_bytes: rustix::param::page_size() as f64,
            may_find: false,
            may_sample: false,
            may_ask: true,
            // What is wrong with it is told with the host's own figures.
            interfaces: read::figure(host::INTERFACES, |text| Some(parse::interfaces(text)))
                .unwrap_or_default()
                .into(),
            cgroup: self.settings.host.cgroup.as_deref().map(Arc::from),
        }
    }

    /// Guests come and go with their sockets.
    fn find_sockets(&mut self, troubles: &mut Vec<String>) {
        let mut sockets: BTreeSet<PathBuf> = self.settings.sockets.iter().cloned().collect();
        if let Some(folder) = &self.settings.socket_folder {
            match sockets_in(folder) {
                Ok(found) => sockets.extend(found),
                Err(error) => {
                    troubles.push(format!("{} cannot be read: {error}", folder.display()));
                }
            }
        }
        self.guests.retain(|guest| sockets.contains(guest.socket()));
        let known: BTreeSet<PathBuf> =
            self.guests.iter().map(|guest| guest.socket().to_owned()).collect();
        self.guests.extend(sockets.difference(&known).cloned().map(GuestProbe::new));
        let left_out = self.guests.len().saturating_sub(GUESTS_MAX);
        if left_out > 0 {
            troubles.push(format!("{left_out} monitors are not looked at: too many"));
            self.guests.truncate(GUESTS_MAX);
        }
    }

    /// All at once, so that one that does not answer delays no other.
    async fn read_guests(
        &mut self,
        moment: &Moment,
        troubles: &mut Vec<String>,
    ) -> Vec<(Vec<String>, GuestReport)> {
        let introspects = self.settings.introspection;
        let (mut looks, mut samples) = if introspects { (LOOKS_MAX, SAMPLES_MAX) } else { (0, 0) };
        let mut readings = JoinSet::new();
        for mut probe in std::mem::take(&mut self.guests) {
            let may_find = looks > 0 && probe.is_look_due(moment.at_s);
            looks -= usize::from(may_find);
            let may_sample = samples > 0 && probe.is_sample_due(moment.at_s);
            samples -= usize::from(may_sample);
            let may_ask = !self.left_alone.contains(probe.socket());
            let moment = Moment { may_find, may_sample, may_ask, ..moment.clone() };
            readings.spawn(async move {
                let mut troubles = vec![];
                let report = probe.read(&moment, &mut troubles).await;
                (probe, report, troubles)
            });
        }
        let mut read = vec![];
        while let Some(reading) = readings.join_next().await {
            // A reading that ended badly takes its probe along: the socket is found again.
            read.extend(reading.ok());
        }
        read.sort_by(|(one, ..), (other, ..)| one.socket().cmp(other.socket()));
        let (mut guests, mut seen) = (vec![], BTreeSet::new());
        for (probe, report, told) in read {
            troubles.extend(told);
            // A QEMU may have several monitors.
            let is_first = probe.process().is_none_or(|process| seen.insert(process));
            let report = report.filter(|_| is_first);
            guests.extend(report.map(|report| (probe.taps().to_vec(), report)));
            self.guests.push(probe);
        }
        guests.sort_by(|(_, one), (_, other)| {
            (&one.name, &one.uuid).cmp(&(&other.name, &other.uuid))
        });
        guests
    }

    fn read_logs(
        &mut self,
        at_s: f64,
        guests: &mut [(Vec<String>, GuestReport)],
        troubles: &mut Vec<String>,
    ) {
        for log in &mut self.logs {
            let Some((_, guest)) = guests.iter_mut().find(|(_, guest)| guest.name == log.guest())
            else {
                // It runs elsewhere, where its log is read, too, or nowhere.
                log.skip();
                continue;
            };
            match log.read(at_s) {
                Ok(seen) => guest.gray_box = seen,
                Err(why) => troubles.push(why),
            }
        }
    }

    async fn read_traffic(
        &mut self,
        guests: &mut [(Vec<String>, GuestReport)],
        troubles: &mut Vec<String>,
    ) {
        let interfaces: BTreeSet<String> =
            guests.iter().flat_map(|(taps, _)| taps.iter().cloned()).collect();
        if interfaces.is_empty() {
            return;
        }
        let at_s = self.began.elapsed().as_secs_f64();
        match self.traffic.read(at_s, &interfaces).await {
            Ok(mut sent) => {
                for (taps, guest) in guests {
                    guest.sent = taps.iter().filter_map(|tap| sent.remove(tap)).flatten().collect();
                }
            }
            Err(why) => troubles.push(format!("What guests send to whom is not known: {why}")),
        }
    }
}

fn sockets_in(folder: &std::path::Path) -> std::io::Result<Vec<PathBuf>> {
    use std::os::unix::fs::FileTypeExt as _;
    let mut sockets = vec![];
    for entry in std::fs::read_dir(folder)?.take(4 * GUESTS_MAX) {
        let path = entry?.path();
        // Behind links, too; those that lead nowhere are of guests that have ended.
        if std::fs::metadata(&path).is_ok_and(|file| file.file_type().is_socket()) {
            sockets.push(path);
        }
    }
    Ok(sockets)
}
