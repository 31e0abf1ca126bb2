// The list of all instances, with the newest task of each.

import { ask, isOperator, listen, tasks } from "./api.js";
import { STATES, announce, badge, bytes, h, isActive, later, number, say, short, time, untilNext, when } from "./dom.js";
import { sweepDialog } from "./forms.js";

const PAGE = 50;
const COLUMNS = [
  { name: "Instance", sort: "name" },
  { name: "State" },
  { name: "Last success", sort: "last_success" },
  { name: "Reclaimed", sort: "reclaimed", isNumber: true },
  { name: "Backlog", sort: "backlog", isNumber: true },
  { name: "Memory", sort: "memory", isNumber: true },
  { name: "Next due" },
  { name: "Window" },
];

function read(query) {
  const filter = new URLSearchParams(query);
  const page = Math.max(1, Number.parseInt(filter.get("page"), 10) || 1);
  return {
    search: filter.get("search") || "", state: filter.get("state") || "", project: filter.get("project") || "",
    sort: filter.get("sort") || "name", order: filter.get("order") || "asc", page,
  };
}

function link(filter) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(filter)) {
    const usual = { sort: "name", order: "asc", page: 1 }[name] ?? "";
    if (value !== usual) query.set(name, value);
  }
  const text = query.toString();
  return text ? `#/?${text}` : "#/";
}

function path(filter) {
  const query = new URLSearchParams({ sort: filter.sort, order: filter.order, limit: PAGE, offset: (filter.page - 1) * PAGE });
  if (filter.search) query.set("search", filter.search);
  if (filter.state) query.set("state", filter.state);
  if (filter.project) query.set("project_id", filter.project);
  return `api/v1/instances?${query}`;
}

class Row {
  constructor(instance) {
    this.cells = COLUMNS.map((column) => h("td", { "data-label": column.name, class: column.isNumber ? "n" : undefined }));
    this.act = h("td", { class: "acts" });
    this.element = h("tr", { "data-id": instance.id }, this.cells, this.act);
    this.show(instance);
  }

  show(instance) {
    this.instance = instance;
    const [name, , success, , backlog, memory, due, windowCell] = this.cells;
    name.replaceChildren(
      h("a", { class: "name", href: `#/instances/${encodeURIComponent(instance.id)}` }, instance.name),
      h("span", { class: "sub" }, instance.target));
    success.replaceChildren(time(instance.last_success_at));
    say(backlog, instance.backlog === undefined ? "–" : short(instance.backlog));
    say(memory, bytes(instance.used_memory));
    due.replaceChildren(time(instance.next_scan_at));
    const change = instance.window_changes_at;
    windowCell.replaceChildren(instance.window_open === undefined ? h("span", { class: "soft" }, "always")
      : h("span", { title: change ? `until ${when(change)}` : undefined }, instance.window_open ? "open" : "closed"));
    this.live(tasks.get(instance.latest?.id) || instance.latest);
  }

  // Shows the newest task, as the stream sent it.
  live(task) {
    const [, state, , reclaimed] = this.cells;
    this.task = task;
    const isLive = isActive(task) && task.progress !== undefined;
    const key = `${task?.state} ${task?.cause}`;
    if (this.shown !== key) {
      this.shown = key;
      this.fill = h("i");
      this.figures = h("span", { class: "sub" });
      state.replaceChildren(badge(task ? task.state : "never"),
        isActive(task) ? h("span", { class: "meter", "aria-hidden": "true" }, this.fill) : "", this.figures);
      this.acts();
    }
    this.fill.style.width = isLive ? 100 * task.progress + "%" : "0";
    const held = isLive && task.holds.length > 0 ? task.holds[0].sentence : "";
    const pace = isLive && task.pace && task.pace.keys >= 1 && task.state === "running" ? ` · ${short(task.pace.keys)} keys/s` : "";
    const why = task && !isActive(task) ? (task.failure ? task.failure.message : task.note || "") : "";
    const done = isLive && task.cause === "keep" ? "kept to its bounds" : isLive ? `${(100 * task.progress).toFixed(1)} %` : "";
    say(this.figures, held || (isLive ? done + pace : why));
    this.figures.className = held ? "sub held" : task && task.failure ? "sub bad" : "sub";
    this.figures.title = this.figures.textContent;
    say(reclaimed, task ? number(task.reclaimed) : "–");
  }

  acts() {
    if (!isOperator()) return;
    // A keep run ends for a sweep that the API creates.
    const busy = isActive(this.task) && this.task.cause !== "keep";
    const sweep = () => sweepDialog(this.instance);
    this.act.replaceChildren(busy ? "" : h("button", { class: "small", onclick: sweep, "aria-label": `Sweep ${this.instance.name}` }, "Sweep…"));
  }
}

export function listView(main, query) {
  let filter = read(query);
  const rows = new Map();
  let answer;
  let asked = 0;
  const again = later(() => refresh());

  const go = (change) => {
    const next = link({ ...filter, page: 1, ...change });
    if (next !== location.hash) history.replaceState(null, "", next);
    filter = read(next.split("?")[1] || "");
    refresh();
  };

  const chips = h("div", { class: "chips", role: "group", "aria-label": "Filter by state" });
  const search = h("input", { type: "search", id: "search", placeholder: "Name, id or address", "aria-label": "Search instances",
    value: filter.search, autocomplete: "off", spellcheck: "false" });
  let typing;
  search.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => go({ search: search.value.trim() }), 200);
  });
  const project = h("select", { "aria-label": "Project", onchange: () => go({ project: project.value }) });
  const order = h("select", { "aria-label": "Sort by", class: "narrow", onchange: () => {
    const [sort, direction] = order.value.split(" ");
    go({ sort, order: direction });
  } }, COLUMNS.filter((column) => column.sort).flatMap(({ name, sort }) => ["asc", "desc"].map((direction) =>
    h("option", { value: `${sort} ${direction}` }, `${name} ${direction === "asc" ? "↑" : "↓"}`))));
  const heads = COLUMNS.map((column) => {
    const head = h("th", { scope: "col", class: column.isNumber ? "n" : undefined });
    if (!column.sort) { head.append(column.name); return head; }
    head.append(h("button", { class: "sort", onclick: () => {
      const turned = filter.sort === column.sort ? (filter.order === "asc" ? "desc" : "asc")
        : column.isNumber ? "desc" : "asc";
      go({ sort: column.sort, order: turned });
    } }, column.name, h("span", { class: "arrow", "aria-hidden": "true" })));
    return head;
  });
  const body = h("tbody");
  const empty = h("p", { class: "empty", hidden: true });
  const table = h("table", { class: "instances" }, h("caption", { class: "hidden" }, "Instances"),
    h("thead", {}, h("tr", {}, heads, h("th", { scope: "col" }, h("span", { class: "hidden" }, "Actions")))), body);
  const pager = h("nav", { class: "pager", "aria-label": "Pages" });
  main.replaceChildren(
    h("div", { class: "head" }, h("h1", { tabindex: "-1" }, "Instances"), chips),
    h("div", { class: "tools" }, search, project, order),
    h("div", { class: "panel" }, table, empty), pager);

  function showChips() {
    const all = Object.values(answer.counts).reduce((sum, n) => sum + n, 0);
    const chip = (state, count) => h("button", {
      class: `chip s-${state || "all"}`, "aria-pressed": String(filter.state === state),
      onclick: () => go({ state: filter.state === state ? "" : state }),
    }, state ? h("i", { "aria-hidden": "true" }) : "", state || "all", h("b", {}, number(count)));
    const focused = chips.contains(document.activeElement) ? [...chips.children].indexOf(document.activeElement) : -1;
    chips.replaceChildren(chip("", all), ...STATES.filter((state) => answer.counts[state] || filter.state === state)
      .map((state) => chip(state, answer.counts[state] || 0)));
    if (focused >= 0) chips.children[Math.min(focused, chips.children.length - 1)].focus();
  }

  function show() {
    showChips();
    order.value = `${filter.sort} ${filter.order}`;
    project.hidden = answer.projects.length < 2;
    if (project.options.length !== answer.projects.length + 1) {
      project.replaceChildren(h("option", { value: "" }, "All projects"), ...answer.projects.map((id) => h("option", { value: id }, id)));
    }
    project.value = filter.project;
    COLUMNS.forEach((column, place) => {
      if (!column.sort) return;
      const direction = filter.sort === column.sort ? filter.order : "";
      if (direction) heads[place].setAttribute("aria-sort", direction === "asc" ? "ascending" : "descending");
      else heads[place].removeAttribute("aria-sort");
      say(heads[place].querySelector(".arrow"), direction === "asc" ? "↑" : direction === "desc" ? "↓" : "");
    });
    const present = new Set();
    const wanted = answer.instances.map((instance) => {
      present.add(instance.id);
      const row = rows.get(instance.id);
      if (row) row.show(instance); else rows.set(instance.id, new Row(instance));
      return rows.get(instance.id).element;
    });
    for (const id of rows.keys()) if (!present.has(id)) rows.delete(id);
    // Replaces the rows only if their order changes: rows that stay keep the focus.
    if (wanted.length !== body.children.length || wanted.some((row, place) => body.children[place] !== row)) body.replaceChildren(...wanted);
    empty.hidden = answer.total > 0;
    empty.textContent = filter.search || filter.state || filter.project ? "No instance matches." : "The settings have no instance yet.";
    const pages = Math.max(1, Math.ceil(answer.total / PAGE));
    const first = (filter.page - 1) * PAGE;
    pager.replaceChildren(
      h("button", { class: "small", disabled: filter.page <= 1, onclick: () => go({ page: filter.page - 1 }), "aria-label": "Previous page" }, "‹"),
      h("span", {}, answer.total ? `${number(first + 1)}–${number(Math.min(first + PAGE, answer.total))} of ${number(answer.total)}` : "0"),
      h("button", { class: "small", disabled: filter.page >= pages, onclick: () => go({ page: filter.page + 1 }), "aria-label": "Next page" }, "›"));
    main.dataset.ready = "list";
  }

  async function refresh() {
    again.stop();
    const own = ++asked;
    try {
      const got = await ask(path(filter));
      if (own !== asked) return;
      if (got.total > 0 && got.instances.length === 0) { go({ page: 1 }); return; }
      answer = got;
      show();
      // The list is loaded again when a scan is due, or a window opens or closes.
      const next = untilNext(answer.instances.flatMap((one) => [one.next_scan_at, one.window_changes_at]));
      if (next) again.soon(next);
    } catch (error) {
      if (error.status !== 401) announce(error.message, true);
    }
  }

  const unlisten = listen((changed, { isFirst, ended }) => {
    let isStale = isFirst && (changed.length > 0 || ended.length > 0) && answer !== undefined;
    for (const task of changed) {
      const row = rows.get(task.instance_id);
      const isNewer = row && (!row.task || task.id >= row.task.id);
      if (isNewer) row.live(task);
      // A new state changes the counts, and perhaps which instances are on this page.
      if (!states.has(task.id) || states.get(task.id) !== task.state) isStale = true;
      states.set(task.id, task.state);
    }
    if (isStale) again.soon(500);
  });
  const states = new Map();
  refresh();
  return { refresh, end() { unlisten(); again.stop(); clearTimeout(typing); asked += 1; }, search };
}
