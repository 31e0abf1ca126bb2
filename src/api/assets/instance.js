// One instance: the running task, the history of its sweeps, its schedule and bounds, forecast and check.

import { ask, instancePath, isOperator, listen, post, tasks } from "./api.js";
import { forecastChart, sweepChart } from "./chart.js";
import { ago, announce, badge, bytes, exactly, h, isActive, later, number, say, short, span, time, took, untilNext, when } from "./dom.js";
import { forecastDialog, keepDialog, scheduleDialog, sweepDialog, tuneDialog } from "./forms.js";

const CHARTED = 60;
const PAGE = 20;
// Shortest time between two requests for the shards of a running task, in ms; there are none while it does not change.
const SHARDS_MS = 2000;

const pairs = (list) => h("dl", {}, list.filter((pair) => pair && pair[1] !== undefined).map(([name, value]) =>
  h("div", {}, h("dt", {}, name), h("dd", {}, value))));
const card = (title, ...parts) => h("section", { class: "card" }, h("h2", {}, title), parts);
const headings = (names) => h("thead", {}, h("tr", {}, names.map((name) =>
  h("th", { scope: "col", class: name.startsWith("#") ? "n" : undefined }, name.replace("#", "")))));

// How well the bounds of a master are kept, in words.
function kept(figures) {
  return [`${number(figures.laps)} laps`,
    figures.backlog === null ? "" : `about ${number(figures.backlog)} expired keys${figures.max_backlog === null ? "" : ` of at most ${number(figures.max_backlog)}`}`,
    figures.delay_s === null ? "" : `reclaimed at most ${span(figures.delay_s)} after expiry`, `${short(figures.inflow_per_s)} keys/s expire`,
    figures.missed_s > 0 ? `missed for ${span(figures.missed_s)}` : "never missed"].filter(Boolean).join(" · ");
}

// The shards of a task with their DBs, warnings and failures.
function shardsTable(shards) {
  const held = (dbs) => {
    const all = {};
    for (const db of dbs) for (const [reason, s] of Object.entries(db.held_s)) if (s > 0) all[reason] = (all[reason] || 0) + s;
    return Object.entries(all).map(([reason, s]) => `${reason.replaceAll("_", " ")} ${span(s)}`).join(", ") || "–";
  };
  return shards.map((shard) => h("div", { class: "shard" },
    h("p", { class: "shard-head" }, h("b", {}, shard.shard),
      shard.server ? ` ${shard.server.product} ${shard.server.version} at ${shard.server.addr}` : " not reached",
      h("span", { class: "soft" }, ` · memory ${bytes(shard.used_memory.before)} → ${bytes(shard.used_memory.after)}`,
        shard.used_memory_rss?.before ? `, resident ${bytes(shard.used_memory_rss.before)} → ${bytes(shard.used_memory_rss.after)}` : "",
        shard.evicted_keys ? ` · ${number(shard.evicted_keys)} evicted` : "", ` · ${shard.touch}`)),
    shard.failure ? h("p", { class: "bad" }, shard.failure.message, shard.failure.hint ? h("span", { class: "soft" }, ` ${shard.failure.hint}`) : "") : "",
    shard.keep ? h("p", { class: shard.keep.is_missed ? "bad" : undefined }, "Bounds: ", kept(shard.keep)) : "",
    shard.warnings.map((warning) => h("p", { class: "warned" }, warning)),
    shard.dbs.length === 0 ? "" : h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `DBs of ${shard.shard}` },
      h("table", { class: "dense" }, h("caption", { class: "hidden" }, `DBs of ${shard.shard}`),
        headings(["DB", "#Done", "#Keys at start", "#Scanned", "#Reclaimed", "#Batches", "#Slice p99", "#Active", "#Rested", "#Waited", "Held"]),
        h("tbody", {}, shard.dbs.map((db) => h("tr", {},
          h("td", {}, db.db), h("td", { class: "n" }, db.complete ? "all" : `${(100 * db.fraction).toFixed(1)} %`),
          [db.keys_at_start, db.scanned, db.reclaimed, db.batches].map((n) => h("td", { class: "n" }, number(n))),
          h("td", { class: "n" }, db.slice_us.p99 < 1000 ? `${db.slice_us.p99} µs` : span(db.slice_us.p99 / 1e6)),
          [db.active_s, db.rested_s, db.waited_s].map((s) => h("td", { class: "n" }, span(s))),
          h("td", {}, held([db])))))))));
}

function report(sweep) {
  const totals = sweep.totals;
  const settings = Object.entries(sweep.settings).map(([name, value]) => `${name} = ${value || "\"\""}`).join("\n");
  return h("div", { class: "report" },
    sweep.failure ? h("p", { class: "bad" }, sweep.failure.message, sweep.failure.hint ? h("span", { class: "soft" }, ` ${sweep.failure.hint}`) : "") : "",
    sweep.note ? h("p", {}, sweep.note) : "",
    h("div", { class: "facts" }, [
      ["Scanned", number(totals.scanned)], ["Reclaimed", number(totals.reclaimed)],
      ["Memory freed", sweep.freed_bytes === undefined ? undefined : bytes(sweep.freed_bytes)],
      ["Evicted meanwhile", sweep.evicted_keys ? number(sweep.evicted_keys) : undefined],
      ["Evicted until the next", sweep.evicted_keys_after === undefined ? undefined : number(sweep.evicted_keys_after)],
      ["Touched", totals.touched ? number(totals.touched) : undefined], ["Lost replies", totals.lost_replies ? number(totals.lost_replies) : undefined],
      ["Active", span(totals.active_s)], ["Waited", span(totals.waited_s)], ["Rested", span(totals.rested_s)], ["Held", span(totals.held_s)],
      ...Object.entries(sweep.held_s).filter(([, s]) => s > 0).map(([reason, s]) => [`Held: ${reason.replaceAll("_", " ")}`, span(s)]),
    ].filter(([, value]) => value !== undefined).map(([name, value]) => h("span", {}, h("small", {}, name), value))),
    shardsTable(sweep.shards),
    h("details", {}, h("summary", {}, "Settings of this sweep"), h("pre", { tabindex: "0" }, settings)),
    h("p", { class: "soft mono" }, sweep.id));
}

export function instanceView(main, id) {
  let instance, isOver = false, isFirst = true, page = 0, shardsAt = 0;
  const again = later(() => refresh(), 500);
  const opened = new Map();

  const title = h("h1", { tabindex: "-1" }, id);
  const state = h("span");
  const where = h("p", { class: "soft where" });
  const acts = h("div", { class: "row-acts" });
  const running = h("section", { class: "card running", hidden: true, "aria-label": "The running sweep" });
  const tiles = h("div", { class: "tiles" });
  const chart = sweepChart({ open: (sweep) => reveal(sweep.id) });
  const charted = card("Sweeps over time", chart.box);
  const schedule = h("section", { class: "card" });
  const forecast = h("section", { class: "card", hidden: true });
  const check = h("section", { class: "card", hidden: true });
  const rows = h("tbody");
  const pager = h("nav", { class: "pager", "aria-label": "Pages of sweeps" });
  const none = h("p", { class: "empty", hidden: true }, "This instance was never swept.");
  const sweeps = h("section", { class: "panel" }, h("h2", { class: "panel-title" }, "Sweeps"),
    h("table", { class: "sweeps" }, h("caption", { class: "hidden" }, "Sweeps, newest first"),
      headings(["When", "State", "Cause", "#Took", "#Reclaimed", "#Memory freed", "#Held", "Why"]), rows), none, pager);
  main.replaceChildren(
    h("nav", { class: "crumbs", "aria-label": "Path" }, h("a", { href: "#/" }, "Instances"), h("span", { "aria-hidden": "true" }, "/")),
    h("div", { class: "head" }, title, state, acts), where, running, tiles,
    h("div", { class: "columns" }, charted, schedule), forecast, check, sweeps);

  const failed = (error) => { if (error.status !== 401) announce(error.message, true); };
  const command = (what, done) => async () => {
    try {
      await post(`api/v1/tasks/${newest().id}/${what}`);
      announce(done);
      await refresh();
    } catch (error) { failed(error); }
  };
  const newest = () => (instance && instance.latest ? { ...instance.latest, ...(tasks.get(instance.latest.id) || {}) } : undefined);

  let acted;
  function showActs(task) {
    const isKept = task?.cause === "keep";
    const key = `${isActive(task)} ${task?.state} ${isKept} ${isOperator()} ${instance.latest?.id}`;
    if (!isOperator() || key === acted) return;
    acted = key;
    const button = (text, act, name = "") => h("button", { class: name, onclick: act }, text);
    // A keep run ends for a sweep that is created here, and when its bounds are removed: it has no Cancel.
    acts.replaceChildren(...(isActive(task) ? [
      isKept ? button("Sweep…", () => sweepDialog(instance)) : "",
      task.state === "paused" ? button("Resume", command("resume", "The task is resumed."), "primary") : button("Pause", command("pause", "The task is paused.")),
      button("Tune…", () => tuneDialog(newest().id)),
      isKept ? "" : button("Cancel", command("cancel", "The task is cancelled."), "danger"),
    ] : [button("Sweep…", () => sweepDialog(instance), "primary")]));
  }

  // Shows the newest task, as the stream sent it, a few times a second.
  let bar, figures, facts, shardsBox;
  function showLive() {
    const task = newest();
    state.replaceChildren(badge(task ? task.state : "never"));
    showActs(task);
    running.hidden = !isActive(task);
    if (!isActive(task)) { bar = undefined; return; }
    if (!bar) {
      bar = h("i");
      figures = h("p", { class: "figures" });
      facts = h("p", { class: "hold" });
      shardsBox = h("div", { class: "live-shards" });
      running.replaceChildren(h("div", { class: "meter large", role: "progressbar", "aria-label": "Progress", "aria-valuemin": "0", "aria-valuemax": "100" }, bar), figures, facts, shardsBox);
      shardsAt = 0;
    }
    const progress = task.progress || 0, pace = task.state === "running" ? task.pace : undefined;
    bar.style.width = 100 * progress + "%";
    bar.parentElement.setAttribute("aria-valuenow", String(Math.round(100 * progress)));
    bar.parentElement.classList.toggle("is-held", task.holds?.length > 0);
    const left = pace && pace.progress > 0 ? (1 - progress) / pace.progress : undefined;
    const isKept = task.cause === "keep";
    say(figures, [isKept ? `lap ${(100 * progress).toFixed(0)} %` : `${(100 * progress).toFixed(1)} %`, `${number(task.scanned || 0)} keys scanned`, `${number(task.reclaimed)} reclaimed`,
      pace && pace.keys >= 1 ? `${short(pace.keys)} keys/s` : "", !isKept && left !== undefined && left < 1e6 ? `about ${span(left)} left` : "",
      task.started_at ? `begun ${ago(task.started_at)}` : ""].filter(Boolean).join(" · "));
    say(facts, [...new Set((task.holds || []).map((hold) => hold.sentence))].join("; "));
    if (Date.now() - shardsAt > SHARDS_MS && !document.hidden) {
      shardsAt = Date.now();
      ask(`api/v1/tasks/${task.id}`).then((details) => {
        if (isOver) return;
        keptNow = details.shards.map((shard) => shard.keep).filter(Boolean);
        if (instance) showTiles();
        if (!shardsBox || shardsBox.contains(document.activeElement)) return;
        shardsBox.replaceChildren(...shardsTable(details.shards));
      }).catch(failed);
    }
  }

  let keptNow = [];
  // The bounds, and whether all masters keep them now.
  function boundTile() {
    const { max_backlog: backlog, max_delay: delay } = instance.keep;
    const bounds = [backlog && backlog !== "off" ? `backlog at most ${backlog}` : "", delay && delay !== "off" ? `delay at most ${delay}` : ""];
    const known = keptNow.filter((figures) => figures.backlog !== null);
    const expired = known.reduce((sum, figures) => sum + figures.backlog, 0);
    const state = keptNow.some((figures) => figures.is_missed) ? h("span", { class: "bad" }, "missed")
      : known.length ? h("span", { class: "good" }, "kept") : "beginning";
    return tile("Bound", state, [...bounds, known.length ? `about ${number(expired)} expired now` : ""].filter(Boolean).join(", "));
  }

  const tile = (name, value, more) => h("div", { class: "tile" }, h("small", {}, name), h("strong", {}, value), h("span", { class: "soft" }, more || ""));

  function showTiles() {
    const task = instance.latest;
    const change = instance.window_changes_at;
    tiles.replaceChildren(
      tile("Last success", instance.last_success_at ? time(instance.last_success_at) : "never", instance.last_success_at ? when(instance.last_success_at) : ""),
      tile("Reclaimed by the newest", task ? number(task.reclaimed) : "–", "keys"),
      tile("Memory", bytes(instance.used_memory), "used, as last seen"),
      tile("Next due", instance.next_scan_at ? time(instance.next_scan_at) : "not scheduled", instance.next_scan_at ? when(instance.next_scan_at) : ""),
      tile("Window", instance.window_open === undefined ? "always open" : instance.window_open ? "open" : "closed", change ? `until ${when(change)}` : ""),
      instance.keep ? boundTile() : "");
  }

  function showSchedule() {
    const { schedule: plan, window, settings } = instance;
    const by = plan.source === "api" ? "set by the API" : "by the settings file";
    const often = plan.cron ? [h("code", {}, plan.cron), ` in ${plan.zone}`] : plan.interval_s ? `every ${exactly(plan.interval_s)}` : "once";
    schedule.replaceChildren(
      h("div", { class: "card-head" }, h("h2", {}, "Schedule"),
        isOperator() ? h("button", { class: "small", onclick: () => scheduleDialog(instance, refresh) }, "Edit…") : ""),
      pairs([
        ["Automatic scan", plan.enabled ? h("span", {}, often) : "off"],
        ["Set", by],
        ["Timeout", plan.enabled ? exactly(plan.timeout_s) : undefined],
        ["COUNT", plan.enabled ? number(plan.count) : undefined],
        ["Window", window ? `${window.days.length === 7 ? "each day" : window.days.join(" ")} ${window.start}–${window.end}, ${window.zone}` : "none"],
        ["Intensity", settings.intensity], ["Ceiling", settings["max-keys-per-sec"] && settings["max-keys-per-sec"] !== "0" ? `${number(Number(settings["max-keys-per-sec"]))} keys/s` : "none"],
      ]),
      h("div", { class: "card-head sub-head" }, h("h3", {}, "Bounds"),
        isOperator() ? h("button", { class: "small", onclick: () => keepDialog(instance, refresh), "aria-label": "Edit the bounds" }, "Bounds…") : ""),
      instance.keep ? pairs([["Backlog at most", instance.keep.max_backlog === "off" ? "no bound" : instance.keep.max_backlog],
        ["Delay at most", instance.keep.max_delay === "off" ? "no bound" : instance.keep.max_delay],
        ["Set", instance.keep_source === "api" ? "set by the API" : "by the settings file"]])
        : h("p", { class: "soft" }, "No bound is set."),
      h("h3", {}, "Due"),
      instance.upcoming.length ? h("ol", { class: "due" }, instance.upcoming.map((at) => h("li", {}, time(at, { absolute: true }), h("span", { class: "soft" }, ago(at)))))
        : h("p", { class: "soft" }, "Swept on request only."));
  }

  // The check, which runs on request and changes nothing.
  function showCheck() {
    if (!isOperator() || !check.hidden) return;
    check.hidden = false;
    const found = h("div", { "aria-live": "polite" }, h("p", { class: "soft" }, "Inspects the servers without changing anything: backlog, rights, and what a sweep would meet."));
    const button = h("button", { class: "small", onclick: inspect }, "Check now");
    check.append(h("div", { class: "card-head" }, h("h2", {}, "Check"), button), found);
    async function inspect() {
      button.disabled = true;
      say(button, "Checking…");
      try {
        const answer = await post(`${instancePath(id)}/check`);
        const shards = answer.shards || [answer];
        const findings = [...(answer.shards ? answer.findings : []), ...shards.flatMap((shard) => shard.failure
          ? [{ severity: "error", code: shard.failure.kind, message: shard.failure.message, advice: shard.failure.hint || "" }] : shard.findings || [])];
        const told = new Map(findings.map((finding) => [finding.message, finding]));
        const backlog = shards.map((shard) => shard.backlog?.expired).filter((n) => n !== undefined && n !== null);
        found.replaceChildren(
          h("p", { class: "verdict" }, answer.verdict),
          backlog.length ? h("p", { class: "soft" }, `About ${number(backlog.reduce((a, b) => a + b, 0))} expired keys in memory.`) : "",
          h("ul", { class: "findings" }, [...told.values()].map((finding) => h("li", { class: `f-${finding.severity}` },
            h("b", {}, finding.severity), h("div", {}, finding.message, h("span", { class: "soft" }, ` ${finding.advice}`))))),
          answer.report ? h("details", {}, h("summary", {}, "The whole report"), h("pre", { tabindex: "0" }, answer.report)) : "");
      } catch (error) {
        found.replaceChildren(h("p", { class: "bad" }, error.message, error.hint ? ` ${error.hint}` : ""));
      } finally {
        button.disabled = false;
        say(button, "Check again");
      }
    }
  }

  // Shows the last forecast, or for an operator how to make one.
  async function showForecast(made) {
    let answer = made;
    try {
      answer = answer || await ask(`${instancePath(id)}/forecast`);
    } catch (error) {
      if (error.status !== 404) { failed(error); return; }
      if (!isOperator()) return;
    }
    if (isOver) return;
    forecast.hidden = false;
    forecast.replaceChildren(h("div", { class: "card-head" }, h("h2", {}, "Forecast"),
      isOperator() ? h("button", { class: "small", onclick: () => forecastDialog(instance, showForecast) }, "Sample…") : ""),
    answer ? h("div", {}, outlooks(answer)) : h("p", { class: "soft" }, "There is no forecast yet of which keys expire when."));
  }

  const about = (figure) => `${number(figure.keys)}${figure.keys_error ? ` ± ${number(figure.keys_error)}` : ""}`;
  const fact = (name, value) => h("span", {}, h("small", {}, name), value);

  function outlook(part, name, peaks) {
    return h("div", { class: "forecast-db" },
      h("p", {}, h("b", {}, name), h("span", { class: "soft" }, ` ${number(part.keys)} keys, ${number(part.looked_at)} sampled`)),
      h("div", { class: "facts" }, fact("With a TTL", about(part.with_ttl)), fact("Without", about(part.without_ttl)),
        fact("Expired in memory", about(part.expired)), part.within.map((bound) => fact(`Within ${exactly(bound.within_s)}`, about(bound))),
        fact("Later", about(part.later))),
      part.bins.length ? forecastChart({ bins: part.bins, name, peaks }) : "");
  }

  function outlooks(answer) {
    const sources = answer.sources.map((source) => source.addr).join(", ");
    const parts = answer.dbs.length === 1 ? [outlook(answer.dbs[0], `DB ${answer.dbs[0].db}`, answer.peaks)]
      : [outlook(answer.total, "All DBs", answer.peaks), h("details", {}, h("summary", {}, "Each DB"), answer.dbs.map((db) => outlook(db, `DB ${db.db}`, answer.peaks)))];
    return [h("p", { class: "soft" }, `Sampled ${when(answer.at)} on ${sources}. The errors (±) are 95 % confidence intervals.`),
      answer.peaks.length ? h("ul", { class: "peaks" }, answer.peaks.map((peak) =>
        h("li", {}, h("i", { "aria-hidden": "true" }), `${when(peak.from)} to ${when(peak.to)}: ${about(peak)} keys expire`))) : "",
      parts,
      answer.prefixes ? h("details", {}, h("summary", {}, "By the first parts of key names"), h("pre", { tabindex: "0" }, answer.report)) : ""];
  }

  function sweepRows(sweep) {
    const mark = opened.get(sweep.id);
    const button = h("button", { class: "fold", "aria-expanded": String(Boolean(mark)), onclick: () => toggle(sweep.id) },
      h("span", { class: "triangle", "aria-hidden": "true" }), time(sweep.created_at, { absolute: true }));
    const row = h("tr", { "data-task": sweep.id },
      h("td", { "data-label": "When" }, button), h("td", { "data-label": "State" }, badge(sweep.state)), h("td", { "data-label": "Cause" }, sweep.cause),
      h("td", { "data-label": "Took", class: "n" }, span(took(sweep))),
      h("td", { "data-label": "Reclaimed", class: "n" }, number(sweep.reclaimed)), h("td", { "data-label": "Memory freed", class: "n" }, bytes(sweep.freed_bytes)),
      h("td", { "data-label": "Held", class: "n" }, sweep.totals.held_s > 0 ? span(sweep.totals.held_s) : "–"),
      h("td", { "data-label": "Why", class: "why" }, sweep.failure ? sweep.failure.message : sweep.note || ""));
    const rest = mark && h("tr", { class: "opened" }, h("td", { colspan: 8 }, report(mark)));
    return rest ? [row, rest] : [row];
  }

  let listed = [];
  function showRows() {
    const focused = rows.contains(document.activeElement) ? document.activeElement.closest("tr").dataset.task : undefined;
    rows.replaceChildren(...listed.flatMap(sweepRows));
    none.hidden = listed.length > 0;
    if (focused) rows.querySelector(`tr[data-task="${focused}"] button`)?.focus();
  }

  async function toggle(task) {
    if (opened.delete(task)) { showRows(); return; }
    try {
      const place = listed.findIndex((sweep) => sweep.id === task);
      const got = await ask(`${instancePath(id)}/history?offset=${page * PAGE + place}&limit=1`);
      const whole = got.sweeps.find((sweep) => sweep.id === task);
      // A newer sweep has moved the places.
      if (!whole) { await loadRows(); return; }
      opened.set(task, whole);
      showRows();
    } catch (error) { failed(error); }
  }

  async function reveal(task) {
    const place = recent.findIndex((sweep) => sweep.id === task);
    if (place < 0) return;
    if (Math.floor(place / PAGE) !== page) { page = Math.floor(place / PAGE); await loadRows(); }
    if (!opened.has(task)) await toggle(task);
    const row = rows.querySelector(`tr[data-task="${task}"]`);
    if (row) { row.scrollIntoView({ block: "start" }); row.querySelector("button").focus({ preventScroll: true }); }
  }

  let recent = [];
  async function loadRows() {
    const many = page === 0 ? CHARTED : PAGE;
    const got = await ask(`${instancePath(id)}/history?shards=false&offset=${page * PAGE}&limit=${many}`);
    if (isOver) return;
    if (page === 0) {
      recent = got.sweeps;
      charted.hidden = recent.length === 0;
      if (recent.length) chart.show(recent);
    }
    listed = got.sweeps.slice(0, PAGE);
    showRows();
    const pages = Math.max(1, Math.ceil(got.total / PAGE));
    const turn = (to) => async () => { page = to; try { await loadRows(); } catch (error) { failed(error); } };
    pager.replaceChildren(
      h("button", { class: "small", disabled: page <= 0, onclick: turn(page - 1), "aria-label": "Newer sweeps" }, "‹"),
      h("span", {}, got.total ? `${number(page * PAGE + 1)}–${number(Math.min((page + 1) * PAGE, got.total))} of ${number(got.total)} · ${number(got.reclaimed)} keys reclaimed` : "0"),
      h("button", { class: "small", disabled: page >= pages - 1, onclick: turn(page + 1), "aria-label": "Older sweeps" }, "›"));
  }

  async function refresh() {
    again.stop();
    try {
      const got = await ask(instancePath(id));
      if (isOver) return;
      instance = got;
      say(title, instance.name);
      document.title = `${instance.name} · ttlsweep`;
      say(where, [instance.target, instance.id === instance.name ? "" : instance.id, instance.project_id].filter(Boolean).join(" · "));
      showLive();
      showTiles();
      showSchedule();
      showCheck();
      await loadRows();
      if (isFirst) { isFirst = false; showForecast(); }
      if (isOver) return;
      main.dataset.ready = "instance";
      const next = untilNext([instance.next_scan_at, instance.window_changes_at]);
      if (next) again.soon(next);
    } catch (error) {
      if (error.status === 404) main.replaceChildren(h("p", { class: "empty" }, error.message, " ", h("a", { href: "#/" }, "All instances")));
      else failed(error);
    }
  }

  const states = new Map();
  const unlisten = listen((changed, { isFirst: isAnew, ended }) => {
    const own = changed.filter((task) => task.instance_id === id);
    const isNews = own.some((task) => states.get(task.id) !== task.state) || (isAnew && ended.some((task) => task.instance_id === id));
    own.forEach((task) => states.set(task.id, task.state));
    if (isNews) again.soon(100);
    else if (own.length && instance) showLive();
  });
  refresh();
  return { refresh, end() { isOver = true; unlisten(); chart.end(); again.stop(); } };
}
