// Draws one timeline on a canvas: what is visible, found by binary search; what is narrower than a pixel, summed.
"use strict";
(() => {
  const P = window.pyggml;

  const AXIS = 22; // heights in CSS pixels
  const RUNS = 18;
  const NAME = 15;
  const BAR = 24;
  const GAP = 8;
  const FONT = "11px system-ui, sans-serif";
  const LANE_ORDER = { host: 0, compute: 1, link: 2, engine: 3, waits: 4 };

  const rankOf = (view, lane) => {
    const known = view.backends.indexOf(lane.backend);
    return lane.kind === "host" ? -1 : (known < 0 ? view.backends.length : known) * 10 + LANE_ORDER[lane.kind];
  };

  /** Lanes of a view for one clock: numbers of events by start, and the latest end up to each. */
  P.lanesOf = (view, clock) => {
    const start = view.start[clock];
    const end = view.end[clock];
    const lists = view.lanes.map(() => []);
    const engines = new Map(); // by name: its events, and the links that it carries
    for (let i = 0; i < view.n; i++) {
      // a wait that was over when it began takes no time and no place
      if (start[i] < 0 || (end[i] === start[i] && view.kindOf(i) === "wait")) continue;
      lists[view.lane[i]].push(i);
      if (clock !== "virtual" || view.engines[i] < 0) continue;
      for (const name of view.engine_sets[view.engines[i]]) {
        if (!engines.has(name)) engines.set(name, { events: [], links: new Set() });
        engines.get(name).events.push(i);
        engines.get(name).links.add(view.lane[i]);
      }
    }
    const lanes = view.lanes.map((lane, l) => ({ ...lane, title: lane.kind === "link" ? `copies ${lane.name}` : lane.name, list: lists[l] }));
    for (const [name, { events, links }] of engines) {
      const [link] = links;
      // an engine that does what one link does needs no lane of its own
      if (links.size === 1 && events.length === lists[link].length) lanes[link].title += ` (${name})`;
      else lanes.push({ kind: "engine", name, title: name, backend: name.split(" copy engine")[0], list: events });
    }
    return lanes
      .filter((lane) => lane.list.length)
      .map((lane) => {
        const events = Int32Array.from(lane.list.sort((a, b) => start[a] - start[b] || a - b));
        const reach = new Float64Array(events.length);
        let latest = -1;
        events.forEach((i, k) => (reach[k] = latest = Math.max(latest, end[i])));
        return { ...lane, events, reach, rank: rankOf(view, lane) };
      })
      .sort((a, b) => a.rank - b.rank || a.name.localeCompare(b.name));
  };

  P.heightOf = (lanes) => AXIS + RUNS + lanes.length * (NAME + BAR + GAP) + 4;
  P.laneTop = (k) => AXIS + RUNS + k * (NAME + BAR + GAP);

  /** First event of a lane that ends after t. */
  P.firstVisible = (lane, t) => {
    let low = 0;
    let high = lane.events.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (lane.reach[middle] > t) high = middle;
      else low = middle + 1;
    }
    return low;
  };

  const isShown = (view, i) => !P.state.hidden.has(view.kindOf(i));

  /** The event under a point, or the nearest within some pixels; -1 if none. */
  P.eventAt = (chart, x, y) => {
    const { view, lanes, clock } = chart;
    const k = lanes.findIndex((_, l) => y >= P.laneTop(l) && y < P.laneTop(l) + NAME + BAR + GAP / 2);
    if (k < 0) return -1;
    const lane = lanes[k];
    const t0 = chart.timeAt(x - 4);
    const t1 = chart.timeAt(x + 4);
    const t = chart.timeAt(x);
    let best = -1;
    let bestFar = Infinity;
    for (let j = P.firstVisible(lane, t0 - 1); j < lane.events.length; j++) {
      const i = lane.events[j];
      const a = view.start[clock][i];
      const b = view.end[clock][i];
      if (a > t1) break;
      if (b < t0 || !isShown(view, i)) continue;
      const far = t < a ? a - t : t > b ? t - b : 0;
      if (far <= bestFar) {
        bestFar = far; // of nested events the later one lies on top
        best = i;
      }
    }
    return best;
  };

  /** The run whose band is under a point at the top; -1 if none. */
  P.runAt = (chart, x, y) => {
    if (y < AXIS || y >= AXIS + RUNS) return -1;
    const t = chart.timeAt(x);
    return chart.view.spansOfRuns(chart.clock).findIndex(([a, b]) => t >= a && t <= b);
  };

  const ticks = (chart, width) => {
    const [t0, t1] = [chart.timeAt(0), chart.timeAt(width)];
    const wanted = Math.max(2, Math.floor(width / 95));
    return d3.ticks(t0, t1, wanted).filter((t) => t >= 0 && (chart.clock !== "order" || Number.isInteger(t)));
  };
  const tickText = (t, step, clock) => {
    if (clock === "order") return String(t);
    const [size, unit] = step >= 1e8 ? [1e9, "s"] : step >= 1e5 ? [1e6, "ms"] : step >= 100 ? [1e3, "µs"] : [1, "ns"];
    const digits = Math.max(0, Math.ceil(-Math.log10(step / size) - 1e-9));
    return `${(t / size).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })} ${unit}`;
  };

  /** Text that is cut to a width. */
  const label = (c, text, x, y, width) => {
    if (width < 24) return;
    let shown = text;
    let w = c.measureText(shown).width;
    if (w > width) {
      shown = `${text.slice(0, Math.max(1, Math.floor((text.length * width) / w) - 1))}…`;
      w = c.measureText(shown).width;
      if (w > width || shown.length < 4) return;
    }
    c.fillText(shown, x, y);
  };

  /** A name without what all names of weights have. */
  const short = (name) => name.replace(/^blk\./, "").replace(/\.weight$/, "");

  P.draw = (chart) => {
    const { canvas, view, lanes } = chart;
    const ratio = window.devicePixelRatio || 1;
    const width = chart.width;
    const height = P.heightOf(lanes);
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const c = canvas.getContext("2d");
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, width, height);
    c.font = FONT;
    c.textBaseline = "middle";
    drawAxis(c, chart, width, height);
    drawRuns(c, chart, width, height);
    lanes.forEach((lane, k) => drawLane(c, chart, lane, P.laneTop(k), width));
    chart.drawnEvents = lanes.reduce((n, lane) => n + lane.drawn, 0);
    const chosen = P.state.selected;
    if (chosen && chosen.view === view.index) drawSelected(c, chart, chosen.i, width);
    c.globalAlpha = 1;
  };

  const drawAxis = (c, chart, width, height) => {
    const found = ticks(chart, width);
    const step = found.length > 1 ? found[1] - found[0] : 1;
    for (const t of found) {
      const x = Math.round(chart.xOf(t)) + 0.5;
      c.fillStyle = P.color("--line");
      c.fillRect(x, AXIS - 4, 1, height - AXIS);
      c.fillStyle = P.color("--muted");
      const text = tickText(t, step, chart.clock);
      const w = c.measureText(text).width;
      c.fillText(text, Math.min(Math.max(x - w / 2, 1), width - w - 1), AXIS / 2);
    }
  };

  const drawRuns = (c, chart, width, height) => {
    const spans = chart.view.spansOfRuns(chart.clock);
    let lastX = -1;
    spans.forEach(([a, b], run) => {
      const x0 = Math.max(chart.xOf(a), -1);
      const x1 = Math.min(chart.xOf(b), width + 1);
      if (x1 < 0 || x0 > width || b < a || (x1 - x0 < 1 && Math.floor(x0) === lastX)) return;
      lastX = Math.floor(x0);
      c.fillStyle = P.color(run % 2 ? "--band-b" : "--band-a");
      c.fillRect(x0, AXIS, Math.max(x1 - x0, 1), height - AXIS);
      c.fillStyle = P.color("--line-strong");
      c.fillRect(x0, AXIS, 1, RUNS - 3);
      c.fillStyle = P.color("--muted");
      label(c, chart.view.runTitle(run), x0 + 5, AXIS + RUNS / 2 - 1, x1 - x0 - 8);
    });
  };

  const drawLane = (c, chart, lane, top, width) => {
    const { view, clock } = chart;
    const start = view.start[clock];
    const end = view.end[clock];
    const n = view.kinds.length;
    const shown = view.kinds.map((k) => !P.state.hidden.has(k));
    const fills = view.kinds.map((k) => P.color(P.KINDS[k].color));
    const inks = view.kinds.map((k) => P.inkOn(P.KINDS[k].color));
    const columns = Math.ceil(width) + 1;
    const thin = chart.thin && chart.thin.length === columns * n ? chart.thin.fill(0) : (chart.thin = new Float32Array(columns * n));
    const y = top + NAME;
    const t0 = chart.timeAt(0);
    const t1 = chart.timeAt(width);
    const found = P.state.found;
    const wanted = found ? found.labels[view.index] : null;
    lane.drawn = 0;
    let anyThin = false;
    for (let j = P.firstVisible(lane, t0); j < lane.events.length; j++) {
      const i = lane.events[j];
      if (start[i] > t1) break;
      const kind = view.kind[i];
      if (!shown[kind]) continue;
      lane.drawn++;
      const x0 = chart.xOf(start[i]);
      const x1 = chart.xOf(end[i]);
      if (x1 - x0 < 1.5) {
        const column = Math.min(columns - 1, Math.max(0, Math.floor(x0)));
        // what takes no time still leaves a trace
        thin[column * n + kind] += Math.max(x1 - x0, 0.04) * (wanted && !wanted.has(view.label[i]) ? 0.15 : 1);
        anyThin = true;
        continue;
      }
      const a = Math.max(x0, -2);
      const b = Math.min(x1, width + 2);
      c.globalAlpha = wanted && !wanted.has(view.label[i]) ? 0.16 : 1;
      c.fillStyle = fills[kind];
      const gap = b - a > 4 ? 0.75 : 0;
      if (view.kinds[kind] === "wait") c.fillRect(a, y + BAR * 0.3, b - a - gap, BAR * 0.4);
      else c.fillRect(a, y, b - a - gap, BAR);
      if (b - a > 30 && view.kinds[kind] !== "wait") {
        c.fillStyle = inks[kind];
        label(c, short(view.titleOf(i)), a + 4, y + BAR / 2 + 0.5, b - a - 8);
      }
    }
    c.globalAlpha = 1;
    if (anyThin) drawThin(c, view, thin, columns, n, y);
    c.fillStyle = P.color("--text");
    c.fillText(lane.title, 4, top + NAME / 2 - 1);
  };

  const drawThin = (c, view, thin, columns, n, y) => {
    for (let x = 0; x < columns; x++) {
      let sum = 0;
      let most = 0;
      for (let k = 0; k < n; k++) {
        const v = thin[x * n + k];
        sum += v;
        if (v > thin[x * n + most]) most = k;
      }
      if (!sum) continue;
      const h = Math.max(3, BAR * Math.min(1, sum));
      c.fillStyle = P.color(P.KINDS[view.kinds[most]].color);
      c.fillRect(x, y + BAR - h, 1, h);
    }
  };

  const drawSelected = (c, chart, i, width) => {
    const { view, clock } = chart;
    const k = chart.lanes.findIndex((lane) => view.lanes[view.lane[i]].name === lane.name && lane.kind === view.lanes[view.lane[i]].kind);
    if (k < 0 || view.start[clock][i] < 0) return;
    const x0 = Math.max(chart.xOf(view.start[clock][i]), -5);
    const x1 = Math.min(Math.max(chart.xOf(view.end[clock][i]), x0 + 2), width + 5);
    c.strokeStyle = P.color("--text");
    c.lineWidth = 2;
    c.strokeRect(x0 - 1.5, P.laneTop(k) + NAME - 1.5, x1 - x0 + 3, BAR + 3);
  };

  /** The whole of a view in a narrow strip: of each pixel's time, what computed and what copied. */
  P.drawOverview = (chart) => {
    const { overview: canvas, view, clock } = chart;
    const ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth;
    const height = canvas.clientHeight;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const c = canvas.getContext("2d");
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    const n = view.kinds.length;
    const sums = new Float32Array((width + 1) * n);
    const scale = width / chart.domain;
    for (const lane of chart.lanes) {
      if (lane.kind !== "compute" && lane.kind !== "link") continue;
      for (const i of lane.events) {
        if (P.state.hidden.has(view.kindOf(i))) continue;
        const a = view.start[clock][i] * scale;
        const b = view.end[clock][i] * scale;
        for (let x = Math.floor(a); x <= b && x < width; x++) sums[x * n + view.kind[i]] += Math.min(b, x + 1) - Math.max(a, x);
      }
    }
    for (let x = 0; x < width; x++) {
      let y = height;
      const sum = Math.max(1, sums.subarray(x * n, x * n + n).reduce((p, q) => p + q, 0));
      for (let k = 0; k < n; k++) {
        const h = (sums[x * n + k] / sum) * height;
        if (h <= 0) continue;
        c.fillStyle = P.color(P.KINDS[view.kinds[k]].color);
        c.fillRect(x, y - h, 1, h);
        y -= h;
      }
    }
  };
})();
