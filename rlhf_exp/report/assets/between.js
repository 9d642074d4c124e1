// Settings side by side: which of two is better, what each reaches at equal cost, and how well its KL
// is estimated from samples.
"use strict";

const settingOf = (id) => groupLabel(groups.get(id));
const noted = (title, text, content) => titled(title, content, element("p", { className: "note", textContent: text }));
const count = (value) => (isNumber(value) ? value.toLocaleString("en", { maximumSignificantDigits: 4 }) : "–");

function improvementTable() {
  if (!data.improvements.length) return null;
  const strata = data.improvements.some((pair) => pair.strata > 1)
    ? " Means over tasks and rewards, within each of which the seeds are resampled." : "";
  return noted("Probability of improvement",
    `The probability that a run of the first has a higher ${data.score} than a run of the second, ties counting one half; `
      + `in brackets ${BOOTSTRAP}, where both have at least five seeds. `
      + `1 [1, 1] says that these runs do not overlap, not that others will not.${strata}`,
    table(["first", "second", "probability"],
      data.improvements.map((pair) => [withoutTails(pair.first), withoutTails(pair.second), measureCell(pair.probability)])));
}

function costTable({ cost, budget, groups: members, left_out: leftOut }) {
  const ranked = [...members].sort((a, b) => b.score.mean - a.score.mean);
  const left = leftOut.length ? ` Left out, since the cost is not known or a run has no evaluation by then: ${leftOut.map(settingOf).join(", ")}.` : "";
  return noted(`At ${count(budget)} ${AXES[cost]}`,
    `Each run by its last evaluation before the largest cost that all of these runs reach, or at most 5 % beyond; `
      + `means over seeds, in brackets ${INTERVALS}.${left}`,
    table(["setting", "score", `KL, ${klUnit}`, `${cost} so far`],
      ranked.map((entry) => [settingOf(entry.group), measureCell(entry.score), measureCell(entry.kl), count(entry.spent)])));
}

function estimateTable() {
  if (!data.kl_estimates.length) return null;
  const cell = (entry, name) => `${format(entry[`kl_${name}`])} (${format(entry[`kl_${name}_var`])})`;
  return noted("Estimates of the KL",
    "Of the rollouts, in nats a token: the exact KL and its estimates from the sampled tokens, in parentheses "
      + "their variances over tokens; means over phases and seeds.",
    table(["setting", "exact", "k1", "k2", "k3"],
      data.kl_estimates.map((entry) => [settingOf(entry.group), entry.kl, ...["k1", "k2", "k3"].map((name) => cell(entry, name))])));
}

function drawBetween() {
  const tables = [improvementTable(), ...data.equal_cost.map(costTable), estimateTable()].filter(Boolean);
  if (!tables.length) return hide("between");
  byId("between").append(...tables);
}
