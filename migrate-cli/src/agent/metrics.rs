//! Metrics of all parts of an agent on one page.

use std::sync::Arc;

use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::receiver::{Receiver, State};
use crate::destination::remote::register_pagers;
use crate::{http, memory_server};

/// What is told of.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The memory server.
    pub memory_server: Option<Arc<memory_server::Shared>>,
    /// All receivers.
    pub receivers: Vec<Arc<Receiver>>,
}

impl Parts {
    /// All metrics as text.
    pub fn text(&self) -> String {
        let mut registry = Registry::default();
        if let Some(shared) = &self.memory_server {
            memory_server::metrics::register(&mut registry, shared);
        }
        register_pagers(&mut registry, self.receivers.iter().map(|receiver| &receiver.watched));
        if !self.receivers.is_empty() {
            register_receivers(&mut registry, &self.receivers);
        }
        http::page(&registry)
    }
}

fn register_receivers(registry: &mut Registry, receivers: &[Arc<Receiver>]) {
    let family = Family::<[(&'static str, String); 2], Gauge>::default();
    for receiver in receivers {
        for state in State::ALL {
            let labels =
                [("qmp", receiver.qmp().display().to_string()), ("state", state.name().to_owned())];
            family.get_or_create(&labels).set(i64::from(receiver.state() == state));
        }
    }
    let help = "What the receiver of a VM is doing: 1 for the state that it is in";
    registry.register("godwit_agent_receiver", help, family);
}
