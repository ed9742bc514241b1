//! Policies by the names that users write.

use super::drs::Drs;
use super::idc::Idc;
use super::sandpiper::Sandpiper;
use super::{Plan, Policy, Problem};

/// The policies' names.
pub const NAMES: [&str; 5] = ["none", "sandpiper", "idc", "idc-plus", "drs"];

/// The policy of that name, with the settings of its authors.
#[must_use]
pub fn policy(name: &str) -> Option<Box<dyn Policy>> {
    match name {
        "none" => Some(Box::new(Nothing)),
        "sandpiper" => Some(Box::new(Sandpiper::default())),
        "idc" => Some(Box::new(Idc::as_in_the_thesis())),
        "idc-plus" => Some(Box::new(Idc::plus())),
        "drs" => Some(Box::new(Drs::default())),
        _ => None,
    }
}

/// Leaves everything as it is: what others are compared with.
#[derive(Debug, Clone, Copy)]
struct Nothing;

impl Policy for Nothing {
    fn name(&self) -> &'static str {
        "none"
    }

    fn plan(&self, _problem: &Problem<'_>) -> Plan {
        Plan::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_leads_to_the_policy_of_that_name() {
        for name in NAMES {
            assert_eq!(policy(name).map(|policy| policy.name()), Some(name));
        }
        assert!(policy("Sandpiper").is_none());
    }
}
