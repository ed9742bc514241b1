//! What is seen in a terminal of a given size.

use std::time::{Duration, Instant};

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent};
use scheduler_api::ApiError;
use scheduler_api::sample;

use super::screen::Screen;
use super::{draw, text};

fn picture(screen: &mut Screen, now: Instant, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw::all(frame, screen, now)).unwrap();
    terminal.backend().to_string()
}

fn watching(hosts: usize, guests: usize) -> (Screen, Instant) {
    let now = Instant::now();
    let mut screen = Screen::new("host-a:7710".into());
    screen.hear(Ok(sample::view(hosts, guests, sample::AT_S)), now);
    (screen, now)
}

fn press(screen: &mut Screen, keys: &str) {
    for key in keys.chars() {
        screen.press(KeyEvent::from(KeyCode::Char(key)));
    }
}

/// The line that holds a text.
fn line<'a>(picture: &'a str, text: &str) -> &'a str {
    picture
        .lines()
        .find(|line| line.contains(text))
        .unwrap_or_else(|| panic!("no {text:?} in\n{picture}"))
}

#[test]
fn hosts_have_bars_and_silent_ones_say_so() {
    let (mut screen, now) = watching(3, 12);
    let picture = picture(&mut screen, now, 140, 30);
    assert!(line(&picture, "agent of").contains("policy godwit, store etcd: 3 hosts, 12 guests"));
    let hot = picture.lines().find(|line| line.contains("host-001  ")).unwrap();
    assert!(hot.contains("████████  96%"), "{hot}");
    let silent = picture.lines().find(|line| line.contains("host-003  ")).unwrap();
    assert!(silent.contains("silent for 2 min"), "{silent}");
    line(&picture, "1 hosts are silent");
    line(&picture, "q end");
}

#[test]
fn guests_are_ordered_by_the_column_that_is_asked_for() {
    let (mut screen, now) = watching(3, 12);
    let first = |screen: &mut Screen| {
        let picture = picture(screen, now, 140, 40);
        let from = picture.lines().position(|line| line.contains("may use")).unwrap();
        picture.lines().nth(from + 1).unwrap().to_owned()
    };
    let view = sample::view(3, 12, sample::AT_S);
    let busiest = view
        .guests
        .iter()
        .max_by(|one, other| one.usage.cpu_cores.total_cmp(&other.usage.cpu_cores));
    let busiest = busiest.unwrap();
    assert!(first(&mut screen).contains(&busiest.name));
    press(&mut screen, "r");
    assert!(!first(&mut screen).contains(&busiest.name));
    // Steal, used, allocated, network, disk, state, name: now from the last on.
    press(&mut screen, "sssssss");
    assert!(first(&mut screen).contains("vm-0011"));
    press(&mut screen, "r");
    assert!(first(&mut screen).contains(sample::MARKUP));
}

#[test]
fn every_tab_shows_its_own() {
    let (mut screen, now) = watching(3, 12);
    let mut shown = |keys: &str| {
        press(&mut screen, keys);
        picture(&mut screen, now, 160, 30)
    };
    let hotspots = shown("2");
    assert!(line(&hotspots, "4 of 5 intervals").contains("96%"));
    assert!(line(&hotspots, "180.0").contains("gone for 4 min"));
    let moves = shown("3");
    assert!(line(&moves, "moving 12 s").contains("█"));
    assert!(line(&moves, "failed").contains("no room for its memory"));
    let plan = shown("4");
    assert!(line(&plan, "memory 1024 MiB → 1536 MiB").contains("done"));
    assert!(line(&plan, "host-001 → host-003").contains("planned"));
}

#[test]
fn scrolling_ends_with_the_last_line_and_comes_back() {
    let (mut screen, now) = watching(200, 2000);
    screen.press(KeyEvent::from(KeyCode::End));
    press(&mut screen, &"]".repeat(500));
    let last = picture(&mut screen, now, 140, 40);
    line(&last, "of 200");
    line(&last, "host-200");
    screen.press(KeyEvent::from(KeyCode::Up));
    press(&mut screen, "[");
    let before = picture(&mut screen, now, 140, 40);
    assert_ne!(last, before);
}

#[test]
fn an_agent_that_is_away_is_told_of_and_what_was_known_stays() {
    let mut screen = Screen::new("host-a:7710".into());
    let now = Instant::now();
    assert!(picture(&mut screen, now, 80, 10).contains("Asking host-a:7710"));
    let away = || Err(ApiError::Unavailable { what: "it is \u{1b}[31maway".into() });
    screen.hear(away(), now);
    let first = picture(&mut screen, now, 80, 10);
    assert!(first.contains("No connection: it is ?[31maway. Trying again."), "{first}");
    screen.hear(Ok(sample::view(3, 12, sample::AT_S)), now);
    assert!(!picture(&mut screen, now, 140, 30).contains("No connection"));
    screen.hear(away(), now);
    let later = picture(&mut screen, now + Duration::from_secs(30), 140, 30);
    line(&later, "No connection for 30 s");
    line(&later, "host-001");
}

#[test]
fn figures_that_stand_still_are_called_old() {
    let (mut screen, now) = watching(3, 12);
    let later = now + Duration::from_secs(40);
    screen.hear(Ok(sample::view(3, 12, sample::AT_S)), later);
    line(&picture(&mut screen, later, 140, 30), "its figures are 40 s old");
    screen.hear(Ok(sample::view(3, 12, sample::AT_S + 5.0)), later);
    assert!(!picture(&mut screen, later, 140, 30).contains("old"));
}

#[test]
fn the_smallest_terminal_and_odd_figures_do_no_harm() {
    let mut view = sample::view(3, 12, f64::NAN);
    view.hosts[0].used.cpu_cores = f64::INFINITY;
    view.moves[0].began_s = f64::NEG_INFINITY;
    view.moves[0].curve.last_mut().unwrap().expected_bytes = 0;
    let now = Instant::now();
    let mut screen = Screen::new("a".into());
    screen.hear(Ok(view), now);
    for (width, height) in [(1, 1), (10, 3), (40, 8), (400, 100)] {
        for key in "1234".chars() {
            press(&mut screen, &key.to_string());
            picture(&mut screen, now, width, height);
        }
    }
}

#[test]
fn the_plain_text_holds_everything_and_nothing_that_steers() {
    let mut view = sample::view(3, 12, sample::AT_S);
    view.remarks.push("evil \u{1b}]0;title\u{7} and \u{202e}turned".into());
    let text = text::picture(&view);
    for guest in &view.guests {
        line(&text, &guest.name);
    }
    assert!(line(&text, "host-001 ").contains("96%"));
    assert!(line(&text, "evil").ends_with("evil ?]0;title? and ?turned"));
    assert!(text.contains("! 1 hosts are silent"));
    assert!(!text.contains('\u{1b}'));
}
