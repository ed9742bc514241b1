//! What was heard, what is chosen, and what keys do.

use std::time::{Duration, Instant};

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use scheduler_api::{ApiError, View};

use super::rows::GuestColumn;

/// An agent's figures count as old after so many of its intervals without a new one.
const MISSED: f64 = 3.0;

/// Lines that a page key goes.
const PAGE: usize = 20;

/// What the lower part shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tab {
    Guests,
    Hotspots,
    Migrations,
    Plan,
}

impl Tab {
    pub(super) const ALL: [Self; 4] = [Self::Guests, Self::Hotspots, Self::Migrations, Self::Plan];

    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Guests => "1 guests",
            Self::Hotspots => "2 hotspots",
            Self::Migrations => "3 migrations",
            Self::Plan => "4 plan",
        }
    }
}

/// The state of the picture.
#[derive(Debug)]
pub(super) struct Screen {
    /// Who is asked.
    pub(super) agents: String,
    pub(super) view: Option<View>,
    /// When the agent last answered, and when with something new.
    heard: Option<Instant>,
    changed: Option<Instant>,
    /// Why it does not answer.
    trouble: Option<String>,
    pub(super) tab: Tab,
    pub(super) column: GuestColumn,
    pub(super) is_reversed: bool,
    /// Lines above the first that is shown.
    pub(super) hosts_from: usize,
    pub(super) rows_from: usize,
    is_left: bool,
}

impl Screen {
    pub(super) const fn new(agents: String) -> Self {
        Self {
            agents,
            view: None,
            heard: None,
            changed: None,
            trouble: None,
            tab: Tab::Guests,
            column: GuestColumn::Cpu,
            is_reversed: false,
            hosts_from: 0,
            rows_from: 0,
            is_left: false,
        }
    }

    /// Takes what the agent says, or why it does not.
    pub(super) fn hear(&mut self, answer: Result<View, ApiError>, now: Instant) {
        match answer {
            Ok(view) => {
                self.trouble = None;
                self.heard = Some(now);
                if self
                    .view
                    .as_ref()
                    .is_none_or(|old| old.at_s != view.at_s || old.agent != view.agent)
                {
                    self.changed = Some(now);
                }
                self.view = Some(view);
            }
            Err(error) => self.trouble = Some(error.to_string()),
        }
    }

    /// Why what is shown is not what is.
    pub(super) fn staleness(&self, now: Instant) -> Option<String> {
        let ago = |then: Option<Instant>| then.map(|then| now.saturating_duration_since(then));
        let words = |ago: Duration| super::rows::span(ago.as_secs_f64());
        if let Some(trouble) = &self.trouble {
            let since =
                ago(self.heard).map_or_else(String::new, |ago| format!(" for {}", words(ago)));
            return Some(format!("No connection{since}: {trouble}. Trying again."));
        }
        let (view, age) = (self.view.as_ref()?, ago(self.changed)?);
        (age.as_secs_f64() > MISSED * view.interval_s.max(2.0)).then(|| {
            format!("The agent of {} answers, but its figures are {} old", view.agent, words(age))
        })
    }

    pub(super) const fn leave(&mut self) {
        self.is_left = true;
    }

    pub(super) const fn is_left(&self) -> bool {
        self.is_left
    }

    pub(super) fn press(&mut self, key: KeyEvent) {
        let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if is_control => self.leave(),
            KeyCode::Char('q') | KeyCode::Esc => self.leave(),
            KeyCode::Char('1') => self.turn_to(Tab::Guests),
            KeyCode::Char('2') => self.turn_to(Tab::Hotspots),
            KeyCode::Char('3') => self.turn_to(Tab::Migrations),
            KeyCode::Char('4') => self.turn_to(Tab::Plan),
            KeyCode::Tab | KeyCode::Right => self.turn(1),
            KeyCode::BackTab | KeyCode::Left => self.turn(Tab::ALL.len() - 1),
            KeyCode::Char('s') => self.order_by_next(),
            KeyCode::Char('r') => self.is_reversed = !self.is_reversed,
            KeyCode::Down | KeyCode::Char('j') => self.rows_from = self.rows_from.saturating_add(1),
            KeyCode::Up | KeyCode::Char('k') => self.rows_from = self.rows_from.saturating_sub(1),
            KeyCode::PageDown => self.rows_from = self.rows_from.saturating_add(PAGE),
            KeyCode::PageUp => self.rows_from = self.rows_from.saturating_sub(PAGE),
            KeyCode::Home => self.rows_from = 0,
            KeyCode::End => self.rows_from = usize::MAX,
            KeyCode::Char(']') => self.hosts_from = self.hosts_from.saturating_add(1),
            KeyCode::Char('[') => self.hosts_from = self.hosts_from.saturating_sub(1),
            _ => {}
        }
    }

    const fn turn_to(&mut self, tab: Tab) {
        self.tab = tab;
        self.rows_from = 0;
    }

    fn turn(&mut self, by: usize) {
        let index = Tab::ALL.iter().position(|tab| *tab == self.tab).unwrap_or_default();
        if let Some(tab) = Tab::ALL.get((index + by) % Tab::ALL.len()) {
            self.turn_to(*tab);
        }
    }

    fn order_by_next(&mut self) {
        let all = GuestColumn::ALL;
        let index = all.iter().position(|column| *column == self.column).unwrap_or_default();
        if let Some(column) = all.get((index + 1) % all.len()) {
            self.column = *column;
            self.rows_from = 0;
        }
    }
}
