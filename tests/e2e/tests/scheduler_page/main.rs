//! The scheduler's page in Chromium, on an agent whose figures are known: what is seen, what buttons do, and what is
//! shown when something is away. Needs neither guests nor a kernel, only the package chromium-headless-shell.

mod browser;
mod site;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use browser::Browser;
use scheduler_api::ApiError;
use scheduler_api::sample;
use scheduler_api::view::{GuestView, View};
use serde_json::json;
use site::Site;

/// On two processors that others use as well.
const DRAWN_WITHIN: Duration = Duration::from_secs(20);

fn begin(view: View) -> Result<(Site, Browser)> {
    let site = Site::begin(view)?;
    let mut browser = Browser::begin()?;
    browser.open(&site.url)?;
    browser.wait_text("#link", "live")?;
    Ok((site, browser))
}

fn small() -> View {
    sample::view(4, 24, sample::AT_S)
}

fn square(guest: &str) -> String {
    format!("#map [data-guest={}]", json!(guest))
}

fn host(name: &str) -> String {
    format!("#map [data-host={}]", json!(name))
}

/// The colour of a guest: its share of its processors, in tenths.
fn cpu_heat(guest: &GuestView) -> String {
    format!("heat-{}", (guest.usage.cpu_cores / f64::from(guest.vcpus) * 10.0) as u32)
}

#[test]
fn two_thousand_guests_are_drawn_in_their_colours() -> Result<()> {
    let view = sample::view(200, 2000, sample::AT_S);
    let site = Site::begin(view.clone())?;
    let mut browser = Browser::begin()?;
    let began = Instant::now();
    browser.open(&site.url)?;
    browser.wait("document.querySelectorAll('#map .vm').length === 2000")?;
    let took = began.elapsed();
    println!("200 hosts and 2,000 guests were drawn after {took:?}");
    ensure!(took < DRAWN_WITHIN, "it took {took:?}");
    ensure!(browser.count("#map .host")? == 200);
    for guest in view.guests.iter().step_by(97) {
        let class = browser
            .value(&format!("document.querySelector({}).className", json!(square(&guest.name))))?;
        let class = class.as_str().unwrap_or_default();
        let expected = cpu_heat(guest);
        ensure!(
            class.split(' ').any(|one| one == expected),
            "{}: {class}, not {expected}",
            guest.name
        );
    }
    let before = browser.count("#map .vm.heat-1")?;
    browser.click("#resources input[value=disk]")?;
    browser.wait(&format!("document.querySelectorAll('#map .vm.heat-1').length !== {before}"))?;
    let redraw = browser.value(
        "(async () => { const began = performance.now(); \
         document.querySelector('#resources input[value=memory]').click(); \
         document.body.getBoundingClientRect(); return performance.now() - began; })()",
    )?;
    println!("Colouring all of them anew took {redraw} ms");
    browser.value("document.querySelector('#find').focus()")?;
    browser.value(
        "(() => { const find = document.querySelector('#find'); find.value = 'host-07'; \
        find.dispatchEvent(new Event('input')); })()",
    )?;
    browser.wait("document.querySelectorAll('#map .host').length === 10")?;
    browser.assert_quiet()
}

#[test]
fn hotspots_migrations_and_plans_are_shown_with_their_curves() -> Result<()> {
    let (_site, mut browser) = begin(small())?;
    browser.wait_text("#hot .card", "host-001")?;
    browser.wait_text("#hot .card", "96 % now, 98 % expected, 85 % is the limit")?;
    browser.wait_text("#cooled", "180 now")?;
    ensure!(browser.count("#map .host.hot")? == 1);
    browser.wait("document.querySelectorAll('#hot svg.chart polyline').length === 3")?;
    let points = browser.value(
        "document.querySelector('#hot polyline.share').getAttribute('points').split(' ').length",
    )?;
    ensure!(points == json!(60), "{points} points of the history");
    // The curve rises from the left to the right, and y goes downwards.
    let rises = browser.value(
        "(() => { const points = document.querySelector('#hot polyline.share').getAttribute('points') \
         .split(' ').map((point) => point.split(',').map(Number)); \
         return points[0][0] < points[59][0] && points[0][1] > points[59][1] + 30; })()",
    )?;
    ensure!(rises == json!(true), "the history does not rise");
    for curve in ["applied", "expected", "rate", "pause"] {
        ensure!(
            browser.count(&format!("#moves svg.chart polyline.{curve}"))? == 1,
            "no curve {curve}"
        );
    }
    browser.wait_text("#moves .card", "moving")?;
    browser.wait_text("#moved", "no room for its memory")?;
    browser.wait_text("#plan", "host-001 → host-003")?;
    browser.wait_text("#plan", "wants 0.9 cores more than it has")?;
    browser.wait_text("#groups .card", "Mbit/s")?;
    browser.wait_text("#remarks", "two hosts")?;
    browser.click("#propose")?;
    browser.wait_text("#proposal", "What would be done now")?;
    browser.assert_quiet()
}

#[test]
fn a_silent_host_is_marked_and_only_that_one() -> Result<()> {
    let (_site, mut browser) = begin(small())?;
    ensure!(browser.count("#map .host.stale")? == 1);
    let marked = browser.text("#map .host.stale")?.context("no text")?;
    let name = sample::silent_host(4);
    ensure!(marked.contains(&name) && marked.contains("silent for"), "{marked}");
    browser.click(&host(&name))?;
    browser.wait_text("#detail", "these figures are old")?;
    browser.assert_quiet()
}

#[test]
fn drain_asks_first_and_then_the_agent() -> Result<()> {
    let (site, mut browser) = begin(small())?;
    browser.click(&host("host-003"))?;
    browser.wait_text("#detail h3", "host-003")?;
    browser.click("#drain")?;
    browser.wait("document.querySelector('#confirm').open")?;
    browser.wait_text("#confirm-text", "host-003")?;
    browser.click("#confirm-no")?;
    browser.wait("!document.querySelector('#confirm').open")?;
    ensure!(site.agent.asked().is_empty(), "{:?}", site.agent.asked());
    browser.click("#drain")?;
    browser.wait("document.querySelector('#confirm').open")?;
    browser.click("#confirm-yes")?;
    browser.wait_text("#detail [role=status]", "The agent does it")?;
    ensure!(site.agent.asked() == ["operator: drain host-003"], "{:?}", site.agent.asked());
    // What drains already can only be ended.
    browser.click(&host("host-002"))?;
    browser.wait("document.querySelector('#drain').disabled")?;
    browser.click("#undrain")?;
    browser.click("#confirm-yes")?;
    browser.wait_text("#detail [role=status]", "The agent does it")?;
    ensure!(site.agent.asked()[1..] == ["operator: undrain host-002"], "{:?}", site.agent.asked());
    browser.assert_quiet()
}

#[test]
fn guests_are_migrated_by_the_keyboard_alone() -> Result<()> {
    let (site, mut browser) = begin(small())?;
    // host-001 has the guests 0, 4, 8 ...: one step to the right of the first is 4.
    browser.value(&format!("document.querySelector({}).focus()", json!(square(sample::MARKUP))))?;
    browser.press("ArrowRight")?;
    let label = browser.value("document.activeElement.dataset.guest")?;
    ensure!(label == json!("vm-0004"), "{label} has the focus");
    browser.press("Enter")?;
    browser.wait_text("#detail h3", "vm-0004")?;
    browser.value("document.querySelector('#target').value = '=host-003'")?;
    browser.value("document.querySelector('#migrate').focus()")?;
    browser.press("Enter")?;
    browser.wait_text("#confirm-text", "Migrate vm-0004 to host-003?")?;
    browser.press("Escape")?;
    browser.wait("!document.querySelector('#confirm').open")?;
    ensure!(site.agent.asked().is_empty());
    browser.press("Enter")?;
    browser.wait("document.querySelector('#confirm').open")?;
    browser.value("document.querySelector('#confirm-yes').focus()")?;
    browser.press("Enter")?;
    browser.wait_text("#detail [role=status]", "The agent does it")?;
    let expected = "operator: move vm-0004 to Some(\"host-003\") (asked for on the page)";
    ensure!(site.agent.asked() == [expected], "{:?}", site.agent.asked());
    browser.press("Escape")?;
    browser.wait("document.querySelector('#detail').hidden")?;
    let focus = browser.value("document.activeElement.dataset.guest")?;
    ensure!(focus == json!("vm-0004"), "the focus went to {focus}");
    browser.assert_quiet()
}

#[test]
fn what_the_agent_refuses_is_told_in_its_words() -> Result<()> {
    let (site, mut browser) = begin(small())?;
    let what = "host-003 is the last of its group <b>here</b>".to_owned();
    site.agent.refuse(Some(ApiError::Conflict { what: what.clone() }));
    browser.click(&host("host-003"))?;
    browser.click("#drain")?;
    browser.click("#confirm-yes")?;
    browser.wait_text("#detail .bad[role=status]", &what)?;
    browser.assert_quiet()
}

#[test]
fn markup_in_names_and_words_is_text() -> Result<()> {
    let mut view = small();
    let evil = "<img src=x onerror=alert(2)>".to_owned();
    view.remarks.push(evil.clone());
    view.hotspots[0].why = evil.clone();
    view.hosts[2].name = evil.clone();
    view.moves[0].reason = evil.clone();
    view.plan.as_mut().context("no plan")?.steps[0].reason = evil.clone();
    let (_site, mut browser) = begin(view)?;
    browser.click(&square(sample::MARKUP))?;
    browser.wait(&format!(
        "document.querySelector('#detail h3').textContent === {}",
        json!(sample::MARKUP)
    ))?;
    browser.click(&host(&evil))?;
    browser
        .wait(&format!("document.querySelector('#detail h3').textContent === {}", json!(evil)))?;
    for selector in ["#hot", "#moves", "#plan", "#remarks", "#map"] {
        browser.wait_text(selector, &evil)?;
    }
    ensure!(browser.count("img")? == 0);
    ensure!(browser.count("body script")? == 0);
    browser.assert_quiet()
}

#[test]
fn a_lost_connection_is_shown_until_it_is_back() -> Result<()> {
    let (mut site, mut browser) = begin(small())?;
    ensure!(browser.count("body.lost")? == 0);
    site.end_agent()?;
    browser.wait_text("#link", "no connection")?;
    browser.wait_text("#alerts", "What is shown is old")?;
    ensure!(browser.count("body.lost")? == 1);
    ensure!(browser.count("#map .vm")? == 24, "what was known stays");
    site.begin_agent()?;
    browser.wait_text("#link", "live")?;
    browser.wait("document.querySelectorAll('body.lost, #alerts .alert').length === 0")?;
    browser.assert_quiet()
}

#[test]
fn an_agent_that_stands_still_and_a_store_that_is_away_are_shown() -> Result<()> {
    let mut view = small();
    view.interval_s = 1.0;
    view.store.trouble = Some("connection refused".into());
    view.is_dry_run = true;
    let (site, mut browser) = begin(view.clone())?;
    browser.wait_text("#alerts", "The store (etcd) cannot be used: connection refused")?;
    browser.wait_text("#alerts", "dry run")?;
    browser.wait_text("#alerts", "answers, but its figures are")?;
    browser.wait_text("#link", "old")?;
    view.at_s += 1.0;
    view.store.trouble = None;
    view.interval_s = 600.0;
    site.agent.set(view);
    browser.wait_text("#link", "live")?;
    browser.wait("!document.querySelector('#alerts').textContent.includes('store')")?;
    browser.assert_quiet()
}

#[test]
fn figures_that_change_change_the_page() -> Result<()> {
    let mut view = small();
    let (site, mut browser) = begin(view.clone())?;
    // A guest has moved and is idle, its host is cool, and one guest is gone.
    view.at_s += 5.0;
    view.guests[4].host = "host-003".into();
    view.guests[4].usage.cpu_cores = 0.0;
    view.guests.pop();
    view.hotspots.remove(0);
    site.agent.set(view);
    browser.wait("document.querySelectorAll('#map .vm').length === 23")?;
    let selector = json!(square("vm-0004"));
    browser.wait(&format!("document.querySelector({selector}).className === 'vm heat-0'"))?;
    browser.wait(&format!(
        "document.querySelector({selector}).closest('.host').querySelector('.name').textContent === 'host-003'"
    ))?;
    browser.wait("document.querySelectorAll('#map .host.hot, #hot .card').length === 0")?;
    browser.assert_quiet()
}
