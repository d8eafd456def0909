// Memory: what each device holds for what, in the end and over time.
"use strict";
(() => {
  const P = window.pyggml;
  const $ = (id) => document.getElementById(id);
  const PURPOSES = { weights: ["weights", "--weight"], kv_cache: ["KV cache", "--kv"], compute: ["compute buffers", "--compute"], policy: ["copy policy", "--others"] };

  /** Steps of each backend: times and what is held then, by purpose. */
  P.memorySteps = (view, clock) => {
    const lanes = new Map();
    for (const step of view.memory) {
      const lane = lanes.get(step.backend) || { backend: step.backend, held: new Map(), steps: [] };
      lanes.set(step.backend, lane);
      lane.held.set(`${step.purpose}\u0000${step.buft}`, step.bytes);
      const sums = Object.fromEntries(Object.keys(PURPOSES).map((p) => [p, 0]));
      for (const [key, n] of lane.held) sums[key.split("\u0000")[0]] = (sums[key.split("\u0000")[0]] || 0) + n;
      lane.steps.push({ t: step[clock] ?? 0, ...sums, total: d3.sum(Object.values(sums)), step });
    }
    const rank = (lane) => (lane.backend === "CPU" ? Infinity : view.backends.indexOf(lane.backend));
    return [...lanes.values()].sort((a, b) => rank(a) - rank(b));
  };

  P.buildMemory = () => {
    const view = P.views[P.state.view];
    $("memory").hidden = !view.memory.length;
    if (!view.memory.length) return;
    const clock = view.clocks.includes(P.state.clock) ? P.state.clock : view.clocks[0];
    const lanes = P.memorySteps(view, clock);
    const total = view.total[clock] || 1;
    const shown = Object.entries(PURPOSES).filter(([purpose]) => purpose !== "policy" || view.memory.some((step) => step.purpose === "policy"));
    const legend = shown.map(([, [title, color]]) => `<span><i class="dot" style="background:var(${color})"></i>${title}</span>`).join("");
    const sizes = new Map((view.about.devices || []).map((d) => [d.name, d.memory_bytes]));
    const figures = lanes.map((lane) => figure(lane, total, clock, sizes.get(lane.backend) || 0));
    $("memory-body").innerHTML = `<p class="legend">${legend}</p><div class="multiples">${figures.join("")}</div>`;
  };

  const figure = (lane, total, clock, size) => {
    const [width, height] = [420, 120];
    const top = Math.max(d3.max(lane.steps, (s) => s.total), size) || 1;
    const now = lane.steps.reduce((a, b) => (b.total >= a.total ? b : a));
    const x = (t) => (Math.min(t, total) / total) * width;
    const y = (n) => height - (n / top) * (height - 4);
    const steps = lane.steps.filter((s, k) => k + 1 === lane.steps.length || lane.steps[k + 1].t !== s.t);
    let base = steps.map(() => 0);
    const areas = Object.entries(PURPOSES).filter(([p]) => p !== "policy" || lane.steps.some((s) => s[p])).map(([purpose, [, color]]) => {
      const above = steps.map((s, k) => base[k] + s[purpose]);
      const points = [];
      steps.forEach((s, k) => {
        const next = k + 1 < steps.length ? steps[k + 1].t : total;
        points.push([x(s.t), x(next), y(above[k]), y(base[k])]);
      });
      const path = points.map(([a, b, t]) => `L${a.toFixed(1)},${t.toFixed(1)}L${b.toFixed(1)},${t.toFixed(1)}`).join("");
      const back = points.slice().reverse().map(([a, b, , u]) => `L${b.toFixed(1)},${u.toFixed(1)}L${a.toFixed(1)},${u.toFixed(1)}`).join("");
      base = above;
      return `<path d="M${path.slice(1)}${back}Z" fill="var(${color})"></path>`;
    });
    const parts = Object.entries(PURPOSES)
      .filter(([p]) => now[p])
      .map(([p, [title]]) => `${title} ${P.bytes(now[p])}`);
    const n = steps.length;
    const isOver = size && now.total > size;
    const line = size ? `<line class="capacity${isOver ? " over" : ""}" x1="0" x2="${width}" y1="${y(size)}" y2="${y(size)}"></line>` : "";
    const of = size ? ` of ${P.bytes(size)} (${P.percent(now.total, size)})` : "";
    const missing = isOver ? `<p class="bad">${P.bytes(now.total - size)} too much: the dashed line is the device's size</p>` : "";
    return `<figure data-backend="${P.escape(lane.backend)}" data-bytes="${now.total}"><figcaption><b>${P.escape(lane.backend)}</b> at most ${P.bytes(now.total)}${of}</figcaption>
      <svg viewBox="0 0 ${width} ${height}" preserveAspectRatio="none" role="img" aria-label="${P.escape(`${lane.backend}: ${parts.join(", ")}`)}">${areas.join("")}${line}</svg>${missing}
      <p class="axis"><span>0</span><span>${clock === "order" ? "" : P.time(total, clock)}</span></p>
      <p>${P.escape(parts.join(", "))}${n > 1 ? `; ${P.count(n - 1)} ${n === 2 ? "change" : "changes"} over time` : ""}</p></figure>`;
  };
})();
