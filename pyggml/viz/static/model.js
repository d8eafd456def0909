// The data of the page, in typed arrays, and questions about it. `window.pyggml` is the only global name.
"use strict";
(() => {
  const P = (window.pyggml = {});
  const data = JSON.parse(document.getElementById("data").textContent);

  P.title = data.title;
  P.COPIES = ["experts", "weight", "activation", "input"];

  class View {
    constructor(raw, index) {
      Object.assign(this, raw);
      this.index = index;
      this.letter = "AB"[index];
      const e = raw.events;
      this.n = e.kind.length;
      this.kind = Uint8Array.from(e.kind);
      this.lane = Uint16Array.from(e.lane);
      for (const c of ["name", "run", "split", "ref", "engines"]) this[c === "name" ? "label" : c] = Int32Array.from(e[c]);
      for (const c of ["amount", "offset", "whole"]) this[c] = Float64Array.from(e[c]);
      this.clocks = Object.keys(raw.times);
      this.start = {};
      this.end = {};
      this.total = {};
      for (const clock of this.clocks) {
        const { start, length } = raw.times[clock];
        this.start[clock] = Float64Array.from(start);
        this.end[clock] = Float64Array.from(length, (n, i) => start[i] + n);
        this.total[clock] = this.end[clock].reduce((a, b) => Math.max(a, b), 0);
      }
      this.isCopy = raw.kinds.map((k) => P.COPIES.includes(k));
      this.runSpans = {};
    }

    kindOf(i) {
      return this.kinds[this.kind[i]];
    }

    nameOf(i) {
      return this.strings[this.label[i]];
    }

    /** What a bar says: copies and reads the tensor, work its split. */
    titleOf(i) {
      return this.kindOf(i) === "compute" ? `split ${this.split[i]}` : this.nameOf(i);
    }

    graphOf(run) {
      const g = run >= 0 && run < this.runs.length ? this.runs[run].graph : -1;
      return g >= 0 ? this.graphs[g] : null;
    }

    splitOf(i) {
      const graph = this.graphOf(this.run[i]);
      return graph === null ? null : graph.splits[this.split[i]] || null;
    }

    /** The planned input that a copy is of. */
    inputOf(i) {
      const split = this.splitOf(i);
      return split === null ? null : split.inputs.find((x) => x.tensor === this.label[i]) || null;
    }

    /** The experts that a copy carries, as ids. */
    expertsOf(i) {
      const e = this.ref[i] >= 0 && this.kindOf(i) === "experts" ? this.experts[this.ref[i]] : null;
      if (e === null) return null;
      const from = this.offset[i];
      const to = from + this.amount[i];
      const ids = this.used_sets[e.used].filter((id) => id * e.expert_bytes >= from && id * e.expert_bytes < to);
      return { ids, used: this.used_sets[e.used], ...{ n: e.n_expert, bytes: e.expert_bytes, from: this.strings[e.ids] } };
    }

    /** Start and end of each run. */
    spansOfRuns(clock) {
      if (this.runSpans[clock]) return this.runSpans[clock];
      const spans = this.runs.map(() => [Infinity, -Infinity]);
      const start = this.start[clock];
      const end = this.end[clock];
      for (let i = 0; i < this.n; i++) {
        if (this.run[i] < 0 || start[i] < 0) continue;
        const span = spans[this.run[i]];
        if (start[i] < span[0]) span[0] = start[i];
        if (end[i] > span[1]) span[1] = end[i];
      }
      return (this.runSpans[clock] = spans);
    }

    /** What a run is called: a micro-batch, if its tokens are known. */
    runWord(n) {
      const one = this.runs.some((r) => r.n_tokens !== null) ? ["micro-batch", "micro-batches"] : this.is_plan ? ["plan", "plans"] : ["run", "runs"];
      return n === 1 ? one[0] : one[1];
    }

    runTitle(run) {
      const { n_tokens: n } = this.runs[run] || {};
      if (n === null || n === undefined) return `${this.runWord(1)} ${run}`;
      return `${n} ${n === 1 ? "token" : "tokens"}`;
    }
  }

  P.views = data.views.map((raw, i) => new View(raw, i));

  /** The layer that a tensor's name tells, as `layer_of` has it; null if none. */
  P.layerOf = (name) => {
    const found = /^blk\.(\d+)\./.exec(name) || /-(\d+)(?: |$)/.exec(name);
    return found ? Number(found[1]) : null;
  };

  /** A tensor's name without its layer, so that layers can be summed. */
  P.withoutLayer = (name) =>
    name.replace(/^blk\.\d+\./, "blk.N.").replace(/-\d+( |$)/, "-N$1").replace(/_l\d+( |$)/, "_lN$1");

  // what the user chose; main.js redraws when it changes
  P.state = {
    clock: P.views[0].clocks[0],
    view: 0,
    hidden: new Set(),
    selected: null, // { view, i }
    found: null, // { name, labels: numbers of its string by view, events, at: which of them, view }
    wantedNode: null, // number of the string of the node that was searched for
  };
})();
