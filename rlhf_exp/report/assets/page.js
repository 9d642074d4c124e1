// Puts the page together: what to decide first, then the figures, the tables and what to mind.
"use strict";

const METRICS = [
  [data.score, "objective/scores", "heldout/loss", "train/loss"],
  [data.kl, "objective/kl", "heldout/accuracy", "train/loss"],
];

function drawCounts() {
  tell("made", `Made ${data.made}`);
  const counts = unique(data.runs.map((run) => run.status))
    .map((status) => `${data.runs.filter((run) => run.status === status).length} ${status}`);
  tell("counts", data.runs.length
    ? `${plural(data.runs.length, "run")} of ${plural(data.groups.length, "setting")}, ${plural(seeds.length, "seed")}: ${counts.join(", ")}`
    : "No run was found.");
  tell("sources", `From ${data.sources.join(", ")}`);
}

// ---- What to decide

const at = (group) => `${format(group.score.mean, 3)} at ${format(group.kl.mean, 3)} ${klUnit}`;
const measureCell = (measure) => element("span", {}, format(measure.mean, 3), element("span", { className: "interval", textContent: bounds(measure) }));
const markOf = (group) => element("span", { className: "mark", textContent: MARKS[leading.get(group.id)] ?? "●",
  data: { group: group.id }, aria: { hidden: true } });

function lowestLoss() {
  const last = (group) => {
    const found = ["eval", "train"].map((kind) => group.curves?.[kind]?.["heldout/loss"]?.mean).find(Boolean);
    return found?.filter(isNumber).at(-1);
  };
  const measured = data.groups.filter((group) => isNumber(last(group))).sort((a, b) => last(a) - last(b));
  return measured.length
    ? `Lowest held-out loss: ${groupLabel(measured[0])}, ${format(last(measured[0]))}.`
    : "";
}

function headline() {
  if (front.length && data.groups.length === 1) {
    const [only] = front;
    const intervals = hasBounds(only.score) ? `, in brackets ${INTERVALS}` : "";
    return `Score ${interval(only.score)} at ${interval(only.kl)} ${klUnit}, ${plural(only.runs.length, "run")}${intervals}.`;
  }
  if (front.length === 1) return `Best trade-off: ${groupLabel(front[0])} scores ${at(front[0])}.`;
  if (front.length) {
    const best = front.at(-1);
    return `Best trade-offs: ${groupLabel(best)} scores highest, ${at(best)}; `
      + `${groupLabel(front[0])} stays closest to the reference, ${at(front[0])}.`;
  }
  const best = data.groups.filter(hasScore).sort((a, b) => b.score.mean - a.score.mean)[0];
  if (best) return `Highest score: ${groupLabel(best)}, ${interval(best.score)}${hasBounds(best.score) ? ` (${INTERVALS})` : ""}. These runs report no KL.`;
  if (lowestLoss()) return lowestLoss();
  const state = finished.length ? "" : data.runs.length ? " No run has finished." : "";
  return `There is no ${data.score} to compare yet.${state}`;
}

function drawHeadline() {
  tell("headline", headline());
  if (front.length && data.groups.length > 1) {
    const listed = [...ofFront].reverse();
    const withIqm = listed.some((group) => group.iqm);
    const heads = ["Best trade-offs", "score", `KL, ${klUnit}`, "runs", ...(withIqm ? ["IQM"] : []), ...(data.true_reward ? ["true reward"] : [])];
    byId("best").append(table(heads, listed.map((group) => [element("span", {}, markOf(group), ` ${groupLabel(group)}`),
      measureCell(group.score), measureCell(group.kl), group.runs.length,
      ...(withIqm ? [group.iqm ? measureCell(group.iqm) : null] : []),
      ...(data.true_reward ? [measureCell(group.true_reward.score)] : [])])));
    const intervals = front.some((group) => hasBounds(group.score))
      ? `Means over seeds, in brackets ${INTERVALS}.` : "One seed each: without intervals, a difference may be chance.";
    const iqm = withIqm ? ` IQM: interquartile mean of the score, in brackets ${BOOTSTRAP}.` : "";
    const left = front.length - listed.length;
    const more = left ? ` ${left} more between them ${left === 1 ? "is" : "are"} in the figure.` : "";
    tell("best-note", `No other setting has both a higher score and a lower KL than one of these. ${intervals}${iqm}${more}`);
  }
  const unfinished = data.runs.length - finished.length;
  if (unfinished && front.length) {
    byId("headline").append(` ${plural(unfinished, "run")} ${unfinished === 1 ? "has" : "have"} not finished.`);
  }
}

// ---- Figures and their controls

function redraw() {
  drawFrontier();
  drawCurves();
  if (byId("parallel-figure")) drawParallel(byId("parallel-figure"));
  for (const where of document.querySelectorAll(".multiple")) drawMultiple(where, where.dataset.key);
  for (const mark of document.querySelectorAll(".mark")) {
    mark.style.color = colorOf(groups.get(Number(mark.dataset.group)));
  }
}

function toggle(button, change) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", on);
    change(on);
    redraw();
  });
  return button;
}

function legendButton(group) {
  const button = element("button", { type: "button", title: groupLabel(group), aria: { pressed: true }, data: { group: group.id } },
    markOf(group), cut(shortLabel(group), 60));
  return toggle(button, (on) => shown.hiddenGroups[on ? "delete" : "add"](group.id));
}

function drawLegend() {
  const others = data.groups.length - leading.size;
  const drawsNothing = !scored.length && !Object.values(data.metrics).flat().length;
  if (data.groups.length < 2 || drawsNothing) return hide("legend");
  if (compact) byId("legend").append(element("span", { className: "muted", textContent: data.parameters.map(nameOf).join(" · ") }));
  byId("legend").append(...data.groups.filter(isLeading).map(legendButton));
  if (!others) return;
  const button = element("button", { type: "button", aria: { pressed: true }, textContent: `${others} others, gray` });
  byId("legend").append(toggle(button, (on) => {
    shown.others = on;
  }));
}

function drawSeeds() {
  if (seeds.length < 2) return hide("seeds");
  const all = seeds.length > 16;
  const box = (text, members) => {
    const input = element("input", { type: "checkbox", data: { seed: text } });
    input.addEventListener("change", () => {
      for (const seed of members) shown.seeds[input.checked ? "add" : "delete"](seed);
      drawCurves();
    });
    return element("label", {}, input, text);
  };
  byId("seeds").append(element("span", { className: "muted", textContent: "Single seeds" }),
    ...(all ? [box("all", seeds)] : seeds.map((seed) => box(seed, [seed]))));
}

function drawAxes() {
  const costs = Object.keys(AXES).filter((name) => data.groups.some((group) => group.curves?.train?.[name] ?? group.curves?.eval?.[name]));
  if (costs.length < 2) return hide("axes");
  byId("axes").append(element("legend", { className: "hidden", textContent: "What the curves are drawn over" }),
    ...costs.map((name) => {
      const input = element("input", { type: "radio", name: "axis", value: name, checked: name === shown.axis });
      input.addEventListener("change", () => {
        shown.axis = name;
        drawCurves();
        drawCurvesNote();
      });
      return element("label", {}, input, element("span", { textContent: name }));
    }));
}

function drawCurvesNote() {
  const several = data.groups.some((group) => group.runs.length > 1);
  const lines = several ? `Lines: means over seeds; bands: ${INTERVALS}; dotted: single seeds.` : "One run of each setting.";
  const place = shown.axis !== "phase" && several ? ` The ${shown.axis} of a line are means over seeds too.` : "";
  const without = data.groups.filter((group) => !["train", "eval"].some((kind) => group.curves?.[kind]?.[shown.axis]));
  const left = without.length ? ` Not drawn, since their ${shown.axis} are not known: ${without.map(groupLabel).join(", ")}.` : "";
  tell("curves-note", lines + place + left);
}

// Whether a metric has more than one phase, which a curve takes.
function isLine(choice) {
  const [kind, metric] = JSON.parse(choice);
  return data.groups.some((group) => group.curves?.[kind]?.[metric]?.mean.filter(isNumber).length > 1);
}

function curvePanel(metrics, preferred, taken) {
  const choices = metrics.map(([kind, metric]) => JSON.stringify([kind, metric]));
  const left = choices.filter((choice) => !taken.includes(choice));
  const wanted = preferred.flatMap((name) => left.filter((choice) => JSON.parse(choice)[1] === name));
  const first = wanted.find(isLine) ?? left.find(isLine) ?? left[0];
  if (!first) return null;
  taken.push(first);
  const select = element("select", { onchange: drawCurves, aria: { label: "Metric" } });
  for (const [kind, title] of [["eval", "Evaluations"], ["train", "Training"]]) {
    const options = metrics.filter(([of]) => of === kind).map(([of, metric]) => {
      const value = JSON.stringify([of, metric]);
      return element("option", { value, textContent: metric, selected: value === first });
    });
    if (options.length) select.append(element("optgroup", { label: title }, ...options));
  }
  const figure = element("div", { className: "figure" });
  return element("div", { className: "curve-panel" }, element("label", { className: "panel-title" }, select), figure);
}

function drawCurvePanels() {
  const metrics = ["eval", "train"].flatMap((kind) => (data.metrics[kind] ?? []).map((metric) => [kind, metric]));
  if (!metrics.length) return hide("curves");
  const taken = [];
  byId("curve-panels").append(...METRICS.map((preferred) => curvePanel(metrics, preferred, taken)).filter(Boolean));
  drawCurvesNote();
}

function drawParameterPanels() {
  if (!data.parameters.length) return hide("parameters");
  if (!scored.length) {
    tell("parameters-note", `Hyperparameters are set against ${data.score}, which no run has.`);
  } else {
    if (data.parameters.length > 1) {
      const figure = element("div", { className: "figure", id: "parallel-figure" });
      figure.style.minWidth = `${(drawn.length + 1) * 6.5}rem`;
      byId("parallel").append(element("h3", { textContent: "All at once: a line for each setting" }),
        element("div", { className: "scroll" }, figure));
      byId("multiples").before(element("h3", { textContent: "Score against each" }));
    }
    // One figure, or two, use the whole width.
    if (drawn.length < 3) byId("multiples").className = "pair";
    byId("multiples").append(...drawn.map((key) => element("div", { className: "figure short multiple", data: { key } })));
    const left = data.parameters.length - drawn.length;
    tell("parameters-note", (scored.some((group) => hasBounds(group.score))
      ? `Large marks: final scores, means over seeds; bars: ${INTERVALS}; rings: single runs.` : "Final scores of single runs.")
      + (left > 0 ? ` The ${drawn.length} most important of ${data.parameters.length} are drawn.` : ""));
  }
  drawImportance();
}

function bars(title, entries) {
  if (!entries.length) return null;
  const cells = entries.flatMap(([name, share]) => {
    const fill = element("i");
    fill.style.width = `${100 * share}%`;
    return [element("div", { className: "name", textContent: name }), element("div", { className: "bar", aria: { hidden: true } }, fill),
      element("div", { className: "value", textContent: `${(100 * share).toFixed(1)} %` })];
  });
  return titled(title, element("div", { className: "bars" }, ...cells));
}

function drawImportance() {
  const single = (data.importance ?? []).map(({ parameter, share }) => [nameOf(parameter), share]);
  const pairs = (data.interactions ?? []).map(({ parameters, share }) => [parameters.map(nameOf).join(" × "), share]);
  byId("importance").append(...[bars("Importance", single), bars("Interactions", pairs.slice(0, 10))].filter(Boolean));
  tell("importance-note", data.importance_note ?? "");
}

// ---- What to mind

function drawWarnings() {
  const entries = data.runs.flatMap((run) => [
    ...(run.error ? [[run, `${run.status}: ${run.error}`, "failed"]] : []),
    ...run.warnings.map((warning) => [run, warning, ""]),
  ]);
  if (!entries.length) return hide("warnings");
  byId("warnings").querySelector("h2").textContent = `Warnings (${entries.length})`;
  const items = entries.map(([run, text, className]) =>
    element("li", { className }, element("b", { textContent: `${run.name}: ` }), cut(text, 600)));
  byId("warning-list").append(element("ul", { className: entries.length > 12 ? "messages many" : "messages" }, ...items));
  return null;
}

function drawProblems() {
  if (!data.problems.length) return hide("problems");
  byId("problem-list").append(...data.problems.map((text) => element("li", { textContent: text })));
  return null;
}

function drawContents() {
  for (const section of document.querySelectorAll("main section:not([hidden])")) {
    byId("contents").append(element("a", { href: `#${section.id}`, textContent: section.querySelector("h2").textContent }));
  }
}

function drawFrontierText() {
  if (data.groups.some(onFrontier)) {
    const bars = data.groups.some((group) => hasBounds(group.score)) ? `bars: ${INTERVALS}; ` : "";
    const start = data.before ? "open diamond: the model before training; " : "";
    const limit = data.limits.length || data.true_reward?.limits.length
      ? "solid line without marks: the limit, the best score that any policy has at a KL, from samples of the model before training; " : "";
    if (!trueGroups.some(onFrontier)) hide("true-frontier");
    tell("frontier-note", `Marks: each setting at its end, the mean over seeds; ${bars}${start}${limit}dashed: the best score that these settings `
      + "reach within a KL (Pareto front). Hover for hyperparameters, seeds and numbers.");
    return;
  }
  for (const id of ["frontier-controls", "frontier-figure", "true-frontier"]) hide(id);
  tell("frontier-note", `There is no frontier: no run has both ${data.score} and ${data.kl ?? "a KL"}.`);
}

function pickFirst() {
  const best = (group) => group?.runs.map((id) => runs.get(id)).sort((a, b) => (b.final.score ?? -Infinity) - (a.final.score ?? -Infinity))[0];
  const first = front.length ? [best(front.at(-1)), front.length > 1 ? best(front[0]) : null] : [data.runs[0]];
  picked.push(...first.filter(Boolean).map((run) => run.id));
}

drawCounts();
drawHeadline();
drawFrontierText();
drawLegend();
drawSeeds();
drawAxes();
drawBetween();
drawCurvePanels();
drawParameterPanels();
drawTable();
pickFirst();
drawComparison();
drawWarnings();
drawProblems();
drawSettings();
if (!data.runs.length) for (const id of ["runs", "compare", "frontier"]) hide(id);
if (data.runs.length === 1) byId("compare").querySelector("h2").textContent = "The run";
drawContents();
redraw();
dark.addEventListener("change", redraw);
narrow.addEventListener("change", redraw);
for (const radio of document.querySelectorAll("input[name=frontier]")) radio.addEventListener("change", drawFrontier);
let resized = 0;
window.addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(drawFrontier, 150);
});
