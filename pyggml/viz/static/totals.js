// Sums over the events of a view. `pyggml.totals` has those of each view, for programs that check the page.
"use strict";
(() => {
  const P = window.pyggml;

  const zeros = () => Object.fromEntries(P.COPIES.map((r) => [r, 0]));

  /** Sums over the runs for which `chosen(run)` holds. */
  P.sum = (view, chosen = () => true) => {
    const t = {
      n_events: 0, n_copies: 0, n_launches: 0, n_waits: 0, n_reads: 0, n_splits: 0, n_runs: 0,
      bytes_copied: 0, bytes_full: 0, bytes_read: 0, bytes_by_reason: zeros(), full_by_reason: zeros(),
      copies_by_reason: zeros(), experts_used: 0, experts_of: 0, seconds: {},
    }; // prettier-ignore
    for (let i = 0; i < view.n; i++) {
      if (!chosen(view.run[i])) continue;
      t.n_events++;
      const kind = view.kindOf(i);
      if (view.isCopy[view.kind[i]]) {
        t.n_copies++;
        t.copies_by_reason[kind]++;
        t.bytes_copied += view.amount[i];
        t.bytes_by_reason[kind] += view.amount[i];
        if (kind !== "experts" || view.is_plan) {
          t.bytes_full += view.whole[i];
          t.full_by_reason[kind] += view.whole[i];
        }
      } else if (kind === "compute") t.n_launches++;
      else if (kind === "wait") t.n_waits++;
      else if (kind === "read") {
        t.n_reads++;
        t.bytes_read += view.amount[i];
      }
    }
    for (const e of view.experts) {
      if (!chosen(e.run)) continue;
      t.bytes_full += e.whole;
      t.full_by_reason.experts += e.whole;
      t.experts_used += view.used_sets[e.used].length;
      t.experts_of += e.n_expert;
    }
    view.runs.forEach((run, r) => {
      if (!chosen(r)) return;
      t.n_runs++;
      const graph = view.graphOf(r);
      if (graph) t.n_splits += graph.splits.length;
    });
    for (const clock of view.clocks) {
      // runs that overlap, as in a pipeline, count once
      const spans = view.spansOfRuns(clock).filter(([a, b], r) => chosen(r) && b > a).sort((p, q) => p[0] - q[0]);
      let [ns, reached] = [0, 0];
      for (const [a, b] of spans) {
        ns += Math.max(0, b - Math.max(a, reached));
        reached = Math.max(reached, b);
      }
      t.seconds[clock] = ns / 1e9;
    }
    return t;
  };

  /** Bytes by tensor: a row for each name and reason, or for each name without its layer. */
  P.byTensor = (view, chosen, group) => {
    const rows = new Map();
    const row = (label, kind) => {
      const own = view.strings[label];
      const name = { tensor: own, kind: P.withoutLayer(own), layer: P.layerOf(own) === null ? "no layer" : `layer ${P.layerOf(own)}` }[group];
      const key = `${name}\u0000${kind}`;
      let found = rows.get(key);
      if (!found) {
        found = { name, kind, layer: group === "kind" ? null : P.layerOf(own), copies: 0, bytes: 0, full: 0, first: -1 };
        rows.set(key, found);
      }
      return found;
    };
    for (let i = 0; i < view.n; i++) {
      if (!view.isCopy[view.kind[i]] || !chosen(view.run[i])) continue;
      const r = row(view.label[i], view.kindOf(i));
      r.copies++;
      r.bytes += view.amount[i];
      if (view.kindOf(i) !== "experts" || view.is_plan) r.full += view.whole[i];
      if (r.first < 0) r.first = i;
    }
    for (const e of view.experts) if (chosen(e.run)) row(e.tensor, "experts").full += e.whole;
    return [...rows.values()];
  };

  /** Used counts and copied bytes by layer and expert; null if no expert weight was copied. */
  P.expertCells = (view, chosen) => {
    const layers = new Map();
    let nExpert = 0;
    const at = (layer, n) => {
      nExpert = Math.max(nExpert, n);
      if (!layers.has(layer)) layers.set(layer, { layer, used: [], bytes: [], reads: 0, full: 0 });
      return layers.get(layer);
    };
    const add = (list, id, n) => (list[id] = (list[id] || 0) + n);
    const seen = new Map(); // several weights share the ids of a layer: an expert is needed once for all
    for (const e of view.experts) {
      if (!chosen(e.run)) continue;
      const layer = P.layerOf(view.strings[e.tensor]);
      const row = at(layer, e.n_expert);
      row.full += e.whole;
      const ids = view.strings[e.ids].replace(/^[^#]*#(.*)#\d+$/, "$1"); // a copy's name holds that of its original
      const key = `${e.run} ${layer} ${ids}`;
      if (!seen.has(key)) {
        seen.set(key, new Set());
        row.reads++;
      }
      const counted = seen.get(key);
      for (const id of view.used_sets[e.used]) {
        if (!counted.has(id)) add(row.used, id, 1);
        counted.add(id);
      }
    }
    for (let i = 0; i < view.n; i++) {
      if (!chosen(view.run[i])) continue;
      const kind = view.kindOf(i);
      if (kind === "experts") {
        const experts = view.expertsOf(i);
        if (experts === null || !experts.ids.length) continue;
        const row = at(P.layerOf(view.nameOf(i)), experts.n);
        // the few bytes after a run of neighbours count for its last expert
        experts.ids.forEach((id, k) => {
          const isLast = k === experts.ids.length - 1;
          add(row.bytes, id, isLast ? view.amount[i] - experts.bytes * k : experts.bytes);
        });
      } else if (kind === "weight") {
        const input = view.inputOf(i);
        if (input === null || input.kind !== "experts") continue;
        const n = input.ne[2];
        const row = at(P.layerOf(view.nameOf(i)), n);
        row.full += view.whole[i];
        for (let id = 0; id < n; id++) add(row.bytes, id, view.amount[i] / n);
      }
    }
    if (!layers.size) return null;
    return { n: nExpert, rows: [...layers.values()].sort((a, b) => (a.layer ?? -1) - (b.layer ?? -1)) };
  };

  P.totals = P.views.map((view) => ({ name: view.name, ...P.sum(view), phases: view.phases }));
})();
