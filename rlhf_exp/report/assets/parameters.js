// Hyperparameters against the score, and how much each of them matters.
"use strict";

const MOST_PARAMETERS = 8;
const scored = data.groups.filter(hasScore);
const shares = new Map((data.importance ?? []).map(({ parameter, share }) => [parameter, share]));
// The most important first, where importance is known.
const drawn = [...data.parameters]
  .sort((a, b) => (shares.get(b) ?? -1) - (shares.get(a) ?? -1))
  .slice(0, MOST_PARAMETERS);

// A scale says where values lie between 0 and 1 along an axis, and what the axis says. The few
// values of a grid lie each in the middle of its own part of the axis; many numbers lie where they are, or where their logarithms
// are if they span decades.
function scale(values) {
  return values.every(isNumber) && unique(values).length > 8 ? continuous(values) : even(values);
}

function even(values) {
  const numeric = values.every(isNumber);
  const read = (value) => (numeric ? value : format(value));
  const distinct = unique(values.map(read))
    .sort((a, b) => (numeric ? a - b : a.localeCompare(b, undefined, { numeric: true })));
  const place = new Map(distinct.map((value, index) => [value, (index + 0.5) / distinct.length]));
  const step = Math.ceil(distinct.length / 12);
  return {
    even: true,
    position: (value) => place.get(read(value)),
    ticks: distinct.filter((_, index) => index % step === 0)
      .map((value) => ({ at: place.get(value), text: format(value) })),
  };
}

function continuous(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const [to, from] = low > 0 && high / low >= 20 ? [Math.log, Math.exp] : [Number, Number];
  const width = to(high) - to(low);
  const steps = width ? [0, 0.25, 0.5, 0.75, 1] : [0.5];
  return {
    position: (value) => (width ? (to(value) - to(low)) / width : 0.5),
    ticks: steps.map((at) => ({ at, text: format(Number(from(to(low) + at * width).toPrecision(3))) })),
  };
}

// Settings that share one of a few values lie beside each other around it, in the order given, over
// so much of its part of the axis.
function apart(ordered, along, of, width) {
  const positions = unique(ordered.map((group) => along.position(of(group))));
  const room = along.even ? width / positions.length : 0;
  const places = new Map();
  for (const at of positions) {
    const members = ordered.filter((group) => along.position(of(group)) === at);
    members.forEach((group, index) => places.set(group.id, at + (members.length > 1 ? (index / (members.length - 1) - 0.5) * room : 0)));
  }
  return (group) => places.get(group.id);
}

function meanMarks(set, at, withBars) {
  return {
    x: set.map(at), y: set.map((g) => g.score.mean), mode: "markers", hoverinfo: "text", hovertext: set.map(describe),
    hoverlabel: { bordercolor: set.map(colorOf) },
    error_y: withBars ? { ...reach(set.map((g) => g.score)), color: theme().faint } : undefined,
    marker: { size: set.map((g) => (isLeading(g) ? 10 : 6)), color: set.map(colorOf), symbol: set.map(symbolOf),
      opacity: 1, line: { color: theme().paper, width: 1 } },
  };
}

function drawMultiple(where, key) {
  const along = scale(scored.map((group) => group.parameters[key]));
  const at = apart(scored, along, (group) => group.parameters[key], 0.6);
  const margin = along.even ? 0 : 0.08;
  const visible = shownGroups().filter(hasScore);
  const few = scored.length <= 24;
  const single = (few ? visible : visible.filter(isLeading)).flatMap((group) => group.runs.map((id) => runs.get(id))
    .filter((run) => isNumber(run.final.score))
    .map((run) => ({ x: at(group), y: run.final.score, text: label(run.name, 60), color: colorOf(group) })));
  const pick = (name) => single.map((point) => point[name]);
  const rings = {
    x: pick("x"), y: pick("y"), mode: "markers", hoverinfo: "text", opacity: 0.55,
    hovertext: single.map((point) => `<b>${point.text}</b><br>score ${format(point.y)}`),
    marker: { size: 5, color: pick("color"), symbol: "circle-open" },
  };
  const others = meanMarks(visible.filter((g) => !isLeading(g)), at, few);
  draw(where, [others, rings, meanMarks(visible.filter(isLeading), at, true)], {
    margin: { l: 52, r: 10, t: 8, b: 42 },
    xaxis: axis({ title: label(nameOf(key)), range: [-margin, 1 + margin], tickmode: "array", showgrid: false,
      ticklabeloverflow: "allow",
      tickvals: along.ticks.map((tick) => tick.at), ticktext: along.ticks.map((tick) => label(tick.text, 14)) }),
    yaxis: axis({ nticks: 5, title: "score" }),
  });
}

function mix(from, to, share) {
  const part = (hex, at) => parseInt(hex.slice(at, at + 2), 16);
  const blend = [1, 3, 5].map((at) => Math.round(part(from, at) * (1 - share) + part(to, at) * share));
  return `rgb(${blend.join(",")})`;
}

// Lines in the groups' colors while each has one; otherwise the higher its rank, the bluer.
function drawParallel(where) {
  const ranked = [...scored].sort((a, b) => a.score.mean - b.score.mean);
  const columns = [
    ...drawn.map((key) => ({ title: nameOf(key), of: (group) => group.parameters[key] })),
    { title: "score", of: (group) => group.score.mean },
  ].map((column) => {
    const along = (column.title === "score" ? continuous : scale)(scored.map(column.of));
    return { ...column, along, at: apart(ranked, along, column.of, 0.4) };
  });
  const colored = scored.length <= SYMBOLS.length;
  const traces = ranked.filter(isShown).map((group) => {
    const height = (ranked.indexOf(group) / Math.max(ranked.length - 1, 1)) ** 2;
    const color = colored ? colorOf(group) : mix(theme().faint, theme().accent, height);
    return {
      x: columns.map((_, index) => index), y: columns.map((column) => column.at(group)),
      mode: "lines+markers", line: { color, width: colored ? 2 : 1 + height },
      marker: { size: colored ? 5 : 3, color }, opacity: colored ? 0.9 : 0.35 + 0.6 * height,
      hoverinfo: "text", hovertext: columns.map(() => describe(group)), hoverlabel: { bordercolor: color },
    };
  });
  const colors = theme();
  draw(where, traces, {
    margin: { l: 30, r: 70, t: 44, b: 16 },
    xaxis: { side: "top", range: [-0.15, columns.length - 0.9], showgrid: false, zeroline: false, fixedrange: true, ticks: "",
      tickvals: columns.map((_, index) => index), ticktext: columns.map((column) => `<b>${label(column.title, 22)}</b>`), tickangle: 0 },
    yaxis: { visible: false, range: [-0.04, 1.04], fixedrange: true },
    shapes: columns.map((_, x) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, layer: "below", line: { color: colors.faint, width: 1 } })),
    annotations: columns.flatMap((column, x) => column.along.ticks.map((tick) => ({
      x, y: tick.at, text: label(tick.text, narrow.matches ? 12 : 18), showarrow: false, xanchor: "left", xshift: 6, borderpad: 1,
      bgcolor: transparent(colors.paper, 0.8), font: { size: 11, color: colors.ink },
    }))),
  });
}
