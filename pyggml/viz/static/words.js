// Numbers, names and reasons as people read them.
"use strict";
(() => {
  const P = window.pyggml;

  P.KINDS = {
    compute: { title: "computing", color: "--compute" },
    experts: { title: "used experts", color: "--experts" },
    weight: { title: "whole weights", color: "--weight" },
    activation: { title: "activations", color: "--activation" },
    input: { title: "graph inputs", color: "--input" },
    read: { title: "reads by the host", color: "--read" },
    wait: { title: "waits", color: "--wait" },
    callback: { title: "callbacks", color: "--mark" },
    event: { title: "events", color: "--mark" },
    plan: { title: "assign and cut", color: "--plan" },
    other: { title: "other", color: "--mark" },
  };

  // before anything ran nobody knows which experts are used
  if (P.views.every((v) => v.is_plan)) P.KINDS.experts.title = "experts";

  /** What a device waited for, by the keys of `phases`. */
  P.waitWords = (what) => {
    if (what.startsWith("compute ")) return `${what.slice(8)} to compute`;
    return (
      {
        experts: "copies of used experts",
        weight: "copies of whole weights",
        activation: "copies of activations",
        input: "copies of graph inputs",
        out: "copies and reads out of it",
        elsewhere: "copies between others",
        plan: "the graph to be assigned and cut",
        host: "the host (nothing recorded)",
      }[what] || what
    );
  };
  P.waitColor = (what) => {
    if (what.startsWith("compute ")) return "--others";
    return { out: "--read", elsewhere: "--wait", host: "--wait", plan: "--plan" }[what] || `--${what}`;
  };

  P.bytes = (n) => {
    if (n < 1024) return `${n} B`;
    let unit = -1;
    while (n >= 1024 && unit < 3) {
      n /= 1024;
      unit++;
    }
    return `${n.toLocaleString("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 })} ${["KiB", "MiB", "GiB", "TiB"][unit]}`;
  };
  P.count = (n) => n.toLocaleString("en");
  P.percent = (part, whole) => {
    if (!whole) return "–";
    const p = (100 * part) / whole;
    return `${p > 0 && p < 0.95 ? p.toFixed(1) : Math.round(p)}%`;
  };
  P.time = (ns, clock = P.state.clock) => {
    if (clock === "order") return `step ${P.count(Math.round(ns))}`;
    if (ns === 0) return "0";
    const size = Math.abs(ns);
    if (size < 1e3) return `${Math.round(ns)} ns`;
    if (size < 1e6) return `${(ns / 1e3).toPrecision(3)} µs`;
    if (size < 1e9) return `${(ns / 1e6).toPrecision(3)} ms`;
    return `${(ns / 1e9).toPrecision(3)} s`;
  };
  P.clockTitle = (clock) => ({ virtual: "virtual time", wall: "wall time", order: "in order" })[clock];

  P.escape = (text) =>
    String(text).replace(/[&<>"']/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[c]);
  P.color = (name) => P.colors[name] || (P.colors[name] = getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  P.colors = {};

  /** Black or white, whichever reads better on a colour. */
  P.inkOn = (name) => {
    const { r, g, b } = d3.rgb(P.color(name));
    return 0.3 * r + 0.59 * g + 0.11 * b > 125 ? "#101418" : "#ffffff";
  };

  P.cause = (view, note) => (note ? view.causes[note] || note : "");

  /** Neighbouring numbers as ranges: 0–3, 7. */
  P.ranges = (ids) => {
    const runs = [];
    for (const id of ids) {
      const last = runs[runs.length - 1];
      if (last && id === last[1] + 1) last[1] = id;
      else runs.push([id, id]);
    }
    return runs.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ");
  };

  /** Why a planned input is copied, as sentences. */
  P.whyInput = (view, split, input) => {
    const name = view.strings[input.tensor];
    const because = (note) => (note ? `, because ${P.cause(view, note)}` : "");
    const user = view.strings[input.user];
    const said = [];
    if (input.kind === "input") {
      said.push(`${name} is an input of the graph: the caller sets it, and it starts on ${input.src}.`);
    } else if (input.kind === "activation") {
      said.push(`${name} is a result of ${input.src}${because(input.cause)}.`);
    } else {
      said.push(`${name} is a weight in memory of ${input.buft || input.src}, where ${split.backend} cannot use it.`);
    }
    if (user) {
      const others = input.n_users > 1 ? ` and ${input.n_users - 1} more` : "";
      const is = input.n_users > 1 ? "read" : "reads";
      said.push(`${user} (${input.user_op})${others} ${is} it on ${split.backend}; ${user} is there${because(input.user_cause)}.`);
    }
    return said.join(" ");
  };

  /** Why a copy happened, as sentences; from its plan, or without one from its reason. */
  P.whyCopy = (view, i) => {
    const lane = view.lanes[view.lane[i]];
    const input = view.inputOf(i);
    const said = [];
    if (input !== null) said.push(P.whyInput(view, view.splitOf(i), input));
    else {
      const what = {
        experts: "is an expert weight whose used experts are needed",
        weight: "is a weight that is needed",
        activation: "is a result that is needed",
        input: "is an input of the graph that is needed",
      }[view.kindOf(i)];
      said.push(`${view.nameOf(i)} ${what} by split ${view.split[i]} on ${lane.backend}.`);
    }
    const experts = view.expertsOf(i);
    if (experts !== null) {
      const from = experts.from ? `${experts.from} names` : "the ids name";
      said.push(`Of its ${experts.n} experts ${from} ${experts.used.length}: only these are copied, neighbours in one piece.`);
    } else if (view.kindOf(i) === "weight") {
      said.push("It is copied whole.");
    }
    return said.join(" ");
  };
})();
