// The heat map: a box a host, a square a guest.

import { RESOURCES, byId, el, heat, keyed, percent, setAttribute, setClass, setText, share, span } from "./dom.js";

const map = byId("map");
const settings = { resource: "cpu", find: "", order: "name" };
let seen = null;
let choose = () => {};
let chosen = null;
let friends = new Set();
// The one square that Tab reaches.
let reached = null;

// `onChoose` is told of a host or guest that was clicked.
export function begin(onChoose) {
  choose = onChoose;
  for (const radio of document.querySelectorAll("#resources input")) {
    radio.addEventListener("change", () => change("resource", radio.value));
  }
  byId("find").addEventListener("input", (event) => change("find", event.target.value.toLowerCase()));
  byId("order").addEventListener("change", (event) => change("order", event.target.value));
  const steps = [...Array(11).keys()].map((level) => el("span", { cls: `heat heat-${level}` }));
  byId("scale").append("0 ", ...steps, " 100 %");
  map.addEventListener("click", (event) => {
    const target = event.target.closest("[data-guest], [data-host]");
    if (target) choose(target.dataset.guest === undefined ? "host" : "guest", target.dataset.guest ?? target.dataset.host);
  });
  map.addEventListener("keydown", walk);
  map.addEventListener("focusin", (event) => reach(event.target.closest(".vm")));
}

function change(name, value) {
  settings[name] = value;
  if (seen) draw(seen.view, seen.now_s);
}

export function mark(kind, name) {
  chosen = kind === null ? null : `${kind} ${name}`;
  if (seen) draw(seen.view, seen.now_s);
}

export function befriend(names) {
  friends = new Set(names);
  if (seen) draw(seen.view, seen.now_s);
}

function reach(square) {
  if (!square || square === reached) return;
  if (reached) reached.tabIndex = -1;
  reached = square;
  square.tabIndex = 0;
}

// Arrow keys: to the sides in reading order, up and down by place on the screen.
function walk(event) {
  const square = event.target.closest(".vm");
  if (!square || event.altKey || event.ctrlKey || event.metaKey) return;
  const squares = [...map.querySelectorAll(".vm")];
  const index = squares.indexOf(square);
  const ends = { Home: 0, End: squares.length - 1, ArrowRight: index + 1, ArrowLeft: index - 1 };
  let next = squares[ends[event.key]];
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    const here = square.getBoundingClientRect();
    const sign = event.key === "ArrowDown" ? 1 : -1;
    let best = Infinity;
    for (const other of squares) {
      const there = other.getBoundingClientRect();
      const down = sign * (there.top - here.top);
      const distance = 4 * down + Math.abs(there.left - here.left);
      if (down > 2 && distance < best) [best, next] = [distance, other];
    }
  }
  if (!(event.key in ends) && !event.key.startsWith("Arrow")) return;
  event.preventDefault();
  next?.focus();
}

// What colours a guest: its share of its own processors or memory, or of its host's links and disks.
function guestShare(guest, host, resource) {
  if (resource === "cpu") return guest.vcpus > 0 ? guest.usage.cpu_cores / guest.vcpus : null;
  if (resource === "memory") return guest.memory_max_mib > 0 ? guest.memory_used_mib / guest.memory_max_mib : null;
  return share(guest.usage, host.capacity, resource);
}

function unknownHost(name) {
  const none = { cpu_cores: 0, memory_mib: 0, network_mbit: 0, disk_mib: 0 };
  return { name, state: "unknown", is_stale: true, is_migrating: false, heard_at_s: NaN, capacity: none, used: none, troubles: [] };
}

export function draw(view, now_s) {
  seen = { view, now_s };
  const hosts = new Map(view.hosts.map((host) => [host.name, { host, guests: [] }]));
  for (const guest of view.guests) {
    if (!hosts.has(guest.host)) hosts.set(guest.host, { host: unknownHost(guest.host), guests: [] });
    hosts.get(guest.host).guests.push(guest);
  }
  const matches = (name) => name.toLowerCase().includes(settings.find);
  let boxes = [...hosts.values()];
  if (settings.find) {
    boxes = boxes.filter(({ host, guests }) => matches(host.name) || guests.some((guest) => matches(guest.name)));
  }
  if (settings.order === "load") {
    const load = ({ host }) => share(host.used, host.capacity, settings.resource) ?? -1;
    boxes.sort((one, other) => load(other) - load(one));
  }
  const hot = new Map();
  for (const { host, resource, ended_s } of view.hotspots) {
    if (ended_s === null) hot.set(host, [...(hot.get(host) ?? []), RESOURCES[resource].name]);
  }
  const stale = view.hosts.filter((host) => host.is_stale).length;
  setText(byId("count"), `${view.hosts.length} hosts, ${view.guests.length} guests`
    + (stale ? `, ${stale} hosts silent` : "") + (settings.find ? `; ${boxes.length} hosts shown` : ""));
  keyed(map, boxes, ({ host }) => host.name, makeBox, (box, entry) => drawBox(box, entry, hot.get(entry.host.name), matches, now_s));
  if (!reached?.isConnected) reach(map.querySelector(".vm"));
}

function makeBox({ host }) {
  const name = el("button", { cls: "name", type: "button", text: host.name });
  name.dataset.host = host.name;
  const load = el("div", { cls: "load" }, ...Object.keys(RESOURCES).map((resource) => {
    const track = el("div", { cls: "track", role: "img" }, el("div", { cls: "fill" }));
    track.dataset.resource = resource;
    return track;
  }));
  const head = el("div", { cls: "head" }, name, el("span", { cls: "share" }));
  return el("article", { cls: "host" }, head, load, el("div", { cls: "marks" }), el("div", { cls: "cells" }));
}

function drawBox(box, { host, guests }, hot, matches, now_s) {
  const [head, load, marks, cells] = box.children;
  const classes = ["host"];
  if (hot) classes.push("hot");
  if (host.is_stale) classes.push("stale");
  if (host.state === "unknown") classes.push("unknown");
  if (chosen === `host ${host.name}`) classes.push("chosen");
  setClass(box, classes.join(" "));
  setText(head.lastChild, percent(share(host.used, host.capacity, settings.resource)));
  for (const track of load.children) {
    const part = share(host.used, host.capacity, track.dataset.resource);
    setAttribute(track, "aria-label", `${RESOURCES[track.dataset.resource].name} ${percent(part)}`);
    setAttribute(track, "title", track.getAttribute("aria-label"));
    setClass(track.firstChild, `fill ${heat(part)}`);
    track.firstChild.style.width = `${Math.min(100, Math.round((part ?? 0) * 100))}%`;
  }
  drawMarks(marks, host, hot, now_s);
  keyed(cells, guests, (guest) => guest.name, makeSquare, (square, guest) => drawSquare(square, guest, host, matches));
}

function drawMarks(marks, host, hot, now_s) {
  const words = [];
  if (hot) words.push(["bad", `hotspot: ${hot.join(", ")}`]);
  if (host.state === "unknown") words.push(["warn", "not known"]);
  else if (host.is_stale || host.state === "silent") words.push(["warn", `silent for ${span(now_s - host.heard_at_s)}`]);
  if (host.state === "draining") words.push(["warn", "draining"]);
  if (host.is_migrating) words.push(["", "migrating"]);
  if (host.troubles.length > 0) words.push(["warn", `${host.troubles.length} troubles`]);
  keyed(marks, words, ([, text]) => text.replace(/[0-9]+ .*/, ""), ([cls]) => el("span", { cls }), (mark, [, text]) => setText(mark, `${text} `));
}

function makeSquare(guest) {
  const square = el("button", { cls: "vm", type: "button", tabindex: "-1" });
  square.dataset.guest = guest.name;
  return square;
}

function drawSquare(square, guest, host, matches) {
  const part = guestShare(guest, host, settings.resource);
  const classes = ["vm", heat(part)];
  if (guest.is_migrating) classes.push("moving");
  if (guest.state !== "running") classes.push("paused");
  if (chosen === `guest ${guest.name}`) classes.push("chosen");
  if (friends.has(guest.name)) classes.push("friend");
  if (settings.find && !matches(guest.name) && !matches(host.name)) classes.push("other");
  setClass(square, classes.join(" "));
  const label = `${guest.name} on ${guest.host}: ${RESOURCES[settings.resource].name} ${percent(part)}`
    + (guest.is_migrating ? ", migrating" : "") + (guest.state === "running" ? "" : `, ${guest.state}`);
  setAttribute(square, "aria-label", label);
  setAttribute(square, "title", label);
}
