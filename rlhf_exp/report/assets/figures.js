// The figures. Each draw function can be called again at any time: it reads what is shown and the
// colors of the moment, and Plotly keeps the reader's zoom.
"use strict";

const CONFIG = {
  responsive: true, displaylogo: false,
  // Plotly has a button that sends a figure to its company.
  showSendToCloud: false, plotlyServerURL: "",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
};

function axis(more = {}) {
  const colors = theme();
  return {
    gridcolor: colors.line, zeroline: false, linecolor: colors.faint, tickcolor: colors.faint,
    ticks: "outside", ticklen: 4, automargin: true, ...more,
    title: { text: more.title ?? "", standoff: 8, font: { size: 13 } },
  };
}

function draw(where, traces, layout) {
  const colors = theme();
  const hover = { bgcolor: colors.paper, font: { color: colors.ink, family: colors.font, size: 12 }, align: "left" };
  return Plotly.react(where, traces, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { family: colors.font, size: 12, color: colors.muted }, hovermode: "closest",
    margin: { l: 56, r: 14, t: 12, b: 46 }, hoverlabel: { ...hover, namelength: -1 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colors.faint, activecolor: colors.accent },
    // A finger that scrolls the page must not zoom.
    dragmode: coarse.matches ? false : "zoom", uirevision: "kept", ...layout,
  }, { ...CONFIG, displayModeBar: coarse.matches ? false : "hover" });
}

// How far from its mean the interval of a measure reaches, for error bars.
function reach(measures) {
  const distance = (measure, side) => (isNumber(measure[side]) ? Math.abs(measure[side] - measure.mean) : 0);
  return {
    type: "data", symmetric: false, thickness: 1.2, width: 4,
    array: measures.map((measure) => distance(measure, "high")),
    arrayminus: measures.map((measure) => distance(measure, "low")),
  };
}

function describe(group) {
  const members = group.runs.map((id) => runs.get(id));
  const lines = [
    `<b>${label(groupLabel(group), 60)}</b>`,
    `${group.measure ?? "score"} ${interval(group.score)}`,
    ...(isNumber(group.kl?.mean) ? [`KL ${interval(group.kl)}`] : []),
    ...(group.efficiency && !group.measure ? [`KL efficiency ${interval(group.efficiency)}`] : []),
    // Unless the label has them all.
    ...(groupLabel(group).length > 60 || !group.label ? Object.entries(group.parameters) : []).slice(0, 8)
      .map(([key, value]) => label(`${nameOf(key)} = ${format(value)}`, 50)),
    label(`seeds ${members.map(seedOf).join(", ")}`, 50),
  ];
  return lines.join("<br>");
}

// ---- The frontier

function pathTraces(visible) {
  return visible.map((group) => ({
    x: group.path.map((point) => point.kl), y: group.path.map((point) => point.score),
    mode: "lines+markers", hoverinfo: "text", opacity: isLeading(group) ? 0.75 : 0.3,
    line: { color: colorOf(group), width: 1.4 }, marker: { size: 4, color: colorOf(group) },
    hovertext: group.path.map(
      (point) => `<b>${label(groupLabel(group), 60)}</b><br>${group.path_axis} ${point.phase}<br>` +
        `${group.measure ?? "score"} ${format(point.score)}<br>KL ${format(point.kl)}` +
        (isNumber(point.efficiency) && !group.measure ? `<br>KL efficiency ${format(point.efficiency, 3)}` : "")),
  }));
}

function pointTraces(visible) {
  const traces = [];
  for (const [members, size] of [[visible.filter((g) => !isLeading(g)), 7], [visible.filter(isLeading), 11]]) {
    for (const set of size === 7 ? [members] : members.map((group) => [group])) {
      if (!set.length) continue;
      const color = colorOf(set[0]);
      const bars = size === 11 ? (measures) => ({ ...reach(measures), color }) : () => undefined;
      traces.push({
        x: set.map((g) => g.kl.mean), y: set.map((g) => g.score.mean), mode: "markers",
        error_x: bars(set.map((g) => g.kl)), error_y: bars(set.map((g) => g.score)),
        marker: { size, color, symbol: symbolOf(set[0]), line: { color: theme().paper, width: 1.5 } },
        hoverinfo: "text", hovertext: set.map(describe), hoverlabel: { bordercolor: color },
      });
    }
  }
  return traces;
}

// The model that all runs begin from.
function startTraces(before) {
  if (!before) return [];
  const color = theme().ink;
  return [{
    x: [before.kl.mean], y: [before.score.mean], mode: "markers", hoverinfo: "text",
    error_x: { ...reach([before.kl]), color }, error_y: { ...reach([before.score]), color },
    marker: { size: 9, color, symbol: "diamond-open", line: { width: 1.5 } },
    hovertext: [`<b>before training</b><br>${interval(before.score)}<br>KL ${interval(before.kl)}`],
  }];
}

// The highest score that any policy can have at a KL, as far as the settings reach.
function limitTraces(limits, most) {
  const dashes = ["solid", "9px,3px", "9px,3px,2px,3px", "2px,3px"];
  return limits.map((limit, place) => {
    const points = limit.points.filter((point) => point.kl <= most);
    return {
      x: points.map((point) => point.kl), y: points.map((point) => point.score), mode: "lines", hoverinfo: "text",
      line: { color: theme().ink, width: 1.8, dash: dashes[place % dashes.length] }, meta: "limit",
      hovertext: points.map((point) => `<b>limit</b>${limit.label ? `<br>${label(limit.label, 60)}` : ""}<br>`
        + `score ${format(point.score)}<br>KL ${format(point.kl)}<br>${format(point.samples, 3)} effective samples a prompt`),
    };
  });
}

// The name of each limit, above its end.
function limitNames(limits, traces) {
  return traces.flatMap((trace, place) => (trace.x.length ? [{
    x: trace.x.at(-1), y: trace.y.at(-1), text: limits[place].label ? `limit: ${label(limits[place].label, 34)}` : "limit",
    showarrow: false, xanchor: "right", yanchor: "bottom", font: { size: 12, color: theme().ink },
  }] : []));
}

function spread(values, share) {
  const numbers = values.filter(isNumber);
  const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
  const pad = (high - low || Math.abs(high) || 1) * share;
  return [low - pad, high + pad];
}

const OFFSETS = [["left", "top"], ["right", "bottom"], ["left", "bottom"], ["right", "top"],
  ["left", "middle"], ["right", "middle"], ["center", "bottom"], ["center", "top"]];

// Labels beside the points, each where it covers neither a point nor another label, nor an error bar
// if that can be; where there is no place there is none, and hovering tells.
function labels(visible, before, ranges, size) {
  const right = (kl) => ((kl - ranges.x[0]) / (ranges.x[1] - ranges.x[0])) * size.width;
  const down = (score) => ((ranges.y[1] - score) / (ranges.y[1] - ranges.y[0])) * size.height;
  const around = (left, last, top, bottom, by) => ({ left: left - by, right: last + by, top: top - by, bottom: bottom + by });
  const spot = (g) => [right(g.kl.mean), down(g.score.mean)];
  const taken = [...visible, ...(before ? [before] : [])].map((g) => around(spot(g)[0], spot(g)[0], spot(g)[1], spot(g)[1], 7));
  const bars = visible.filter(isLeading).flatMap((g) => [
    ...(hasBounds(g.kl) ? [around(right(g.kl.low), right(g.kl.high), spot(g)[1], spot(g)[1], 3)] : []),
    ...(hasBounds(g.score) ? [around(spot(g)[0], spot(g)[0], down(g.score.high), down(g.score.low), 3)] : []),
  ]);
  const inside = (box) => box.left > 0 && box.right < size.width && box.top > 0 && box.bottom < size.height;
  const free = (box, obstacles) => !obstacles.some((other) => box.left < other.right && other.left < box.right
    && box.top < other.bottom && other.top < box.bottom);
  return visible.filter(isLeading).flatMap((group) => {
    const text = cut(shortLabel(group), narrow.matches ? 20 : 34);
    const places = OFFSETS.map((offset) => boxAt(...spot(group), text.length * 6.7, 15, offset)).filter(inside);
    const box = places.find((one) => free(one, [...taken, ...bars])) ?? places.find((one) => free(one, taken));
    if (!box) return [];
    taken.push(box);
    return [{
      x: group.kl.mean, y: group.score.mean, text: escaped(text), showarrow: false, borderpad: 0,
      xanchor: "left", yanchor: "top", xshift: box.left - spot(group)[0], yshift: spot(group)[1] - box.top,
      font: { size: 12, color: theme().ink },
    }];
  });
}

function boxAt(x, y, width, height, [xanchor, yanchor]) {
  const apart = xanchor === "center" ? 11 : 7;
  const left = x + { left: 9, right: -9 - width, center: -width / 2 }[xanchor];
  const top = y + { top: apart, bottom: -apart - height, middle: -height / 2 }[yanchor];
  return { left, right: left + width, top, bottom: top + height };
}

function drawOneFrontier(id, members, before, limits, title) {
  const byPhase = document.querySelector("input[name=frontier]:checked").value === "path";
  const visible = shownGroups(members).filter(onFrontier);
  // The best of n samples is a line of points to choose from, not a history.
  const withPath = visible.filter((group) => byPhase || group.path_axis === "n");
  const points = [...withPath.flatMap((group) => group.path), ...(before ? [{ kl: before.kl.mean, score: before.score.mean }] : [])];
  const gather = (name) => [...members.filter(onFrontier).flatMap((g) => [g[name].mean, g[name].low, g[name].high]),
    ...points.map((point) => point[name])];
  const rangeOfKl = spread(gather("kl"), 0.07);
  const ofLimits = limitTraces(limits, rangeOfKl[1]);
  const ranges = { x: rangeOfKl, y: spread([...gather("score"), ...ofLimits.flatMap((trace) => trace.y)], 0.09) };
  const where = byId(id);
  const size = { width: where.clientWidth - 76, height: where.clientHeight - 62 };
  const best = frontOf(members);
  const frontLine = {
    x: best.map((g) => g.kl.mean), y: best.map((g) => g.score.mean), mode: "lines", hoverinfo: "skip",
    line: { shape: "hv", color: theme().muted, width: 1.3, dash: "4px,4px" },
  };
  draw(where, [frontLine, ...ofLimits, ...pathTraces(withPath), ...startTraces(before), ...pointTraces(visible)], {
    margin: { l: 62, r: 14, t: 12, b: 50 }, uirevision: byPhase ? "path" : "final",
    xaxis: axis({ title: `KL to the reference, ${klUnit}`, range: ranges.x, automargin: false }),
    yaxis: axis({ title: escaped(title), range: ranges.y, automargin: false }),
    annotations: [...labels(visible, before, ranges, size), ...limitNames(limits, ofLimits)],
  });
}

function drawFrontier() {
  if (data.groups.some(onFrontier)) drawOneFrontier("frontier-figure", data.groups, data.before, data.limits, `score (${data.score})`);
  if (trueGroups.some(onFrontier)) {
    drawOneFrontier("true-frontier-figure", trueGroups, data.true_reward.before, data.true_reward.limits,
      `true reward (${data.true_reward.score})`);
  }
}

// ---- Curves

// Several lines as one trace: far fewer elements, with a gap between lines.
function joined(lines, more) {
  const trace = { x: [], y: [], customdata: [], mode: "lines", ...more };
  for (const line of lines) {
    trace.x.push(...line.x, null);
    trace.y.push(...line.y, null);
    trace.customdata.push(...line.x.map(() => line.label), null);
  }
  return { ...trace, hovertemplate: `<b>%{customdata}</b><br>${shown.axis} %{x}<br>%{y:.4~g}<extra></extra>` };
}

function bandTrace(x, measure, color) {
  const kept = x.map((_, place) => place).filter((place) => isNumber(x[place]) && isNumber(measure.low?.[place]) && isNumber(measure.high?.[place]));
  const back = [...kept].reverse();
  return {
    x: [...kept, ...back].map((place) => x[place]), mode: "lines", fill: "toself", hoverinfo: "skip",
    y: [...kept.map((place) => measure.high[place]), ...back.map((place) => measure.low[place])],
    line: { width: 0 }, fillcolor: transparent(color, dark.matches ? 0.22 : 0.16),
  };
}

function meanTrace(group, x, measure) {
  const ends = x.map((_, place) => bounds({ low: measure.low?.[place], high: measure.high?.[place] }));
  const color = colorOf(group);
  return {
    x, y: measure.mean, customdata: ends, mode: x.length > 40 ? "lines" : "lines+markers",
    line: { color, width: 2 }, marker: { size: 5, symbol: symbolOf(group) }, hoverlabel: { bordercolor: color },
    hovertemplate: `<b>${label(groupLabel(group), 60)}</b><br>${shown.axis} %{x}<br>%{y:.4~g}%{customdata}<extra></extra>`,
  };
}

function runLines(group, kind, metric) {
  return group.runs.map((id) => runs.get(id))
    .filter((run) => shown.seeds.has(seedOf(run)) && run.curves?.[kind]?.[metric] && run.curves[kind][shown.axis])
    .map((run) => ({ x: run.curves[kind][shown.axis], y: run.curves[kind][metric], label: label(run.name, 60) }));
}

function curveTraces(kind, metric) {
  const present = shownGroups().filter((group) => group.curves?.[kind]?.[metric] && group.curves[kind][shown.axis]);
  const curve = (group) => ({ x: group.curves[kind][shown.axis], measure: group.curves[kind][metric] });
  const others = present.filter((group) => !isLeading(group));
  const first = present.filter(isLeading);
  const faint = { color: theme().faint, width: 1 };
  return [
    joined(others.map((g) => ({ x: curve(g).x, y: curve(g).measure.mean, label: label(groupLabel(g), 60) })),
      { line: faint, opacity: 0.55 }),
    joined(others.flatMap((g) => runLines(g, kind, metric)), { line: { ...faint, dash: "dot" }, opacity: 0.4 }),
    ...first.map((group) => bandTrace(curve(group).x, curve(group).measure, colorOf(group))),
    ...first.map((group) => joined(runLines(group, kind, metric),
      { line: { color: colorOf(group), width: 1, dash: "dot" }, opacity: 0.75, meta: "seed" })),
    ...first.map((group) => meanTrace(group, curve(group).x, curve(group).measure)),
  ].filter((trace) => trace.x.length);
}

// Plotly would draw a constant 1e-3 between -1 and 1.
function rangeOfConstant(traces) {
  const values = unique(traces.flatMap((trace) => trace.y).filter(isNumber));
  return values.length === 1 ? spread(values, 0.5) : undefined;
}

function drawCurves() {
  for (const panel of document.querySelectorAll(".curve-panel")) {
    const [kind, metric] = JSON.parse(panel.querySelector("select").value);
    const traces = curveTraces(kind, metric);
    draw(panel.querySelector(".figure"), traces, {
      uirevision: `${metric} ${shown.axis}`, xaxis: axis({ title: AXES[shown.axis] }), yaxis: axis({ range: rangeOfConstant(traces) }),
    });
  }
}
