// Chooses the view by the address, logs in, and shows whether the stream of events is connected.

import { ask, hasToken, setCaller, setToken, startStream, stopStream, whenRefused } from "./api.js";
import { h, say, zoneName } from "./dom.js";
import { instanceView } from "./instance.js";
import { listView } from "./list.js";
import { daemonsView, sweepsView } from "./sweeps.js";

const main = document.getElementById("main");
const live = document.getElementById("live");
let view;
let isKnown = false;

const WORDS = { on: "live", again: "reconnecting", off: "not connected" };
function showLive(state) {
  live.dataset.live = state;
  say(live, WORDS[state]);
}

function route() {
  const [path, query] = location.hash.replace(/^#/, "").split("?");
  const parts = path.split("/").filter(Boolean);
  if (view) view.end();
  delete main.dataset.ready;
  const name = parts[0] === "instances" && parts[1] ? "list" : parts[0] || "list";
  for (const link of document.querySelectorAll("nav a[data-view]")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  if (parts[0] === "instances" && parts[1]) view = instanceView(main, decodeURIComponent(parts[1]));
  else if (parts[0] === "sweeps") view = sweepsView(main);
  else if (parts[0] === "daemons") view = daemonsView(main);
  else view = listView(main, query || "");
  document.title = name === "list" && !parts[1] ? "ttlsweep" : `${parts[1] ? decodeURIComponent(parts[1]) : name} · ttlsweep`;
  window.scrollTo(0, 0);
}

function logIn(error) {
  if (view) { view.end(); view = undefined; }
  isKnown = false;
  stopStream(showLive);
  delete main.dataset.ready;
  const token = h("input", { id: "token", type: "password", autocomplete: "current-password", "aria-describedby": "login-error" });
  const form = h("form", { class: "login", id: "login", onsubmit: (event) => {
    event.preventDefault();
    setToken(token.value.trim());
    begin();
  } }, h("h1", {}, "Log in"), h("label", { for: "token" }, "Token"), token,
  h("p", { id: "login-error", class: "wrong", role: "alert" }, hasToken() ? error.message : ""),
  h("button", { class: "primary" }, "Log in"));
  setToken("");
  main.replaceChildren(form);
  main.dataset.ready = "login";
  token.focus();
}

async function begin() {
  try {
    const caller = await ask("api/v1/caller");
    setCaller(caller);
    isKnown = true;
    say(document.getElementById("caller"), `${caller.name} · ${caller.role}`);
    route();
    if (!document.hidden) startStream(showLive);
  } catch (error) {
    if (error.status === 401) return;
    showLive("again");
    main.replaceChildren(h("p", { class: "empty" }, error.message, " ", h("button", { class: "small", onclick: begin }, "Try again")));
  }
}

whenRefused(logIn);
say(document.getElementById("zone"), zoneName());
document.getElementById("zone").title = "The time zone of all times on this page";
window.addEventListener("hashchange", () => {
  if (location.hash === "#main" || !isKnown) return;
  route();
  // Moves the focus to the title of the new view, for screen readers and the keyboard.
  const title = main.querySelector("h1");
  if (title) title.focus({ preventScroll: true });
});
document.addEventListener("visibilitychange", () => {
  if (!isKnown) return;
  if (document.hidden) stopStream(showLive);
  else { startStream(showLive); if (view) view.refresh(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, dialog")) return;
  const search = document.getElementById("search");
  if (search) { event.preventDefault(); search.focus(); search.select(); }
});
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
begin();
