//! The five scenarios of the IDC thesis, as files: who moves where, by how much response times and throughput change, and
//! that `godwit` is at least as good as the better of the two policies that the thesis compares.

use super::{Outcome, Scenario};
use crate::plan::policy;

/// Runs a scenario's policies and checks all that its file expects.
fn holds(name: &str, text: &str) -> Vec<Outcome> {
    let scenario = Scenario::parse(text).unwrap_or_else(|error| panic!("{name}: {error}"));
    let run = |name: &String| scenario.run(policy(name).expect("a policy").as_ref(), 1);
    let outcomes: Vec<Outcome> = scenario.policies().iter().map(run).collect();
    let names: Vec<&str> = outcomes.iter().map(|outcome| outcome.policy.as_str()).collect();
    assert_eq!(names, ["none", "sandpiper", "idc", "godwit"], "{name}");
    let verdicts = scenario.judge(&outcomes);
    assert!(verdicts.len() >= 5, "{name}: {verdicts:?}");
    for verdict in verdicts {
        println!("{name}: {}: {}", verdict.expected, verdict.found);
        assert!(verdict.holds, "{name}: expected {}: {}", verdict.expected, verdict.found);
    }
    for outcome in &outcomes {
        assert_eq!(outcome.ping_pongs, 0, "{name}: {}", outcome.policy);
    }
    outcomes
}

#[test]
fn an_isolated_guest_leaves_and_no_group_is_split() {
    holds("A", include_str!("../../scenarios/idc-a.toml"));
}

#[test]
fn a_group_is_reunited() {
    let outcomes = holds("B", include_str!("../../scenarios/idc-b.toml"));
    let bytes: Vec<f64> = outcomes.iter().map(|outcome| outcome.wire_mib).collect();
    assert!(bytes[3] <= bytes[1].max(bytes[2]) && bytes[0] == 0.0, "{bytes:?}");
}

#[test]
fn who_swaps_grows_and_another_makes_room() {
    holds("C", include_str!("../../scenarios/idc-c.toml"));
}

#[test]
fn a_pair_that_is_brought_together_gets_twice_the_throughput() {
    holds("D", include_str!("../../scenarios/idc-d.toml"));
}

#[test]
fn several_overloads_are_solved_one_after_the_other() {
    holds("E", include_str!("../../scenarios/idc-e.toml"));
}
