// Calls the API with the token that the user entered, and reads the one stream of all unfinished tasks.

let token = sessionStorage.getItem("token") || "";
export const hasToken = () => token !== "";
export function setToken(text) {
  token = text;
  if (text) sessionStorage.setItem("token", text); else sessionStorage.removeItem("token");
}

export class ApiError extends Error {
  constructor(status, body) {
    super(body.error_msg || `The daemon answered ${status}.`);
    this.status = status;
    this.code = body.error_code || "";
    this.hint = body.error_ext_msg || "";
  }
}

// The handler for missing or refused credentials.
let onRefused = () => {};
export const whenRefused = (act) => { onRefused = act; };

async function send(path, { method = "GET", body, signal } = {}) {
  const headers = token ? { "X-Auth-Token": token } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  if (response.ok) return response;
  const error = new ApiError(response.status, await response.json().catch(() => ({})));
  if (response.status === 401) onRefused(error);
  throw error;
}

export const ask = async (path, options) => (await send(path, options)).json();
export const post = (path, body) => ask(path, { method: "POST", body });
export const instancePath = (id) => `api/v1/instances/${encodeURIComponent(id)}`;
export const contractPath = (instance, call) =>
  `v2/${encodeURIComponent(instance.project_id)}/instances/${encodeURIComponent(instance.id)}/${call}`;

// All unfinished tasks by id, as the stream last sent them. A task that ends is passed on once and removed.
export const tasks = new Map();
const listeners = new Set();
export function listen(act) {
  listeners.add(act);
  return () => listeners.delete(act);
}

// Keys and progress per second, smoothed over several events.
function measure(before, task) {
  const now = performance.now() / 1000;
  task.at = now;
  if (!before || before.state !== "running" || task.state !== "running" || !(now - before.at > 0.05)) {
    task.pace = before && before.state === task.state ? before.pace : undefined;
    return;
  }
  const seconds = now - before.at, share = before.pace ? 0.3 : 1;
  const mix = (name, value) => (before.pace ? before.pace[name] : 0) * (1 - share) + share * value / seconds;
  task.pace = { keys: mix("keys", task.scanned - before.scanned), progress: mix("progress", task.progress - before.progress) };
}

function take(changed, isFirst) {
  const ended = [];
  if (isFirst) {
    const present = new Set(changed.map((task) => task.id));
    for (const id of tasks.keys()) if (!present.has(id)) { ended.push(tasks.get(id)); tasks.delete(id); }
  }
  for (const task of changed) {
    measure(tasks.get(task.id), task);
    if (task.finished_at) tasks.delete(task.id); else tasks.set(task.id, task);
  }
  listeners.forEach((act) => act(changed, { isFirst, ended }));
}

const AGAIN_MS = [500, 1000, 2000, 5000, 10000];
let reading;
// Counts the streams that were started. A stream that is not the last one ends; so does every one after a stop.
let turn = 0;
let isOn = false;

// EventSource cannot send a token, so the stream is read by fetch. A hidden tab closes its stream, to free the connection.
async function read(show, own) {
  const goesOn = () => isOn && own === turn;
  for (let failures = 0; goesOn();) {
    reading = new AbortController();
    try {
      const stream = (await send("api/v1/events", { signal: reading.signal })).body.pipeThrough(new TextDecoderStream());
      const reader = stream.getReader();
      show("on");
      failures = 0;
      let isFirst = true;
      for (let unread = ""; ;) {
        const { value, done } = await reader.read();
        if (done) break;
        unread += value;
        const lines = unread.split("\n");
        unread = lines.pop();
        for (const line of lines) {
          if (!line.startsWith("data: ")) continue;
          take(JSON.parse(line.slice(6)), isFirst);
          isFirst = false;
        }
      }
      show("again");
    } catch (error) {
      if (!goesOn()) return;
      if (error.status === 401) { isOn = false; show("off"); return; }
      show("again");
    }
    await new Promise((done) => setTimeout(done, AGAIN_MS[Math.min(failures, AGAIN_MS.length - 1)]));
    failures += 1;
  }
}

export function startStream(show) {
  if (isOn) return;
  isOn = true;
  turn += 1;
  read(show, turn);
}
export function stopStream(show) {
  isOn = false;
  if (reading) reading.abort();
  show("off");
}

let caller = { role: "reader" };
export const setCaller = (known) => { caller = known; };
export const isOperator = () => caller.role === "operator";
