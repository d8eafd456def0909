// The head of the page, the comparison, switches and themes; starts everything.
"use strict";
(() => {
  const P = window.pyggml;
  const $ = (id) => document.getElementById(id);
  const timed = (view) => (view.clocks.includes(P.state.clock) ? P.state.clock : view.clocks[0]);
  const phase = (view, name = "all") => view.phases.find((p) => p.clock === timed(view) && p.phase === name);

  // -- summary --------------------------------------------------------------

  /** The device that the words are about: the first that is not the host. */
  const deviceTime = (view) => {
    const found = phase(view);
    if (!found || !found.backends.length) return null;
    return found.backends.find((b) => b.backend !== "CPU" && (b.computing || Object.keys(b.waits).length)) || found.backends[0];
  };
  const longestWait = (b) => Object.entries(b.waits).sort((p, q) => q[1] - p[1])[0] || null;

  const spent = (b, name, when) => {
    const parts = [["computing", b.computing, "--compute"], ...Object.entries(b.waits).sort((p, q) => q[1] - p[1]).map(([what, n]) => [what, n, P.waitColor(what)])];
    const cells = parts.map(([what, n, color]) => `<span style="width:${(100 * n) / (b.total || 1)}%;background:var(${color})" title="${P.escape(`${what === "computing" ? "computing" : P.waitWords(what)}: ${P.time(n)}, ${P.percent(n, b.total)}`)}"></span>`);
    const words = parts
      .filter(([, n]) => n / (b.total || 1) >= 0.005)
      .map(([what, n, color]) => `<li data-what="${P.escape(what)}" data-ns="${n}"><i class="dot" style="background:var(${color})"></i>${P.percent(n, b.total)} ${what === "computing" ? "computing" : `waiting for ${P.escape(P.waitWords(what))}`}</li>`);
    return `<div class="spent" data-backend="${P.escape(b.backend)}" data-phase="${name}"><b>${P.escape(b.backend)}</b><small>${P.escape(when)}</small><div class="stack">${cells.join("")}</div><ul>${words.join("")}</ul></div>`;
  };

  const tokensOf = (p) => (p.n_tokens === 1 ? "1 token" : `${P.count(p.n_tokens)} tokens ${p.phase === "prompt" ? "at once" : "one by one"}`);

  /** How each backend spent its time; the device that the words are about also by phase, if there are several. */
  const spendLines = (view) => {
    const all = phase(view);
    if (!all) return "";
    const parts = view.phases.filter((p) => p.clock === all.clock && p.phase !== "all");
    const about = deviceTime(view);
    const rank = (b) => (b === about ? 0 : b.backend === "CPU" ? 2 : 1);
    return all.backends
      .slice()
      .sort((a, b) => rank(a) - rank(b))
      .map((b) => {
        const lines = [spent(b, "all", parts.length > 1 ? "all the time" : "")];
        if (b === about && parts.length > 1) {
          for (const p of parts) lines.push(spent(p.backends.find((x) => x.backend === b.backend), p.phase, tokensOf(p)));
        }
        return lines.join("");
      })
      .join("");
  };

  const phaseLines = (view) =>
    view.phases
      .filter((p) => p.clock === timed(view) && p.phase !== "all")
      .map((p) => {
        const rate = p.n_tokens && p.length ? `, ${((p.n_tokens * 1e9) / p.length).toLocaleString("en", { maximumSignificantDigits: 3 })} tokens/s` : "";
        return `<li>${P.time(p.length)} for ${tokensOf(p)}${rate}</li>`;
      })
      .join("");

  const tooLarge = (view) => view.about.too_large || [];

  const tiles = (view) => {
    const t = P.totals[view.index];
    const saved = t.bytes_full - t.bytes_copied;
    const all = phase(view);
    const made = [];
    if (t.n_copies) {
      const word = view.is_plan ? "to copy at most" : "copied between devices";
      const weights = t.full_by_reason.experts + t.full_by_reason.weight;
      const told = view.is_plan
        ? `in ${P.count(t.n_copies)} copies, before it is known which experts are used`
        : saved
          ? `of ${P.bytes(t.bytes_full)} if whole: <b>${P.bytes(saved)} saved (${P.percent(saved, t.bytes_full)})</b>`
          : weights
            ? "weights were copied whole: nothing saved"
            : "activations and inputs only: no weight was copied";
      const bar = weights ? P.bar(t.bytes_copied / (t.bytes_full || 1), t.bytes_by_reason.experts ? "--experts" : "--weight") : "";
      made.push(`<div class="tile" data-total="bytes_copied" data-value="${t.bytes_copied}"><h3>${word}</h3>
        <p class="big">${P.bytes(t.bytes_copied)}</p>${bar}<p>${told}</p></div>`);
    }
    if (t.experts_of) {
      const [n, full] = [t.bytes_by_reason.experts, t.full_by_reason.experts];
      made.push(`<div class="tile" data-total="experts" data-value="${n}"><h3>experts needed of a weight</h3>
        <p class="big">${P.percent(t.experts_used, t.experts_of)}</p>${P.bar(t.experts_used / t.experts_of, "--experts")}
        <p>${P.bytes(n)} of ${P.bytes(full)} of expert weights copied (${P.percent(n, full)})</p></div>`);
    }
    if (all) {
      made.push(`<div class="tile" data-total="length" data-value="${all.length}"><h3>${P.clockTitle(all.clock)}</h3><p class="big">${P.time(all.length)}</p><ul>${phaseLines(view)}</ul>${tooLarge(view).length ? '<p class="bad">Does not fit: times of a device with enough memory</p>' : ""}</div>`);
      const device = deviceTime(view);
      const wait = device && longestWait(device);
      if (wait && wait[1] < device.total / 200) {
        made.push(`<div class="tile"><h3>${P.escape(device.backend)} hardly waited</h3><p class="big">${P.percent(device.computing, device.total)}</p><p>of the time it computed</p></div>`);
      } else if (wait) {
        made.push(`<div class="tile" data-total="wait" data-value="${wait[1]}"><h3>${P.escape(device.backend)} waited most for</h3><p class="big words">${P.escape(P.waitWords(wait[0]))}</p>
          <p>${P.time(wait[1])}, ${P.percent(wait[1], device.total)} of the time; it computed for ${P.percent(device.computing, device.total)}</p></div>`);
      }
    }
    const counts = [[t.n_runs, view.runWord(1), view.runWord(2)], [t.n_splits, "split", "splits"], [t.n_copies, "copy", "copies"], [t.n_launches, "launch", "launches"], [t.n_waits, "wait", "waits"]]
      .filter(([n]) => n)
      .map(([n, one, more]) => `<li data-total="${more.replace("micro-batches", "runs")}" data-value="${n}"><b>${P.count(n)}</b> ${n === 1 ? one : more}</li>`);
    if (counts.length) made.push(`<div class="tile counts"><h3>${view.is_plan ? "planned" : "in all"}</h3><ul>${counts.join("")}</ul></div>`);
    return made.join("");
  };

  const aboutLine = (view) => {
    const { model, devices, options, assumed } = view.about;
    const said = [];
    if (model) {
      const layers = model.n_layer ? `, ${model.n_layer} layers` : "";
      const experts = model.n_expert ? `, ${model.n_expert} experts${model.n_expert_used ? `, ${model.n_expert_used} used by a token` : ""}` : "";
      said.push(`${model.name || model.path || ""}${model.arch ? ` (${model.arch})` : ""}${layers}${experts}`);
    }
    if (devices && !assumed) said.push(devices.map((d) => (d.description ? `${d.name}: ${d.description}` : d.name)).join("; "));
    if (options) said.push(options);
    if (assumed) said.push(assumed);
    return said.filter(Boolean).map(P.escape).join(" · ");
  };

  P.buildSummary = () => {
    const shown = P.views.map((view) => {
      const letter = P.views.length > 1 ? `<b class="letter">${view.letter}</b> ` : "";
      const spends = spendLines(view);
      return `<div class="view">${P.views.length > 1 ? `<h2>${letter}${P.escape(view.name)}</h2>` : ""}<p class="about">${aboutLine(view)}</p>
        ${tooLarge(view).map((line) => `<p class="bad banner" role="alert">${P.escape(line)}</p>`).join("")}
        <div class="tiles">${tiles(view)}</div>${spends ? `<div class="spends">${spends}</div>` : ""}</div>`;
    });
    $("summary").innerHTML = `<h1>${P.escape(P.title)}</h1><div class="views n${P.views.length}">${shown.join("")}</div>`;
  };

  // -- comparison -----------------------------------------------------------

  P.buildDelta = () => {
    $("compare").hidden = P.views.length < 2;
    if (P.views.length < 2) return;
    const [a, b] = P.totals;
    const rows = [];
    const add = (title, p, q, form, key) => {
      if (!p && !q) return;
      const diff = Math.abs(q - p) > 1e-6 * Math.max(p, q) ? q - p : 0; // times are rounded to nanoseconds
      const sign = diff > 0 ? "+" : diff < 0 ? "−" : "";
      const ratio = p && q ? `${(q / p).toLocaleString("en", { maximumSignificantDigits: 3 })} ×` : "–";
      rows.push(`<tr data-key="${P.escape(key)}" data-a="${p}" data-b="${q}"><th scope="row">${P.escape(title)}</th><td>${form(p)}</td><td>${form(q)}</td><td>${sign}${form(Math.abs(diff))}</td><td>${ratio}</td></tr>`);
    };
    add("bytes copied", a.bytes_copied, b.bytes_copied, P.bytes, "bytes_copied");
    for (const r of P.COPIES) add(`– ${P.KINDS[r].title}`, a.bytes_by_reason[r], b.bytes_by_reason[r], P.bytes, `bytes_${r}`);
    add("bytes if whole", a.bytes_full, b.bytes_full, P.bytes, "bytes_full");
    add("copies", a.n_copies, b.n_copies, P.count, "n_copies");
    add("launches", a.n_launches, b.n_launches, P.count, "n_launches");
    const clock = P.state.clock;
    if (clock !== "order" && P.views.every((v) => v.clocks.includes(clock))) {
      const time = (n) => P.time(n, clock);
      const names = { all: P.clockTitle(clock), prompt: "– several tokens at once", generate: "– one token at a time" };
      for (const [name, title] of Object.entries(names)) {
        const [p, q] = P.views.map((v) => phase(v, name));
        if (p || q) add(title, p ? p.length : 0, q ? q.length : 0, time, `time_${name}`);
      }
      const backends = [...new Set(P.views.flatMap((v) => v.backends))];
      for (const backend of backends) {
        const [p, q] = P.views.map((v) => phase(v) && phase(v).backends.find((x) => x.backend === backend));
        add(`${backend} computing`, p ? p.computing : 0, q ? q.computing : 0, time, `computing_${backend}`);
        const whats = [...new Set([p, q].flatMap((x) => (x ? Object.keys(x.waits) : [])))];
        if (backend === "CPU") continue;
        for (const what of whats) add(`${backend} waiting for ${P.waitWords(what)}`, (p && p.waits[what]) || 0, (q && q.waits[what]) || 0, time, `wait_${backend}_${what}`);
      }
    }
    $("delta-words").textContent = deltaWords(a, b);
    const head = P.views.map((v) => `<th scope="col"><b class="letter">${v.letter}</b> ${P.escape(v.name)}</th>`).join("");
    $("delta").innerHTML = `<thead><tr><th></th>${head}<th scope="col">B − A</th><th scope="col">B / A</th></tr></thead><tbody>${rows.join("")}</tbody>`;
  };

  /** What the comparison comes to, in a sentence. */
  const deltaWords = (a, b) => {
    const said = [];
    if (a.bytes_copied !== b.bytes_copied) {
      const [less, more] = a.bytes_copied < b.bytes_copied ? ["A", "B"] : ["B", "A"];
      const [p, q] = less === "A" ? [a, b] : [b, a];
      said.push(`${less} copied ${P.bytes(p.bytes_copied)}, ${more} ${P.bytes(q.bytes_copied)}: ${less} saved ${P.bytes(q.bytes_copied - p.bytes_copied)} (${P.percent(q.bytes_copied - p.bytes_copied, q.bytes_copied)}).`);
    } else said.push(`Both copied ${P.bytes(a.bytes_copied)}.`);
    const [p, q] = P.views.map((v) => phase(v));
    if (p && q && p.clock === q.clock && p.length && q.length) {
      const [fast, slow] = p.length <= q.length ? ["A", "B"] : ["B", "A"];
      const [x, y] = [Math.min(p.length, q.length), Math.max(p.length, q.length)];
      said.push(`In ${P.clockTitle(p.clock)} ${fast} took ${P.time(x)} and ${slow} ${P.time(y)}, ${(y / x).toLocaleString("en", { maximumSignificantDigits: 3 })} times as long.`);
    }
    return said.join(" ");
  };

  // -- switches -------------------------------------------------------------

  const segments = (box, choices, current, go) => {
    box.replaceChildren();
    if (choices.length < 2) return;
    for (const [value, text] of choices) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.setAttribute("aria-pressed", String(value === current));
      button.dataset.value = value;
      button.addEventListener("click", () => go(value));
      box.append(button);
    }
  };
  const tables = () => {
    P.buildSplits();
    P.buildExperts();
    P.buildBytes();
    P.buildMemory();
    P.buildGraph();
    buildNav();
  };
  P.setView = (index) => {
    P.state.view = index;
    switches();
    tables();
  };
  P.setClock = (clock) => {
    P.state.clock = clock;
    switches();
    P.buildSummary();
    P.buildDelta();
    P.buildCharts();
    tables();
    if (P.state.selected) P.showDetail(P.views[P.state.selected.view], P.state.selected.i);
  };
  const switches = () => {
    segments($("view-switch"), P.views.length > 1 ? P.views.map((v) => [v.index, v.letter]) : [], P.state.view, P.setView);
    const clocks = [...new Set(P.views.flatMap((v) => v.clocks))];
    segments($("clock-switch"), clocks.map((c) => [c, P.clockTitle(c)]), P.state.clock, P.setClock);
  };

  const buildNav = () => {
    const titles = { compare: "Compare", timeline: "Timeline", splits: "Splits", experts: "Experts", bytes: "Bytes", memory: "Memory", graph: "Graph", help: "Help" };
    $("nav").innerHTML = Object.entries(titles)
      .filter(([id]) => !$(id).hidden)
      .map(([id, title]) => `<a href="#${id}">${title}</a>`)
      .join("");
  };

  const isDark = () => {
    const set = document.documentElement.dataset.theme;
    return set ? set === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const recolor = () => {
    P.colors = {};
    P.charts.forEach(P.drawOverview);
    P.redraw();
    if (!$("experts").hidden) P.redrawExperts();
  };
  const connectTheme = () => {
    $("theme").addEventListener("click", () => {
      document.documentElement.dataset.theme = isDark() ? "light" : "dark";
      recolor();
    });
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolor);
  };

  // -- start ----------------------------------------------------------------

  const hasTimeline = P.views.some((v) => v.n);
  $("timeline").hidden = !hasTimeline;
  connectTheme();
  switches();
  P.buildSummary();
  P.buildDelta();
  if (hasTimeline) {
    P.connectTimeline();
    P.connectFind();
    P.buildChips();
    P.buildCharts();
    P.showDetail(null);
  }
  tables();
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    if (!$("experts").hidden) P.redrawExperts();
  });
  /** `#split-42` opens that split, `#split-42-3` that of run 3; any other fragment is a section. */
  const follow = () => {
    const [, split, run] = /^#split-(\d+)(?:-(\d+))?$/.exec(location.hash) || [];
    if (split !== undefined && !$("splits").hidden) P.showSplit(P.views[P.state.view], Number(run || 0), Number(split));
  };
  window.addEventListener("hashchange", follow);
  follow();
  document.documentElement.dataset.ready = "true";
})();
