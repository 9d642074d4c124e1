// The table of runs, the comparison of two of them, and the configuration.
"use strict";

const FINAL = [["score", "score"], ["best_score", "best"], ["kl", "KL"], ["efficiency", "efficiency"], ["entropy", "entropy"],
  ["distinct_3", "distinct 3"], ["seconds", "seconds"]];
const picked = [];
const order = { column: null, descending: false };
const boxes = new Map();

const columns = [
  { title: "run", text: true, of: (run) => run.name, length: 34 },
  { title: "status", of: (run) => run.status, text: true },
  { title: "seed", of: (run) => run.seed },
  ...data.parameters.map((key) => ({ title: nameOf(key), of: (run) => run.parameters[key], hint: key })),
  // A column that no run fills says nothing.
  ...FINAL.filter(([key]) => data.runs.some((run) => known(run.final[key])))
    .map(([key, title]) => ({ title, of: (run) => run.final[key] })),
  { title: "phases", of: (run) => run.phases },
  { title: "warnings", of: (run) => run.warnings.length },
];

// Numbers before texts, nothing last in either direction.
function compare(a, b, descending) {
  if (!known(a) || !known(b)) return Number(!known(a)) - Number(!known(b));
  const sign = descending ? -1 : 1;
  if (isNumber(a) && isNumber(b)) return sign * (a - b);
  if (isNumber(a) !== isNumber(b)) return sign * (isNumber(a) ? -1 : 1);
  return sign * format(a).localeCompare(format(b), undefined, { numeric: true });
}

function rowOf(run) {
  const box = element("input", { type: "checkbox", aria: { label: `Compare ${run.name}` }, onchange: () => pick(run.id, box.checked) });
  boxes.set(run.id, box);
  const cells = columns.map((column) => {
    const cell = element("td", { textContent: cut(format(column.of(run)), column.length ?? 40), className: column.text ? "text" : "" });
    if (column.title === "status") cell.classList.add(`status-${run.status}`);
    if (column.title === "run") Object.assign(cell, { title: `${run.name}\n${run.folder}` });
    return cell;
  });
  const made = element("tr", { data: { run: run.id } }, element("td", {}, box), ...cells);
  const words = [run.name, run.status, `seed=${run.seed}`, run.error ?? "",
    ...Object.entries(run.parameters).map(([key, value]) => `${key}=${format(value)}`)];
  return { run, made, words: words.join(" ").toLowerCase() };
}

const rows = data.runs.map(rowOf);
const body = element("tbody");

function drawRows() {
  const wanted = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const status = byId("status").value;
  const kept = rows.filter(({ run, words }) =>
    wanted.every((word) => words.includes(word)) && (!status || run.status === status));
  if (order.column) kept.sort((a, b) => compare(order.column.of(a.run), order.column.of(b.run), order.descending));
  body.replaceChildren(...kept.map((row) => row.made));
  tell("shown", `${kept.length} of ${plural(rows.length, "run")}`);
}

function sortBy(column, head) {
  order.descending = order.column === column && !order.descending;
  order.column = column;
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order.descending ? "descending" : "ascending");
  drawRows();
}

function drawTable() {
  const heads = columns.map((column) => {
    const head = element("th", { scope: "col", className: column.text ? "text" : "", title: column.hint ?? "" });
    head.append(element("button", { type: "button", textContent: column.title, onclick: () => sortBy(column, head) }));
    return head;
  });
  const first = element("th", { scope: "col" }, element("span", { className: "hidden", textContent: "compare" }));
  byId("table").append(element("table", {}, element("thead", {}, element("tr", {}, first, ...heads)), body));
  const statuses = unique(data.runs.map((run) => run.status));
  byId("status").append(element("option", { value: "", textContent: "any" }),
    ...statuses.map((status) => element("option", { value: status, textContent: status })));
  byId("filter").addEventListener("input", drawRows);
  byId("status").addEventListener("change", drawRows);
  drawRows();
}

// ---- Two runs side by side

function pick(id, wanted) {
  const place = picked.indexOf(id);
  if (place >= 0) picked.splice(place, 1);
  if (wanted) picked.push(id);
  if (picked.length > 2) picked.shift();
  drawComparison();
}

function table(heads, body) {
  const cells = (row) => row.map((value, index) => element(index ? "td" : "th",
    { className: index ? "wide" : "text wide", scope: index ? "" : "row" }, value instanceof Node ? value : format(value)));
  const head = heads.map((text, index) => element("th", { textContent: text, scope: "col", className: index ? "wide" : "text" }));
  return element("div", { className: "scroll" }, element("table", {},
    element("thead", {}, element("tr", {}, ...head)),
    element("tbody", {}, ...body.map((row) => element("tr", {}, ...cells(row))))));
}

function titled(title, ...content) {
  return element("div", {}, element("h3", { textContent: title }), ...content);
}

const chosen = () => picked.map((id) => runs.get(id));
const letters = ["A", "B"];

function chooser(index) {
  const select = element("select", { onchange: () => {
    if (select.value === "") picked.splice(index, 1);
    else if (!picked.includes(Number(select.value))) picked[Math.min(index, picked.length)] = Number(select.value);
    drawComparison();
    byId(`pick-${index}`).focus();
  } });
  select.id = `pick-${index}`;
  select.append(element("option", { value: "", textContent: "none" }),
    ...data.runs.map((run) => element("option", { value: run.id, textContent: run.name, selected: picked[index] === run.id })));
  return element("label", {}, element("span", { className: "key", textContent: letters[index] }), select);
}

function metricsTable(two) {
  const rows = FINAL.filter(([key]) => two.some((run) => known(run.final[key]))).map(([key, title]) => {
    const values = two.map((run) => run.final[key]);
    const both = two.length === 2 && values.every(isNumber);
    return [title, ...values, ...(both ? [values[1] - values[0]] : two.length === 2 ? [null] : [])];
  });
  const heads = ["", ...two.map((_, index) => letters[index]), ...(two.length === 2 ? ["B − A"] : [])];
  return rows.length
    ? titled("At the end", table(heads, [["status", ...two.map((run) => run.status), ...(two.length === 2 ? [""] : [])], ...rows]))
    : null;
}

function differences(two) {
  const place = (run) => data.runs.indexOf(run);
  const found = Object.entries(data.differing)
    .map(([key, values]) => [key, ...two.map((run) => values[place(run)])])
    .filter(([, a, b]) => JSON.stringify(a ?? null) !== JSON.stringify(b ?? null));
  if (two.length < 2) return null;
  const content = found.length
    ? table(["", ...letters], found)
    : element("p", { className: "muted", textContent: "None." });
  return titled("Differences of configuration", content);
}

function completion(letter, when, text, score) {
  if (!known(text)) return null;
  return element("div", { className: `completion ${when}` },
    element("div", { className: "of" }, element("span", { className: "key", textContent: letter }), when, element("span", { className: "value", textContent: format(score) })),
    // Most begin with the space that parts them from the prompt.
    element("p", { textContent: text.replace(/^ /, "") }));
}

function sampleCard(two, index) {
  const samples = two.map((run) => run.samples[index]);
  const shared = unique(samples.filter(Boolean).map((sample) => sample.prompt)).length === 1;
  const prompt = (sample) => element("p", { className: "prompt" }, element("b", { textContent: "Prompt " }), sample.prompt);
  const sides = samples.map((sample, side) => element("div", {}, ...(sample ? [
    shared ? null : prompt(sample),
    completion(letters[side], "before", sample.before, sample.score_before),
    completion(letters[side], "after", sample.after, sample.score_after),
  ].filter(Boolean) : [element("p", { className: "muted", textContent: "No sample." })])));
  return element("div", { className: "sample" }, shared ? prompt(samples.find(Boolean)) : null,
    element("div", { className: two.length === 2 ? "pair" : "" }, ...sides));
}

function samplesOf(two) {
  const count = Math.max(...two.map((run) => run.samples.length));
  if (!count) return titled("Samples", element("p", { className: "muted", textContent: "These runs have no samples." }));
  const headings = two.map((run, index) => element("p", { className: "run-heading" },
    element("span", { className: "key", textContent: letters[index] }), run.name));
  return titled("Samples, with their scores",
    element("div", { className: two.length === 2 ? "pair" : "" }, ...headings),
    ...Array.from({ length: count }, (_, index) => sampleCard(two, index)));
}

function drawComparison() {
  const two = chosen();
  for (const { run, made } of rows) {
    boxes.get(run.id).checked = picked.includes(run.id);
    made.classList.toggle("picked", picked.includes(run.id));
  }
  byId("picks").replaceChildren(chooser(0), ...(data.runs.length > 1 ? [chooser(1)] : []));
  const parts = two.length
    ? [metricsTable(two), differences(two), samplesOf(two)].filter(Boolean)
    : [element("p", { className: "muted", textContent: "Tick a run in the table above." })];
  byId("comparison").replaceChildren(...parts);
}

// ---- Configuration

function drawSettings() {
  const differing = Object.entries(data.differing);
  const common = Object.entries(data.common);
  const fold = (title, heads, rows) => element("details", {},
    element("summary", { textContent: `${title} (${rows.length})` }), table(heads, rows));
  const spreadOf = (values) => {
    const distinct = unique(values.map((value) => format(value)));
    return distinct.slice(0, 12).join(", ") + (distinct.length > 12 ? `, and ${distinct.length - 12} more` : "");
  };
  byId("settings").append(...[
    differing.length ? fold("What differs between runs", ["", "values"],
      differing.map(([key, values]) => [key, spreadOf(values)])) : null,
    common.length ? fold("What all runs have in common", ["", "value"], common) : null,
  ].filter(Boolean));
  byId("configuration").hidden = !differing.length && !common.length;
}
