// A graph alone: its nodes in order, and a drawing of what is around one of them.
"use strict";
(() => {
  const P = window.pyggml;
  const $ = (id) => document.getElementById(id);
  const WHOLE = 60; // nodes up to which the whole graph is drawn

  P.buildGraph = () => {
    const view = P.views[P.state.view];
    const graph = view.graph;
    $("graph").hidden = !graph;
    if (!graph) return;
    const tensors = graph.tensors;
    const users = tensors.map(() => []);
    tensors.forEach((t, i) => t.src.forEach((s) => users[s].push(i)));
    let center = null;
    const tools = $("graph-tools");
    tools.innerHTML = `<input type="search" placeholder="Filter by name, op, type …" aria-label="Filter the graph"><span class="words"></span><button type="button" hidden>whole graph</button>`;
    const [filter, words, whole] = tools.children;
    const columns = [
      { title: "", right: true, value: (r) => r.i, html: (r) => (r.i < graph.n_leafs ? "leaf" : r.i - graph.n_leafs) },
      { title: "name", value: (r) => r.name, html: (r) => P.escape(r.name) },
      { title: "op", value: (r) => r.op, html: (r) => P.escape(r.op) },
      { title: "type", value: (r) => r.type, html: (r) => P.escape(r.type) },
      { title: "ne", value: (r) => r.bytes, html: (r) => P.escape(r.ne.join(" × ")) },
      { title: "bytes", right: true, value: (r) => r.bytes, html: (r) => P.bytes(r.bytes) },
      { title: "sources", value: (r) => r.src.length, html: (r) => P.escape(r.src.map((s) => tensors[s].name).join(", ") || "–") },
    ];
    const show = () => {
      const text = filter.value.trim().toLowerCase();
      const rows = tensors
        .map((t, i) => ({ ...t, i }))
        .filter((t) => !text || [t.name, t.op, t.type].some((x) => x.toLowerCase().includes(text)));
      words.textContent = `${P.count(rows.length)} of ${P.count(tensors.length)} tensors`;
      P.table($("graph-table"), columns, rows, {
        click: (row) => {
          center = row.i;
          draw();
          $("graph-drawing").scrollIntoView({ behavior: "smooth", block: "nearest" });
        },
      }); // prettier-ignore
    };
    const draw = () => {
      const canAll = tensors.length <= WHOLE;
      whole.hidden = center === null || !canAll;
      if (center === null && !canAll) {
        $("graph-drawing").innerHTML = `<p class="hint">Select a row to draw what is around it.</p>`;
        return;
      }
      drawing(center === null ? tensors.map((_, i) => i) : around(center), tensors, users, center, (i) => {
        center = i;
        draw();
      });
    };
    const around = (i) => {
      const near = new Set([i]);
      const walk = (at, next, depth) => {
        if (depth === 0) return;
        for (const j of next(at).slice(0, 8)) {
          near.add(j);
          walk(j, next, depth - 1);
        }
      };
      walk(i, (j) => tensors[j].src, 2);
      walk(i, (j) => users[j], 2);
      return [...near].sort((a, b) => a - b);
    };
    whole.addEventListener("click", () => {
      center = null;
      draw();
    });
    filter.addEventListener("input", show);
    $("graph-table").state = null;
    show();
    draw();
  };

  /** The numbers of elements, without the ones at the end. */
  const dims = (ne) => ne.slice(0, ne.reduce((last, n, k) => (n === 1 ? last : k), 0) + 1).join("×");

  /** Layers by the longest way from a source; within a layer near the mean of the sources. */
  const drawing = (chosen, tensors, users, center, go) => {
    const inside = new Set(chosen);
    const depth = new Map();
    for (const i of chosen) depth.set(i, 0);
    const order = chosen.slice().sort((a, b) => rankOf(tensors, a) - rankOf(tensors, b));
    for (let pass = 0; pass < order.length; pass++) {
      let changed = false;
      for (const i of order) {
        const d = Math.max(0, ...tensors[i].src.filter((s) => inside.has(s) && s !== i).map((s) => depth.get(s) + 1));
        if (d !== depth.get(i)) {
          depth.set(i, d);
          changed = true;
        }
      }
      if (!changed) break;
    }
    // a source stands right above its first user, not at the top of everything
    for (const i of order) {
      if (tensors[i].src.some((s) => inside.has(s))) continue;
      const below = users[i].filter((u) => inside.has(u) && u !== i).map((u) => depth.get(u));
      if (below.length) depth.set(i, Math.min(...below) - 1);
    }
    const least = Math.min(...depth.values());
    const layers = [];
    for (const i of chosen) (layers[depth.get(i) - least] = layers[depth.get(i) - least] || []).push(i);
    const [w, h, gx, gy] = [150, 38, 16, 30];
    const place = new Map();
    layers.forEach((layer, y) => {
      const want = (i) => d3.mean(tensors[i].src.filter((s) => place.has(s)), (s) => place.get(s)[0]) ?? 1e6;
      layer.sort((a, b) => want(a) - want(b) || a - b);
      layer.forEach((i, x) => place.set(i, [x * (w + gx), y * (h + gy)]));
    });
    const width = (w + gx) * d3.max(layers, (l) => l.length) - gx + 4;
    layers.forEach((layer) => {
      const shift = (width - (layer.length * (w + gx) - gx)) / 2;
      layer.forEach((i) => (place.get(i)[0] += shift));
    });
    const height = layers.length * (h + gy) - gy + 4;
    const lines = [];
    const boxes = [];
    for (const i of chosen) {
      const [x, y] = place.get(i);
      for (const s of tensors[i].src) {
        if (!place.has(s) || s === i) continue;
        const [a, b] = place.get(s);
        lines.push(`<path d="M${a + w / 2},${b + h}C${a + w / 2},${b + h + gy / 2} ${x + w / 2},${y - gy / 2} ${x + w / 2},${y}"></path>`);
      }
      const t = tensors[i];
      const cut = (text, n) => P.escape(text.length > n ? `${text.slice(0, n - 1)}…` : text);
      boxes.push(`<g tabindex="0" role="button" data-i="${i}" class="${t.src.length ? "node" : "leaf"}${i === center ? " chosen" : ""}" transform="translate(${x},${y})"><title>${P.escape(`${t.name}: ${t.op} ${t.type} [${t.ne.join(", ")}]`)}</title><rect width="${w}" height="${h}" rx="6"></rect><text x="8" y="15">${cut(t.name, 20)}</text><text x="8" y="30" class="small">${cut(`${t.src.length ? `${t.op} ` : ""}${t.type} ${dims(t.ne)}`, 24)}</text></g>`);
    }
    $("graph-drawing").innerHTML = `<div class="scroll"><svg class="nodes" width="${width + 4}" height="${height + 4}" viewBox="-2 -2 ${width + 4} ${height + 4}">${lines.join("")}${boxes.join("")}</svg></div>`;
    for (const g of $("graph-drawing").querySelectorAll("g[data-i]")) {
      g.addEventListener("click", () => go(Number(g.dataset.i)));
      g.addEventListener("keydown", (event) => event.key === "Enter" && go(Number(g.dataset.i)));
    }
  };
  const rankOf = (tensors, i) => (tensors[i].src.length ? i + tensors.length : i);
})();
