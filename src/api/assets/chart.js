// SVG charts. The chart of sweeps has a column for each sweep and four panels below each other.

import { bytes, h, number, say, short, shortWhen, span, svg, when } from "./dom.js";

const LEFT = 52, RIGHT = 6, GAP = 34, FOOT = 20;
// Number of reasons for holds with a colour of their own.
const COLOURS = 5;

// Rounds up to 1, 2, 5 or 10 times a power of ten; with base 1024 to a power of two.
function roundUp(value, base = 10) {
  if (value <= 0) return 1;
  const power = base ** Math.floor(Math.log(value) / Math.log(base));
  const steps = base === 10 ? [1, 2, 5, 10] : [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024];
  return power * steps.find((step) => step * power >= value * 0.9999);
}

const sum = (held) => Object.values(held).reduce((all, n) => all + n, 0);

// The reasons for holds, by their total time over all sweeps, longest first.
function reasonsOf(sweeps) {
  const all = {};
  for (const sweep of sweeps) for (const [reason, held] of Object.entries(sweep.held_s)) all[reason] = (all[reason] || 0) + held;
  return Object.entries(all).filter(([, held]) => held > 0).sort((a, b) => b[1] - a[1]).map(([reason]) => reason);
}

export function sweepChart({ open }) {
  const drawing = h("div", { class: "drawing" });
  const readout = h("p", { class: "readout", "aria-live": "polite" });
  const legend = h("ul", { class: "legend" });
  const box = h("div", { class: "chart", tabindex: "0", role: "group", "aria-label": "Chart of the sweeps: arrow keys go from one to the next, Enter opens it" },
    readout, drawing, legend);
  let sweeps = [], at = -1, columns = [], width = 0;

  function choose(place) {
    at = place;
    columns.forEach((column, n) => column.classList.toggle("chosen", n === at));
    const sweep = sweeps[at];
    if (!sweep) {
      say(readout, sweeps.length === 1 ? `One sweep, ${when(sweeps[0].created_at)}`
        : sweeps.length ? `${number(sweeps.length)} sweeps, ${when(sweeps[0].created_at)} to ${when(sweeps[sweeps.length - 1].created_at)}` : "");
      return;
    }
    const held = Object.entries(sweep.held_s).sort((a, b) => b[1] - a[1]).map(([reason, s]) => `${reason.replaceAll("_", " ")} ${span(s)}`);
    say(readout, [when(sweep.created_at), sweep.state, `${number(sweep.reclaimed)} keys`,
      sweep.freed_bytes === undefined ? "" : `${bytes(sweep.freed_bytes)} of memory`,
      sweep.cause === "keep" && sweep.backlog !== undefined ? `about ${number(sweep.backlog)} expired keys left` : "", held.length ? `held: ${held.join(", ")}` : "not held"]
      .filter(Boolean).join(" · "));
  }

  function draw() {
    width = Math.max(280, drawing.clientWidth);
    const reasons = reasonsOf(sweeps);
    const panels = [
      { title: "Keys reclaimed", height: 92, format: short, value: (s) => s.reclaimed, base: 10 },
      { title: "Memory freed", height: 56, format: (n) => bytes(n), value: (s) => Math.max(0, s.freed_bytes || 0), base: 1024 },
      { title: "Backlog: found by a sweep, left by a keep run", height: 56, format: short, value: (s) => s.backlog || 0, base: 10 },
      { title: "Held", height: 56, format: span, value: (s) => sum(s.held_s), base: 10, stack: true },
    ];
    const height = panels.reduce((all, panel) => all + panel.height + GAP, FOOT);
    const band = (width - LEFT - RIGHT) / Math.max(sweeps.length, 24);
    const gap = Math.min(3, band * 0.25);
    // The newest sweep is at the right edge.
    const x = (n) => width - RIGHT - (sweeps.length - n) * band;
    columns = sweeps.map((sweep, n) => svg("g", { class: `column s-${sweep.state}` },
      svg("rect", { class: "back", x: x(n), y: 0, width: band, height: height - FOOT })));
    const frame = [];
    let top = GAP;
    for (const panel of panels) {
      const most = roundUp(Math.max(0, ...sweeps.map(panel.value)), panel.base);
      const bottom = top + panel.height;
      const y = (value) => bottom - panel.height * value / most;
      frame.push(svg("text", { class: "title", x: 0, y: top - 13 }, panel.title));
      for (const share of [1, 0.5, 0]) {
        const line = bottom - panel.height * share;
        frame.push(svg("line", { class: share ? "grid" : "axis", x1: LEFT, x2: width - RIGHT, y1: line, y2: line }));
        if (share !== 0.5) frame.push(svg("text", { class: "tick", x: LEFT - 7, y: line + 3.5, "text-anchor": "end" }, panel.format(most * share)));
      }
      sweeps.forEach((sweep, n) => {
        const parts = panel.stack ? reasons.map((reason, place) => [sweep.held_s[reason] || 0, `r${Math.min(place, COLOURS)}`])
          : [[panel.value(sweep), "bar-fill"]];
        let base = 0;
        for (const [value, name] of parts) {
          if (value <= 0) continue;
          const from = y(base), to = Math.min(y(base + value), from - 0.75);
          columns[n].append(svg("rect", { class: name, x: x(n) + gap / 2, y: to, width: Math.max(1, band - gap), height: from - to, rx: Math.min(2, band / 6) }));
          base += value;
        }
      });
      top = bottom + GAP;
    }
    const foot = height - 5;
    if (sweeps.length) {
      const last = sweeps.length - 1;
      frame.push(svg("text", { class: "tick", x: width - RIGHT, y: foot, "text-anchor": "end" }, shortWhen(sweeps[last].created_at)));
      const first = x(0);
      if (width - RIGHT - first > 160) frame.push(svg("text", { class: "tick", x: Math.max(LEFT, first), y: foot }, shortWhen(sweeps[0].created_at)));
    }
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `Keys reclaimed, memory freed, backlog and time held of ${sweeps.length} sweeps` }, frame, columns);
    columns.forEach((column, n) => {
      column.addEventListener("pointerenter", () => choose(n));
      column.addEventListener("click", () => open(sweeps[n]));
    });
    picture.addEventListener("pointerleave", () => choose(-1));
    drawing.replaceChildren(picture);
    legend.replaceChildren(...reasons.slice(0, COLOURS).map((reason, place) => h("li", { class: `r${place}` }, h("i", { "aria-hidden": "true" }), reason.replaceAll("_", " "))),
      reasons.length > COLOURS ? h("li", { class: `r${COLOURS}` }, h("i", { "aria-hidden": "true" }), "other reasons") : "");
    choose(Math.min(at, sweeps.length - 1));
  }

  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && sweeps.length) {
      event.preventDefault();
      choose(at < 0 ? (step < 0 ? sweeps.length - 1 : 0) : Math.min(sweeps.length - 1, Math.max(0, at + step)));
    } else if (event.key === "Enter" && sweeps[at]) open(sweeps[at]);
  });
  box.addEventListener("blur", () => choose(-1));
  const watcher = new ResizeObserver(() => { if (Math.abs(drawing.clientWidth - width) > 1 && sweeps.length) draw(); });
  watcher.observe(drawing);
  return {
    box,
    // Draws these sweeps, which come newest first.
    show(newest) { sweeps = [...newest].reverse(); draw(); },
    end: () => watcher.disconnect(),
  };
}

// The histogram of a forecast: a bar for each bin, with its error. Bins inside one of `peaks` are highlighted.
export function forecastChart(what) {
  const drawing = h("div", { class: "drawing" });
  let drawn = 0;
  // The observer ends with its element.
  new ResizeObserver(() => {
    const width = Math.max(280, drawing.clientWidth);
    if (Math.abs(width - drawn) < 1) return;
    drawn = width;
    drawing.replaceChildren(forecastPicture(what, width));
  }).observe(drawing);
  return drawing;
}

function forecastPicture({ bins, name, peaks }, width) {
  const height = 150, bottom = height - FOOT;
  const most = roundUp(Math.max(0, ...bins.map((bin) => bin.keys + bin.keys_error)));
  const band = (width - LEFT - RIGHT) / Math.max(1, bins.length);
  const y = (value) => bottom - (bottom - 12) * Math.min(1, value / most);
  const parts = [
    svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: 12, y2: 12 }),
    svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: (12 + bottom) / 2, y2: (12 + bottom) / 2 }),
    svg("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: bottom, y2: bottom }),
    svg("text", { class: "tick", x: LEFT - 7, y: 16, "text-anchor": "end" }, short(most)),
    svg("text", { class: "tick", x: LEFT - 7, y: bottom + 3.5, "text-anchor": "end" }, "0"),
  ];
  const every = Math.max(1, Math.ceil(bins.length / Math.floor((width - LEFT) / 100)));
  const inside = (bin, peak) => Date.parse(peak.from) < Date.parse(bin.to) && Date.parse(bin.from) < Date.parse(peak.to);
  bins.forEach((bin, n) => {
    const x = LEFT + n * band, middle = x + band / 2;
    const words = `${when(bin.from)} to ${when(bin.to)}: ${number(bin.keys)}${bin.keys_error ? ` ± ${number(bin.keys_error)}` : ""} keys${bin.bytes ? `, ${bytes(bin.bytes)}` : ""}`;
    parts.push(svg("g", { class: "column" }, svg("title", {}, words),
      svg("rect", { class: "back", x, y: 0, width: band, height: bottom }),
      svg("rect", { class: peaks.some((peak) => inside(bin, peak)) ? "peak-fill" : "bar-fill", x: x + Math.min(1, band / 8), y: y(bin.keys), width: Math.max(0.8, band - Math.min(2, band / 4)), height: Math.max(0, bottom - y(bin.keys)), rx: Math.min(2, band / 6) }),
      bin.keys_error ? svg("path", { class: "error", d: `M${middle} ${y(Math.max(0, bin.keys - bin.keys_error))}V${y(bin.keys + bin.keys_error)}` }) : ""));
    if (n % every === 0 && x < width - 70) parts.push(svg("text", { class: "tick", x, y: height - 5 }, shortWhen(bin.from)));
  });
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `Keys of ${name} that expire, by time` }, parts);
}
