// What is told of one event: a line under the pointer, and a panel when it is selected.
"use strict";
(() => {
  const P = window.pyggml;
  const $ = (id) => document.getElementById(id);
  const clockOf = (view) => (view.clocks.includes(P.state.clock) ? P.state.clock : view.clocks[0]);

  P.showTip = (event, html) => {
    const tip = $("tip");
    tip.innerHTML = html;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const x = Math.min(event.clientX + 14, window.innerWidth - width - 8);
    const y = event.clientY + 18 + height > window.innerHeight ? event.clientY - height - 10 : event.clientY + 18;
    tip.style.transform = `translate(${Math.max(4, x)}px, ${Math.max(4, y)}px)`;
  };
  P.hideTip = () => ($("tip").hidden = true);

  const lengthOf = (view, i) => view.end[clockOf(view)][i] - view.start[clockOf(view)][i];

  /** A few lines for the pointer. */
  P.tipOf = (view, i) => {
    const kind = view.kindOf(i);
    const lines = [];
    const clock = clockOf(view);
    const time = clock === "order" ? "" : P.time(lengthOf(view, i), clock);
    if (view.isCopy[view.kind[i]] || kind === "read") {
      const part = view.whole[i] > view.amount[i] ? ` of ${P.bytes(view.whole[i])}` : "";
      lines.push(`${P.KINDS[kind].title}: ${P.bytes(view.amount[i])}${part}`, view.lanes[view.lane[i]].name);
    } else if (kind === "compute") {
      lines.push(`${P.count(view.amount[i])} nodes from ${view.nameOf(i)}`, `on ${view.lanes[view.lane[i]].backend}`);
    }
    if (time) lines.push(time);
    return `<b>${P.escape(view.titleOf(i))}</b><br>${lines.map(P.escape).join("<br>")}`;
  };

  P.tipOfRun = (view, run) => {
    const t = P.sum(view, (r) => r === run);
    const clock = clockOf(view);
    const [a, b] = view.spansOfRuns(clock)[run];
    const lines = [clock === "order" ? "" : P.time(b - a, clock), `${P.bytes(t.bytes_copied)} copied of ${P.bytes(t.bytes_full)}`, "click to zoom to it"];
    return `<b>${P.escape(view.runs[run].n_tokens === null ? view.runTitle(run) : `${view.runWord(1)} ${run}: ${view.runTitle(run)}`)}</b><br>${lines.filter(Boolean).map(P.escape).join("<br>")}`;
  };

  const rows = (pairs) =>
    `<dl>${pairs.filter((p) => p && p[1] !== "" && p[1] !== null).map(([k, v]) => `<dt>${k}</dt><dd>${v}</dd>`).join("")}</dl>`;

  const timeRows = (view, i) => {
    const made = [];
    for (const clock of view.clocks) {
      if (clock === "order" || view.start[clock][i] < 0) continue;
      const ns = view.end[clock][i] - view.start[clock][i];
      made.push([P.clockTitle(clock), `${P.time(ns, clock)} from ${P.time(view.start[clock][i], clock)}`]);
    }
    return made;
  };
  const where = (view, i) => {
    const run = view.run[i];
    const what = run >= 0 ? `${run}${view.runs[run].n_tokens ? `, of ${view.runTitle(run)}` : ""}` : "";
    return [
      ["split", view.split[i] >= 0 ? `<button type="button" class="link" data-split="${view.split[i]}" data-run="${run}">${view.split[i]}</button>` : ""],
      [view.runWord(1), what],
    ];
  };

  const copyDetail = (view, i) => {
    const [src, dst] = view.lanes[view.lane[i]].name.split(" → ");
    const experts = view.expertsOf(i);
    const input = view.inputOf(i);
    const seconds = lengthOf(view, i) / 1e9;
    const rate = clockOf(view) !== "order" && seconds > 0 ? `${(view.amount[i] / seconds / 1e9).toFixed(1)} GB/s` : "";
    const all = P.nameIndex(view).get(view.label[i]).events;
    const at = all.indexOf(i);
    const pieces = all.filter((j) => view.run[j] === view.run[i] && view.split[j] === view.split[i]);
    const sum = d3.sum(pieces, (j) => view.amount[j]);
    return `<p class="why">${P.escape(P.whyCopy(view, i))}</p>${rows([
      ["copied", `<b>${P.bytes(view.amount[i])}</b> of ${P.bytes(view.whole[i])} (${P.percent(view.amount[i], view.whole[i])}), ${P.count(view.amount[i])} bytes`],
      pieces.length > 1 && ["in all pieces", `${P.bytes(sum)} of ${P.bytes(view.whole[i])} (${P.percent(sum, view.whole[i])}), ${pieces.length} copies`],
      ["from offset", P.count(view.offset[i])],
      ["from → to", P.escape(`${src} → ${dst}`)],
      view.engines[i] >= 0 && ["carried by", P.escape(view.engine_sets[view.engines[i]].join(", "))],
      experts && ["experts here", P.ranges(experts.ids)],
      experts && ["experts used", `${experts.used.length} of ${experts.n}: ${P.ranges(experts.used)}`],
      input && ["type", P.escape(`${input.type} [${input.ne.join(", ")}]`)],
      input && view.strings[input.user] && ["read by", P.escape(`${view.strings[input.user]} (${input.user_op})`)],
      ...where(view, i),
      ...timeRows(view, i),
      ["rate", rate],
    ])}<p class="more">copy ${at + 1} of ${all.length} of this tensor
      <button type="button" data-event="${all[at - 1]}" ${at ? "" : "disabled"}>previous</button>
      <button type="button" data-event="${all[at + 1]}" ${at + 1 < all.length ? "" : "disabled"}>next</button></p>`;
  };

  const computeDetail = (view, i) => {
    const split = view.splitOf(i);
    const causes = view.ref[i] >= 0 ? view.cause_sets[view.ref[i]] : [];
    const backend = view.lanes[view.lane[i]].backend;
    const list = causes
      .slice()
      .sort((a, b) => b[1] - a[1])
      .map(([note, n]) => `<li>${P.count(n)}: ${P.escape(P.cause(view, note))} <code>${P.escape(note)}</code></li>`)
      .join("");
    const inputs = split ? split.inputs : [];
    return `<p class="why">${P.escape(`${P.count(view.amount[i])} nodes from ${view.nameOf(i)} on ${backend}.`)}</p>${rows([
      ["first node", P.escape(split ? `${view.nameOf(i)} (${split.op})` : view.nameOf(i))],
      ["it is there because", split ? P.escape(P.cause(view, split.cause)) : ""],
      ["inputs copied", inputs.length ? P.escape(inputs.map((x) => view.strings[x.tensor]).join(", ")) : split ? "none" : ""],
      ...where(view, i),
      ...timeRows(view, i),
    ])}${list ? `<h4>Why its nodes are on ${P.escape(backend)}</h4><ul>${list}</ul>` : ""}${idleBefore(view, i)}${nodesOf(view, i)}`;
  };

  /** What went on between the work before and this one. */
  const idleBefore = (view, i) => {
    const clock = clockOf(view);
    if (clock === "order") return "";
    const start = view.start[clock];
    const end = view.end[clock];
    let from = -1;
    for (let j = 0; j < view.n; j++) {
      if (view.lane[j] === view.lane[i] && view.kindOf(j) === "compute" && j !== i && end[j] <= start[i]) from = Math.max(from, end[j]);
    }
    if (from < 0 || start[i] - from <= 0) return "";
    const during = meanwhile(view, from, start[i], (j) => view.lane[j] !== view.lane[i]);
    return `<h4>Idle for ${P.time(start[i] - from)} before; meanwhile</h4>${during || "<p>nothing was recorded.</p>"}`;
  };

  /** What overlaps a time, the longest first. */
  const meanwhile = (view, a, b, isMeant) => {
    const clock = clockOf(view);
    const sums = new Map();
    for (let j = 0; j < view.n; j++) {
      const kind = view.kindOf(j);
      if (view.start[clock][j] < 0 || kind === "wait" || kind === "event" || kind === "callback" || !isMeant(j)) continue;
      const n = Math.min(b, view.end[clock][j]) - Math.max(a, view.start[clock][j]);
      if (n <= 0) continue;
      const what = `${P.KINDS[kind].title}: ${view.titleOf(j)}${kind === "compute" ? ` on ${view.lanes[view.lane[j]].backend}` : ""}`;
      const found = sums.get(what) || { n: 0, j };
      found.n += n;
      sums.set(what, found);
    }
    const found = [...sums].sort((p, q) => q[1].n - p[1].n);
    const items = found.slice(0, 5).map(([what, { n, j }]) => `<li>${P.time(n)} <button type="button" class="link" data-event="${j}">${P.escape(what)}</button></li>`);
    if (found.length > 5) items.push(`<li>and ${found.length - 5} more</li>`);
    return items.length ? `<ul>${items.join("")}</ul>` : "";
  };

  const nodesOf = (view, i) => {
    const graph = view.graphOf(view.run[i]);
    if (!graph || !graph.nodes.name.length) return "";
    let from = 0;
    for (const s of graph.splits) {
      if (s.split === view.split[i]) break;
      from += s.n_nodes;
    }
    const split = graph.splits[view.split[i]];
    if (!split) return "";
    const wanted = P.state.wantedNode;
    const lines = [];
    for (let k = from; k < from + split.n_nodes; k++) {
      const note = graph.causes[graph.nodes.cause[k]];
      const mark = wanted === graph.nodes.name[k] ? ' class="marked"' : "";
      lines.push(`<tr${mark}><td>${P.escape(view.strings[graph.nodes.name[k]])}</td><td>${P.escape(graph.ops[graph.nodes.op[k]])}</td><td>${P.escape(P.cause(view, note))}</td></tr>`);
    }
    const open = lines.some((line) => line.startsWith("<tr class")) ? " open" : "";
    return `<details${open}><summary>${P.count(split.n_nodes)} nodes that are computed</summary><div class="scroll"><table class="rows"><thead><tr><th>node</th><th>op</th><th>here because</th></tr></thead><tbody>${lines.join("")}</tbody></table></div></details>`;
  };

  const waitDetail = (view, i) => {
    const [what, ...rest] = view.nameOf(i).split(" ");
    const backend = rest.join(" ");
    const said = {
      synchronize: `The host waited for all submitted work of ${backend}.`,
      event_synchronize: `The host waited until ${backend} reached its latest event; then its inputs can be overwritten.`,
      event_wait: `${backend} itself waited for its latest event before it goes on.`,
    }[what];
    const clock = clockOf(view);
    const of = (j) => view.lanes[view.lane[j]].backend === backend;
    const during = meanwhile(view, view.start[clock][i], view.end[clock][i], of);
    return `<p class="why">${P.escape(said || view.nameOf(i))}</p>${rows([...where(view, i), ...timeRows(view, i)])}
      ${during ? `<h4>Meanwhile ${P.escape(backend)} did</h4>${during}` : ""}`;
  };

  const otherDetail = (view, i) => {
    const kind = view.kindOf(i);
    const said = {
      read: `The host read ${view.nameOf(i)} from ${view.lanes[view.lane[i]].kind === "host" ? "its own memory" : view.lanes[view.lane[i]].name.split(" → ")[0]}: ${P.bytes(view.amount[i])}.`,
      callback: `The eval callback was called for ${view.nameOf(i)}.`,
      event: `${view.lanes[view.lane[i]].backend} was told to mark what it was given so far.`,
      plan: "A graph was assigned to backends and cut into splits.",
    }[kind];
    const names = kind === "read" && view.experts.some((e) => e.ids === view.label[i]);
    const why = names ? " It names the experts that are needed: without it nobody knows what to copy." : "";
    return `<p class="why">${P.escape((said || view.nameOf(i)) + why)}</p>${rows([...where(view, i), ...timeRows(view, i)])}`;
  };

  P.showDetail = (view, i) => {
    const box = $("detail");
    if (view === null) {
      box.innerHTML = `<p class="hint">Select a bar, or find a tensor by name, to see why it was copied, what of it, and who reads it.</p>`;
      return;
    }
    const kind = view.kindOf(i);
    const make = view.isCopy[view.kind[i]] ? copyDetail : { compute: computeDetail, wait: waitDetail }[kind] || otherDetail;
    const letter = P.views.length > 1 ? `<b class="letter">${view.letter}</b> ` : "";
    box.innerHTML = `<h3>${letter}<i style="background:var(${P.KINDS[kind].color})"></i>${P.escape(view.titleOf(i))}</h3><p class="kind">${P.KINDS[kind].title}</p>${make(view, i)}`;
    box.dataset.name = view.nameOf(i);
    box.dataset.kind = kind;
    box.dataset.bytes = view.isCopy[view.kind[i]] ? view.amount[i] : "";
    for (const button of box.querySelectorAll("[data-event]")) {
      button.addEventListener("click", () => P.select(view, Number(button.dataset.event), { zoom: true }));
    }
    for (const button of box.querySelectorAll("[data-split]")) {
      button.addEventListener("click", () => P.showSplit(view, Number(button.dataset.run), Number(button.dataset.split)));
    }
  };
})();
