// Finding a tensor or node by name: the box, its list, and what is marked.
"use strict";
(() => {
  const P = window.pyggml;
  const $ = (id) => document.getElementById(id);

  /** Names that hold a text: of events, of planned inputs, of nodes; events first, then the largest. */
  P.find = (text) => {
    const wanted = text.trim().toLowerCase();
    if (!wanted) return [];
    const names = new Map();
    for (const view of P.views) {
      const index = P.nameIndex(view);
      for (const [label, entry] of index) {
        const name = view.strings[label];
        if (!name.toLowerCase().includes(wanted)) continue;
        const found = names.get(name) || { name, n: 0, bytes: 0, entries: [] };
        found.n += entry.events.length;
        for (const i of entry.events) found.bytes = Math.max(found.bytes, view.whole[i]);
        found.entries[view.index] = { label, ...entry };
        names.set(name, found);
      }
    }
    const starts = (x) => (x.name.toLowerCase().startsWith(wanted) ? 0 : 1);
    return [...names.values()].sort(
      (a, b) => starts(a) - starts(b) || (b.n > 0) - (a.n > 0) || b.bytes - a.bytes || a.name.localeCompare(b.name, "en", { numeric: true }),
    );
  };

  /** Events by name; for a node, the work of its split. */
  P.nameIndex = (view) => {
    if (view.names) return view.names;
    const names = new Map();
    const at = (label) => names.get(label) || names.set(label, { events: [], node: null }).get(label);
    for (let i = 0; i < view.n; i++) {
      const kind = view.kindOf(i);
      if (view.isCopy[view.kind[i]] || kind === "read" || kind === "callback") at(view.label[i]).events.push(i);
    }
    view.graphs.forEach((graph, g) => {
      let node = 0;
      for (const split of graph.splits) {
        for (let k = 0; k < split.n_nodes && node < graph.nodes.name.length; k++, node++) {
          const entry = at(graph.nodes.name[node]);
          if (entry.node === null) entry.node = { graph: g, split: split.split, node };
        }
      }
    });
    return (view.names = names);
  };

  /** The work of a split in the first run of a graph. */
  P.workOf = (view, graph, split) => {
    const run = view.runs.findIndex((r) => r.graph === graph);
    for (let i = 0; i < view.n; i++) if (view.run[i] === run && view.split[i] === split && view.kindOf(i) === "compute") return i;
    return -1;
  };

  /** Go to a name: its events are marked, the first is selected. */
  P.goTo = (found) => {
    const order = [P.state.view, 1 - P.state.view].filter((v) => found.entries[v]);
    const view = P.views[order[0]];
    const entry = found.entries[order[0]];
    const isMarked = found.entries.some((e) => e && e.events.length);
    P.state.found = isMarked ? { name: found.name, labels: P.views.map((_, v) => (found.entries[v] ? new Set([found.entries[v].label]) : new Set())), at: 0, view: order[0], events: entry.events } : null;
    const isNode = !entry.events.length;
    const i = isNode ? P.workOf(view, entry.node.graph, entry.node.split) : entry.events[0];
    P.state.wantedNode = isNode ? entry.label : null;
    if (i >= 0) {
      P.state.hidden.delete(view.kindOf(i));
      P.refreshChips();
      P.select(view, i, { zoom: true });
    }
  };
  P.nextFound = (way) => {
    const found = P.state.found;
    if (!found || !found.events.length) return;
    found.at = (found.at + way + found.events.length) % found.events.length;
    P.select(P.views[found.view], found.events[found.at], { zoom: true });
  };

  const MOST = 60;
  const showFound = () => {
    const list = $("found");
    const all = P.find($("search").value);
    list.replaceChildren();
    for (const found of all.slice(0, MOST)) {
      const item = document.createElement("li");
      item.setAttribute("role", "option");
      item.id = `found-${list.children.length}`;
      item.innerHTML = `<span>${P.escape(found.name)}</span><small>${found.n ? `${P.count(found.n)} ${found.n === 1 ? "event" : "events"}` : "node"}</small>`;
      item.addEventListener("pointerdown", (event) => event.preventDefault());
      item.addEventListener("click", () => choose(found));
      item.found = found;
      list.append(item);
    }
    if (all.length > MOST) list.insertAdjacentHTML("beforeend", `<li class="more" aria-disabled="true">and ${P.count(all.length - MOST)} more</li>`);
    if (!all.length && $("search").value.trim()) list.innerHTML = `<li class="more" aria-disabled="true">nothing of that name</li>`;
    list.hidden = !list.children.length;
    $("search").setAttribute("aria-expanded", String(!list.hidden));
    mark(0);
  };
  const options = () => [...$("found").querySelectorAll('[role="option"]')];
  const mark = (k) => {
    options().forEach((o, j) => o.setAttribute("aria-selected", String(j === k)));
    const chosen = options()[k];
    if (chosen) {
      chosen.scrollIntoView({ block: "nearest" });
      $("search").setAttribute("aria-activedescendant", chosen.id);
    }
  };
  const choose = (found) => {
    $("search").value = found.name;
    closeFound();
    P.goTo(found);
    $("charts").scrollIntoView({ block: "nearest" });
  };
  const closeFound = () => {
    $("found").hidden = true;
    $("search").setAttribute("aria-expanded", "false");
  };

  P.connectFind = () => {
    $("search").addEventListener("input", showFound);
    $("search").addEventListener("focus", () => $("search").value && showFound());
    $("search").addEventListener("blur", closeFound);
    $("search").addEventListener("keydown", (event) => {
      const at = options().findIndex((o) => o.getAttribute("aria-selected") === "true");
      if (event.key === "ArrowDown" || event.key === "ArrowUp") {
        event.preventDefault();
        mark(Math.min(Math.max(at + (event.key === "ArrowDown" ? 1 : -1), 0), options().length - 1));
      } else if (event.key === "Enter" && options()[at]) choose(options()[at].found);
      else if (event.key === "Escape") P.forget();
    });
  };
})();
