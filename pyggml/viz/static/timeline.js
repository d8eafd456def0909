// The timelines: one chart for each view, all with the same zoom; keys, selection, filters.
"use strict";
(() => {
  const P = window.pyggml;
  const $ = (id) => document.getElementById(id);
  const charts = (P.charts = []);
  let transform = d3.zoomIdentity;
  let isDue = false;

  P.redraw = () => {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => {
      isDue = false;
      for (const chart of charts) {
        P.draw(chart);
        placeWindow(chart);
      }
    });
  };

  const clockFor = (view) => (view.clocks.includes(P.state.clock) ? P.state.clock : view.clocks[0]);

  /** Build the charts for the chosen clock. */
  P.buildCharts = () => {
    const domain = Math.max(1, ...P.views.map((v) => v.total[clockFor(v)])) * 1.002;
    charts.length = 0;
    $("charts").replaceChildren();
    for (const view of P.views) {
      if (!view.n) continue;
      const clock = clockFor(view);
      const chart = { view, clock, domain, lanes: P.lanesOf(view, clock) };
      const box = document.createElement("figure");
      box.className = "chart";
      const title = P.views.length > 1 ? `<figcaption><b>${view.letter}</b> ${P.escape(view.name)}</figcaption>` : "";
      box.innerHTML = `${title}<div class="overview"><canvas></canvas><div class="window"></div></div>
        <canvas class="lanes" tabindex="0" role="img"></canvas>`;
      chart.overview = box.querySelector(".overview canvas");
      chart.window = box.querySelector(".window");
      chart.canvas = box.querySelector("canvas.lanes");
      chart.canvas.style.height = `${P.heightOf(chart.lanes)}px`;
      const what = chart.lanes.map((l) => l.title).join(", ");
      chart.canvas.setAttribute("aria-label", `Timeline of ${view.name || "the records"}, ${P.clockTitle(clock)}; lanes: ${what}`);
      $("charts").append(box);
      chart.width = chart.canvas.clientWidth; // asking the page for it at every event would cost a frame its time
      chart.scale = () => chart.width / domain;
      chart.xOf = (t) => ((t * chart.width) / domain) * transform.k + transform.x;
      chart.timeAt = (x) => ((x - transform.x) / transform.k / chart.width) * domain;
      charts.push(chart);
      connect(chart);
    }
    setTransform(d3.zoomIdentity);
    charts.forEach(P.drawOverview);
  };

  const zoomer = d3
    .zoom()
    // one finger is left to the page, which may want to scroll, and to `followFinger`
    .filter((event) => !event.button && event.type !== "dblclick" && (event.type !== "touchstart" || event.touches.length > 1))
    .on("zoom", (event) => {
      if (event.sourceEvent) setTransform(event.transform);
    });

  const limits = (chart) => {
    const width = chart.width;
    zoomer.scaleExtent([1, Math.max(64, chart.domain / 40)]).translateExtent([[0, 0], [width, 1]]).extent([[0, 0], [width, 1]]);
  };

  /** Give every chart the same zoom. */
  const setTransform = (t) => {
    transform = t;
    for (const chart of charts) chart.canvas.__zoom = t;
    P.redraw();
  };

  const clamp = (k, x, width) => {
    const most = Math.max(64, charts[0].domain / 40);
    const scale = Math.min(Math.max(k, 1), most);
    return d3.zoomIdentity.translate(Math.min(0, Math.max(width * (1 - scale), x)), 0).scale(scale);
  };

  /** Show the times from a to b, in ns. */
  P.showTimes = (a, b) => {
    if (!charts.length) return;
    const width = charts[0].width;
    const scale = charts[0].scale();
    const k = width / Math.max((b - a) * scale, 1e-9);
    const most = Math.max(64, charts[0].domain / 40);
    const kept = Math.min(Math.max(k, 1), most);
    setTransform(clamp(kept, width / 2 - ((a + b) / 2) * scale * kept, width));
  };
  P.shownTimes = () => [charts[0].timeAt(0), charts[0].timeAt(charts[0].width)];

  const zoomBy = (factor, x) => {
    const width = charts[0].width;
    const at = x === undefined ? width / 2 : x;
    const most = Math.max(64, charts[0].domain / 40);
    const k = Math.min(Math.max(transform.k * factor, 1), most);
    setTransform(clamp(k, at - ((at - transform.x) / transform.k) * k, width));
  };
  const moveBy = (share) => {
    const width = charts[0].width;
    setTransform(clamp(transform.k, transform.x - share * width, width));
  };

  const placeWindow = (chart) => {
    const width = chart.overview.clientWidth;
    const a = (chart.timeAt(0) / chart.domain) * width;
    const b = (chart.timeAt(chart.width) / chart.domain) * width;
    chart.window.style.left = `${a}px`;
    chart.window.style.width = `${Math.max(b - a, 3)}px`;
  };

  /** Let one finger move the time, as far as it goes sideways. */
  const followFinger = (canvas) => {
    const fingers = new Map();
    canvas.addEventListener("pointerdown", (event) => event.pointerType === "touch" && fingers.set(event.pointerId, event.clientX));
    canvas.addEventListener("pointermove", (event) => {
      if (!fingers.has(event.pointerId)) return;
      const dx = event.clientX - fingers.get(event.pointerId);
      fingers.set(event.pointerId, event.clientX);
      if (fingers.size === 1) setTransform(clamp(transform.k, transform.x + dx, charts[0].width));
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => fingers.delete(event.pointerId));
  };

  const connect = (chart) => {
    const { canvas, view } = chart;
    d3.select(canvas).on("pointerenter", () => limits(chart)).call(zoomer).on("dblclick.zoom", null);
    limits(chart);
    followFinger(canvas);
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons || event.pointerType === "touch") return P.hideTip();
      const i = P.eventAt(chart, event.offsetX, event.offsetY);
      const run = i < 0 ? P.runAt(chart, event.offsetX, event.offsetY) : -1;
      canvas.style.cursor = i < 0 && run < 0 ? "grab" : "pointer";
      if (i >= 0) P.showTip(event, P.tipOf(view, i));
      else if (run >= 0) P.showTip(event, P.tipOfRun(view, run));
      else P.hideTip();
    });
    canvas.addEventListener("pointerleave", P.hideTip);
    canvas.addEventListener("click", (event) => {
      const i = P.eventAt(chart, event.offsetX, event.offsetY);
      const run = i < 0 ? P.runAt(chart, event.offsetX, event.offsetY) : -1;
      if (i >= 0) P.select(view, i);
      else if (run >= 0) P.showTimes(...view.spansOfRuns(chart.clock)[run]);
    });
    canvas.addEventListener("dblclick", (event) => zoomBy(event.shiftKey ? 1 / 4 : 4, event.offsetX));
    canvas.addEventListener("keydown", onKey);
    const strip = chart.overview.parentElement;
    const go = (event) => {
      const at = ((event.clientX - strip.getBoundingClientRect().left) / strip.clientWidth) * chart.domain;
      const [a, b] = P.shownTimes();
      P.showTimes(at - (b - a) / 2, at + (b - a) / 2);
    };
    strip.addEventListener("pointerdown", (event) => {
      strip.setPointerCapture(event.pointerId);
      go(event);
    });
    strip.addEventListener("pointermove", (event) => event.buttons && go(event));
  };

  const onKey = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = {
      "+": () => zoomBy(1.6), "=": () => zoomBy(1.6), "-": () => zoomBy(1 / 1.6), "−": () => zoomBy(1 / 1.6),
      ArrowLeft: () => moveBy(-0.2), ArrowRight: () => moveBy(0.2), 0: () => setTransform(d3.zoomIdentity),
      Home: () => setTransform(d3.zoomIdentity), "[": () => P.step(-1), "]": () => P.step(1), f: P.zoomToSelected,
    }; // prettier-ignore
    if (keys[event.key]) {
      event.preventDefault();
      keys[event.key]();
    }
  };

  // -- selecting ------------------------------------------------------------

  P.select = (view, i, { zoom = false } = {}) => {
    P.state.selected = { view: view.index, i };
    $("zoom-selected").disabled = false;
    P.showDetail(view, i);
    if (zoom) P.zoomToSelected();
    P.redraw();
  };
  P.forget = () => {
    P.state.selected = null;
    P.state.found = null;
    P.state.wantedNode = null;
    $("zoom-selected").disabled = true;
    $("search").value = "";
    P.showDetail(null);
    P.redraw();
  };
  P.zoomToSelected = () => {
    const chosen = P.state.selected;
    if (!chosen) return;
    const view = P.views[chosen.view];
    const clock = clockFor(view);
    const a = view.start[clock][chosen.i];
    if (a < 0) return;
    const b = Math.max(view.end[clock][chosen.i], a + 1);
    const around = Math.max((b - a) * 4, view.total[clock] / 2e5);
    P.showTimes(a - around, b + around);
  };
  /** Select the next or previous event of the same lane. */
  P.step = (way) => {
    const chosen = P.state.selected;
    const chart = charts.find((x) => x.view.index === (chosen ? chosen.view : P.state.view)) || charts[0];
    const { view } = chart;
    const lane = chosen ? chart.lanes.find((l) => l.events.includes(chosen.i)) : chart.lanes.find((l) => l.kind === "compute");
    if (!lane) return;
    const shown = lane.events.filter((i) => !P.state.hidden.has(view.kindOf(i)));
    const at = chosen ? shown.indexOf(chosen.i) : way > 0 ? -1 : 0;
    const next = shown[Math.min(Math.max(at + way, 0), shown.length - 1)];
    if (next === undefined) return;
    P.select(view, next);
    const [a, b] = P.shownTimes();
    const t = view.start[chart.clock][next];
    if (t < a || t > b) P.showTimes(t - (b - a) / 2, t + (b - a) / 2);
  };

  P.connectTimeline = () => {
    $("zoom-in").addEventListener("click", () => zoomBy(2));
    $("zoom-out").addEventListener("click", () => zoomBy(1 / 2));
    $("zoom-fit").addEventListener("click", () => setTransform(d3.zoomIdentity));
    $("zoom-selected").addEventListener("click", P.zoomToSelected);
    document.addEventListener("keydown", (event) => {
      if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "/") {
        event.preventDefault();
        $("search").focus();
        $("search").select();
      } else if (event.key === "n") P.nextFound(1);
      else if (event.key === "N") P.nextFound(-1);
      else if (event.key === "Escape") P.forget();
    });
    let width = 0;
    new ResizeObserver(() => {
      if (!charts.length || $("charts").clientWidth === width) return;
      width = $("charts").clientWidth;
      const before = P.shownTimes();
      for (const chart of charts) chart.width = chart.canvas.clientWidth;
      charts.forEach(P.drawOverview);
      charts.forEach(limits);
      P.showTimes(...before);
    }).observe($("charts"));
  };

  // -- filters --------------------------------------------------------------

  P.refreshChips = () => {
    for (const chip of $("kinds").children) chip.setAttribute("aria-pressed", String(!P.state.hidden.has(chip.dataset.kind)));
  };
  P.buildChips = () => {
    const box = $("kinds");
    box.replaceChildren();
    for (const [kind, { title, color }] of Object.entries(P.KINDS)) {
      const n = P.views.map((v) => v.kind.reduce((sum, k) => sum + (v.kinds[k] === kind), 0));
      if (!n.some(Boolean)) continue;
      const chip = document.createElement("button");
      chip.type = "button";
      chip.className = "chip";
      chip.dataset.kind = kind;
      chip.title = `${n.map(P.count).join(" and ")} events; click to hide or show, with Shift only these`;
      chip.innerHTML = `<i style="background:var(${color})"></i>${title}`;
      chip.addEventListener("click", (event) => {
        const hidden = P.state.hidden;
        const others = [...box.children].map((x) => x.dataset.kind).filter((k) => k !== kind);
        if (event.shiftKey) {
          const isOnly = others.every((k) => hidden.has(k)) && !hidden.has(kind);
          hidden.clear();
          if (!isOnly) others.forEach((k) => hidden.add(k));
        } else if (!hidden.delete(kind)) hidden.add(kind);
        P.refreshChips();
        charts.forEach(P.drawOverview);
        P.redraw();
      });
      box.append(chip);
    }
    P.refreshChips();
  };
})();
