// The newest sweeps of all instances, and the daemons that share a database.

import { ask, listen } from "./api.js";
import { announce, badge, h, later, number, span, time, took, when } from "./dom.js";

const PAGE = 50;

export function sweepsView(main) {
  const body = h("tbody");
  const more = h("button", { class: "small", hidden: true, onclick: () => load(last) }, "Older sweeps");
  const sum = h("span", { class: "soft" });
  let last;
  const again = later(() => load());
  main.replaceChildren(
    h("div", { class: "head" }, h("h1", { tabindex: "-1" }, "Sweeps"), sum),
    h("div", { class: "panel" }, h("table", {}, h("caption", { class: "hidden" }, "Sweeps, newest first"), h("thead", {}, h("tr", {},
      ["Instance", "State", "Cause", "Created", "Took", "Reclaimed", "Why"].map((name) =>
        h("th", { scope: "col", class: ["Took", "Reclaimed"].includes(name) ? "n" : undefined }, name)))), body)),
    h("nav", { class: "pager", "aria-label": "Pages" }, more));

  function row(task, names) {
    const id = encodeURIComponent(task.instance_id);
    return h("tr", {},
      h("td", { "data-label": "Instance" }, h("a", { class: "name", href: `#/instances/${id}` }, names[task.instance_id] || task.instance_id)),
      h("td", { "data-label": "State" }, badge(task.state)),
      h("td", { "data-label": "Cause" }, task.cause),
      h("td", { "data-label": "Created" }, time(task.created_at, { absolute: true })),
      h("td", { "data-label": "Took", class: "n" }, span(took(task))),
      h("td", { "data-label": "Reclaimed", class: "n" }, number(task.reclaimed)),
      h("td", { "data-label": "Why", class: "why" }, task.failure ? task.failure.message : task.note || ""));
  }

  async function load(before) {
    try {
      const got = await ask(`api/v1/tasks?limit=${PAGE}${before ? "&before=" + before : ""}`);
      const made = got.tasks.map((task) => row(task, got.instance_names));
      if (before) body.append(...made); else body.replaceChildren(...made);
      if (got.tasks.length) last = got.tasks[got.tasks.length - 1].id;
      more.hidden = got.tasks.length < PAGE;
      if (!before) sum.textContent = `${number(got.count)} sweeps, ${number(got.reclaimed)} keys reclaimed`;
      main.dataset.ready = "sweeps";
    } catch (error) {
      if (error.status !== 401) announce(error.message, true);
    }
  }

  const states = new Map();
  const unlisten = listen((changed) => {
    const isNews = changed.some((task) => states.get(task.id) !== task.state);
    changed.forEach((task) => states.set(task.id, task.state));
    // No reload while older sweeps are shown: the rows would move under the reader.
    if (isNews && body.children.length <= PAGE) again.soon(500);
  });
  load();
  return { refresh: () => load(), end() { unlisten(); again.stop(); } };
}

export function daemonsView(main) {
  const body = h("tbody");
  main.replaceChildren(
    h("div", { class: "head" }, h("h1", { tabindex: "-1" }, "Daemons")),
    h("div", { class: "panel" }, h("table", {}, h("caption", { class: "hidden" }, "Daemons"), h("thead", {}, h("tr", {},
      ["Name", "Version", "Since", "Heartbeat", "Settings", "Sweeps"].map((name) =>
        h("th", { scope: "col", class: name === "Sweeps" ? "n" : undefined }, name)))), body)));
  async function refresh() {
    try {
      const { daemons } = await ask("api/v1/daemons");
      body.replaceChildren(...daemons.map((daemon) => h("tr", {},
        h("td", { "data-label": "Name" }, h("b", {}, daemon.name), h("span", { class: "sub" },
          (daemon.answers || daemons.length === 1 ? "this daemon" : daemon.address) + (daemon.labels.length ? ` · ${daemon.labels.join(", ")}` : ""))),
        h("td", { "data-label": "Version" }, daemon.version),
        h("td", { "data-label": "Since" }, h("span", { title: when(daemon.started_at, true) }, when(daemon.started_at))),
        h("td", { "data-label": "Heartbeat", class: daemon.heartbeat_age_s > 10 ? "bad" : undefined }, time(daemon.heartbeat_at)),
        h("td", { "data-label": "Settings", class: daemon.same_settings ? undefined : "bad" }, daemon.same_settings ? "same as here" : "different"),
        h("td", { "data-label": "Sweeps", class: "n" }, number(daemon.tasks.length)))));
      main.dataset.ready = "daemons";
    } catch (error) {
      if (error.status !== 401) announce(error.message, true);
    }
  }
  refresh();
  // Reloads every 10 s: the stream of tasks does not report heartbeats.
  const timer = setInterval(() => { if (!document.hidden) refresh(); }, 10000);
  return { refresh, end() { clearInterval(timer); } };
}
