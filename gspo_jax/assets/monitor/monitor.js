// The live page: asks /data again and again and shows what it says.
//
// Whatever comes from a run may have been written by a model: text reaches the page through
// textContent and text nodes alone, and the page's policy (see monitor.py) allows nothing else.
"use strict";

(() => {
  const COLOURS = 8; // --c0 to --c7 in monitor.css
  const HEIGHT = 180;
  const MOST_ACCURACIES = 4;
  const SECONDS = { fresh: 2, hidden: 15, behind: 0.05, lost: 3 };

  // What is drawn, in this order; a chart without data is left out.
  const CHARTS = [
    { id: "reward", title: "Reward", lines: [{ y: "reward" }] },
    { id: "loss", title: "Loss", lines: [{ y: "loss" }], unless: "reward" },
    {
      id: "clip", title: "Clipped tokens", form: percent, zero: true,
      note: "solid: above, dashed: below",
      lines: [{ y: "clip_frac_high" }, { y: "clip_frac_low", dash: [4, 3] }],
    },
    {
      id: "ratio", title: "Importance ratio", form: ratio, note: "median; band: 5 % to 95 %",
      lines: [{ y: "ratio_q50" }], band: ["ratio_q05", "ratio_q95"],
    },
    { id: "entropy", title: "Entropy", note: "nats per token", zero: true, lines: [{ y: "entropy" }] },
    { id: "length", title: "Length", note: "tokens", lines: [{ y: "completions/mean_length" }] },
    {
      id: "cut", title: "Cut at the length limit", form: percent, zero: true,
      lines: [{ y: "completions/clipped_ratio" }],
    },
    {
      id: "equal", title: "Groups without spread", form: percent, zero: true,
      lines: [{ y: "frac_reward_zero_std" }],
    },
    { id: "kl", title: "KL from the reference", note: "nats per token", lines: [{ y: "kl" }] },
    { id: "grad", title: "Gradient norm", zero: true, lines: [{ y: "grad_norm" }] },
    {
      id: "speed", title: "Throughput", note: "tokens per second", form: compact, zero: true,
      lines: [{ y: "tokens_per_second" }],
    },
  ];

  const page = {
    runs: [], // as /data has them
    colours: new Map(), // run name -> its number, kept as runs come and go
    hidden: new Set(), // run names
    axis: "updates",
    smoothing: 1,
    zoom: null, // [from, to] on the x axis, or null for everything
    isNewest: false, // the zoom follows the newest quarter
    isPaused: false,
    etag: "",
    lostSince: null,
    refused: "",
    clock: 0, // how far the server's clock is ahead of ours, ms
    timer: 0,
  };
  const charts = new Map(); // id -> chart, see makeChart
  const $ = (id) => document.getElementById(id);

  // ------------------------------------------------------------------------------- elements

  function el(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name === "class") made.className = value;
      else if (name.includes("-") || name === "role") made.setAttribute(name, value);
      else made[name] = value;
    }
    made.append(...children.filter((child) => child !== null)); // strings become text nodes
    return made;
  }

  // Setting what is there already would lose a selection, and be told again to those who listen.
  function say(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  function swatch(name) {
    const made = el("span", { class: "swatch", "aria-hidden": "true" });
    made.style.setProperty("--colour", `var(--c${colourOf(name)})`);
    return made;
  }

  function colourOf(name) {
    if (!page.colours.has(name)) page.colours.set(name, page.colours.size % COLOURS);
    return page.colours.get(name);
  }

  function css(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  // ---------------------------------------------------------------------------------- texts

  function number(value, digits = 4) {
    if (value === null || value === undefined) return "–";
    if (value !== 0 && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-4)) {
      return value.toExponential(digits - 2);
    }
    return value.toLocaleString("en", { maximumSignificantDigits: Math.max(digits, wholeDigits(value)) });
  }

  function wholeDigits(value) {
    return Math.min(Math.max(Math.ceil(Math.log10(Math.abs(value) + 1)), 1), 15);
  }

  function percent(value) {
    if (value === null || value === undefined) return "–";
    return `${(100 * value).toLocaleString("en", { maximumSignificantDigits: 3 })} %`;
  }

  // Of accuracies: tenths of a point, whatever their size.
  function points(value) {
    return value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`;
  }

  function ratio(value) {
    return value === null || value === undefined ? "–" : value.toFixed(4);
  }

  function compact(value) {
    if (value === null || value === undefined) return "–";
    return value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 3 });
  }

  function clock(seconds) {
    if (seconds === null || seconds === undefined) return "–";
    const whole = Math.round(seconds);
    const two = (n) => String(n).padStart(2, "0");
    const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
    return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
  }

  function seconds(value) {
    return value >= 100 ? clock(value) : `${number(value, 3)} s`;
  }

  function accuracy(found) {
    const [low, high] = [found.low, found.high].map((v) => (100 * v).toFixed(1));
    return `${points(found.value)} [${low}, ${high}]`;
  }

  function xText(value) {
    return page.axis === "time" ? clock(value) : page.axis === "tokens" ? compact(value) : number(value);
  }

  // ----------------------------------------------------------------------------------- runs

  // Each run keeps its elements, so that focus and selection stay while numbers change.
  const cards = new Map();

  function makeCard(name) {
    const cell = (label) => {
      const value = el("dd");
      return { value, root: el("div", {}, el("dt", {}, label), value) };
    };
    const toggle = el("button", { type: "button", class: "toggle" }, swatch(name), el("span", {}, name));
    toggle.addEventListener("click", (event) => (event.shiftKey ? showAlone(name) : showOrHide(name)));
    const card = {
      toggle,
      state: el("span", { class: "state" }),
      bar: el("progress", { max: 1, value: 0, "aria-label": `Progress of ${name}` }),
      cells: {
        step: cell("step"), left: cell("left"), reward: cell("reward"),
        accuracy: cell("held-out"), speed: cell("tokens/s"), age: cell("last sign"),
      },
      differs: el("p", { class: "note differs" }),
    };
    const cells = Object.values(card.cells).map((made) => made.root);
    card.root = el(
      "li", {}, el("div", { class: "run-head" }, toggle, card.state), card.bar,
      el("dl", { class: "cells" }, ...cells), card.differs,
    );
    return card;
  }

  function drawRuns() {
    const names = page.runs.map((run) => run.name);
    for (const name of [...cards.keys()].filter((key) => !names.includes(key))) {
      cards.get(name).root.remove();
      cards.delete(name);
    }
    page.runs.forEach((run, place) => {
      if (!cards.has(run.name)) cards.set(run.name, makeCard(run.name));
      const card = cards.get(run.name);
      if ($("runs").children[place] !== card.root) $("runs").insertBefore(card.root, $("runs").children[place] ?? null);
      fillCard(card, run);
    });
    drawTitle();
  }

  function fillCard(card, run) {
    const { step, left, reward, accuracy: held, speed } = card.cells;
    const isShown = !page.hidden.has(run.name);
    card.root.classList.toggle("off", !isShown);
    card.toggle.setAttribute("aria-pressed", String(isShown));
    card.toggle.title = run.path;
    say(card.state, run.behind > 0 ? `reading, ${percent(1 - run.behind)}` : run.state);
    card.state.dataset.state = run.state;
    card.bar.hidden = !run.of;
    card.bar.value = run.of ? Math.min((run.step ?? 0) / run.of, 1) : 0;
    say(step.value, run.of ? `${number(run.step ?? 0)} of ${number(run.of)}` : number(run.step));
    say(left.value, run.eta === null ? "–" : `${clock(run.eta)}`);
    say(reward.value, number(run.newest.reward, 3));
    const first = run.accuracies[0];
    say(held.value, first ? `${accuracy(first)} ${first.name}, n = ${number(first.n)}, step ${first.step}` : "–");
    say(speed.value, compact(run.newest.tokens_per_second));
    const own = Object.entries(run.settings).map(([name, value]) => `${name}=${value}`);
    say(card.differs, own.join("  "));
    card.differs.hidden = own.length === 0;
  }

  function drawTitle() {
    const counts = new Map();
    for (const run of page.runs) counts.set(run.state, (counts.get(run.state) ?? 0) + 1);
    const states = [...counts].map(([state, count]) => `${count} ${state}`).join(", ");
    const only = page.runs.length === 1 ? page.runs[0] : null;
    const text = only ? `${only.name}: ${only.state}`
      : page.runs.length ? `${page.runs.length} runs: ${states}` : "No run is here yet";
    say($("title"), text);
    const place = only && only.of ? `${only.step ?? 0}/${only.of} ` : "";
    document.title = `${page.lostSince ? "(lost) " : ""}${place}${text} · gspo-jax`;
  }

  function drawAges() {
    const now = (Date.now() + page.clock) / 1000;
    for (const run of page.runs) {
      const age = run.updated === null ? null : Math.max(now - run.updated, 0);
      const text = age === null ? "–" : age < 5 ? "now" : `${clock(age)} ago`;
      const card = cards.get(run.name);
      if (card) say(card.cells.age.value, age > 86400 ? new Date(run.updated * 1000).toLocaleDateString() : text);
    }
  }

  function showOrHide(name) {
    if (!page.hidden.delete(name)) page.hidden.add(name);
    draw();
  }

  function showAlone(name) {
    page.hidden = new Set(page.runs.map((run) => run.name).filter((other) => other !== name));
    draw();
  }

  const shownRuns = () => page.runs.filter((run) => !page.hidden.has(run.name));

  // --------------------------------------------------------------------- advice, warnings.log

  function drawAdvice() {
    const items = shownRuns().flatMap((run) => run.advice.map((advice) => ({ run, text: advice.text })));
    const key = JSON.stringify(items.map(({ run, text }) => [run.name, text]));
    $("advice-section").hidden = items.length === 0;
    if ($("advice").dataset.key === key) return;
    $("advice").dataset.key = key;
    $("advice").replaceChildren(
      ...items.map(({ run, text }) => el("li", {}, swatch(run.name), el("b", {}, run.name), " ", text)),
    );
  }

  function drawLog() {
    const runs = shownRuns().filter((run) => run.warnings.length);
    const key = JSON.stringify(runs.map((run) => [run.name, run.warnings]));
    $("log-section").hidden = runs.length === 0;
    if ($("log").dataset.key === key) return;
    $("log").dataset.key = key;
    const wasOpen = new Set([...$("log").querySelectorAll("details[open]")].map((d) => d.dataset.name));
    $("log").replaceChildren(
      ...runs.map((run) => {
        const made = el(
          "details", { open: wasOpen.has(run.name) },
          el("summary", {}, swatch(run.name), `${run.name}: ${run.warnings.length} newest lines`),
          el("pre", { tabIndex: 0, dir: "auto" }, run.warnings.join("\n")),
        );
        made.dataset.name = run.name;
        return made;
      }),
    );
  }

  // --------------------------------------------------------------------------- the newest step

  function drawTimes() {
    const runs = shownRuns().filter((run) => run.phases.length);
    $("time-section").hidden = runs.length === 0;
    $("time").replaceChildren(...runs.map(timesOf));
  }

  function timesOf(run) {
    const total = run.phases.reduce((sum, [, spent]) => sum + spent, 0) || 1;
    const bar = el("div", { class: "stack", "aria-hidden": "true" });
    const list = el("ul", { class: "phases" });
    run.phases.forEach(([label, spent], k) => {
      const colour = `var(--p${k})`;
      const part = el("span");
      part.style.width = `${(100 * spent) / total}%`;
      part.style.background = colour;
      bar.append(part);
      const mark = el("span", { class: "swatch", "aria-hidden": "true" });
      mark.style.setProperty("--colour", colour);
      list.append(el("li", {}, mark, `${label} ${seconds(spent)}, ${percent(spent / total)}`));
    });
    return el(
      "div", { class: "time" },
      el("h3", {}, swatch(run.name), `${run.name}: step ${run.step}, ${seconds(total)}`),
      bar, list,
      el(
        "div", { class: "updates" },
        updatesOf("clipped tokens, update by update", run.by_update.clipped, percent),
        rangesOf("importance ratio: 5 %, median, 95 %", ...run.by_update.ratio),
      ),
    );
  }

  // A number for each update of a step: on the first after a rollout, at ratio 1, it must be 0.
  function updatesOf(title, values, shown) {
    if (values.length < 2) return null;
    const most = Math.max(...values.map((v) => v ?? 0), 1e-9);
    const bars = values.slice(0, 16).map((value) => {
      const bar = el("span", { class: "bar", "aria-hidden": "true" });
      bar.style.height = `${Math.max((100 * (value ?? 0)) / most, 2)}%`;
      return el("li", {}, el("span", { class: "bar-space" }, bar), shown(value));
    });
    return el(
      "div", {}, el("p", { class: "note" }, title), el("ol", { class: "bars" }, ...bars),
    );
  }

  // From the 5 % to the 95 % quantile of each update, with the median as a mark, on one scale.
  function rangesOf(title, low, middle, high) {
    const numbers = [...low, ...middle, ...high];
    if (low.length < 2 || numbers.length !== 3 * low.length) return null;
    if (numbers.some((v) => v === null)) return null;
    const least = Math.min(...numbers), span = Math.max(...numbers) - least || 1;
    const place = (value) => `${(100 * (value - least)) / span}%`;
    const bars = low.slice(0, 16).map((from, k) => {
      const bar = el("span", { class: "range", "aria-hidden": "true" });
      bar.style.bottom = place(from);
      bar.style.height = `max(2px, ${(100 * (high[k] - from)) / span}%)`;
      const mark = el("span", { class: "median", "aria-hidden": "true" });
      mark.style.bottom = place(middle[k]);
      const text = `${ratio(from)}, ${ratio(middle[k])}, ${ratio(high[k])}`;
      return el("li", { title: text }, el("span", { class: "bar-space" }, bar, mark),
        `${ratio(from)} – ${ratio(high[k])}`);
    });
    return el(
      "div", {}, el("p", { class: "note" }, title), el("ol", { class: "bars" }, ...bars),
    );
  }

  // ---------------------------------------------------------------------------- completions

  function drawSamples() {
    const runs = page.runs.filter((run) => run.samples.length);
    $("samples-section").hidden = runs.length === 0;
    if (!runs.length) return;
    const select = $("samples-run");
    const names = runs.map((run) => run.name);
    if (select.dataset.key !== JSON.stringify(names)) {
      const kept = select.value;
      select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
      select.dataset.key = JSON.stringify(names);
      const busy = runs.find((run) => run.state === "running") ?? runs[0];
      select.value = names.includes(kept) ? kept : busy.name;
    }
    const run = runs.find((found) => found.name === select.value) ?? runs[0];
    const key = JSON.stringify([run.name, run.samples]);
    if (page.samplesKey === key) return;
    page.samplesKey = key;
    const wasOpen = new Set([...$("samples").querySelectorAll("details[open]")].map((d) => d.sampleKey));
    $("samples").replaceChildren(...run.samples.map((sample) => sampleOf(sample, wasOpen)));
  }

  function sampleOf(sample, wasOpen) {
    const cells = [
      number(sample.step), number(sample.reward, 3), number(sample.advantage, 3), sample.answer ?? "–",
    ].map((text) => el("span", { class: "cell" }, text));
    const texts = [["prompt", "cell wide"], ["completion", "cell"]].map(([name, kind]) =>
      el("span", { class: kind, dir: "auto" }, (sample[name] ?? "–").slice(0, 200)),
    );
    cells[1].classList.add(sample.reward > 0 ? "good" : "bad");
    const part = (name) => [
      el("h3", {}, name), el("pre", { tabIndex: 0, dir: "auto" }, sample[name] ?? "–"),
    ];
    const made = el("details", {}, el("summary", {}, ...cells, ...texts));
    made.sampleKey = `${sample.step}\n${sample.prompt}\n${sample.completion}`;
    const inside = el("div", { class: "sample" }, ...part("prompt"), ...part("completion"));
    if (sample.answer !== null) inside.append(...part("answer"));
    made.append(inside);
    made.open = wasOpen.has(made.sampleKey);
    return made;
  }

  // ---------------------------------------------------------------------------------- curves

  // The specs for which some run has numbers; one more per held-out accuracy.
  function specs() {
    const has = (name) => page.runs.some((run) => (run.y[name] ?? []).some((v) => v !== null));
    const found = [...new Set(page.runs.flatMap((run) => Object.keys(run.y)))].filter(
      (name) => name.startsWith("eval/") && has(`${name}_low`) && has(`${name}_high`),
    );
    const isSampled = (name) => name !== "eval/greedy";
    found.sort((one, other) => isSampled(one) - isSampled(other));
    const measured = found.slice(0, MOST_ACCURACIES).map((name) => ({
      id: name, title: `Held-out accuracy, ${name.slice(5)}`, form: points,
      lines: [{ y: name }], interval: [`${name}_low`, `${name}_high`],
    }));
    const [reward, ...others] = CHARTS;
    return [reward, ...measured, ...others].filter(
      (spec) => spec.lines.some((line) => has(line.y)) && !(spec.unless && has(spec.unless)),
    );
  }

  // Where a run's rows stand on the axis, and which of them: x must grow, and be a number.
  function places(run) {
    const [xs, rows] = [[], []];
    run.x[page.axis].forEach((x, row) => {
      if (x !== null && (xs.length === 0 || x > xs[xs.length - 1])) {
        xs.push(x);
        rows.push(row);
      }
    });
    return { xs, rows };
  }

  // The mean of the newest `page.smoothing` values that are there.
  function smooth(values) {
    const window = [];
    return values.map((value) => {
      if (value === null) return null;
      window.push(value);
      if (window.length > page.smoothing) window.shift();
      return window.reduce((sum, v) => sum + v, 0) / window.length;
    });
  }

  // What a chart draws of one run: a table for uPlot.join, and a style per column.
  function tableOf(spec, run) {
    const { xs, rows } = places(run);
    const pick = (name) => rows.map((row) => (run.y[name] ?? [])[row] ?? null);
    const colour = css(`--c${colourOf(run.name)}`);
    const isSmooth = page.smoothing > 1 && !spec.interval;
    const columns = [];
    for (const name of spec.band ?? spec.interval ?? []) {
      columns.push({ values: isSmooth ? smooth(pick(name)) : pick(name), style: { kind: "edge", colour } });
    }
    for (const line of spec.lines) {
      const values = pick(line.y);
      if (isSmooth && !spec.band) columns.push({ values, style: { kind: "faint", colour } });
      const style = { kind: spec.interval ? "points" : "line", colour, dash: line.dash };
      columns.push({ values: isSmooth ? smooth(values) : values, style });
    }
    return { run, xs, columns, isBand: Boolean(spec.band) };
  }

  function seriesOf(style) {
    const kinds = {
      edge: { stroke: "transparent", width: 0, points: { show: false } },
      faint: { stroke: `${style.colour}55`, width: 1, points: { show: false } },
      points: { stroke: style.colour, width: 1.5, points: { show: true, size: 6, fill: style.colour } },
      line: { stroke: style.colour, width: 1.8, dash: style.dash, points: { show: onlyWhereAlone, size: 4 } },
    };
    return { spanGaps: true, ...kinds[style.kind] };
  }

  // A line of one point would be invisible.
  function onlyWhereAlone(plot, index) {
    return plot.data[index].filter((v) => v !== null && v !== undefined).length < 2;
  }

  function makeChart(spec) {
    const chart = { spec, plot: null, key: "", tables: [], at: null };
    chart.readout = el("p", { class: "readout" });
    chart.host = el("div", { class: "plot" });
    const head = el("h3", {}, spec.title);
    if (spec.note) head.append(" ", el("small", {}, spec.note));
    chart.root = el("figure", { tabIndex: 0, role: "group" }, head, chart.readout, chart.host);
    chart.root.addEventListener("keydown", (event) => readByKey(chart, event));
    chart.root.addEventListener("blur", () => clearCursor(chart));
    chart.size = new ResizeObserver(() => chart.plot?.setSize(sizeOf(chart)));
    chart.size.observe(chart.host);
    return chart;
  }

  const sizeOf = (chart) => ({ width: Math.max(chart.host.clientWidth, 120), height: HEIGHT });

  function dropChart(chart) {
    chart.size.disconnect();
    chart.plot?.destroy();
    chart.root.remove();
  }

  function drawCharts() {
    const wanted = specs();
    $("no-charts").hidden = wanted.length > 0;
    for (const [id, chart] of charts) {
      if (!wanted.some((spec) => spec.id === id)) {
        dropChart(chart);
        charts.delete(id);
      }
    }
    wanted.forEach((spec, place) => {
      if (!charts.has(spec.id)) charts.set(spec.id, makeChart(spec));
      const { root } = charts.get(spec.id);
      if ($("charts").children[place] !== root) $("charts").insertBefore(root, $("charts").children[place] ?? null);
    });
    const range = xRange();
    for (const chart of charts.values()) drawChart(chart, range);
  }

  function drawChart(chart, range) {
    chart.tables = shownRuns().map((run) => tableOf(chart.spec, run)).filter((table) => table.xs.length);
    const styles = chart.tables.flatMap((table) => table.columns.map((column) => column.style));
    const data = chart.tables.length
      ? uPlot.join(chart.tables.map((table) => [table.xs, ...table.columns.map((c) => c.values)]))
      : [[]];
    const key = JSON.stringify([styles, page.axis, css("--ink")]);
    if (chart.key !== key) {
      chart.plot?.destroy();
      chart.plot = new uPlot(options(chart, styles), data, chart.host);
      chart.key = key;
    } else {
      chart.plot.setData(data, false);
    }
    chart.plot.setScale("x", range);
    readOut(chart);
  }

  function options(chart, styles) {
    const form = chart.spec.form ?? number;
    const axis = {
      stroke: css("--soft"), font: "11px system-ui, sans-serif",
      grid: { stroke: css("--line"), width: 1 }, ticks: { show: false },
    };
    return {
      ...sizeOf(chart),
      padding: [8, 12, 0, 0],
      legend: { show: false },
      cursor: {
        y: false,
        drag: { x: true, y: false, setScale: false },
        sync: { key: "runs", setSeries: false },
        points: { show: false },
        bind: { dblclick: () => () => zoomTo(null) },
      },
      scales: { x: { time: false }, y: { range: (plot, low, high) => yRange(chart.spec, low, high) } },
      axes: [
        { ...axis, size: 26, space: 60, values: (plot, at) => at.map(xText) },
        { ...axis, size: 54, space: 34, values: (plot, at) => at.map((v) => form(v)) },
      ],
      series: [{}, ...styles.map(seriesOf)],
      bands: bandsOf(chart),
      hooks: {
        setSelect: [(plot) => zoomToSelection(plot)],
        setCursor: [(plot) => followCursor(chart, plot)],
        draw: [(plot) => drawIntervals(chart, plot)],
      },
    };
  }

  function bandsOf(chart) {
    const bands = [];
    let column = 1;
    for (const table of chart.tables) {
      if (table.isBand) bands.push({ series: [column + 1, column], fill: `${table.columns[0].style.colour}30` });
      column += table.columns.length;
    }
    return bands;
  }

  function yRange(spec, low, high) {
    if (low === null || high === null) return [0, 1];
    if (spec.zero) low = Math.min(low, 0);
    const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 0.01;
    return [spec.zero && low === 0 ? 0 : low - room, high + room];
  }

  // 95 % intervals as bars: the first two columns of a table are their ends.
  function drawIntervals(chart, plot) {
    if (!chart.spec.interval) return;
    const { ctx } = plot;
    ctx.save();
    ctx.beginPath();
    ctx.rect(plot.bbox.left, plot.bbox.top, plot.bbox.width, plot.bbox.height);
    ctx.clip();
    ctx.lineWidth = devicePixelRatio;
    for (const { xs, columns: [low, high] } of chart.tables) {
      ctx.strokeStyle = low.style.colour;
      ctx.beginPath();
      xs.forEach((x, k) => {
        if (low.values[k] === null || high.values[k] === null) return;
        const at = plot.valToPos(x, "x", true);
        ctx.moveTo(at, plot.valToPos(low.values[k], "y", true));
        ctx.lineTo(at, plot.valToPos(high.values[k], "y", true));
      });
      ctx.stroke();
    }
    ctx.restore();
  }

  // ------------------------------------------------------------------------------------ zoom

  function ends() {
    const all = shownRuns().map((run) => places(run).xs).filter((xs) => xs.length);
    if (!all.length) return [0, 1];
    const [from, to] = [Math.min(...all.map((xs) => xs[0])), Math.max(...all.map((xs) => xs.at(-1)))];
    return to > from ? [from, to] : [from - 0.5, to + 0.5];
  }

  function xRange() {
    const [from, to] = ends();
    if (page.isNewest) return { min: from + 0.75 * (to - from), max: to };
    return page.zoom ? { min: page.zoom[0], max: page.zoom[1] } : { min: from, max: to };
  }

  function zoomTo(zoom, isNewest = false) {
    [page.zoom, page.isNewest] = [zoom, isNewest];
    $("newest").setAttribute("aria-pressed", String(isNewest));
    const range = xRange();
    for (const chart of charts.values()) chart.plot?.setScale("x", range);
  }

  function zoomToSelection(plot) {
    const { left, width } = plot.select;
    if (width < 4) return;
    const [from, to] = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    zoomTo([from, to]);
  }

  // --------------------------------------------------------------------- reading the curves

  // The last place at or before `x`, and the value of a column there or the nearest before it.
  function valueAt(table, values, x) {
    let [low, high] = [0, table.xs.length - 1];
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (table.xs[middle] <= x) low = middle;
      else high = middle - 1;
    }
    while (low > 0 && values[low] === null) low -= 1;
    return values[low] === null ? null : { x: table.xs[low], value: values[low] };
  }

  function followCursor(chart, plot) {
    const { left, idx } = plot.cursor;
    const at = left >= 0 && idx !== null && idx !== undefined ? plot.data[0][idx] : null;
    if (chart.at !== at) {
      chart.at = at;
      readOut(chart);
    }
  }

  // The values under the cursor, else the newest; beside each the colour of its run.
  function readOut(chart) {
    const form = chart.spec.form ?? number;
    const parts = chart.tables.flatMap((table) => {
      const lines = table.columns.filter((c) => c.style.kind !== "edge" && c.style.kind !== "faint");
      const texts = lines.map((line) => form(valueAt(table, line.values, chart.at ?? Infinity)?.value));
      if (texts.every((text) => text === "–")) return [];
      const part = el("span", { title: table.run.name }, swatch(table.run.name), texts.join(" / "));
      if (chart.spec.interval) part.append(intervalAt(table, chart.at ?? Infinity));
      return [part];
    });
    const where = chart.at === null ? "" : `at ${xText(chart.at)}`;
    chart.readout.replaceChildren(...parts, where);
    const told = chart.tables.map((t, k) => `${t.run.name} ${parts[k]?.textContent ?? ""}`).join(", ");
    chart.root.setAttribute("aria-label", `${chart.spec.title} ${where || "now"}: ${told}`);
  }

  function intervalAt(table, x) {
    const [low, high] = table.columns.slice(0, 2).map((c) => valueAt(table, c.values, x)?.value);
    const n = valueAt(table, places(table.run).rows.map((row) => (table.run.y["eval/n"] ?? [])[row] ?? null), x);
    if (low === undefined || high === undefined) return "";
    return ` [${(100 * low).toFixed(1)}, ${(100 * high).toFixed(1)}] n = ${number(n?.value)}`;
  }

  function readByKey(chart, event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") clearCursor(chart);
    if (!by || !chart.tables.length || !chart.plot) return;
    event.preventDefault();
    const { xs } = chart.tables[0];
    const now = chart.at === null ? xs.length : xs.findIndex((x) => x >= chart.at);
    const x = xs[Math.min(Math.max((now < 0 ? xs.length : now) + by, 0), xs.length - 1)];
    chart.plot.setCursor({ left: chart.plot.valToPos(x, "x"), top: 10 });
  }

  function clearCursor(chart) {
    chart.plot?.setCursor({ left: -10, top: -10 });
  }

  // ------------------------------------------------------------------------- asking the server

  async function ask() {
    const headers = page.etag ? { "If-None-Match": page.etag } : {};
    const answer = await fetch("/data", { headers, cache: "no-store", signal: AbortSignal.timeout(20000) });
    const date = Date.parse(answer.headers.get("Date") ?? "");
    if (Number.isFinite(date)) page.clock = date - Date.now();
    if (answer.status === 304) return;
    if (!answer.ok) {
      page.refused = (await answer.text()).trim();
      throw new Error("refused");
    }
    page.etag = answer.headers.get("ETag") ?? "";
    page.runs = (await answer.json()).runs;
    draw();
  }

  async function poll() {
    clearTimeout(page.timer);
    if (page.isPaused) return;
    const wasLost = page.lostSince !== null;
    try {
      await ask();
      page.lostSince = null;
    } catch {
      page.lostSince ??= new Date();
    }
    if (wasLost || page.lostSince) drawLost();
    drawAges();
    const isBehind = page.runs.some((run) => run.behind > 0);
    const wait = page.lostSince ? SECONDS.lost : isBehind ? SECONDS.behind
      : document.hidden ? SECONDS.hidden : SECONDS.fresh;
    page.timer = setTimeout(poll, 1000 * wait);
  }

  function drawLost() {
    $("lost").hidden = page.lostSince === null;
    document.body.classList.toggle("stale", page.lostSince !== null);
    if (page.lostSince) {
      const why = page.refused || "The monitor does not answer; start gspo-jax monitor again.";
      say($("lost"), `${why} What is shown is from ${page.lostSince.toLocaleTimeString()}. The runs do not mind.`);
    }
    page.refused = "";
    drawTitle();
  }

  function draw() {
    drawRuns();
    drawAdvice();
    drawCharts();
    drawTimes();
    drawSamples();
    drawLog();
    drawAges();
  }

  // -------------------------------------------------------------------------- what users press

  function setAxis(axis) {
    page.axis = axis;
    for (const input of document.querySelectorAll("#axis input")) input.checked = input.value === axis;
    zoomTo(null, page.isNewest); // a range of updates is none of tokens
    drawCharts();
  }

  function setSmoothing(value) {
    page.smoothing = Number(value);
    $("smoothing").value = String(value);
    drawCharts();
  }

  function nextSmoothing() {
    const values = [...$("smoothing").options].map((option) => option.value);
    setSmoothing(values[(values.indexOf($("smoothing").value) + 1) % values.length]);
  }

  function pause() {
    page.isPaused = !page.isPaused;
    $("pause").setAttribute("aria-pressed", String(page.isPaused));
    if (!page.isPaused) poll();
  }

  function showAll() {
    page.hidden.clear();
    draw();
  }

  const KEYS = {
    1: () => setAxis("updates"),
    2: () => setAxis("tokens"),
    3: () => setAxis("time"),
    s: nextSmoothing,
    q: () => zoomTo(null, !page.isNewest),
    r: () => zoomTo(null),
    p: pause,
    a: showAll,
    "?": () => $("help").showModal(),
  };

  function onKey(event) {
    const isTyping = event.target.closest("select, input[type=text], textarea, dialog") !== null;
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, event.key)) return;
    event.preventDefault();
    KEYS[event.key]();
  }

  function start() {
    $("axis").addEventListener("change", (event) => setAxis(event.target.value));
    $("smoothing").addEventListener("change", (event) => setSmoothing(event.target.value));
    $("newest").addEventListener("click", () => zoomTo(null, !page.isNewest));
    $("whole").addEventListener("click", () => zoomTo(null));
    $("pause").addEventListener("click", pause);
    $("ask").addEventListener("click", () => $("help").showModal());
    $("samples-run").addEventListener("change", drawSamples);
    document.addEventListener("keydown", onKey);
    document.addEventListener("visibilitychange", () => document.hidden || poll());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    setInterval(drawAges, 1000);
    poll();
  }

  start();
})();
