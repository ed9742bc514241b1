// Hotspots, migrations, plans, groups of guests that talk, and what is odd.

import { RESOURCES, byId, bytes, clock, el, keyed, mib, number, percent, setText, span } from "./dom.js";
import * as chart from "./chart.js";
import { act, ask } from "./ask.js";

// Charts of this many hotspots are kept up to date.
const HISTORIES_MAX = 8;

// Groups that are shown, and traffic from which on guests count as talking.
const GROUPS_MAX = 40;
const TALK_MBIT = 1;

let choose = () => {};
let befriend = () => {};

export function begin(onChoose, onBefriend) {
  choose = onChoose;
  befriend = onBefriend;
  byId("propose").addEventListener("click", propose);
}

function nameButton(kind, name) {
  const button = el("button", { cls: "name", type: "button", text: name });
  button.addEventListener("click", () => choose(kind, name));
  return button;
}

// Its place in a list stays although its figures change.
const hotspotKey = (hotspot) => JSON.stringify([hotspot.host, hotspot.guest, hotspot.resource, hotspot.since_s]);
const moveKey = (move) => JSON.stringify([move.guest, move.began_s, move.agent]);

// Shares read as percent; swap writes and response times are figures of their own.
const figure = (value, threshold) => (threshold <= 1.5 ? percent(value) : number(value));

function empty(text) {
  return el("li", { cls: "quiet", text });
}

function fill(list, items, keyOf, make, update, none) {
  list.querySelector(":scope > li.quiet")?.remove();
  keyed(list, items, keyOf, make, update);
  if (items.length === 0) list.append(empty(none));
}

export function draw(view, now_s) {
  const hot = view.hotspots.filter((hotspot) => hotspot.ended_s === null);
  const cooled = view.hotspots.filter((hotspot) => hotspot.ended_s !== null);
  fill(byId("hot"), hot, hotspotKey, makeHotspot, (card, item) => drawHotspot(card, item, now_s), "None.");
  setText(byId("cooled-title"), `${cooled.length} that are gone`);
  byId("cooled-box").hidden = cooled.length === 0;
  fill(byId("cooled"), cooled, hotspotKey, makeHotspot, (card, item) => drawHotspot(card, item, now_s), "None.");
  const moving = view.moves.filter((move) => move.ended_s === null);
  const moved = view.moves.filter((move) => move.ended_s !== null);
  fill(byId("moves"), moving, moveKey, makeMove, (card, move) => drawMove(card, move, now_s), "None under way.");
  setText(byId("moved-title"), `${moved.length} that ended`);
  byId("moved-box").hidden = moved.length === 0;
  fill(byId("moved"), moved, moveKey, makeMove, (card, move) => drawMove(card, move, now_s), "None.");
  drawPlan(byId("plan"), view.plan, now_s, "This agent has made no plan yet.");
  drawGroups(view);
  const troubles = view.hosts.flatMap((host) => host.troubles.map((trouble) => `${host.name}: ${trouble}`));
  fill(byId("remarks"), [...view.remarks, ...troubles], (text) => text, (text) => el("li", { text }), null, "Nothing.");
}

function makeHotspot(hotspot) {
  const head = el("h3", {}, nameButton("host", hotspot.host));
  if (hotspot.guest !== null) head.append(" · ", nameButton("guest", hotspot.guest));
  head.append(` · ${RESOURCES[hotspot.resource].name}`);
  const card = el("li", { cls: "card" }, head, el("p"), el("p", { cls: "quiet" }), el("div"));
  return card;
}

function drawHotspot(card, hotspot, now_s) {
  const [, figures, why] = card.children;
  const { current, predicted, threshold } = hotspot;
  const ago = hotspot.ended_s === null
    ? `for ${span(now_s - hotspot.since_s)}`
    : `from ${clock(hotspot.since_s)} to ${clock(hotspot.ended_s)}`;
  setText(figures, `${figure(current, threshold)} now, ${figure(predicted, threshold)} expected, `
    + `${figure(threshold, threshold)} is the limit; ${ago}`);
  setText(why, hotspot.why);
}

// Asks for the history of hosts that are hot, and draws it.
export async function drawHistories(view) {
  const hot = view.hotspots.filter((hotspot) => hotspot.ended_s === null).slice(0, HISTORIES_MAX);
  const known = new Map();
  for (const hotspot of hot) {
    if (!known.has(hotspot.host)) {
      const asked = ask("GET", `/v1/hosts/${encodeURIComponent(hotspot.host)}/history`);
      known.set(hotspot.host, asked.then(({ value }) => value, () => null));
    }
    const history = await known.get(hotspot.host);
    const card = byId("hot").keyed?.get(hotspotKey(hotspot));
    if (history && card) card.lastChild.replaceChildren(chart.history(history, hotspot.resource));
  }
}

const STAGES = {
  preparing: "preparing", moving: "moving", completed: "completed", failed: "failed: the guest runs at the source",
  "in-doubt": "in doubt: it is being found out where the guest runs",
};

function makeMove(move) {
  const head = el("h3", {}, nameButton("guest", move.guest), ": ", nameButton("host", move.from), " → ", nameButton("host", move.to));
  const card = el("li", { cls: "card" }, head, el("p"), el("progress", { max: "1" }), el("div"), el("p", { cls: "bad" }),
    el("p", { cls: "quiet" }), el("p", { cls: "buttons" }));
  if (move.ended_s === null) {
    const told = el("span", { role: "status" });
    const abort = el("button", { type: "button", text: "Give it up" });
    abort.addEventListener("click", () => act(
      `Give up the migration of ${move.guest}? It runs on at ${move.from}.`, "Give it up", told, "DELETE",
      `/v1/moves/${encodeURIComponent(move.guest)}`));
    card.lastChild.append(abort, told);
  }
  return card;
}

function drawMove(card, move, now_s) {
  const [, words, progress, curve, wrong, why] = card.children;
  const parts = [STAGES[move.stage] ?? move.stage];
  if (move.ended_s === null) parts.push(`for ${span(now_s - move.began_s)}`);
  else parts.push(`at ${clock(move.ended_s)} after ${span(move.ended_s - move.began_s)}`);
  if (move.downtime_ms !== null) parts.push(`pause ${number(move.downtime_ms)} ms`);
  if (move.wire_bytes !== null) parts.push(`${bytes(move.wire_bytes)} sent`);
  parts.push(`by the agent of ${move.agent}`);
  setText(words, parts.join(", "));
  const last = move.curve.at(-1);
  progress.hidden = move.ended_s !== null;
  if (last && last.expected_bytes > 0) progress.value = Math.min(1, last.applied_bytes / last.expected_bytes);
  else progress.removeAttribute("value");
  const drawn = `${move.curve.length} ${last?.at_s}`;
  if (curve.dataset.drawn !== drawn) {
    curve.dataset.drawn = drawn;
    curve.replaceChildren(chart.move(move.curve, move.began_s));
  }
  setText(wrong, move.error ?? "");
  setText(why, move.reason);
}

function drawPlan(box, plan, now_s, none) {
  if (plan === null) {
    box.replaceChildren(el("p", { cls: "quiet", text: none }));
    return;
  }
  const drawn = JSON.stringify(plan);
  if (box.dataset.drawn !== drawn) {
    box.dataset.drawn = drawn;
    box.replaceChildren(el("p", { cls: "quiet" }), steps(plan), notes(plan));
  }
  setText(box.firstChild, `By the policy ${plan.policy} at ${clock(plan.at_s)}, ${span(now_s - plan.at_s)} ago`);
}

function steps(plan) {
  if (plan.steps.length === 0) return el("p", { text: "Nothing is to be done." });
  const titles = ["Wave", "Guest", "What", "Expected", "State", "Why"].map((text) => el("th", { text, scope: "col" }));
  const rows = plan.steps.map((step) => {
    const { action } = step;
    const is_move = action.kind === "migrate";
    const what = is_move ? `${action.from} → ${action.to}` : `memory ${mib(action.from_mib)} → ${mib(action.to_mib)}`;
    const cost = is_move
      ? `${span(action.cost.total_s)}, ${mib(action.cost.wire_mib)}, pause ${number(action.cost.downtime_ms)} ms` : "";
    const cells = [String(step.wave + 1), step.guest, what, cost, step.state, step.error ?? step.reason];
    const row = el("tr", {}, ...cells.map((text) => el("td", { text })));
    if (step.state === "failed") row.className = "bad";
    return row;
  });
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...titles)), el("tbody", {}, ...rows));
  return el("div", { cls: "scroll", tabindex: "0", role: "region", "aria-label": "Steps" }, table);
}

const notes = (plan) => el("ul", { cls: "quiet" }, ...plan.notes.map((text) => el("li", { text })));

async function propose() {
  const [button, box] = [byId("propose"), byId("proposal")];
  button.disabled = true;
  delete box.dataset.drawn;
  try {
    const { value } = await ask("GET", "/v1/plan");
    drawPlan(box, value, value.at_s, "");
    box.prepend(el("h3", { text: "What would be done now; nothing is done" }));
  } catch (error) {
    box.replaceChildren(el("p", { cls: "bad", text: error.message }));
  }
  button.disabled = false;
}

// Groups: guests between which traffic leads, by union-find.
function groups(view) {
  const leader = new Map();
  const find = (name) => {
    let top = name;
    while ((leader.get(top) ?? top) !== top) top = leader.get(top);
    while (name !== top) {
      const next = leader.get(name) ?? name;
      leader.set(name, top);
      name = next;
    }
    return top;
  };
  const talks = view.talks.filter((talk) => talk.mbit >= TALK_MBIT);
  for (const { one, other } of talks) leader.set(find(one), find(other));
  const hosts = new Map(view.guests.map((guest) => [guest.name, guest.host]));
  const found = new Map();
  for (const { one, other, mbit } of talks) {
    const top = find(one);
    if (!found.has(top)) found.set(top, { members: new Set(), mbit: 0, across: 0 });
    const group = found.get(top);
    group.members.add(one).add(other);
    group.mbit += mbit;
    if (hosts.get(one) !== hosts.get(other)) group.across += mbit;
  }
  return [...found.values()].map(({ members, ...sums }) => ({
    ...sums,
    members: [...members].sort().map((name) => ({ name, host: hosts.get(name) ?? "?" })),
  })).sort((one, other) => other.across - one.across || other.mbit - one.mbit).slice(0, GROUPS_MAX);
}

function drawGroups(view) {
  const all = groups(view);
  const keyOf = ({ members }) => JSON.stringify(members.map(({ name }) => name));
  fill(byId("groups"), all, keyOf, makeGroup, drawGroup, "None.");
}

function makeGroup({ members }) {
  const names = members.map(({ name }) => name);
  const card = el("li", { cls: "card" }, el("p"), el("p"));
  const list = card.lastChild;
  for (const name of names.slice(0, 32)) list.append(nameButton("guest", name), el("span", { cls: "quiet" }), " ");
  if (names.length > 32) list.append(`and ${names.length - 32} more`);
  for (const [event, shown] of [["mouseenter", names], ["focusin", names], ["mouseleave", []], ["focusout", []]]) {
    card.addEventListener(event, () => befriend(shown));
  }
  return card;
}

function drawGroup(card, { members, mbit, across }) {
  const [words, list] = card.children;
  const hosts = new Set(members.map(({ host }) => host)).size;
  setText(words, `${members.length} guests on ${hosts} hosts: ${number(mbit)} Mbit/s, ${number(across)} of it between hosts`);
  members.slice(0, 32).forEach(({ host }, index) => setText(list.children[2 * index + 1], ` (${host})`));
}
