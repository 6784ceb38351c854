// How far the filter and the answers agree, over all auditors.

import { address, draw, find, make, nats, percent, request, session, showLines, whole } from "./common.js";
import { visible } from "./text.js";

const EXPLAINED = {
  agreement: "of all documents, people and filter say the same",
  precision: "of what the filter drops, people drop too",
  recall: "of what people drop, the filter drops too",
};

function card(name, estimate) {
  const body = estimate
    ? [make("b", { textContent: percent(estimate.value) }), interval(estimate),
      make("span", { className: "quiet", textContent: `${percent(estimate.low)} to ${percent(estimate.high)} · ${whole(estimate.decided)} decided` })]
    : [make("b", { textContent: "—" }), make("span", { className: "quiet", textContent: "nothing decided yet" })];
  return make("div", { className: "panel" }, make("strong", { textContent: name }), ...body,
    make("p", { className: "quiet", textContent: EXPLAINED[name] }));
}

function interval(estimate) {
  const at = share => `${100 * share}%`;
  return draw("svg", { class: "interval", role: "img", "aria-label": `${percent(estimate.low)} to ${percent(estimate.high)}` },
    draw("rect", { class: "axis", x: 0, y: 6, width: "100%", height: 2 }),
    draw("rect", { class: "range", x: at(estimate.low), y: 2, width: at(Math.max(estimate.high - estimate.low, 0.004)), height: 10 }),
    draw("rect", { class: "value", x: at(Math.min(estimate.value, 0.99)), y: 0, width: 3, height: 14 }));
}

const short = estimate => estimate ? `${percent(estimate.value)} (${percent(estimate.low)} to ${percent(estimate.high)})` : "—";

/** rows: arrays of text or nodes; numbers: which columns are right-aligned. */
function table(header, rows, numbers = []) {
  const side = column => numbers.includes(column) ? "n" : "wide";
  const cell = (kind, value, column) => make(kind, { className: side(column) }, value instanceof Node ? value : visible(String(value)));
  return make("div", { className: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, ...header.map((value, column) => Object.assign(cell("th", value, column), { scope: "col" })))),
    make("tbody", {}, ...rows.map(row => make("tr", {}, ...row.map((value, column) => cell("td", value, column)))))));
}

function groups(title, found) {
  const rows = Object.entries(found).map(([name, figures]) => [name || "—", whole(figures.samples), whole(figures.answered),
    short(figures.agreement), short(figures.precision), short(figures.recall)]);
  return [make("h2", { textContent: `By ${title}` }),
    table([title, "samples", "judged", "agreement", "precision", "recall"], rows, [1, 2, 3, 4, 5])];
}

function show({ summary, disagreements, samples, answers, problems }) {
  document.title = `Audit: summary of ${samples}`;
  find("file").replaceChildren(visible(`${samples} · answers in ${answers}`));
  showLines("problems", problems);
  const { overall } = summary;
  const weighted = summary.weighted
    ? "Strata (source, language, place, verdict) are weighted by how many documents of the corpus they stand for."
    : "The sample is not stratified: nothing is weighted, and the figures speak for the sample alone.";
  const missing = summary.uncovered.reduce((sum, row) => sum + row[4], 0);
  const remarks = [
    `${whole(overall.answered)} of ${whole(overall.samples)} documents judged; ${summary.unsure} unsure and ${summary.disputed} disputed between auditors, which decide nothing.`,
    `${weighted} Intervals: 95 %, Wilson's, combined over strata.`,
    summary.uncovered.length ? `Strata without a decided sample yet: ${summary.uncovered.length}, of ${whole(missing)} documents; the figures do not speak for them.` : "",
    summary.not_blind ? `${summary.not_blind} answers were given with the filter's verdict in sight.` : "",
    summary.median_seconds === null ? "" : `Median time for an answer: ${summary.median_seconds.toFixed(1)} s.`,
    summary.pairs ? `Auditors agree on ${summary.pairs_agree} of ${summary.pairs} pairs of verdicts on one document.` : "",
    summary.unknown ? `${summary.unknown} answers are on documents that are not among these samples.` : "",
  ];
  const auditors = Object.entries(summary.auditors).map(([name, count]) => [name, whole(count)]);
  const rows = disagreements.map(row => [
    make("a", { href: address("/") + `#${row.position + 1}` }, visible(row.document)),
    row.source, row.language || "—", row.place, nats(row.score), row.filter, row.people, row.note]);
  find("content").replaceChildren(
    make("div", { className: "cards" }, ...["agreement", "precision", "recall"].map(name => card(name, overall[name]))),
    make("section", { className: "panel" }, ...remarks.filter(Boolean).map(line => make("p", { textContent: line }))),
    make("h2", { textContent: "Samples, unweighted" }),
    table(["", "people keep", "people drop"], ["keep", "drop"].map(verdict =>
      [`filter ${verdict}s`, whole(overall.counts[verdict].keep), whole(overall.counts[verdict].drop)]), [1, 2]),
    ...groups("place", summary.places), ...groups("source", summary.sources), ...groups("language", summary.languages),
    make("h2", { textContent: `Where people decided against the filter: ${whole(rows.length)}` }),
    rows.length ? table(["document", "source", "language", "place", "score", "filter", "people", "note"], rows, [4]) : make("p", { textContent: "Nowhere." }),
    make("h2", { textContent: "Auditors" }),
    auditors.length ? table(["auditor", "answers"], auditors, [1]) : make("p", { textContent: "None yet." }));
}

find("to-judge").href = address("/");
try {
  await session();
  show(await request("/api/summary"));
} catch (problem) {
  showLines("alert", [problem.message]);
}
