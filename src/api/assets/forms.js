// Dialogs for operators: a sweep, limits of a running one, schedule, bounds, forecast. An error of the API is shown at its field.

import { ask, contractPath, instancePath, post } from "./api.js";
import { ZONE, announce, exactly, h, when, zoneName } from "./dom.js";

// The limits on load as the API describes them: a new one needs no change here.
let known;
async function limitFields() {
  if (!known) {
    const { properties } = (await ask("openapi.json")).components.schemas.LimitWishes;
    known = Object.entries(properties).map(([name, about]) => {
      const is = (type) => [about.type].flat().includes(type);
      const label = (name[0].toUpperCase() + name.slice(1)).replaceAll("_", " ");
      return { name, label, hint: about.description, kind: is("boolean") ? "switch" : is("number") ? "number" : undefined };
    });
  }
  return known;
}

const PACE = [
  { name: "intensity", label: "Intensity", hint: "Largest share of the master's time, above 0 and up to 1", kind: "number" },
  { name: "max_keys_per_sec", label: "Ceiling, keys/s", hint: "On each master; 0: none", kind: "number" },
];

class Wrong extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

function seconds(name, text) {
  const found = /^(\d+(?:\.\d+)?)\s*(s|min|h|d)?$/.exec(text.trim().replaceAll(",", ""));
  if (!found) throw new Wrong(name, "A duration such as 90s, 30min, 2h or 1d.");
  return Math.round(found[1] * { s: 1, min: 60, h: 3600, d: 86400 }[found[2] || "s"]);
}

function parse(field, text) {
  if (field.kind === "number") {
    const n = Number(text);
    if (!Number.isFinite(n)) throw new Wrong(field.name, "A number.");
    return n;
  }
  if (field.kind === "duration") return seconds(field.name, text);
  if (field.kind === "switch") return text === "true";
  if (field.kind === "list") {
    return text.split(/[\s,]+/).filter(Boolean).map((part) => {
      if (!/^\d+$/.test(part)) throw new Wrong(field.name, "Numbers with commas between, such as 0, 3.");
      return Number(part);
    });
  }
  return text.trim();
}

// A dialog with these fields. `act` gets the values by name, without the empty ones, and may throw an error of the API.
function dialog({ title, about, fields, more = [], submit, act, second }) {
  const inputs = new Map();
  const make = (field) => {
    const id = `f-${field.name}`;
    const attributes = { id, name: field.name, "aria-describedby": `${id}-hint ${id}-wrong` };
    let input;
    if (field.kind === "check") input = h("input", { ...attributes, type: "checkbox", onchange: field.onchange });
    else if (field.kind === "select" || field.kind === "switch") {
      const asSet = field.placeholder ? `as set (${field.placeholder})` : "as set";
      const options = field.options || [["", asSet], ["true", "true"], ["false", "false"]];
      input = h("select", attributes, options.map(([value, text]) => h("option", { value }, text)));
    } else if (field.kind === "moment") input = h("input", { ...attributes, type: "datetime-local", step: 1 });
    else {
      const mode = field.kind === "number" ? "decimal" : undefined;
      input = h("input", { ...attributes, type: "text", inputmode: mode, autocomplete: "off", spellcheck: "false", placeholder: field.placeholder });
    }
    if (field.kind === "check") input.checked = Boolean(field.value); else if (field.value !== undefined) input.value = field.value;
    const wrong = h("span", { class: "wrong", id: `${id}-wrong`, role: "alert" });
    inputs.set(field.name, { field, input, wrong });
    const label = h("label", { for: id }, field.label);
    const hint = h("span", { class: "hint", id: `${id}-hint` }, field.hint || "");
    return field.kind === "check" ? h("div", { class: "field check" }, h("div", {}, input, label), hint, wrong)
      : h("div", { class: "field" }, label, input, hint, wrong);
  };
  const general = h("p", { class: "wrong", role: "alert" });
  const button = h("button", { class: "primary", type: "submit" }, submit);
  const close = () => box.close();
  const box = h("dialog", { "aria-labelledby": "dialog-title" }, h("form", { novalidate: true, onsubmit: onSubmit },
    h("h2", { id: "dialog-title" }, title), about ? h("p", { class: "soft" }, about) : "",
    h("div", { class: "fields" }, fields.map(make)),
    more.length ? h("details", {}, h("summary", {}, "Load limits"), h("div", { class: "fields" }, more.map(make))) : "",
    general,
    h("div", { class: "ends" }, second ? h("button", { type: "button", class: "left", onclick: () => run(second.act, second.done) }, second.text) : "",
      h("button", { type: "button", onclick: close }, "Close"), button)));

  function complain(error) {
    const named = error.field || [...inputs.keys()].find((name) => {
      const words = [name, name.replaceAll("_", "-")];
      return words.some((word) => new RegExp(`(^|[^\\w-])(--)?${word}([^\\w-]|$)`).test(error.message));
    });
    const place = inputs.get(named);
    const text = error.hint ? `${error.message} ${error.hint}` : error.message;
    if (!place) { general.textContent = text; return; }
    place.wrong.textContent = text;
    place.input.setAttribute("aria-invalid", "true");
    const folded = place.input.closest("details");
    if (folded) folded.open = true;
    place.input.focus();
  }

  async function run(work, done) {
    general.textContent = "";
    for (const { input, wrong } of inputs.values()) { wrong.textContent = ""; input.removeAttribute("aria-invalid"); }
    button.disabled = true;
    const slow = setTimeout(() => { button.textContent = "Working…"; }, 400);
    try {
      const filled = {};
      for (const [name, { field, input }] of inputs) {
        if (field.kind === "check") filled[name] = input.checked;
        else if (input.value.trim() !== "" && !input.disabled) filled[name] = parse(field, input.value);
      }
      await work(filled);
      box.close();
      announce(done);
    } catch (error) {
      if (error.status !== 401) complain(error); else box.close();
    } finally {
      clearTimeout(slow);
      button.textContent = submit;
      button.disabled = false;
    }
  }
  function onSubmit(event) {
    event.preventDefault();
    run(act.work, act.done);
  }
  box.addEventListener("close", () => box.remove());
  document.body.append(box);
  box.showModal();
  return inputs;
}

const kebab = (name) => name.replaceAll("_", "-");

// The body of a request with these values. Those of limits stand in an object of their own.
function sorted(values, limits) {
  const body = {}, own = {};
  for (const [name, value] of Object.entries(values)) {
    if (limits.some((limit) => limit.name === name)) own[name] = value; else body[name] = value;
  }
  return Object.keys(own).length ? { ...body, limits: own } : body;
}

export async function sweepDialog(shown) {
  let instance, limits;
  try { [instance, limits] = await Promise.all([ask(instancePath(shown.id)), limitFields()]); } catch (error) {
    if (error.status !== 401) announce(error.message, true);
    return;
  }
  const usual = (field) => ({ ...field, placeholder: instance.settings[kebab(field.name)] });
  const fields = [...PACE.map(usual),
    { name: "timeout_s", label: "Timeout", hint: "Such as 30min, 2h", kind: "duration", placeholder: instance.settings.timeout },
    { name: "db", label: "DBs", hint: "Such as 0, 3; empty: each DB with keys that expire", kind: "list", placeholder: instance.settings.db || "all" },
    { name: "touch", label: "Touch", kind: "select", hint: "Command to send for each key that SCAN returned",
      options: [["", `as set (${instance.settings.touch || "auto"})`], ["auto", "auto"], ["none", "none"], ["exists", "exists"], ["ttl", "ttl"]] }];
  if (instance.window) fields.push({ name: "respect_window", label: "Only while the window is open", kind: "check" });
  dialog({
    title: `Sweep ${instance.name}`, about: `${instance.target}. Empty fields have the values of the instance's settings.`,
    fields, more: limits.map(usual), submit: "Sweep now",
    act: { done: "The sweep is created.", work: (filled) => post("api/v1/tasks", { instance_id: instance.id, ...sorted(filled, limits) }) },
  });
}

export async function tuneDialog(id) {
  let task, limits;
  try { [task, limits] = await Promise.all([ask(`api/v1/tasks/${id}`), limitFields()]); } catch (error) {
    if (error.status !== 401) announce(error.message, true);
    return;
  }
  const now = (field) => ({ ...field, value: task.settings[kebab(field.name)] });
  const fields = PACE.map(now), more = limits.map(now);
  dialog({
    title: "Tune the sweep", about: "The limits apply from the next batch on.", fields, more, submit: "Tune",
    act: { done: "The new limits are in force.", work: (filled) => {
      const before = new Map([...fields, ...more].map((field) => [field.name, String(field.value ?? "")]));
      const changed = Object.entries(filled).filter(([name, value]) => String(value) !== before.get(name));
      return ask(`api/v1/tasks/${id}`, { method: "PATCH", body: sorted(Object.fromEntries(changed), limits) });
    } },
  });
}

// The field that each of the contract's error codes is about.
const CODES = { "DCS.4819": "first_scan_at", "DCS.4820": "interval", "DCS.4821": "timeout", "DCS.4822": "scan_keys_count" };

export function scheduleDialog(instance, changed) {
  const schedule = instance.schedule;
  const first = instance.upcoming[0] || (schedule.first_scan_at && new Date(schedule.first_scan_at) > new Date() ? schedule.first_scan_at : "");
  const inputs = dialog({
    title: "Automatic scan",
    about: schedule.cron ? `The settings file has cron ${schedule.cron} (${schedule.zone}). A schedule set here overrides it.` : undefined,
    submit: "Save",
    fields: [
      { name: "enable_auto_scan", label: "Scan automatically", kind: "check", value: schedule.enabled, onchange: follow },
      { name: "first_scan_at", label: "First due time", kind: "moment", hint: `In your time zone: ${zoneName()}`, value: first ? when(first, true).replace(" ", "T") : "" },
      { name: "interval", label: "Every", kind: "duration", hint: "Such as 30min, 6h, 1d; 0: once", value: schedule.interval_s === undefined ? "1 d" : exactly(schedule.interval_s) },
      { name: "timeout", label: "Timeout", kind: "duration", hint: "At least twice the interval", value: exactly(schedule.timeout_s) },
      { name: "scan_keys_count", label: "COUNT of the first SCAN", kind: "number", hint: "10 to 1000", value: String(schedule.count) },
    ],
    act: { done: "The schedule is in force.", work: async (filled) => {
      const body = { enable_auto_scan: filled.enable_auto_scan };
      if (body.enable_auto_scan) {
        Object.assign(body, filled);
        if (filled.first_scan_at) body.first_scan_at = new Date(filled.first_scan_at).toISOString();
      }
      try {
        await ask(contractPath(instance, "scan-expire-keys/autoscan-config"), { method: "PUT", body });
      } catch (error) {
        error.field = CODES[error.code];
        throw error;
      }
      changed();
    } },
    second: schedule.source === "api" && {
      text: "Reset to the settings file", done: "The settings file's schedule is in force.",
      act: async () => { await ask(`${instancePath(instance.id)}/auto-scan`, { method: "DELETE" }); changed(); },
    },
  });
  function follow() {
    const isOn = inputs.get("enable_auto_scan").input.checked;
    for (const [name, { input }] of inputs) if (name !== "enable_auto_scan") input.disabled = !isOn;
  }
  follow();
}

// The dialog for the bounds of an instance.
export function keepDialog(instance, changed) {
  const path = `${instancePath(instance.id)}/keep`;
  const now = (name) => (instance.keep && instance.keep[name] !== "off" ? instance.keep[name] : undefined);
  dialog({
    title: "Bounds", about: "The instance is swept all the time, no faster than these bounds need. Without a bound it is not kept.", submit: "Save",
    fields: [
      { name: "max_backlog", label: "Backlog at most", hint: "On each master: 5% of the keys with a TTL, 100000 keys, or 64MiB", value: now("max_backlog"), placeholder: "no bound" },
      { name: "max_delay", label: "Delay at most", hint: "Time from a key's expiry until it is reclaimed, such as 2s", value: now("max_delay"), placeholder: "no bound" },
    ],
    act: { done: "The bounds are in force.", work: async (filled) => {
      await ask(path, { method: "PUT", body: { max_backlog: filled.max_backlog || "off", max_delay: filled.max_delay || "off" } });
      changed();
    } },
    second: instance.keep_source === "api" && {
      text: "Reset to the settings file", done: "The settings file's bounds are in force.",
      act: async () => { await ask(path, { method: "DELETE" }); changed(); },
    },
  });
}

// The dialog to make a forecast of an instance.
export function forecastDialog(instance, show) {
  dialog({
    title: "Forecast", about: "Takes a random sample of the keys and their TTLs on a replica of each master.", submit: "Sample now",
    fields: [
      { name: "on_master", label: "Sample on the masters themselves", kind: "check", hint: "If there are no replicas: takes a twentieth of a master's time, and frees the expired keys that it meets." },
      { name: "by_prefix", label: "Group keys by the first parts of their names", kind: "check", hint: "Parts of names are shown once and are not stored." },
    ],
    act: { done: "The forecast is made.", work: async (filled) => {
      const zone = ZONE === "UTC" ? {} : { zone: ZONE };
      await show(await post(`${instancePath(instance.id)}/forecast`, { ...filled, ...zone }));
    } },
  });
}
