// What the other scripts share: the payload, ways to make elements and text, colors, and which
// groups and seeds are shown. Text of models and settings reaches the page as text alone.
"use strict";

const data = JSON.parse(document.getElementById("payload").textContent);
const byId = (id) => document.getElementById(id);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const narrow = window.matchMedia("(max-width: 640px)");
const coarse = window.matchMedia("(pointer: coarse)");

// Okabe and Ito's colors, told apart by people with any color vision; lighter on dark ground.
// Without their yellow, which cannot be seen on white.
const COLORS = {
  light: ["#0072b2", "#d55e00", "#009e73", "#b5559a", "#b98100", "#3a9bd9", "#5b4fa2", "#7a5c3e"],
  dark: ["#56a8e0", "#f08a4b", "#35c79b", "#e08fc4", "#e9b949", "#8fd0ff", "#a99bf0", "#c6a583"],
};
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "star", "cross", "x"];
// As text, which some systems would draw as emoji.
const MARKS = ["●", "■", "◆", "▲", "▼", "★", "✚", "✖"].map((mark) => `${mark}\ufe0e`);
const shown = { hiddenGroups: new Set(), seeds: new Set(), others: true, axis: "phase" };
// The x axes of curves. A setting that does not know a cost is not drawn over it.
const AXES = {
  phase: "phase", completions: "completions sampled for training", tokens: "tokens sampled for training",
  seconds: "seconds of training, without evaluations",
};

function element(tag, properties = {}, ...children) {
  const { data: dataset = {}, aria = {}, ...rest } = properties;
  const made = Object.assign(document.createElement(tag), rest);
  Object.assign(made.dataset, dataset);
  for (const [name, value] of Object.entries(aria)) made.setAttribute(`aria-${name}`, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const known = (value) => value !== null && value !== undefined;
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const unique = (values) => [...new Set(values)];
const short = (key) => key.split(".").slice(-1)[0];

// Four digits at most, as the payload has; a true minus sign.
function format(value, digits = 4) {
  if (!known(value)) return "–";
  if (typeof value === "boolean") return String(value);
  if (!isNumber(value)) return typeof value === "object" ? JSON.stringify(value) : String(value);
  const size = Math.abs(value);
  const text =
    size !== 0 && (size < 1e-3 || size >= 1e6)
      ? value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e")
      : String(Number(value.toPrecision(digits)));
  return text.replace("-", "−");
}

const hasBounds = (measure) => isNumber(measure?.low) && isNumber(measure?.high);
const bounds = (measure) => (hasBounds(measure) ? ` [${format(measure.low, 3)}, ${format(measure.high, 3)}]` : "");
const INTERVALS = "95 % t-intervals of the mean";
const BOOTSTRAP = "95 % percentile intervals of a bootstrap over seeds";
const interval = (measure) => format(measure?.mean, 3) + bounds(measure);

// Names of hyperparameters that no other one ends with are shown without their path.
const names = new Map(
  data.parameters.map((key) => {
    const alone = data.parameters.filter((other) => short(other) === short(key)).length === 1;
    return [key, alone ? short(key) : key];
  }),
);
const nameOf = (key) => names.get(key) ?? key;

// Plotly reads a few tags, entities and %{...} in its texts.
const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", "%": "&#37;" };
const escaped = (text) => String(text).replace(/[&<>%]/g, (character) => ESCAPES[character]);
const cut = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
const label = (text, length = 40) => escaped(cut(String(text), length));

const groupOf = (run) => groups.get(run.group);
const withoutTails = (text) => text.replace(/\d+\.\d{4,}(e[+-]?\d+)?/g, (digits) => format(Number(digits)));
const groupLabel = (group) => withoutTails(group.label) || (data.groups.length === 1 ? "all runs" : `setting ${group.id}`);
// Where names and values are too long for a figure, the values alone.
const compact = data.groups.some((group) => groupLabel(group).length > 24 && data.parameters.length > 1);
const shortLabel = (group) => (compact
  ? data.parameters.map((key) => cut(format(group.parameters[key]), 14)).join(" · ")
  : groupLabel(group));
const groups = new Map(data.groups.map((group) => [group.id, group]));
const runs = new Map(data.runs.map((run) => [run.id, run]));
const hasScore = (group) => isNumber(group.score?.mean);
const onFrontier = (group) => hasScore(group) && isNumber(group.kl?.mean);
const frontOf = (members) => members.filter((g) => g.pareto && onFrontier(g)).sort((a, b) => a.kl.mean - b.kl.mean);
const front = frontOf(data.groups);
// The groups with the true reward in place of the score.
const trueGroups = data.true_reward ? data.groups.map((group) => ({ ...group, ...group.true_reward, measure: "true reward" })) : [];
const finished = data.runs.filter((run) => run.status === "done");
const seedOf = (run) => (known(run.seed) ? String(run.seed) : "none");
const seeds = unique(data.runs.map(seedOf)).sort((a, b) => Number(a) - Number(b));
const klUnit = String(data.kl ?? "").endsWith("_sum") ? "nats a completion" : "nats a token";

// Of a long front some, from end to end.
const steps = Math.min(front.length, SYMBOLS.length);
const ofFront = Array.from({ length: steps }, (_, step) =>
  front[steps > 1 ? Math.round((step * (front.length - 1)) / (steps - 1)) : 0]);

// The groups with a color of their own: those of the front first, then by score. The colors go by
// id, so that neighbors in a sweep keep their order.
const leading = new Map(
  [...data.groups]
    .sort((a, b) => Number(ofFront.includes(b)) - Number(ofFront.includes(a))
      || (b.score?.mean ?? -Infinity) - (a.score?.mean ?? -Infinity))
    .slice(0, SYMBOLS.length)
    .sort((a, b) => a.id - b.id)
    .map((group, place) => [group.id, place]),
);
const isLeading = (group) => leading.has(group.id);
const colorOf = (group) =>
  isLeading(group) ? COLORS[dark.matches ? "dark" : "light"][leading.get(group.id)] : theme().faint;
const symbolOf = (group) => (isLeading(group) ? SYMBOLS[leading.get(group.id)] : "circle");
const isShown = (group) =>
  isLeading(group) ? !shown.hiddenGroups.has(group.id) : shown.others;
// Colored ones last, so that gray ones do not cover them.
const shownGroups = (members = data.groups) =>
  [...members].sort((a, b) => Number(isLeading(a)) - Number(isLeading(b))).filter(isShown);

function theme() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    paper: read("paper"), ink: read("ink"), muted: read("muted"), line: read("line"),
    faint: read("faint"), accent: read("accent"), font: read("font"),
  };
}

function transparent(hex, opacity) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return `rgba(${red},${green},${blue},${opacity})`;
}

const hide = (id) => {
  byId(id).hidden = true;
};
const tell = (id, text) => {
  byId(id).textContent = text;
  byId(id).hidden = !text;
};
