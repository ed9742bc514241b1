//! What nft is told, and what is made of its counters.

use super::*;

#[test]
fn names_that_nft_would_take_otherwise_are_not_given_to_it() {
    assert!(is_interface("tap0") && is_interface("vnet-1.2_x"));
    for name in ["", "a b", "t\"}; drop", "abcdefghijklmnop", "tap*", "é"] {
        assert!(!is_interface(name), "{name}");
    }
}

#[test]
fn the_table_is_made_anew_and_watches_what_is_named() {
    let text = table(&["tap0", "tap1"].map(str::to_owned).into());
    assert!(
        text.starts_with("table bridge godwit_traffic {}\ndelete table bridge godwit_traffic\n")
    );
    assert!(text.ends_with("add element bridge godwit_traffic guests { \"tap0\", \"tap1\" }\n"));
    assert!(text.contains("policy accept;"), "no packet is dropped");
    assert_eq!(elements(&BTreeSet::new()), "flush set bridge godwit_traffic guests\n");
}

#[test]
fn counters_that_go_and_come_begin_anew() {
    let mut probe = TrafficProbe::new("nft".into());
    let sent =
        |bytes| nft::Sent { interface: "tap0".into(), to: "52:54:00:00:00:01".into(), bytes };
    assert!(probe.rates(0.0, vec![sent(5_000_000)]).is_empty());
    let rates = probe.rates(10.0, vec![sent(17_500_000)]);
    assert_eq!(rates["tap0"], [Sent { to: "52:54:00:00:00:01".into(), mbit: 10.0 }]);
    assert!(probe.rates(20.0, vec![]).is_empty());
    assert!(probe.rates(30.0, vec![sent(1000)]).is_empty(), "it is new again");
    assert!(probe.counters.len() == 1);
}

#[tokio::test]
async fn a_program_that_is_missing_or_refuses_is_told_of() {
    let interfaces = BTreeSet::from(["tap0".to_owned()]);
    let mut probe = TrafficProbe::new("/nonexistent/nft".into());
    let why = probe.read(0.0, &interfaces).await.unwrap_err();
    assert!(why.ends_with("install the package nftables"), "{why}");
    let mut probe = TrafficProbe::new("/bin/false".into());
    let why = probe.read(0.0, &interfaces).await.unwrap_err();
    assert_eq!(why, "/bin/false refuses: it does not say why");
    assert!(probe.watched.is_none(), "it is tried again");
    let mut probe = TrafficProbe::new("/bin/true".into());
    let why = probe.read(0.0, &interfaces).await.unwrap_err();
    assert_eq!(why, "nft lists its set in an unknown form");
}
