// The live page: past values from /history.json once, new ones from /live.json each second.
"use strict";

// Okabe and Ito's colours, told apart by colour-blind people too, and dashes for those beyond them.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c8c00"];
const DASHES = [[], [8, 4], [2, 3], [12, 3, 2, 3]];

const UNITS = {
  ratio: (v) => `${(100 * v).toFixed(v < 0.1 ? 1 : 0)}%`,
  per_s: (v) => `${short(v)}/s`,
  seconds: (v) => (v < 0.001 ? `${(v * 1e6).toFixed(0)} µs` : v < 1 ? `${+(v * 1e3).toPrecision(3)} ms` : `${+v.toPrecision(3)} s`),
  bytes: (v) => `${short(v)}B`,
  bytes_per_s: (v) => `${short(v)}B/s`,
  rows: short,
  watts: (v) => `${short(v)} W`,
  celsius: (v) => `${v.toFixed(0)} °C`,
  count: short,
  joules: (v) => `${short(v)} J`,
};

function short(value) {
  const size = Math.abs(value);
  for (const [scale, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= scale) return `${+(value / scale).toPrecision(3)}${letter}`;
  }
  return `${+value.toPrecision(3)}`;
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

class Panel {
  constructor(told, historyS) {
    Object.assign(this, { name: told.name, kind: told.kind, unit: UNITS[told.unit] ?? short, historyS });
    this.series = new Map(); // legend -> Map(time -> value)
    const part = document.getElementById("panel").content.cloneNode(true);
    this.article = part.querySelector("article");
    this.article.id = `panel-${told.name}`;
    const title = part.querySelector("h2");
    title.textContent = told.title;
    title.id = `title-${told.name}`;
    this.article.setAttribute("aria-labelledby", title.id);
    part.querySelector(".help").textContent = told.help;
    part.querySelector("caption").textContent = told.title;
    this.chart = part.querySelector(".chart");
    this.table = part.querySelector("table");
    this.empty = part.querySelector(".empty");
    this.toggle = part.querySelector(".toggle");
    this.title = told.title;
    this.asTable = this.kind === "table";
    this.toggle.hidden = this.asTable;
    this.toggle.setAttribute("aria-label", `${told.title} as a table`);
    this.toggle.addEventListener("click", () => {
      this.asTable = !this.asTable;
      this.toggle.setAttribute("aria-pressed", String(this.asTable));
      this.draw();
    });
    document.getElementById("panels").append(part);
    for (const one of told.series) this.add(one);
  }

  add(one) {
    if (!this.series.has(one.legend)) this.series.set(one.legend, new Map());
    const points = this.series.get(one.legend);
    for (const [at, value] of one.points) points.set(Math.round(at), value);
  }

  take(found, now) {
    if (this.kind === "table") this.series.clear();
    for (const one of found) this.add(one);
    const oldest = now - this.historyS;
    for (const [legend, points] of this.series) {
      for (const at of points.keys()) if (at < oldest) points.delete(at);
      if (!points.size) this.series.delete(legend);
    }
    this.present = new Set(found.map((one) => one.legend));
    this.draw();
  }

  latest() {
    const rows = [...this.series].map(([legend, points]) => [legend, points.get(Math.max(...points.keys()))]);
    return rows.filter(([legend]) => !this.present || this.present.has(legend));
  }

  draw() {
    const has = this.series.size > 0;
    this.empty.hidden = has;
    this.chart.hidden = !has || this.asTable;
    this.table.hidden = !has || !this.asTable;
    if (!has) return;
    if (this.asTable) this.drawTable();
    else if (this.kind === "heat") this.drawHeat();
    else this.drawLines();
    const words = this.latest().slice(0, 8).map(([legend, value]) => `${legend} ${this.unit(value)}`);
    this.chart.setAttribute("aria-label", `${this.title}: ${words.join(", ")}`);
  }

  drawTable() {
    const body = this.table.tBodies[0];
    const rows = this.latest();
    if (this.kind !== "heat") rows.sort((a, b) => (a[0] < b[0] ? -1 : 1));
    while (body.rows.length > rows.length) body.deleteRow(-1);
    rows.forEach(([legend, value], index) => {
      const row = body.rows[index] ?? body.insertRow();
      while (row.cells.length < 2) row.insertCell();
      row.cells[0].textContent = legend;
      row.cells[1].textContent = this.kind === "heat" ? `${short(value)}/s` : this.unit(value);
      row.cells[1].className = "number";
    });
  }

  times() {
    const all = new Set();
    for (const points of this.series.values()) for (const at of points.keys()) all.add(at);
    return [...all].sort((a, b) => a - b);
  }

  drawLines() {
    const legends = [...this.series.keys()].sort();
    const times = this.times();
    const data = [times, ...legends.map((legend) => times.map((at) => this.series.get(legend).get(at) ?? null))];
    const width = Math.max(200, this.chart.clientWidth);
    const key = legends.join("\n") + css("--ink");
    if (this.plot && this.key === key) {
      if (this.plot.width !== width) this.plot.setSize({ width, height: 170 });
      this.plot.setData(data);
      this.showNewest(times);
      return;
    }
    this.plot?.destroy();
    this.key = key;
    const axis = { stroke: css("--pale"), grid: { stroke: css("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
    const show = (_, v) => (v == null ? "–" : this.unit(v));
    this.plot = new uPlot({
      width,
      height: 170,
      cursor: { drag: { x: false, y: false } },
      scales: { y: { range: (_, low, high) => [Math.min(0, low ?? 0), high > 0 ? high * 1.1 : 1] } },
      axes: [{ ...axis, space: 70 }, { ...axis, size: 58, values: (_, ticks) => ticks.map(this.unit) }],
      series: [
        {},
        ...legends.map((legend, index) => ({
          label: legend,
          stroke: COLOURS[index % COLOURS.length],
          dash: DASHES[Math.floor(index / COLOURS.length) % DASHES.length],
          width: 2,
          spanGaps: true,
          points: { show: times.length < 3 },
          value: show,
        })),
      ],
    }, data, this.chart);
    this.showNewest(times);
  }

  // In the legend, unless somebody points at another moment.
  showNewest(times) {
    if (this.plot.cursor.idx == null) this.plot.setLegend({ idx: times.length - 1 });
  }

  // A column per moment, a row per bucket, as dark as its share of the column's largest.
  drawHeat() {
    const bounds = [...this.series.keys()].sort((a, b) => bound(a) - bound(b));
    const columns = this.times().slice(-120);
    if (!this.canvas) {
      this.canvas = document.createElement("canvas");
      this.chart.replaceChildren(this.canvas);
    }
    const wide = Math.max(200, this.chart.clientWidth), high = 190, left = 58, bottom = 18;
    const scale = window.devicePixelRatio || 1;
    Object.assign(this.canvas, { width: wide * scale, height: high * scale });
    this.canvas.style.width = `${wide}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    const cells = columns.map((at) => {
      let below = 0;
      return bounds.map((legend) => {
        const upTo = this.series.get(legend).get(at) ?? below;
        const here = Math.max(0, upTo - below);
        below = Math.max(below, upTo);
        return here;
      });
    });
    const most = Math.max(1e-9, ...cells.flat());
    const cellWide = (wide - left) / Math.max(1, columns.length), cellHigh = (high - bottom) / bounds.length;
    const heat = css("--heat");
    cells.forEach((column, x) => column.forEach((value, y) => {
      if (value <= 0) return;
      pen.fillStyle = `rgba(${heat}, ${0.12 + 0.88 * Math.sqrt(value / most)})`;
      pen.fillRect(left + x * cellWide, high - bottom - (y + 1) * cellHigh, cellWide + 0.5, cellHigh - 0.5);
    }));
    pen.fillStyle = css("--pale");
    pen.font = "11px system-ui";
    bounds.forEach((legend, y) => {
      if (y % 2) return;
      const text = Number.isFinite(bound(legend)) ? `≤ ${this.unit(bound(legend))}` : "more";
      pen.fillText(text, 0, high - bottom - y * cellHigh - cellHigh / 2 + 4);
    });
    if (columns.length) {
      const clock = (at) => new Date(1000 * at).toLocaleTimeString();
      pen.fillText(clock(columns[0]), left, high - 4);
      pen.textAlign = "right";
      pen.fillText(clock(columns.at(-1)), wide, high - 4);
    }
  }
}

function bound(text) {
  return text === "+Inf" ? Infinity : Number(text);
}

function showAlerts(alerts) {
  const place = document.getElementById("alerts");
  const firing = alerts.filter((one) => one.state === "firing");
  const key = JSON.stringify(firing);
  if (place.dataset.key === key) return; // said once, not each second
  place.dataset.key = key;
  place.hidden = !firing.length;
  place.replaceChildren();
  if (!firing.length) return;
  const title = document.createElement("h2");
  title.textContent = firing.length === 1 ? "1 alert fires" : `${firing.length} alerts fire`;
  const list = document.createElement("ul");
  for (const one of firing) {
    const item = document.createElement("li");
    item.textContent = `${one.name}${one.severity ? ` (${one.severity})` : ""}: ${one.summary} `;
    if (one.runbook) {
      const link = document.createElement("a");
      link.href = `runbooks/${one.runbook}`;
      link.textContent = "run-book";
      item.append(link);
    }
    list.append(item);
  }
  place.append(title, list);
}

async function ask(path) {
  const reply = await fetch(path, { cache: "no-store" });
  if (!reply.ok) throw new Error(`${path}: ${reply.status}`);
  return reply.json();
}

async function main() {
  let told, panels, period = 1;
  const state = document.getElementById("state");
  const say = (name, text) => {
    if (state.dataset.state !== name) Object.assign(state, { textContent: text }).dataset.state = name;
  };
  for (;;) {
    try {
      if (!panels) {
        told = await ask("history.json");
        panels = told.panels.map((one) => new Panel(one, told.history_s));
        period = told.period_s;
      }
      const now = await ask("live.json");
      say(now.state, told.states[now.state]);
      document.getElementById("clock").textContent = new Date(1000 * now.time).toLocaleTimeString();
      showAlerts(now.alerts);
      if (now.state !== "no prometheus") {
        for (const panel of panels) panel.take(now.panels[panel.name] ?? [], now.time);
      }
    } catch (error) {
      say("no prometheus", `This page's server does not answer (${error.message}); what is shown is old.`);
    }
    await new Promise((done) => setTimeout(done, 1000 * period));
  }
}

main();
