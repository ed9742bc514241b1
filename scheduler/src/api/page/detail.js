// The host or guest that is chosen: its figures, and what can be asked for it.

import { RESOURCES, byId, el, keyed, mib, number, percent, setText, share, span } from "./dom.js";
import * as chart from "./chart.js";
import { act, ask } from "./ask.js";

const box = byId("detail");
let chosen = null;
let close = () => {};

export function begin(onClose) {
  close = onClose;
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && chosen && !byId("confirm").open) close();
  });
}

export function hide() {
  chosen = null;
  box.hidden = true;
  box.replaceChildren();
}

export function show(kind, name, view, now_s) {
  chosen = { kind, name };
  const closer = el("button", { type: "button", text: "Close" });
  closer.addEventListener("click", () => close());
  const head = el("div", { cls: "bar" }, el("h3", { text: name }), closer);
  const table = el("table", {}, el("tbody"));
  const told = el("p", { role: "status" });
  const parts = kind === "host" ? hostButtons(name, told) : guestButtons(name, told);
  box.replaceChildren(head, table, el("div"), parts, told);
  box.dataset.kind = kind;
  box.hidden = false;
  draw(view, now_s);
  if (kind === "host") drawHistory();
}

function hostButtons(name, told) {
  const path = `/v1/hosts/${encodeURIComponent(name)}/drain`;
  const drain = el("button", { cls: "act", type: "button", id: "drain", text: "Drain" });
  drain.addEventListener("click", () => act(
    `Move all guests away from ${name} and let none come?`, "Drain", told, "PUT", path));
  const undrain = el("button", { type: "button", id: "undrain", text: "End draining" });
  undrain.addEventListener("click", () => act(
    `Let guests come to ${name} again?`, "End draining", told, "DELETE", path));
  return el("p", { cls: "buttons" }, drain, undrain);
}

function guestButtons(name, told) {
  const target = el("select", { id: "target", "aria-label": "Where to" });
  const migrate = el("button", { cls: "act", type: "button", id: "migrate", text: "Migrate" });
  migrate.addEventListener("click", () => {
    const to = target.value === "" ? null : target.value.slice(1);
    const where = to === null ? "to the best place" : `to ${to}`;
    act(`Migrate ${name} ${where}?`, "Migrate", told, "POST", "/v1/moves", { guest: name, to, reason: "asked for on the page" });
  });
  const abort = el("button", { type: "button", id: "abort", text: "Give its migration up" });
  abort.addEventListener("click", () => act(
    `Give up the migration of ${name}?`, "Give it up", told, "DELETE", `/v1/moves/${encodeURIComponent(name)}`));
  return el("p", { cls: "buttons" }, target, migrate, abort);
}

export function draw(view, now_s) {
  if (!chosen) return;
  const list = chosen.kind === "host" ? view.hosts : view.guests;
  const found = list.find(({ name }) => name === chosen.name);
  const rows = !found ? [["", "It is not there any more."]]
    : chosen.kind === "host" ? hostRows(found, view, now_s) : guestRows(found, view);
  const body = box.querySelector("tbody");
  keyed(body, rows, ([title]) => title, ([title]) => el("tr", {}, el("th", { text: title, scope: "row" }), el("td")),
    (row, [, text]) => setText(row.lastChild, text));
  for (const button of box.querySelectorAll(".buttons button")) button.disabled = !found;
  if (!found) return;
  if (chosen.kind === "host") {
    byId("drain").disabled = found.state === "draining";
    byId("undrain").disabled = found.state !== "draining";
  } else {
    byId("migrate").disabled = found.is_migrating;
    byId("abort").disabled = !found.is_migrating;
    const targets = view.hosts.filter((host) => host.name !== found.host && host.state === "active" && !host.is_stale);
    // The empty value is the best place; names have a mark before them, since a host may be called anything.
    const options = [["", "the best place"], ...targets.map(({ name }) => [`=${name}`, name])];
    keyed(byId("target"), options, ([value]) => value, ([value, text]) => el("option", { value, text }));
  }
}

// Draws the chosen host's history anew.
export async function drawHistory() {
  const asked = chosen;
  if (asked?.kind !== "host") return;
  const charts = box.children[2];
  try {
    const { value } = await ask("GET", `/v1/hosts/${encodeURIComponent(asked.name)}/history`);
    if (chosen === asked) charts.replaceChildren(...Object.keys(RESOURCES).map((resource) => chart.history(value, resource)));
  } catch (error) {
    if (chosen === asked) charts.replaceChildren(el("p", { cls: "bad", text: error.message }));
  }
}

function hostRows(host, view, now_s) {
  const rows = [["State", host.is_stale ? `silent for ${span(now_s - host.heard_at_s)}: these figures are old` : host.state]];
  for (const [resource, { name, field, of }] of Object.entries(RESOURCES)) {
    rows.push([name, `${percent(share(host.used, host.capacity, resource))}: ${of(host.used[field])} of ${of(host.capacity[field])}`]);
  }
  const { cpu, memory, memory_full, disk } = host.pressure;
  rows.push(["Waiting", `for CPU ${percent(cpu)}, memory ${percent(memory)} (all: ${percent(memory_full)}), disk ${percent(disk)}`]);
  rows.push(["Guests", String(view.guests.filter((guest) => guest.host === host.name).length)]);
  rows.push(["Agent", host.api ?? "not there"]);
  if (host.troubles.length > 0) rows.push(["Troubles", host.troubles.join("; ")]);
  return rows;
}

function guestRows(guest, view) {
  const rows = [["Host", guest.host], ["State", guest.state + (guest.is_migrating ? ", migrating" : "") + (guest.is_pinned ? ", pinned" : "")]];
  rows.push(["CPU", `${number(guest.usage.cpu_cores, 2)} of ${guest.vcpus} cores, peak ${number(guest.peak.cpu_cores, 2)}, waits ${percent(guest.steal)}`]);
  rows.push(["memory", `may use ${mib(guest.usage.memory_mib)} of ${mib(guest.memory_max_mib)}; uses ${mib(guest.memory_used_mib)}, needs ${mib(guest.memory_needed_mib)}`]);
  if (guest.swap_writes_per_s > 0) rows.push(["Swap", `${number(guest.swap_writes_per_s)} pages written a second`]);
  rows.push(["network", `${number(guest.usage.network_mbit)} Mbit/s, peak ${number(guest.peak.network_mbit)}`]);
  rows.push(["disk", `${number(guest.usage.disk_mib)} MiB/s, peak ${number(guest.peak.disk_mib)}`]);
  rows.push(["Priority", String(guest.priority)]);
  const said = guest.gray_box;
  if (said !== null) {
    rows.push(["Application", `${number(said.served_per_s)} requests/s in ${number(said.response_s * 1000)} ms, ${number(said.dropped_per_s)} dropped`
      + (said.promised_response_s > 0 ? `; promised ${number(said.promised_response_s * 1000)} ms` : "")]);
  }
  const talks = view.talks.filter(({ one, other }) => one === guest.name || other === guest.name).slice(0, 8);
  if (talks.length > 0) {
    rows.push(["Talks with", talks.map(({ one, other, mbit }) => `${one === guest.name ? other : one} (${number(mbit)} Mbit/s)`).join(", ")]);
  }
  return rows;
}
