// Elements and words. Names and reasons come from guests and hosts: they become text, never markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

// An element with a class, text and children.
export function el(tag, { cls, text, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  if (cls) element.className = cls;
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function svg(tag, attributes = {}, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// Writes only what has changed: most of a page is as it was.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setClass(element, cls) {
  if (element.className !== cls) element.className = cls;
}

export function setAttribute(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

// Makes the children of `parent` those of `items`, in order, and keeps elements whose key stays: what has the focus
// keeps it.
export function keyed(parent, items, keyOf, make, update) {
  const old = parent.keyed ?? new Map();
  const now = new Map();
  let next = parent.firstChild;
  for (const item of items) {
    let key = keyOf(item);
    // Two of one name: both are shown.
    while (now.has(key)) key += "\u0000";
    const element = old.get(key) ?? make(item);
    now.set(key, element);
    update?.(element, item);
    if (element === next) next = next.nextSibling;
    else parent.insertBefore(element, next);
  }
  for (const [key, element] of old) if (!now.has(key)) element.remove();
  parent.keyed = now;
}

const finite = (value) => typeof value === "number" && Number.isFinite(value);

export function percent(share) {
  return finite(share) ? `${Math.round(share * 100)} %` : "?";
}

export function number(value, digits = 1) {
  if (!finite(value)) return "?";
  return Math.abs(value) >= 100 ? String(Math.round(value)) : value.toFixed(digits).replace(/\.0+$/, "");
}

export function bytes(value) {
  if (!finite(value)) return "?";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit += 1) value /= 1024;
  return `${number(value)} ${units[unit]}`;
}

export const mib = (value) => bytes(value * 1048576);

export function span(seconds) {
  if (!finite(seconds)) return "?";
  const s = Math.max(0, Math.round(seconds));
  if (s < 120) return `${s} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / 86400)} days`;
}

export function clock(at_s) {
  return finite(at_s) ? new Date(at_s * 1000).toLocaleTimeString() : "?";
}

export const RESOURCES = {
  cpu: { name: "CPU", field: "cpu_cores", of: (value) => `${number(value)} cores` },
  memory: { name: "memory", field: "memory_mib", of: mib },
  network: { name: "network", field: "network_mbit", of: (value) => `${number(value)} Mbit/s` },
  disk: { name: "disk", field: "disk_mib", of: (value) => `${number(value)} MiB/s` },
};

// The share of what there is; null if that is not known.
export function share(used, capacity, resource) {
  const { field } = RESOURCES[resource];
  return finite(used[field]) && capacity[field] > 0 ? used[field] / capacity[field] : null;
}

export function heat(value) {
  return value === null || !finite(value) ? "heat-none" : `heat-${Math.max(0, Math.min(10, Math.floor(value * 10)))}`;
}
