// Layers by experts: how often each was used, or how many bytes of it were copied.
"use strict";
(() => {
  const P = window.pyggml;
  const $ = (id) => document.getElementById(id);
  const choice = { measure: "used", runs: "all" };

  const shade = (share) => {
    if (share <= 0) return P.color("--heat-0");
    return d3.piecewise(d3.interpolateLab, [P.color("--heat-1"), P.color("--heat-2"), P.color("--heat-3")])(share);
  };

  P.buildExperts = () => {
    const view = P.views[P.state.view];
    const any = P.expertCells(view, () => true);
    $("experts").hidden = any === null;
    if (any === null) return;
    const tools = $("experts-tools");
    tools.replaceChildren();
    const runs = P.runSelect(view);
    const measure = document.createElement("select");
    measure.setAttribute("aria-label", "What a cell tells");
    if (view.experts.length) measure.add(new Option("how often needed", "used"));
    measure.add(new Option("bytes copied", "bytes"));
    if ([...measure.options].some((o) => o.value === choice.measure)) measure.value = choice.measure;
    if ([...runs.options].some((o) => o.value === choice.runs)) runs.value = choice.runs;
    const legend = document.createElement("span");
    legend.className = "legend";
    tools.append(runs, measure, legend);
    const show = () => {
      choice.measure = measure.value;
      choice.runs = runs.value;
      const cells = P.expertCells(view, P.chosenRuns(view, runs.value));
      draw(view, cells, measure.value, legend);
    };
    runs.addEventListener("change", show);
    measure.addEventListener("change", show);
    P.redrawExperts = show;
    show();
  };

  const draw = (view, cells, measure, legend) => {
    const box = $("heat");
    box.replaceChildren();
    const words = $("experts-words");
    if (cells === null) {
      words.textContent = "No expert weights were copied: experts were used where they are.";
      legend.textContent = "";
      return;
    }
    const { n, rows } = cells;
    const top = d3.max(rows, (r) => d3.max(r[measure].filter((x) => x !== undefined)) || 0) || 1;
    const bytes = d3.sum(rows, (r) => d3.sum(r.bytes));
    const full = d3.sum(rows, (r) => r.full);
    const reads = d3.sum(rows, (r) => r.reads);
    const usedMean = reads ? d3.sum(rows, (r) => d3.sum(r.used)) / reads : null;
    words.textContent =
      (usedMean === null ? "Every expert was copied: the ids were not read. " : `On average ${usedMean.toFixed(1)} of ${n} experts of a layer were needed. `) +
      `Copied ${P.bytes(bytes)} of ${P.bytes(full)} (${P.percent(bytes, full)}).`;
    const most = measure === "used" && top === 1 ? 0.6 : 1; // needed or not: the darkest shade would only be loud
    const text = (v) => (measure === "bytes" ? P.bytes(Math.round(v)) : `needed ${P.count(v)} ×`);
    legend.innerHTML = `<span>0</span>${d3.range(0, 12).map((k) => `<i style="background:${shade((k / 11) * most)}"></i>`).join("")}<span>${text(top)}</span>`;
    const left = 34;
    const side = 74;
    const room = box.clientWidth - left - side - 2;
    const w = Math.max(2, Math.min(60, room / n));
    const h = Math.max(5, Math.min(18, rows.length > 40 ? 7 : 16));
    const head = 18;
    const foot = 46;
    const width = left + w * n + side;
    const height = head + h * rows.length + foot;
    const canvas = document.createElement("canvas");
    const ratio = window.devicePixelRatio || 1;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${rows.length} layers by ${n} experts; the most of a cell is ${text(top)}`);
    const c = canvas.getContext("2d");
    c.scale(ratio, ratio);
    c.font = "11px system-ui, sans-serif";
    c.textBaseline = "middle";
    const gap = w > 6 && h > 6 ? 1 : w > 3 ? 0.5 : 0;
    const sums = rows.map((r) => d3.sum(r[measure]));
    const columns = d3.range(n).map((e) => d3.sum(rows, (r) => r[measure][e] || 0));
    rows.forEach((row, y) => {
      for (let e = 0; e < n; e++) {
        c.fillStyle = shade(((row[measure][e] || 0) / top) * most);
        c.fillRect(left + e * w, head + y * h, w - gap, h - gap);
      }
      c.fillStyle = P.color("--experts");
      c.fillRect(left + n * w + 6, head + y * h, ((side - 10) * sums[y]) / (d3.max(sums) || 1), h - Math.max(gap, 1));
    });
    c.fillStyle = P.color("--muted");
    c.textAlign = "right";
    const every = Math.ceil(14 / h);
    rows.forEach((row, y) => {
      if (y % (every > 1 ? 5 * Math.ceil(every / 5) : 1) === 0) c.fillText(row.layer === null ? "–" : row.layer, left - 6, head + y * h + h / 2);
    });
    c.textAlign = "center";
    const step = [1, 2, 4, 8, 16, 32, 64].find((s) => s * w >= 22) || 64;
    for (let e = 0; e < n; e += step) c.fillText(e, left + e * w + w / 2, head / 2);
    c.textAlign = "left";
    c.fillText("by layer", left + n * w + 6, head / 2);
    const highest = d3.max(columns) || 1;
    c.fillStyle = P.color("--experts");
    columns.forEach((v, e) => {
      const bar = (26 * v) / highest;
      c.fillRect(left + e * w, head + rows.length * h + 6 + 26 - bar, Math.max(w - gap, 0.5), bar);
    });
    c.fillStyle = P.color("--muted");
    c.fillText("by expert", left, head + rows.length * h + 40);
    const at = (event) => [Math.floor((event.offsetX - left) / w), Math.floor((event.offsetY - head) / h)];
    canvas.addEventListener("pointermove", (event) => {
      const [e, y] = at(event);
      if (e < 0 || e >= n || y < 0 || y >= rows.length) {
        if (y >= 0 && y < rows.length && e >= n) P.showTip(event, `<b>layer ${rows[y].layer ?? "–"}</b><br>${text(sums[y])} in all`);
        else if (e >= 0 && e < n && y >= rows.length) P.showTip(event, `<b>expert ${e}</b><br>${text(columns[e])} in all layers`);
        else P.hideTip();
        return;
      }
      const row = rows[y];
      P.showTip(event, `<b>layer ${row.layer ?? "–"}, expert ${e}</b><br>${view.experts.length ? `needed ${P.count(row.used[e] || 0)} × of ${P.count(row.reads)}<br>` : ""}${P.bytes(Math.round(row.bytes[e] || 0))} copied`);
    });
    canvas.addEventListener("pointerleave", P.hideTip);
    canvas.addEventListener("click", (event) => {
      const [, y] = at(event);
      if (y < 0 || y >= rows.length) return;
      const i = view.kind.findIndex((_, j) => ["experts", "weight"].includes(view.kindOf(j)) && P.layerOf(view.nameOf(j)) === rows[y].layer);
      if (i < 0) return;
      P.select(view, i, { zoom: true });
      $("timeline").scrollIntoView({ behavior: "smooth" });
    });
    box.append(canvas);
  };
})();
