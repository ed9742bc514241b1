//! Texts of real kernels and programs, and what is made of damaged ones.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// Linux 6.18, two processors.
const STAT: &str = "\
cpu  4008467 22409 735646 2677073 47789 0 26603 27455 0 0
cpu0 1996665 10215 361364 1364919 14054 0 12189 14036 0 0
cpu1 2011802 12193 374281 1312154 33734 0 14414 13418 0 0
intr 1234 0 0
ctxt 999
";

const MEMINFO: &str = "\
MemTotal:       24684084 kB
MemFree:        21958484 kB
MemAvailable:   23964768 kB
Buffers:            7768 kB
HugePages_Total:       0
";

const PRESSURE: &str = "\
some avg10=2.38 avg60=28.37 avg300=22.51 total=13390947685
full avg10=0.00 avg60=0.00 avg300=0.00 total=17
";

const NET_DEV: &str = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0
  tap1: 192000698 3200009    0    0    0     0          0         0     2144      26    0    0    0     0       0          0
br-lan.7:1116      17    0    0    0     0          0        16      954      11    0    0    0     0       0          0
";

/// nftables 1.0.6.
const SET: &str = r#"{"nftables": [{"metainfo": {"version": "1.0.6", "release_name": "Lester Gooch #5", "json_schema_version": 1}}, {"set": {"family": "bridge", "name": "sent", "table": "godwit_traffic", "type": ["ifname", "ether_addr"], "handle": 2, "size": 65536, "flags": ["timeout"], "timeout": 600, "elem": [{"elem": {"val": {"concat": ["tap1", "33:33:00:00:00:02"]}, "expires": 589, "counter": {"packets": 2, "bytes": 112}}}, {"elem": {"val": {"concat": ["tap1", "3a:f4:1a:cb:9d:1d"]}, "expires": 596, "counter": {"packets": 1600000, "bytes": 73600000}}}, {"elem": {"val": {"concat": ["tap2", "42:fe:48:ec:f8:ed"]}, "expires": 576, "counter": {"packets": 1, "bytes": 28}}}, {"elem": {"val": {"concat": ["tap1", "ff:ff:ff:ff:ff:ff"]}, "expires": 576, "counter": {"packets": 1, "bytes": 28}}}], "stmt": [{"counter": null}]}}]}"#;

#[test]
fn the_kernels_texts_are_read() {
    let time = cpu_time(STAT).unwrap();
    assert_eq!(time.busy_ticks, 4_008_467 + 22_409 + 735_646 + 26_603);
    assert_eq!(time.total_ticks, time.busy_ticks + 2_677_073 + 47_789);
    assert_eq!(time.processors, 2);
    let memory = host_memory(MEMINFO).unwrap();
    assert_eq!((memory.total_mib.trunc(), memory.available_mib.trunc()), (24105.0, 23403.0));
    let waited = Stalled { some_us: 13_390_947_685, full_us: 17 };
    assert_eq!(stalled(PRESSURE), Some(waited));
    assert_eq!(stalled("some avg10=0.00 total=5\n").unwrap().full_us, 0);
    let interfaces = interfaces(NET_DEV);
    assert_eq!(interfaces.keys().collect::<Vec<_>>(), ["br-lan.7", "lo", "tap1"]);
    assert_eq!((interfaces["tap1"], interfaces["br-lan.7"]), (192_002_842, 2070));
    assert_eq!(thread_waited_ns("70 57576 1\n"), Some(57576));
    let name = "7 (a) b (c) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 1 0 99 1000 2 184\n";
    assert_eq!(process_ticks(name), Some(300));
    assert_eq!(resident_pages("1000 200 30 4 0 5 0\n"), Some(200));
    assert_eq!(
        tap_name("pos:\t0\nflags:\t0104002\nmnt_id:\t15\nino:\t90\niff:\tvnet3\n"),
        Some("vnet3")
    );
    assert_eq!(tap_name("pos:\t0\niff:\t\n"), None, "not attached to an interface");
    assert_eq!(
        (cpu_max_cores("150000 100000\n"), cpu_max_cores("max 100000\n")),
        (Some(1.5), None)
    );
    assert_eq!(cgroup_cpu_us("usage_usec 1234\nuser_usec 1000\n"), Some(1234));
    assert_eq!(cgroup_cache_bytes("anon 1\ninactive_file 4096\n"), Some(4096));
    let split = "3:cpuset:/\n2:cpuacct,cpu:/vm/a\n0::/b\n";
    assert_eq!((cpu_cgroup(split), cpu_cgroup("0::/b/c\n")), (Some("/vm/a"), Some("/b/c")));
    assert_eq!((number("4096\n"), number("max\n")), (Some(4096), None));
}

#[test]
fn what_nft_lists_is_read_without_what_goes_to_many() {
    let sent = nft::sent(SET.as_bytes()).unwrap();
    let of = |interface: &str, to: &str, bytes| nft::Sent {
        interface: interface.into(),
        to: to.into(),
        bytes,
    };
    let expected =
        [of("tap1", "3a:f4:1a:cb:9d:1d", 73_600_000), of("tap2", "42:fe:48:ec:f8:ed", 28)];
    assert_eq!(sent, expected);
    let empty = r#"{"nftables": [{"metainfo": {}}, {"set": {"name": "sent"}}]}"#;
    assert_eq!(nft::sent(empty.as_bytes()), Some(vec![]));
    assert_eq!(nft::sent(b"{}"), None);
}

#[test]
fn what_qemu_answers_is_read() {
    let disks = json!([
        { "device": "d0", "stats": { "rd_bytes": 100, "wr_bytes": 20, "rd_operations": 3 },
          "parent": { "stats": { "rd_bytes": 99, "wr_bytes": 20 } } },
        { "device": "d1", "stats": { "rd_bytes": 1, "wr_bytes": u64::MAX } },
        { "device": "floppy0" },
    ]);
    assert_eq!(qmp::disk_bytes(&disks), u64::MAX);
    assert_eq!(qmp::disk_bytes(&json!([disks[0]])), 120);
    let cards = json!([{ "name": "n0", "main-mac": "52:54:00:AB:CD:EF" }, { "main-mac": "x" }, {}]);
    assert_eq!(qmp::ethernet_addresses(&cards), ["52:54:00:ab:cd:ef"]);
    let ram = json!({ "base-memory": 268_435_456_u64, "plugged-memory": 1_048_576 });
    assert_eq!(qmp::ram_mib(&ram), Some(257.0));
    assert_eq!(qmp::balloon_leaves_mib(&json!({ "actual": 134_217_728 })), Some(128.0));
    let mut stats = json!({ "last-update": 1_700_000_000, "stats": {
        "stat-swap-out": 8192, "stat-free-memory": 104_857_600, "stat-minor-faults": 5,
        "stat-total-memory": 209_715_200, "stat-available-memory": 157_286_400,
        "stat-htlb-pgalloc": u64::MAX,
    } });
    let expected = qmp::BalloonStats {
        at_s: 1_700_000_000,
        total_mib: 200.0,
        free_mib: 100.0,
        available_mib: 150.0,
        swapped_out_pages: Some(2),
    };
    assert_eq!(qmp::balloon_stats(&stats), Some(expected));
    for unknown in [json!(-1), json!(u64::MAX)] {
        stats["stats"]["stat-available-memory"] = unknown;
        assert_eq!(qmp::balloon_stats(&stats), None);
    }
    assert_eq!(
        qmp::balloon_stats(&json!({ "last-update": 0, "stats": {} })),
        None,
        "never answered"
    );
}

/// A text of which pieces are missing, doubled or changed.
fn damaged(text: &'static str) -> impl Strategy<Value = Vec<u8>> {
    let changes = prop::collection::vec((0..text.len(), 0..40_usize, any::<Option<u8>>()), 0..8);
    changes.prop_map(move |changes| {
        let mut bytes = text.as_bytes().to_vec();
        for (at, count, byte) in changes {
            let at = at.min(bytes.len());
            let end = (at + count).min(bytes.len());
            match byte {
                Some(byte) if at < bytes.len() => bytes[at] = byte,
                _ if count % 2 == 0 => drop(bytes.drain(at..end)),
                _ => bytes.extend_from_within(at..end),
            }
        }
        bytes
    })
}

fn any_json() -> impl Strategy<Value = Value> {
    let names =
        "(stats|rd_bytes|wr_bytes|main-mac|actual|last-update|stat-free-memory|base-memory)";
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[0-9a-f:]{0,17}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 40, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(names, inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    /// Whatever files hold, there is an answer or none, and no figure that cannot be.
    #[test]
    fn no_text_does_harm(
        bytes in prop_oneof![
            damaged(STAT), damaged(MEMINFO), damaged(PRESSURE), damaged(NET_DEV), damaged(SET),
            prop::collection::vec(any::<u8>(), 0..200),
        ],
    ) {
        let text = String::from_utf8_lossy(&bytes);
        if let Some(time) = cpu_time(&text) {
            prop_assert!(time.busy_ticks <= time.total_ticks);
        }
        if let Some(memory) = host_memory(&text) {
            prop_assert!(memory.total_mib.is_finite() && memory.available_mib >= 0.0);
        }
        prop_assert!(cpu_max_cores(&text).is_none_or(f64::is_finite));
        prop_assert!(nft::sent(&bytes).is_none_or(|sent| sent.len() <= nft::ELEMENTS_MAX));
        prop_assert!(tap_name(&text).is_none_or(|name| !name.is_empty()));
        prop_assert!(interfaces(&text).len() <= INTERFACES_MAX);
        prop_assert!(cpu_cgroup(&text).is_none_or(|group| group.starts_with('/')));
        let _ = (stalled(&text), thread_waited_ns(&text), process_ticks(&text));
        let _ = (resident_pages(&text), number(&text), cgroup_cpu_us(&text));
        let _ = cgroup_cache_bytes(&text);
    }

    #[test]
    fn no_answer_does_harm(answer in any_json()) {
        let _ = qmp::disk_bytes(&answer);
        prop_assert!(qmp::ethernet_addresses(&answer).iter().all(|one| qmp::is_ethernet_address(one)));
        prop_assert!(qmp::ram_mib(&answer).is_none_or(f64::is_finite));
        prop_assert!(qmp::balloon_leaves_mib(&answer).is_none_or(f64::is_finite));
        prop_assert!(qmp::balloon_stats(&answer).is_none_or(|stats| stats.at_s > 0));
    }
}
