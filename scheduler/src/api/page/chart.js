// Curves as SVG.

import { RESOURCES, bytes, el, number, percent, svg } from "./dom.js";

const WIDTH = 400;
const HEIGHT = 100;

const finite = (value) => typeof value === "number" && Number.isFinite(value);

function frame(label) {
  const picture = svg("svg", {
    class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label,
  });
  picture.append(svg("title", {}, label));
  return picture;
}

// Points with x and y between 0 and 1.
function line(picture, cls, points) {
  const place = ([x, y]) => `${(x * WIDTH).toFixed(1)},${((1 - Math.min(1, Math.max(0, y))) * (HEIGHT - 4) + 2).toFixed(1)}`;
  const known = points.filter(([x, y]) => finite(x) && finite(y));
  if (known.length > 0) picture.append(svg("polyline", { class: cls, points: known.map(place).join(" ") }));
}

const key = (entries) => el("ul", { cls: "key" }, ...entries.map(([cls, text]) => el("li", { cls, text })));

// Load of a host over time, its limit, and what is expected next.
export function history(view, resource) {
  const { field, name } = RESOURCES[resource];
  const points = view.points.map((point) => [point.at_s, point.share[field]]).filter(([, y]) => finite(y));
  const limit = view.threshold[field];
  const predicted = view.predicted?.[field];
  if (points.length < 2) return el("p", { cls: "quiet", text: `Not enough is known of ${name} yet.` });
  const [first] = points[0];
  const [last, now] = points.at(-1);
  const step = (last - first) / (points.length - 1);
  const span = last - first + 4 * step || 1;
  const top = Math.max(1, ...points.map(([, y]) => y), finite(predicted) ? predicted : 0) * 1.05;
  const x = (at) => (at - first) / span;
  const label = `${name}: ${percent(now)} now` + (finite(predicted) ? `, ${percent(predicted)} expected next` : "");
  const picture = frame(label);
  line(picture, "share", points.map(([at, y]) => [x(at), y / top]));
  const entries = [["share", `${name} of the host: ${percent(now)}`]];
  if (finite(limit) && limit > 0) {
    line(picture, "limit", [[0, limit / top], [1, limit / top]]);
    entries.push(["limit", `limit ${percent(limit)}`]);
  }
  if (finite(predicted)) {
    line(picture, "predicted", [[x(last), now / top], [1, predicted / top]]);
    entries.push(["predicted", `expected ${percent(predicted)}`]);
  }
  return el("div", {}, picture, key(entries));
}

// How a migration goes: bytes there and bytes needed, rate, and pause if the guest were stopped.
export function move(curve, began_s) {
  if (curve.length < 2) return el("p", { cls: "quiet", text: "No curve yet." });
  const last = curve.at(-1);
  const span = Math.max(last.at_s - began_s, 1e-3);
  const top = (values) => Math.max(1e-9, ...values.filter(finite)) * 1.05;
  const most = top(curve.map((point) => Math.max(point.applied_bytes, point.expected_bytes)));
  const fastest = top(curve.map((point) => point.rate_bytes_per_s));
  const longest = top(curve.map((point) => point.predicted_ms));
  const label = `${bytes(last.applied_bytes)} of ${bytes(last.expected_bytes)}, round ${last.round}`;
  const picture = frame(label);
  const draw = (cls, of) => line(picture, cls, curve.map((point) => [(point.at_s - began_s) / span, of(point)]));
  draw("expected", (point) => point.expected_bytes / most);
  draw("applied", (point) => point.applied_bytes / most);
  draw("rate", (point) => (finite(point.rate_bytes_per_s) ? point.rate_bytes_per_s / fastest : NaN));
  draw("pause", (point) => (finite(point.predicted_ms) ? point.predicted_ms / longest : NaN));
  const entries = [["applied", `there: ${bytes(last.applied_bytes)}`], ["expected", `needed: ${bytes(last.expected_bytes)}`]];
  if (finite(last.rate_bytes_per_s)) entries.push(["rate", `${bytes(last.rate_bytes_per_s)}/s`]);
  if (finite(last.predicted_ms)) entries.push(["pause", `pause ${number(last.predicted_ms)} ms`]);
  entries.push(["round", `round ${last.round}`]);
  return el("div", {}, picture, key(entries));
}
