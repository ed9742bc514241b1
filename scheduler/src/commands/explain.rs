//! `godwit-scheduler explain`.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use scheduler_api::text::clean;
use scheduler_api::view::{HotspotView, PlanView, StepAction, StepView};
use scheduler_api::{ApiError, Client, View};
use serde::Serialize;
use transport::Identity;

use crate::args::ExplainArgs;

/// What is seen, and what would be done about it.
#[derive(Debug, Serialize)]
struct Explained {
    agent: String,
    policy: String,
    is_dry_run: bool,
    hotspots: Vec<HotspotView>,
    plan: PlanView,
    remarks: Vec<String>,
}

/// Runs it.
pub(crate) fn run(args: &ExplainArgs) -> Result<()> {
    let identity = Arc::new(Identity::load(&args.identity)?);
    let client = Client::new(identity);
    let (view, plan) = super::runtime()?.block_on(ask(&client, &args.agent))?;
    let explained = Explained::of(view, plan);
    let text = match args.json {
        true => serde_json::to_string_pretty(&explained)? + "\n",
        false => explained.to_string(),
    };
    std::io::stdout().write_all(text.as_bytes()).context("Cannot write")
}

/// The first agent that answers.
async fn ask(client: &Client, agents: &[String]) -> Result<(View, PlanView)> {
    let mut refusals = vec![];
    for agent in agents {
        let asked = async {
            let view = client.state(agent, None).await?;
            Ok::<_, ApiError>((view, client.propose(agent, None).await?))
        };
        match asked.await {
            Ok(answer) => return Ok(answer),
            Err(error) => refusals.push(clean(&error.to_string())),
        }
    }
    bail!("No agent answers. {}", refusals.join(". "))
}

impl Explained {
    fn of(view: View, plan: PlanView) -> Self {
        let View { agent, policy, is_dry_run, hotspots, remarks, .. } = view;
        let hotspots = hotspots.into_iter().filter(|hotspot| hotspot.ended_s.is_none()).collect();
        Self { agent, policy, is_dry_run, hotspots, plan, remarks }
    }
}

impl std::fmt::Display for Explained {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dry = if self.is_dry_run { " (dry run: nothing is done)" } else { "" };
        writeln!(f, "As {} sees it, by policy {}{dry}", clean(&self.agent), clean(&self.policy))?;
        section(f, "Hotspots", self.hotspots.iter().map(hotspot))?;
        section(f, "What would be done now", self.plan.steps.iter().map(step))?;
        section(f, "What was considered and left", self.plan.notes.iter().map(|note| clean(note)))?;
        section(f, "Odd about reports", self.remarks.iter().map(|remark| clean(remark)))
    }
}

fn section(
    f: &mut std::fmt::Formatter<'_>,
    title: &str,
    lines: impl Iterator<Item = String>,
) -> std::fmt::Result {
    let lines: Vec<String> = lines.collect();
    writeln!(f, "\n{title}")?;
    if lines.is_empty() {
        return writeln!(f, "  nothing");
    }
    lines.iter().try_for_each(|line| writeln!(f, "  {line}"))
}

fn hotspot(hotspot: &HotspotView) -> String {
    let mut line = clean(&hotspot.host);
    if let Some(guest) = &hotspot.guest {
        let _ = write!(line, ", guest {}", clean(guest));
    }
    format!("{line}: {}", clean(&hotspot.why))
}

fn step(step: &StepView) -> String {
    let what = match &step.action {
        StepAction::Migrate { from, to, cost } => format!(
            "moves from {} to {} in about {:.0} s ({:.0} MiB, a pause of {:.0} ms)",
            clean(from),
            clean(to),
            cost.total_s,
            cost.wire_mib,
            cost.downtime_ms
        ),
        StepAction::Resize { from_mib, to_mib } => {
            format!("gets {to_mib:.0} MiB of memory instead of {from_mib:.0}")
        }
    };
    format!("{}. {} {what}: {}", step.wave + 1, clean(&step.guest), clean(&step.reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hotspots_steps_and_reasons_are_told_in_lines() {
        let mut view = scheduler_api::sample::view(4, 12, 1000.0);
        view.remarks = vec!["b\u{1b}[2J lies".to_owned()];
        let plan = scheduler_api::sample::plan(1000.0);
        let (hot, reason) = (view.hotspots[0].clone(), plan.steps[0].reason.clone());
        assert!(hot.ended_s.is_none() && !plan.notes.is_empty());
        let note = plan.notes[0].clone();
        let text = Explained::of(view, plan).to_string();
        assert!(text.contains(&format!("{}: {}", hot.host, hot.why)), "{text}");
        assert!(text.contains("1. ") && text.contains(&reason) && text.contains(&note), "{text}");
        assert!(text.contains("b?[2J lies"), "{text}");
    }

    #[test]
    fn hotspots_that_ended_are_not_told_and_nothing_is_said_to_be_nothing() {
        let mut view = scheduler_api::sample::view(4, 12, 1000.0);
        for hotspot in &mut view.hotspots {
            hotspot.ended_s = Some(990.0);
        }
        view.is_dry_run = true;
        let text = Explained::of(view, PlanView::default()).to_string();
        assert!(text.contains("Hotspots\n  nothing\n"), "{text}");
        assert!(text.contains("What would be done now\n  nothing\n"), "{text}");
        assert!(text.contains("dry run"), "{text}");
    }
}
