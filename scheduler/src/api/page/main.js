// Asks the agent again and again and shows what it says, or that it says nothing.

import { byId, clock, el, keyed, setClass, setText, span } from "./dom.js";
import { ask } from "./ask.js";
import * as detail from "./detail.js";
import * as heat from "./heat.js";
import * as lists from "./lists.js";

const POLL_MS = 2_000;
const POLL_HIDDEN_MS = 15_000;
// The agent makes its view anew at its interval: this many missed count as trouble.
const MISSED = 3;

const state = { view: null, etag: null, heard_ms: null, changed_ms: null, lost: null, chosen: null };

// The agent's clock, as far as it can be told from here.
function now_s() {
  return state.view.at_s + (performance.now() - state.changed_ms) / 1000;
}

async function poll() {
  try {
    const { value, etag } = await ask("GET", "/v1/state", undefined, state.etag);
    state.heard_ms = performance.now();
    state.lost = null;
    state.etag = etag;
    if (value) take(value);
  } catch (error) {
    state.lost = error.message;
  }
  draw();
  setTimeout(poll, document.hidden ? POLL_HIDDEN_MS : POLL_MS);
}

function take(view) {
  if (view.v !== 1) throw new Error(`The agent speaks version ${view.v} of this page's language: load the page again`);
  state.view = view;
  state.changed_ms = performance.now();
  heat.draw(view, now_s());
  lists.draw(view, now_s());
  detail.draw(view, now_s());
  lists.drawHistories(view);
  detail.drawHistory();
}

// What time alone changes.
function draw() {
  const { view, lost } = state;
  const alerts = [];
  if (lost !== null) {
    const since = state.heard_ms === null ? "" : ` for ${span((performance.now() - state.heard_ms) / 1000)}`;
    alerts.push(["lost", "", `No connection to the agent${since}: ${lost}. What is shown is old; it is tried again.`]);
  }
  let is_old = false;
  if (view) {
    const age_s = (performance.now() - state.changed_ms) / 1000;
    is_old = age_s > MISSED * Math.max(view.interval_s, 2);
    if (lost === null && is_old) {
      alerts.push(["old", "", `The agent of ${view.agent} answers, but its figures are ${span(age_s)} old.`]);
    }
    if (view.store.trouble !== null) {
      alerts.push(["store", "", `The store (${view.store.kind}) cannot be used: ${view.store.trouble}. Nothing is decided until it can; guests run on.`]);
    }
    if (view.is_dry_run) alerts.push(["dry", " note", "Plans are only shown: this agent does nothing by itself (dry run)."]);
    setText(byId("facts"), `agent of ${view.agent}, policy ${view.policy}, store ${view.store.kind}, as of ${clock(view.at_s)}`);
  }
  keyed(byId("alerts"), alerts, ([key]) => key, ([, cls]) => el("p", { cls: `alert${cls}` }), (alert, [, , text]) => setText(alert, text));
  const link = byId("link");
  setText(link, lost !== null ? "no connection" : is_old ? "old" : view ? "live" : "connecting");
  setClass(link, `badge ${lost !== null || is_old ? "bad" : "live"}`);
  document.body.classList.toggle("lost", lost !== null || is_old);
  document.title = lost !== null ? "Godwit: no connection" : "Godwit";
}

function choose(kind, name) {
  if (!state.view) return;
  state.chosen = { kind, name };
  heat.mark(kind, name);
  detail.show(kind, name, state.view, now_s());
}

function unchoose() {
  heat.mark(null, null);
  detail.hide();
  const chosen = state.chosen;
  state.chosen = null;
  if (!chosen) return;
  const data = chosen.kind === "host" ? "host" : "guest";
  for (const element of byId("map").querySelectorAll(`[data-${data}]`)) {
    if (element.dataset[data] === chosen.name) element.focus();
  }
}

heat.begin(choose);
lists.begin(choose, heat.befriend);
detail.begin(unchoose);
setInterval(draw, 1_000);
poll();
