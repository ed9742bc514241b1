//! Reports that agree, and that contradict each other.

use proptest::prelude::*;

use super::*;
use crate::model::{GrayBox, Resource};
use crate::plan::{self, Hotspot, Limits, Problem};
use crate::profile::report::{GuestMemory, MemorySource, Sent, VERSION};

const GIB: f64 = 1024.0;

fn guest(name: &str, address: &str) -> GuestReport {
    GuestReport {
        name: name.into(),
        vcpus: 2,
        cpu_cores: 0.5,
        steal: 0.1,
        memory: GuestMemory {
            allocated_mib: 2.0 * GIB,
            max_mib: 4.0 * GIB,
            resident_mib: GIB,
            used_mib: 1.5 * GIB,
            needed_mib: GIB,
            swap_writes_per_s: 3.0,
            source: MemorySource::Introspection,
        },
        network_mbit: 100.0,
        disk_mib: 5.0,
        addresses: vec![address.into()],
        ..GuestReport::default()
    }
}

fn host(name: &str, at_s: f64, guests: Vec<GuestReport>) -> Received {
    let amounts = |cpu_cores, memory_mib, network_mbit| Amounts {
        cpu_cores,
        memory_mib,
        network_mbit,
        disk_mib: 0.0,
    };
    let report = HostReport {
        v: VERSION,
        host: name.into(),
        boot_id: "b".into(),
        seq: 1,
        at_s,
        capacity: amounts(8.0, 16.0 * GIB, 2000.0),
        used: amounts(3.0, 4.0 * GIB, 300.0),
        guests,
        ..HostReport::default()
    };
    Received { report, at_s }
}

fn put_together(received: &[Received]) -> Assembled {
    let assembled = assemble(received, &Settings::default(), 1000.0);
    assert_eq!(assembled.cluster.check(), Ok(()));
    assembled
}

const A: &str = "52:54:00:00:00:0a";
const B: &str = "52:54:00:00:00:0b";

#[test]
fn reports_that_agree_are_a_cluster() {
    let mut one = guest("one", A);
    one.sent =
        vec![Sent { to: B.into(), mbit: 30.0 }, Sent { to: "52:54:00:00:00:ff".into(), mbit: 9.0 }];
    let mut two = guest("two", B);
    two.sent = vec![Sent { to: A.into(), mbit: 10.0 }];
    let received = [host("h1", 990.0, vec![one.clone()]), host("h2", 995.0, vec![two.clone()])];
    let Assembled { cluster, remarks } = put_together(&received);
    assert_eq!(remarks, Vec::<String>::new());
    assert_eq!(cluster.traffic.between(VmIndex(0), VmIndex(1)), 40.0);
    let vm = &cluster.vms[0];
    assert_eq!((vm.name.as_str(), vm.host, vm.usage.network_mbit), ("one", HostIndex(0), 60.0));
    assert_eq!(
        (vm.usage.memory_mib, vm.memory.needed_mib, vm.memory.reserve_mib),
        (2.0 * GIB, GIB, 200.0)
    );
    assert_eq!((vm.steal, vm.usage, vm.is_migrating), (0.1, vm.peak, false));
    // Of 3 processors the guest has half of one; of 4 GiB it has one resident; of 300 Mbit/s all of its 100 leave.
    let own = cluster.hosts[0].own;
    assert_eq!((own.cpu_cores, own.memory_mib, own.network_mbit), (2.5, 3.0 * GIB, 200.0));
    let on_one = put_together(&[host("h1", 990.0, vec![one, two])]).cluster;
    assert_eq!(
        on_one.hosts[0].own.network_mbit,
        300.0 - 60.0 - 60.0,
        "what stays inside is not there"
    );
}

/// Disks never say what they can do, and links often do not.
#[test]
fn what_a_host_cannot_say_of_itself_keeps_nobody_away() {
    let mut busy = host("h1", 990.0, vec![guest("one", A), guest("two", B)]);
    busy.report.used.cpu_cores = 8.0;
    let mut free = host("h2", 990.0, vec![]);
    free.report.used = Amounts::ZERO;
    for received in [&mut busy, &mut free] {
        received.report.capacity.network_mbit = 0.0;
    }
    let cluster = put_together(&[busy, free]).cluster;
    let capacity = cluster.hosts[1].capacity;
    assert_eq!((capacity.network_mbit, capacity.disk_mib), (UNBOUNDED, UNBOUNDED));
    let hotspot = Hotspot {
        host: HostIndex(0),
        vm: None,
        resource: Resource::Cpu,
        current: 1.0,
        predicted: 1.0,
        threshold: 0.85,
        since_s: 900.0,
        why: String::new(),
    };
    let limits = Limits::default();
    let hotspots = [hotspot];
    let problem =
        Problem { cluster: &cluster, hotspots: &hotspots, limits: &limits, now_s: 1000.0 };
    for name in plan::NAMES.iter().filter(|name| **name != "none") {
        let plan = plan::policy(name).unwrap().plan(&problem);
        assert!(plan.moves().next().is_some(), "{name}: {:?}", plan.notes);
    }
}

#[test]
fn who_was_not_heard_of_is_silent_and_clocks_do_not_matter() {
    let mut late = host("h1", 960.0, vec![guest("one", A)]);
    let Assembled { cluster, remarks } = put_together(std::slice::from_ref(&late));
    assert_eq!(cluster.hosts[0].state, HostState::Silent);
    assert_eq!(remarks, ["Nothing was heard of h1 for 40 s"]);
    assert_eq!(cluster.vms.len(), 1, "its guests are where they were");
    late.at_s = 999.0;
    let Assembled { cluster, remarks } = put_together(&[late]);
    assert_eq!(cluster.hosts[0].state, HostState::Active);
    assert_eq!(remarks, ["The clock of h1 differs by -39 s"]);
}

#[test]
fn a_migration_is_no_contradiction() {
    let mut leaving = guest("one", A);
    leaving.is_migrating = true;
    let mut expected = guest("one", A);
    expected.state = GuestState::Incoming;
    let third = host("h3", 990.0, vec![]);
    let received =
        [host("h1", 990.0, vec![expected.clone()]), host("h2", 990.0, vec![leaving]), third];
    let Assembled { cluster, remarks } = put_together(&received);
    assert_eq!(remarks, Vec::<String>::new());
    assert_eq!((cluster.vms.len(), cluster.vms[0].host), (1, HostIndex(1)));
    assert!(cluster.vms[0].is_migrating);
    assert_eq!([0, 1, 2].map(|host: usize| cluster.hosts[host].is_migrating), [true, true, false]);
    assert_eq!(cluster.hosts[0].own.memory_mib, (4.0 + 3.0) * GIB, "its memory is taken there");
    let alone = put_together(&[host("h1", 990.0, vec![expected])]).cluster;
    assert!(alone.vms.is_empty() && alone.hosts[0].is_migrating);
}

#[test]
fn a_guest_that_runs_twice_is_touched_by_nobody() {
    let twice =
        [host("h1", 990.0, vec![guest("one", A)]), host("h2", 995.0, vec![guest("one", A)])];
    let Assembled { cluster, remarks } = put_together(&twice);
    assert_eq!((cluster.vms.len(), cluster.vms[0].host), (1, HostIndex(1)));
    assert!(cluster.vms[0].is_migrating && cluster.hosts.iter().all(|host| host.is_migrating));
    assert_eq!(remarks, ["one runs on h2 and on h1: nothing is done with it until it is on one"]);
    let moved =
        [host("h1", 900.0, vec![guest("one", A)]), host("h2", 995.0, vec![guest("one", A)])];
    let Assembled { cluster, remarks } = put_together(&moved);
    assert_eq!((cluster.vms[0].host, cluster.vms[0].is_migrating), (HostIndex(1), false));
    assert_eq!(remarks, ["Nothing was heard of h1 for 100 s"]);
}

#[test]
fn a_host_that_lies_is_silent() {
    let mut lies = guest("one", A);
    lies.cpu_cores = 11.0;
    let mut nothing = host("h2", 990.0, vec![]);
    nothing.report.capacity.memory_mib = 0.0;
    let mut negative = host("h3", 990.0, vec![]);
    negative.report.used.cpu_cores = -1.0;
    let Assembled { cluster, remarks } =
        put_together(&[host("h1", 990.0, vec![lies]), nothing, negative]);
    assert_eq!(cluster.hosts.len(), 2);
    assert!(cluster.hosts.iter().all(|host| host.state == HostState::Silent));
    let expected = [
        "A report of \"h3\" cannot be: a figure of -1",
        "What h1 says cannot be, so nothing is decided by it: its guests use 11.0 of 8.0 processors",
        "What h2 says cannot be, so nothing is decided by it: it has 8 processors and 0 MiB",
    ];
    assert_eq!(remarks, expected);
}

#[test]
fn names_and_addresses_that_are_not_unique_are_told() {
    let mut guests = [guest("one", A), guest("one", A)];
    guests[0].uuid = "11111111-0000".into();
    guests[1].uuid = "22222222-0000".into();
    guests[0].sent = vec![Sent { to: A.into(), mbit: 50.0 }];
    let Assembled { cluster, remarks } = put_together(&[host("h1", 990.0, guests.to_vec())]);
    assert_eq!(cluster.vms[1].name, "one (22222222-0000)");
    assert_eq!(cluster.traffic, Traffic::silent(2));
    let expected = [
        "Two guests are called one: give them different names",
        "Two guests have the Ethernet address 52:54:00:00:00:0a",
    ];
    assert_eq!(remarks, expected);
    let mut later = host("h1", 995.0, vec![]);
    later.report.boot_id = "other".into();
    let Assembled { cluster, remarks } = put_together(&[later, host("h1", 990.0, guests.to_vec())]);
    assert!(cluster.vms.is_empty(), "the later report counts");
    assert_eq!(remarks, ["Two hosts call themselves h1, or it was started anew"]);
}

#[test]
fn nobody_sends_more_than_goes_through_its_interfaces() {
    let mut boasts = guest("one", A);
    boasts.sent = vec![Sent { to: B.into(), mbit: 1e6 }];
    let cluster = put_together(&[host("h1", 990.0, vec![boasts, guest("two", B)])]).cluster;
    assert_eq!(cluster.traffic.between(VmIndex(0), VmIndex(1)), 100.0);
}

#[test]
fn reports_travel_as_json_and_what_is_foreign_is_refused() {
    let mut report = host("h1", 990.0, vec![guest("one", A)]).report;
    report.guests[0].gray_box = Some(GrayBox::default());
    let text = serde_json::to_vec(&report).unwrap();
    assert_eq!(HostReport::from_json(&text).unwrap(), report);
    report.v = 2;
    let text = serde_json::to_vec(&report).unwrap();
    let refused = HostReport::from_json(&text).unwrap_err().to_string();
    assert!(refused.ends_with("bring all agents to one version"), "{refused}");
    let long = vec![b' '; crate::profile::report::REPORT_BYTES_MAX + 1];
    assert!(HostReport::from_json(&long).unwrap_err().to_string().contains("too long"));
    report.v = 1;
    report.guests[0].name = "a\nb".into();
    let text = serde_json::to_vec(&report).unwrap();
    assert!(HostReport::from_json(&text).is_err());
}

#[test]
fn what_is_too_much_is_left_out_by_who_reports() {
    let mut many = guest("one", A);
    many.sent = (0..400).map(|mbit| Sent { to: B.into(), mbit: mbit.into() }).collect();
    let mut report = host("h1", 990.0, vec![many; 1100]).report;
    report.troubles = vec!["é".repeat(400); 100];
    assert!(report.check().is_err());
    report.fit();
    report.check().unwrap();
    assert_eq!((report.guests.len(), report.guests[0].sent.len()), (1024, 256));
    assert_eq!(report.guests[0].sent[0].mbit, 399.0, "the most is kept");
    assert_eq!(report.troubles[0], "76 guests are not reported: too many");
}

fn any_figure() -> impl Strategy<Value = f64> {
    prop_oneof![8 => 0.0..1e4, 1 => 0.0..2e12, 1 => Just(f64::NAN), 1 => Just(-1.0)]
}

fn any_guest() -> impl Strategy<Value = GuestReport> {
    let state = prop_oneof![3 => Just(GuestState::Running), 1 => Just(GuestState::Paused), 1 => Just(GuestState::Incoming)];
    let figures = prop_oneof![
        4 => prop::array::uniform8(0.0..2.0), 1 => prop::array::uniform8(any_figure()),
    ];
    let address = |byte: u8| format!("52:54:00:00:00:{byte:02x}");
    let who = ("[a-c]", "(|[12]|0)", 0_u8..6, prop::collection::vec((0_u8..6, any_figure()), 0..3));
    (who, state, any::<bool>(), figures).prop_map(
        move |((name, uuid, own, to), state, is_migrating, figures)| {
            let [
                cpu_cores,
                steal,
                network_mbit,
                disk_mib,
                allocated_mib,
                max_mib,
                used_mib,
                needed_mib,
            ] = figures;
            let sent = to.into_iter().map(|(to, mbit)| Sent { to: address(to), mbit }).collect();
            let memory = GuestMemory {
                allocated_mib,
                max_mib,
                used_mib,
                needed_mib,
                ..GuestMemory::default()
            };
            GuestReport {
                name,
                uuid,
                state,
                is_migrating,
                cpu_cores,
                steal,
                network_mbit,
                disk_mib,
                memory,
                sent,
                addresses: vec![address(own)],
                vcpus: 1,
                ..GuestReport::default()
            }
        },
    )
}

proptest! {
    /// Whatever hosts say, in whatever order: a cluster that can be, the same each time, with each guest once.
    #[test]
    fn whatever_is_said_is_a_cluster_that_can_be(
        said in prop::collection::vec(
            (0_u8..4, 0_u64..3, 900.0..1000.0, prop::collection::vec(any_guest(), 0..4)), 0..6,
        ),
        turn in 0_usize..6,
    ) {
        let mut received: Vec<Received> = said.into_iter().map(|(name, seq, at_s, guests)| {
            let mut received = host(&format!("h{name}"), at_s, guests);
            received.report.seq = seq;
            received
        }).collect();
        let one = assemble(&received, &Settings::default(), 1000.0);
        prop_assert_eq!(one.cluster.check(), Ok(()));
        let names: BTreeSet<&str> = one.cluster.vms.iter().map(|vm| vm.name.as_str()).collect();
        prop_assert_eq!(names.len(), one.cluster.vms.len());
        let len = received.len().max(1);
        let by = turn % len;
        received.rotate_left(by);
        let other = assemble(&received, &Settings::default(), 1000.0);
        prop_assert_eq!(one, other);
    }
}
