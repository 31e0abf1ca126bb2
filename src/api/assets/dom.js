// Creates elements, and formats numbers and times. Text is inserted as text, never as markup: names come from the settings.

const SVG = "http://www.w3.org/2000/svg";

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(3)) {
    if (child !== undefined && child !== null && child !== false) element.append(child);
  }
  return element;
}

export const h = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
export const svg = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

// Sets the text of an element only if it differs, so that a selection in it stays.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const ZONE = Intl.DateTimeFormat().resolvedOptions().timeZone || "UTC";

// The browser's time zone with its offset at this time, such as `Europe/Berlin, UTC+1`.
export function zoneName(at = new Date()) {
  const minutes = -at.getTimezoneOffset();
  const sign = minutes < 0 ? "−" : "+", hours = Math.floor(Math.abs(minutes) / 60), rest = Math.abs(minutes) % 60;
  const offset = minutes === 0 ? "UTC" : `UTC${sign}${hours}${rest ? ":" + String(rest).padStart(2, "0") : ""}`;
  return ZONE === "UTC" || ZONE === offset ? offset : `${ZONE}, ${offset}`;
}

const two = (n) => String(n).padStart(2, "0");
const day = (d) => `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())}`;

// A time in the browser's zone, in the same form for every language: `2026-11-27 17:04`.
export function when(text, seconds = false) {
  const d = new Date(text);
  return `${day(d)} ${two(d.getHours())}:${two(d.getMinutes())}${seconds ? ":" + two(d.getSeconds()) : ""}`;
}

export function shortWhen(text) {
  const d = new Date(text);
  const clock = `${two(d.getHours())}:${two(d.getMinutes())}`;
  return day(d) === day(new Date()) ? clock : `${day(d).slice(5)} ${clock}`;
}

export const number = (n) => Math.round(n).toLocaleString("en");

export function short(n) {
  const units = ["", "k", "M", "G", "T"];
  let at = 0;
  while (Math.abs(n) >= 1000 && at < units.length - 1) { n /= 1000; at += 1; }
  return (at === 0 ? String(Math.round(n)) : n.toFixed(Math.abs(n) < 10 ? 1 : 0)) + units[at];
}

export function bytes(n) {
  if (n === undefined || n === null) return "–";
  const sign = n < 0 ? "−" : "";
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let at = 0, size = Math.abs(n);
  while (size >= 1024 && at < units.length - 1) { size /= 1024; at += 1; }
  return sign + (at === 0 || size >= 100 ? size.toFixed(0) : size.toFixed(1)) + " " + units[at];
}

export function span(seconds) {
  if (seconds === undefined || seconds === null) return "–";
  if (seconds === 0) return "0 s";
  if (seconds < 0.0995) return Math.round(seconds * 1000) + " ms";
  if (seconds < 9.95) return seconds.toFixed(1) + " s";
  if (seconds < 90) return Math.round(seconds) + " s";
  if (seconds < 5400) return Math.round(seconds / 60) + " min";
  if (seconds < 129600) return (seconds / 3600).toFixed(seconds < 36000 ? 1 : 0) + " h";
  return Math.round(seconds / 86400) + " d";
}

// Seconds in the largest unit that divides them, as in settings.
export function exactly(seconds) {
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (seconds >= size && seconds % size === 0) return `${number(seconds / size)} ${unit}`;
  }
  return `${number(seconds)} s`;
}

export function ago(text) {
  const seconds = (Date.now() - new Date(text)) / 1000;
  if (Math.abs(seconds) < 2) return "now";
  return seconds >= 0 ? `${span(seconds)} ago` : `in ${span(-seconds)}`;
}

const relative = new Set();

// A time relative to now, which is updated, with the absolute time as its title.
export function time(text, { absolute = false, seconds = false } = {}) {
  if (!text) return h("span", { class: "soft" }, "–");
  const title = `${when(text, true)} ${zoneName(new Date(text))}`;
  const element = h("time", { datetime: text, title }, absolute ? when(text, seconds) : ago(text));
  if (!absolute) relative.add(new WeakRef(element));
  return element;
}

setInterval(() => {
  for (const held of relative) {
    const element = held.deref();
    if (!element || (!element.isConnected && element.dataset.seen)) { relative.delete(held); continue; }
    if (element.isConnected) element.dataset.seen = "1";
    say(element, ago(element.dateTime));
  }
}, 5000);

export const STATES = ["running", "waiting", "paused", "interrupted", "failed", "cancelled", "succeeded", "never"];
export const isActive = (task) => Boolean(task) && ["waiting", "running", "paused", "interrupted"].includes(task.state);

export function badge(state) {
  return h("span", { class: `state s-${state}` }, h("i", { "aria-hidden": "true" }), state === "never" ? "never swept" : state);
}

export function took(task) {
  if (!task.started_at) return undefined;
  return (new Date(task.finished_at || Date.now()) - new Date(task.started_at)) / 1000;
}

let hiding;
export function announce(text, isBad = false) {
  const said = document.getElementById("said");
  clearTimeout(hiding);
  said.textContent = text;
  said.className = isBad ? "toast shown bad" : "toast shown";
  hiding = setTimeout(() => { said.className = "toast"; }, isBad ? 8000 : 3500);
}

// Delays an action and merges requests for it: it runs once, at the earliest requested time, and not twice within `least` ms.
export function later(act, least = 1000) {
  let timer, due = Infinity, last = -Infinity;
  return {
    soon(ms) {
      const at = Math.max(performance.now() + ms, last + least);
      if (at >= due) return;
      clearTimeout(timer);
      due = at;
      timer = setTimeout(() => { due = Infinity; last = performance.now(); act(); }, Math.min(at - performance.now(), 2 ** 31 - 1));
    },
    // Cancels the pending action.
    stop() { clearTimeout(timer); due = Infinity; last = performance.now(); },
  };
}

// Milliseconds until the first of these times that lies ahead; undefined if none does.
export function untilNext(times) {
  const ahead = times.filter(Boolean).map((at) => new Date(at) - Date.now());
  return ahead.length ? Math.max(3000, Math.min(...ahead) + 1000) : undefined;
}
