// Tables: splits with their inputs, bytes by tensor and by reason; sorted and filtered where they stand.
"use strict";
(() => {
  const P = window.pyggml;
  const $ = (id) => document.getElementById(id);
  const MOST = 200;

  const dot = (kind) => `<i class="dot" style="background:var(${P.KINDS[kind].color})"></i>`;
  P.dot = dot;

  /** A bar of a share. */
  P.bar = (share, color) => `<span class="bar"><span style="width:${(100 * Math.min(1, Math.max(0, share))).toFixed(2)}%;background:var(${color})"></span></span>`;

  /** A select of the runs of a view: all, or one. */
  P.runSelect = (view, { all = true } = {}) => {
    const made = document.createElement("select");
    made.setAttribute("aria-label", "Which micro-batch");
    if (all) made.add(new Option(view.runs.length === 1 ? view.runTitle(0) : `all ${P.count(view.runs.length)} ${view.runWord(2)}`, "all"));
    const several = view.runs.some((r) => r.n_tokens > 1) && view.runs.some((r) => r.n_tokens === 1);
    if (all && several && view.runs.length > 2) {
      made.add(new Option("those of several tokens", "prompt"));
      made.add(new Option("those of one token", "generate"));
    }
    if (view.runs.length > 1 || !all) view.runs.slice(0, 500).forEach((_, r) => made.add(new Option(view.runs[r].n_tokens === null ? view.runTitle(r) : `${view.runWord(1)} ${r}: ${view.runTitle(r)}`, String(r))));
    return made;
  };
  P.chosenRuns = (view, value) => {
    if (value === "all") return () => true;
    if (value === "prompt") return (r) => r >= 0 && view.runs[r].n_tokens > 1;
    if (value === "generate") return (r) => r >= 0 && view.runs[r].n_tokens === 1;
    return (r) => r === Number(value);
  };

  /** Fill a table; columns: { title, right, value(row), html(row) }. */
  P.table = (table, columns, rows, { sort = null, click = null, most = MOST, extra = null } = {}) => {
    const state = (table.state = table.state || { sort, most });
    const shown = rows.slice();
    if (state.sort) {
      const { column, way } = state.sort;
      const value = columns[column].value;
      shown.sort((a, b) => {
        const [p, q] = [value(a), value(b)];
        return way * (typeof p === "string" ? p.localeCompare(q, "en", { numeric: true }) : (p ?? -1) - (q ?? -1));
      });
    }
    const head = columns.map((c, k) => {
      const isSorted = state.sort && state.sort.column === k;
      const arrow = isSorted ? (state.sort.way > 0 ? " ↑" : " ↓") : "";
      const aria = isSorted ? ` aria-sort="${state.sort.way > 0 ? "ascending" : "descending"}"` : "";
      return `<th scope="col"${aria} class="${c.right ? "right" : ""}"><button type="button" data-column="${k}">${c.title}${arrow}</button></th>`;
    });
    table.innerHTML = `<thead><tr>${head.join("")}</tr></thead><tbody></tbody>`;
    const body = table.tBodies[0];
    for (const row of shown.slice(0, state.most)) {
      const line = document.createElement("tr");
      line.innerHTML = columns.map((c) => `<td class="${c.right ? "right" : ""}">${c.html(row)}</td>`).join("");
      if (click) {
        line.tabIndex = 0;
        line.className = "click";
        const go = () => click(row, line);
        line.addEventListener("click", go);
        line.addEventListener("keydown", (event) => event.key === "Enter" && event.target === line && go());
      }
      line.row = row;
      body.append(line);
      if (extra) extra(row, line);
    }
    if (shown.length > state.most) {
      const line = body.insertRow();
      line.innerHTML = `<td colspan="${columns.length}"><button type="button">show ${P.count(shown.length - state.most)} more</button></td>`;
      line.querySelector("button").addEventListener("click", () => {
        state.most = Infinity;
        P.table(table, columns, rows, { sort, click, most, extra });
      });
    }
    for (const button of table.tHead.querySelectorAll("button")) {
      button.addEventListener("click", () => {
        const column = Number(button.dataset.column);
        const isSame = state.sort && state.sort.column === column;
        state.sort = { column, way: isSame ? -state.sort.way : columns[column].right ? -1 : 1 };
        P.table(table, columns, rows, { sort, click, most, extra });
      });
    }
  };

  // -- splits ---------------------------------------------------------------

  const splitRows = (view, run) => {
    const graph = view.graphOf(run);
    const rows = new Map();
    const at = (s) => {
      if (!rows.has(s)) rows.set(s, { split: s, plan: graph ? graph.splits[s] || null : null, bytes: 0, full: 0, ns: 0, work: -1, copies: [] });
      return rows.get(s);
    };
    if (graph) graph.splits.forEach((s) => at(s.split));
    const clock = view.clocks.includes(P.state.clock) ? P.state.clock : view.clocks[0];
    for (let i = 0; i < view.n; i++) {
      if (view.run[i] !== run || view.split[i] < 0) continue;
      const kind = view.kindOf(i);
      if (view.isCopy[view.kind[i]]) {
        const row = at(view.split[i]);
        row.bytes += view.amount[i];
        if (kind !== "experts" || view.is_plan) row.full += view.whole[i];
        row.copies.push(i);
      } else if (kind === "compute") {
        const row = at(view.split[i]);
        if (row.work < 0) row.work = i;
        row.ns += Math.max(0, view.end[clock][i] - view.start[clock][i]);
      }
    }
    for (const e of view.experts) if (e.run === run) at(e.split).full += e.whole;
    for (const row of rows.values()) {
      row.backend = row.plan ? row.plan.backend : row.work >= 0 ? view.lanes[view.lane[row.work]].backend : "";
      row.first = row.plan ? view.strings[row.plan.first] : row.work >= 0 ? view.nameOf(row.work) : "";
      row.nodes = row.plan ? row.plan.n_nodes : row.work >= 0 ? view.amount[row.work] : 0;
      row.names = row.plan ? row.plan.inputs.map((x) => view.strings[x.tensor]) : [...new Set(row.copies.map((i) => view.nameOf(i)))];
      row.because = row.plan ? P.cause(view, row.plan.cause) : row.work >= 0 ? causesText(view, row.work) : "";
    }
    return [...rows.values()].sort((a, b) => a.split - b.split);
  };
  const causesText = (view, i) => (view.cause_sets[view.ref[i]] || []).map(([note]) => P.cause(view, note)).join("; ");

  const inputsTable = (view, row) => {
    const lines = [];
    const plan = row.plan;
    const seen = new Set();
    const copied = (label) => row.copies.filter((i) => view.label[i] === label);
    const line = (label, kind, src, size, why) => {
      const events = copied(label);
      const bytes = events.reduce((n, i) => n + view.amount[i], 0);
      const real = events.length ? view.kindOf(events[0]) : kind;
      const experts = events.length ? view.expertsOf(events[0]) : null;
      const used = experts ? ` ${experts.used.length} of ${experts.n} experts` : "";
      lines.push(`<tr><td>${dot(real)}<button type="button" class="link" data-event="${events.length ? events[0] : ""}" ${events.length ? "" : "disabled"}>${P.escape(view.strings[label])}</button></td>
        <td>${P.KINDS[real].title}${used}</td><td>${P.escape(src)}</td><td class="right">${events.length ? P.bytes(bytes) : "–"}</td><td class="right">${P.bytes(size)}</td><td class="why">${P.escape(why)}</td></tr>`);
    };
    if (plan) {
      for (const input of plan.inputs) {
        seen.add(input.tensor);
        line(input.tensor, input.kind, input.src, input.bytes, P.whyInput(view, plan, input));
      }
    }
    for (const i of row.copies) {
      if (seen.has(view.label[i])) continue;
      seen.add(view.label[i]);
      line(view.label[i], view.kindOf(i), view.lanes[view.lane[i]].name.split(" → ")[0], view.whole[i], P.whyCopy(view, i));
    }
    if (!lines.length) return "<p>It needs no copies.</p>";
    return `<table class="rows inner"><thead><tr><th>input</th><th>reason</th><th>from</th><th class="right">copied</th><th class="right">if whole</th><th>why</th></tr></thead><tbody>${lines.join("")}</tbody></table>`;
  };

  const openSplit = (view, row, line, { only = false } = {}) => {
    const next = line.nextElementSibling;
    if (next && next.classList.contains("inputs")) {
      if (!only) next.remove();
      line.setAttribute("aria-expanded", String(only));
      return;
    }
    const more = document.createElement("tr");
    more.className = "inputs";
    more.innerHTML = `<td colspan="8">${row.work >= 0 ? `<button type="button" data-work>show in the timeline</button>` : ""}${inputsTable(view, row)}</td>`;
    line.after(more);
    line.setAttribute("aria-expanded", "true");
    const go = (i) => {
      P.select(view, i, { zoom: true });
      $("timeline").scrollIntoView({ behavior: "smooth" });
    };
    more.querySelectorAll("[data-event]").forEach((b) => b.dataset.event && b.addEventListener("click", () => go(Number(b.dataset.event))));
    const work = more.querySelector("[data-work]");
    if (work) work.addEventListener("click", () => go(row.work));
  };

  let splitsRun = null;
  P.buildSplits = () => {
    const view = P.views[P.state.view];
    const isThere = view.runs.length > 0;
    $("splits").hidden = !isThere;
    if (!isThere) return;
    const tools = $("splits-tools");
    tools.replaceChildren();
    const select = P.runSelect(view, { all: false });
    const filter = document.createElement("input");
    filter.type = "search";
    filter.placeholder = "Filter by node, input, cause …";
    filter.setAttribute("aria-label", "Filter the splits");
    const words = document.createElement("span");
    words.className = "words";
    tools.append(select, filter, words);
    const table = $("splits-table");
    const columns = [
      { title: "split", right: true, value: (r) => r.split, html: (r) => `<a href="#split-${r.split}${splitsRun ? `-${splitsRun}` : ""}">${r.split}</a>` },
      { title: "on", value: (r) => r.backend, html: (r) => P.escape(r.backend) },
      { title: "nodes", right: true, value: (r) => r.nodes, html: (r) => P.count(r.nodes) },
      { title: "first node", value: (r) => r.first, html: (r) => P.escape(r.first) },
      { title: "there because", value: (r) => r.because, html: (r) => `<span class="cause">${P.escape(r.because)}</span>` },
      { title: "inputs", value: (r) => r.names.length, html: (r) => (r.names.length ? `<span class="names">${P.escape(r.names.join(", "))}</span>` : "–") },
      { title: "copied", right: true, value: (r) => r.bytes, html: (r) => (r.bytes ? P.bytes(r.bytes) : "–") },
      { title: "if whole", right: true, value: (r) => r.full, html: (r) => (r.full ? P.bytes(r.full) : "–") },
    ];
    const show = () => {
      const run = Number(select.value);
      splitsRun = run;
      const text = filter.value.trim().toLowerCase();
      const all = splitRows(view, run);
      const rows = all.filter((r) => !text || [r.first, r.backend, r.because, ...r.names].some((x) => x.toLowerCase().includes(text)));
      words.textContent = `${P.count(rows.length)} of ${P.count(all.length)} splits, ${P.count(d3.sum(rows, (r) => r.names.length))} inputs, ${P.bytes(d3.sum(rows, (r) => r.bytes))} copied of ${P.bytes(d3.sum(rows, (r) => r.full))}`;
      P.table(table, columns, rows, { sort: { column: 0, way: 1 }, click: (row, line) => openSplit(view, row, line) });
    };
    table.state = null;
    select.addEventListener("change", show);
    filter.addEventListener("input", show);
    show();
    P.showSplit = (wanted, run, split) => {
      if (wanted !== view) P.setView(wanted.index);
      if (splitsRun !== run || wanted !== view || filter.value) {
        const box = $("splits-tools");
        box.querySelector("select").value = String(run);
        box.querySelector("input").value = "";
        $("splits-table").state = { sort: { column: 0, way: 1 }, most: Infinity };
        box.querySelector("select").dispatchEvent(new Event("change"));
      } else if (table.state.most !== Infinity) {
        table.state.most = Infinity;
        show();
      }
      const line = [...$("splits-table").tBodies[0].rows].find((l) => l.row && l.row.split === split);
      if (!line) return;
      openSplit(wanted, line.row, line, { only: true });
      line.scrollIntoView({ block: "center", behavior: "smooth" });
      line.focus({ preventScroll: true });
    };
  };

  // -- bytes ----------------------------------------------------------------

  P.buildBytes = () => {
    const view = P.views[P.state.view];
    const t = P.totals[view.index];
    $("bytes").hidden = !t.n_copies;
    if (!t.n_copies) return;
    const tools = $("bytes-tools");
    tools.replaceChildren();
    const runs = P.runSelect(view);
    const group = document.createElement("select");
    group.setAttribute("aria-label", "What makes a row");
    for (const [value, text] of [["tensor", "by tensor"], ["kind", "by tensor, layers summed"], ["layer", "by layer"]]) group.add(new Option(text, value));
    const filter = document.createElement("input");
    filter.type = "search";
    filter.placeholder = "Filter by name or reason …";
    filter.setAttribute("aria-label", "Filter the bytes");
    const words = document.createElement("span");
    words.className = "words";
    tools.append(runs, group, filter, words);
    const table = $("bytes-table");
    table.state = null;
    const show = () => {
      const chosen = P.chosenRuns(view, runs.value);
      const text = filter.value.trim().toLowerCase();
      const rows = P.byTensor(view, chosen, group.value).filter((r) => !text || r.name.toLowerCase().includes(text) || P.KINDS[r.kind].title.includes(text));
      const most = d3.max(rows, (r) => r.full) || 1;
      const columns = [
        { title: group.value === "layer" ? "layer" : "tensor", value: (r) => r.name, html: (r) => `${dot(r.kind)}<span class="name">${P.escape(r.name)}</span>` },
        { title: "reason", value: (r) => P.KINDS[r.kind].title, html: (r) => P.KINDS[r.kind].title },
        { title: "copies", right: true, value: (r) => r.copies, html: (r) => P.count(r.copies) },
        { title: "copied", right: true, value: (r) => r.bytes, html: (r) => P.bytes(r.bytes) },
        { title: "if whole", right: true, value: (r) => r.full, html: (r) => P.bytes(r.full) },
        { title: "share", right: true, value: (r) => r.bytes / (r.full || 1), html: (r) => P.percent(r.bytes, r.full) },
        { title: "copied, within what whole would be", value: (r) => r.bytes, html: (r) => `<span class="bar outer" style="width:${((100 * r.full) / most).toFixed(2)}%"><span style="width:${((100 * r.bytes) / (r.full || 1)).toFixed(2)}%;background:var(${P.KINDS[r.kind].color})"></span></span>` },
      ];
      const bytes = d3.sum(rows, (r) => r.bytes);
      words.textContent = `${P.count(rows.length)} rows, ${P.bytes(bytes)} copied of ${P.bytes(d3.sum(rows, (r) => r.full))}`;
      table.dataset.bytes = bytes;
      P.table(table, columns, rows, {
        sort: { column: 3, way: -1 }, most: 40,
        click: (row) => {
          if (row.first < 0) return;
          P.select(view, row.first, { zoom: true });
          $("timeline").scrollIntoView({ behavior: "smooth" });
        },
      }); // prettier-ignore
      showReasons(view, chosen);
    };
    for (const x of [runs, group]) x.addEventListener("change", show);
    filter.addEventListener("input", show);
    show();
  };

  const showReasons = (view, chosen) => {
    const t = P.sum(view, chosen);
    const most = Math.max(1, ...P.COPIES.map((r) => t.full_by_reason[r]));
    const lines = P.COPIES.filter((r) => t.copies_by_reason[r]).map(
      (r) => `<div class="reason" data-reason="${r}" data-bytes="${t.bytes_by_reason[r]}"><span>${dot(r)}${P.KINDS[r].title}</span>
        <span class="bar outer"><span class="whole" style="width:${((100 * t.full_by_reason[r]) / most).toFixed(2)}%"></span><span style="width:${((100 * t.bytes_by_reason[r]) / most).toFixed(2)}%;background:var(${P.KINDS[r].color})"></span></span>
        <span class="right"><b>${P.bytes(t.bytes_by_reason[r])}</b> of ${P.bytes(t.full_by_reason[r])}, ${P.count(t.copies_by_reason[r])} ${t.copies_by_reason[r] === 1 ? "copy" : "copies"}</span></div>`,
    );
    $("reasons").innerHTML = lines.join("");
  };
})();
