//! The picture in a terminal.

use std::time::Instant;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Paragraph, Row, Table, Wrap};
use scheduler_api::View;

use super::rows::{self, GuestColumn, HostRow};
use super::screen::{Screen, Tab};

const HELP: &str = "q end  1-4 or Tab what is shown  s order by next column  r reverse  ↑↓ PgUp PgDn scroll  [ ] scroll hosts";

/// Characters of a bar.
const BAR: usize = 8;

/// From this share on a bar is yellow, and red.
const WARM: f64 = 0.7;
const HOT: f64 = 0.85;

/// Draws everything; scrolling beyond the end is taken back.
pub(super) fn all(frame: &mut Frame<'_>, screen: &mut Screen, now: Instant) {
    let stale = screen.staleness(now);
    let Some(view) = screen.view.take() else {
        nothing_yet(frame, screen, stale.as_deref());
        return;
    };
    let mut alerts: Vec<_> = stale.iter().map(|text| rows::clean(text)).collect();
    alerts.extend(rows::warnings(&view));
    let hosts = rows::hosts(&view);
    let hosts_height = (hosts.len() as u16).saturating_add(3).min(frame.area().height * 2 / 5);
    let [top, alert, upper, lower, help] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length((alerts.len() as u16).min(4)),
        Constraint::Length(hosts_height),
        Constraint::Min(3),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(Paragraph::new(rows::head(&view)).style(bold()), top);
    let alerts: Vec<_> = alerts.into_iter().map(Line::from).collect();
    frame.render_widget(Paragraph::new(alerts).style(Style::new().fg(Color::Red)), alert);
    draw_hosts(frame, upper, &hosts, &mut screen.hosts_from, stale.is_some());
    draw_tab(frame, lower, screen, &view);
    frame.render_widget(Paragraph::new(HELP).style(Style::new().add_modifier(Modifier::DIM)), help);
    screen.view = Some(view);
}

fn nothing_yet(frame: &mut Frame<'_>, screen: &Screen, stale: Option<&str>) {
    let asked = format!("Asking {} …", screen.agents);
    let text = stale.map_or(asked, rows::clean);
    let [main, help] =
        Layout::vertical([Constraint::Min(1), Constraint::Length(1)]).areas(frame.area());
    frame.render_widget(Paragraph::new(text).wrap(Wrap { trim: true }), main);
    frame.render_widget(Paragraph::new(HELP), help);
}

fn bold() -> Style {
    Style::new().add_modifier(Modifier::BOLD)
}

/// The lines that fit, and how many are above them at most.
fn window(area: Rect, len: usize, from: &mut usize) -> (usize, usize) {
    // Two lines are the frame, one the titles.
    let height = usize::from(area.height.saturating_sub(3));
    *from = (*from).min(len.saturating_sub(height));
    (*from, height)
}

fn draw_hosts(
    frame: &mut Frame<'_>,
    area: Rect,
    hosts: &[HostRow],
    from: &mut usize,
    is_old: bool,
) {
    let (from, height) = window(area, hosts.len(), from);
    let lines = hosts.iter().skip(from).take(height).map(|host| {
        let mut cells = vec![Cell::from(host.name.clone())];
        cells.extend(host.shares.iter().map(|share| Cell::from(meter(*share))));
        cells.push(Cell::from(host.guests.to_string()));
        cells.push(Cell::from(host.notes.clone()));
        let style = if host.is_stale || is_old {
            Style::new().add_modifier(Modifier::DIM)
        } else if host.is_hot {
            Style::new().fg(Color::Red).add_modifier(Modifier::BOLD)
        } else {
            Style::new()
        };
        Row::new(cells).style(style)
    });
    let meter = Constraint::Length(BAR as u16 + 6);
    let widths = [
        Constraint::Length(20),
        meter,
        meter,
        meter,
        meter,
        Constraint::Length(6),
        Constraint::Min(10),
    ];
    let titles = ["host", "CPU", "memory", "network", "disk", "guests", "remarks"];
    let title =
        format!(" hosts {}-{} of {} ", from + 1, (from + height).min(hosts.len()), hosts.len());
    let table = Table::new(lines, widths)
        .header(Row::new(titles).style(bold()))
        .block(Block::bordered().title(title));
    frame.render_widget(table, area);
}

fn meter(share: Option<f64>) -> Line<'static> {
    let Some(share) = share.filter(|share| share.is_finite()) else {
        return Line::from("?");
    };
    let color = match share {
        share if share >= HOT => Color::Red,
        share if share >= WARM => Color::Yellow,
        _ => Color::Green,
    };
    Line::from(vec![
        Span::styled(rows::bar(share, BAR), Style::new().fg(color)),
        Span::raw(format!(" {:>4}", rows::percent(share))),
    ])
}

fn draw_tab(frame: &mut Frame<'_>, area: Rect, screen: &mut Screen, view: &View) {
    let from = &mut screen.rows_from;
    let title = tabs(screen.tab);
    match screen.tab {
        Tab::Guests => {
            let guests = rows::guests(view, screen.column, screen.is_reversed);
            let titles = guest_titles(screen.column, screen.is_reversed);
            let widths = [24, 18, 6, 6, 9, 9, 8, 8, 18].map(Constraint::Length);
            draw_table(frame, area, title, titles, &widths, &guests, from);
        }
        Tab::Hotspots => {
            let mut widths = [24, 8, 8, 8, 8, 14].map(Constraint::Length).to_vec();
            widths.push(Constraint::Min(10));
            let titles = rows::HOTSPOT_TITLES.map(str::to_owned);
            draw_table(frame, area, title, titles, &widths, &rows::hotspots(view), from);
        }
        Tab::Migrations => {
            let mut widths = [24, 16, 16, 16, 16].map(Constraint::Length).to_vec();
            widths.push(Constraint::Min(10));
            let titles = rows::MOVE_TITLES.map(str::to_owned);
            draw_table(frame, area, title, titles, &widths, &rows::moves(view), from);
        }
        Tab::Plan => {
            let steps = view.plan.as_ref().map(rows::plan).unwrap_or_default();
            let mut widths = [4, 24, 26, 26, 8].map(Constraint::Length).to_vec();
            widths.push(Constraint::Min(10));
            draw_table(
                frame,
                area,
                title,
                rows::PLAN_TITLES.map(str::to_owned),
                &widths,
                &steps,
                from,
            );
        }
    }
}

fn tabs(current: Tab) -> Line<'static> {
    let span = |tab: Tab| {
        let style = if tab == current {
            Style::new().add_modifier(Modifier::REVERSED)
        } else {
            Style::new()
        };
        Span::styled(format!(" {} ", tab.title()), style)
    };
    Line::from(Tab::ALL.map(span).to_vec())
}

fn guest_titles(column: GuestColumn, is_reversed: bool) -> [String; 9] {
    let mut titles = rows::GUEST_TITLES.map(str::to_owned);
    for (title, of) in titles.iter_mut().zip(GuestColumn::ALL) {
        if of == column {
            title.push(if is_reversed { '▲' } else { '▼' });
        }
    }
    titles
}

fn draw_table<const N: usize>(
    frame: &mut Frame<'_>,
    area: Rect,
    title: Line<'static>,
    titles: [String; N],
    widths: &[Constraint],
    lines: &[[String; N]],
    from: &mut usize,
) {
    let (from, height) = window(area, lines.len(), from);
    let lines = lines.iter().skip(from).take(height).map(|line| Row::new(line.clone()));
    let table = Table::new(lines, widths.to_vec())
        .header(Row::new(titles).style(bold()))
        .block(Block::bordered().title(title));
    frame.render_widget(table, area);
}
