// One document at a time: shows it, takes the verdict, goes on to the next that is open.

import { address, draw, Failure, find, make, nats, percent, request, session, showLines, whole } from "./common.js";
import { append, visible } from "./text.js";

const state = { count: 0, position: 0, shown: null, busy: false, judged: [], loading: false };
const KEYS = { k: "keep", 1: "keep", d: "drop", 2: "drop", u: "unsure", 3: "unsure" };
const PLACES = {
  "low tail": "far down the scores: suspect as boilerplate or repetition",
  "low border": "next to the lower threshold",
  "middle": "inside what is kept, as a control",
  "high border": "next to the upper threshold",
  "high tail": "far up the scores: suspect as noise",
};

const watch = {
  // Seconds that the document was looked at: hidden tabs do not count.
  total: 0, since: null,
  start() { this.total = 0; this.since = document.hidden ? null : performance.now(); },
  pause() { if (this.since !== null) this.total += performance.now() - this.since; this.since = null; },
  resume() { this.since ??= performance.now(); },
  seconds() { return Math.min((this.total + (this.since === null ? 0 : performance.now() - this.since)) / 1000, 86400); },
};

const fail = problem => showLines("alert", [problem instanceof Failure ? problem.message : String(problem)]);
const say = text => { find("status").textContent = text; };

/** Runs one action at a time: a key that comes while an answer is being saved is not for the document after it. */
async function once(action) {
  if (state.busy) return;
  state.busy = true;
  try {
    await action();
  } catch (problem) {
    fail(problem);
  } finally {
    state.busy = false;
  }
}

function showProgress(found) {
  state.count = found.count;
  find("progress").max = found.count;
  find("progress").value = found.answered;
  find("place").textContent = `${whole(found.answered)} of ${whole(found.count)} judged`;
  const items = Object.entries(found.figures).map(([name, estimate]) => make("div", {},
    make("dt", { textContent: name }),
    make("dd", {}, estimate ? percent(estimate.value) : "—",
      estimate ? make("small", { textContent: ` ${percent(estimate.low)} to ${percent(estimate.high)}` }) : null)));
  find("figures").replaceChildren(...items);
  showLines("problems", found.problems);
}

async function open(position) {
  const found = await request(`/api/document?position=${position}`);
  Object.assign(state, { position, shown: found });
  find("done").hidden = true;
  find("document").hidden = false;
  find("title").replaceChildren(visible(found.key || found.document || found.id));
  const about = [`document ${whole(position + 1)} of ${whole(state.count)}`, found.source, found.language,
    `${whole(found.characters)} characters`, found.tokens ? `${whole(found.tokens)} tokens` : ""];
  find("about").replaceChildren(visible(about.filter(Boolean).join(" · ")));
  find("about").title = found.shard ? `${found.shard}, document ${found.shard_position}` : "";
  find("text").replaceChildren();
  find("note").value = found.answer?.note ?? "";
  press(found.answer?.verdict);
  showFilter(found.filter);
  showPiece(found);
  showLines("alert", []);
  watch.start();
  scrollTo(0, 0);
  find("document").focus({ preventScroll: true });
}

function press(verdict) {
  for (const button of document.querySelectorAll("[data-verdict]")) {
    button.setAttribute("aria-pressed", String(button.dataset.verdict === verdict));
  }
  find("back").disabled = state.position === 0;
}

function showPiece(found) {
  append(find("text"), found.text);
  state.shown.end = found.end;
  const left = found.held - found.end;
  find("rest").hidden = !left;
  // Looked at anew: an end that is still in sight after a short piece is no news to the observer otherwise.
  observer.unobserve(find("rest"));
  if (left) observer.observe(find("rest"));
  find("left").textContent = left ? `${whole(left)} more characters` : "";
  const cut = found.characters - found.held;
  find("end").textContent = left ? "" : cut > 0
    ? `The sample holds the first ${whole(found.held)} of ${whole(found.characters)} characters.`
    : found.held ? "End of the document" : "The document is empty";
}

const observer = new IntersectionObserver(entries => {
  if (entries.some(entry => entry.isIntersecting)) more();
}, { rootMargin: "600px" });

async function more() {
  const shown = state.shown;
  if (state.loading || !shown || shown.end >= shown.held) return;
  state.loading = true;
  try {
    const found = await request(`/api/document?position=${state.position}&start=${shown.end}`);
    state.loading = false;
    if (state.shown === shown) showPiece(found);
  } catch (problem) {
    fail(problem);
  } finally {
    state.loading = false;
  }
}

function showFilter(filter) {
  const panel = find("filter");
  if (!filter) {
    panel.replaceChildren(make("p", { className: "line" },
      make("span", { className: "quiet", textContent: "Scores, reason and the filter's verdict are hidden until you answer." }),
      make("button", { id: "reveal", className: "plain", textContent: "Show (S)", onclick: () => once(reveal) })));
    return;
  }
  const score = filter[filter.measure];
  const other = filter.measure === "nats_per_token" ? "nats_per_byte" : "nats_per_token";
  const share = filter.probability === null ? null
    : `${percent(filter.probability)} of such documents are in the sample`;
  panel.replaceChildren(
    make("p", { className: "line" },
      make("strong", { textContent: `The filter ${filter.verdict}s it`, className: "said" }),
      make("span", { textContent: `${filter.place}: ${PLACES[filter.place]}` }),
      share ? make("span", { className: "quiet", textContent: share }) : null),
    make("p", { className: "line quiet" },
      make("span", { textContent: `${nats(score)} ${filter.measure.replaceAll("_", " ")}` }),
      make("span", { textContent: `${nats(filter[other])} ${other.replaceAll("_", " ")}` }),
      make("span", { textContent: `kept from ${filter.low ?? "the lowest"} to ${filter.high ?? "the highest"}` })),
    score === null ? "" : scale(score, filter.low, filter.high));
  panel.querySelector(".said").dataset.verdict = filter.verdict;
}

/** Where the score lies on a line beside the band that is kept. */
function scale(score, low, high) {
  const known = [score, low, high].filter(value => value !== null);
  const least = Math.min(...known), most = Math.max(...known), pad = (most - least || Math.abs(most) || 1) * 0.15;
  const at = value => Math.min(98, Math.max(2, 2 + 96 * (value - least + pad) / (most - least + 2 * pad)));
  const left = low === null ? 0 : at(low), right = high === null ? 100 : at(high);
  const label = (value, y, own) => draw("text", { x: `${at(value)}%`, y, "text-anchor": at(value) < 10 ? "start" : at(value) > 90 ? "end" : "middle",
    ...(own && { class: "own" }) }, value.toFixed(2));
  return draw("svg", { class: "scale", role: "img",
    "aria-label": `score ${nats(score)}, kept from ${low ?? "the lowest"} to ${high ?? "the highest"}` },
    draw("rect", { class: "band", x: `${left}%`, y: 18, width: `${right - left}%`, height: 12 }),
    draw("line", { class: "axis", x1: "0%", x2: "100%", y1: 24, y2: 24 }),
    draw("line", { class: "score", x1: `${at(score)}%`, x2: `${at(score)}%`, y1: 14, y2: 34 }),
    label(score, 11, true), ...[low, high].filter(value => value !== null).map(value => label(value, 47)));
}

async function reveal() {
  if (!state.shown || find("document").hidden) return;
  const found = await request(`/api/document?position=${state.position}&reveal=1`);
  showFilter(found.filter);
}

async function judge(verdict) {
  if (!state.shown || find("document").hidden) return;
  const position = state.position;
  const body = { sample: state.shown.id, verdict, note: find("note").value.trim(), seconds: watch.seconds() };
  let found;
  try {
    found = await request("/api/answers", body);
  } catch (problem) {
    fail(problem);
    say("Not saved. Press the key again once that is mended.");
    return;
  }
  state.judged = [...state.judged.filter(earlier => earlier !== position), position];
  showProgress(found);
  showLines("alert", []);
  const same = verdict === "unsure" ? "" : found.filter.verdict === verdict ? ", as the filter" : `; the filter says ${found.filter.verdict}`;
  say(`${found.saved.edit ? "Changed to" : "Saved:"} ${verdict}${same}. Z goes back to it.`);
  if (found.next === null) finish(); else await open(found.next);
}

function finish() {
  find("document").hidden = true;
  find("done").hidden = false;
  find("back").disabled = false;
  press(null);
  scrollTo(0, 0);
  find("done").focus({ preventScroll: true });
}

async function back() {
  if (!find("done").hidden) return open(state.position);
  if (state.position > 0) await open(state.position - 1);
}

async function next() {
  if (find("document").hidden) return;
  if (state.position + 1 < state.count) return open(state.position + 1);
  const found = await session();
  showProgress(found);
  if (found.next === null) finish(); else await open(found.next);
}

async function undo() {
  const last = state.judged.pop();
  if (last === undefined) return back();
  await open(last);
  say("Judge it again: the later verdict counts.");
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || find("help").open) return;
  if (event.target === find("note")) {
    if (event.key === "Escape") find("note").blur();
    return;
  }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const actions = { ArrowLeft: back, ArrowRight: next, z: undo, s: reveal };
  const verdict = KEYS[key];
  if (verdict || actions[key] || "nm?".includes(key)) event.preventDefault(); else return;
  if (event.repeat && (verdict || key === "z")) return;  // a key held down judges one document
  if (verdict) once(() => judge(verdict));
  else if (actions[key]) once(actions[key]);
  else if (key === "n") find("note").focus();
  else if (key === "m") find("text").classList.toggle("fixed");
  else find("help").showModal();
}

addEventListener("keydown", onKey);
for (const button of document.querySelectorAll("[data-verdict]")) {
  button.addEventListener("click", () => once(() => judge(button.dataset.verdict)));
}
find("back").addEventListener("click", () => once(back));
find("next").addEventListener("click", () => once(next));
find("more").addEventListener("click", more);
find("help-button").addEventListener("click", () => find("help").showModal());
for (const link of ["to-summary", "done-summary"]) find(link).href = address("/summary");
document.addEventListener("visibilitychange", async () => {
  if (document.hidden) return watch.pause();
  watch.resume();
  try {
    showProgress(await session());  // another tab may have gone on
  } catch { /* the next action says it */ }
});

/** The position that the address names, as a link of the summary does; the address then forgets it, so that a reload
 *  goes on at the first document that is open. */
function asked() {
  const position = Number(location.hash.slice(1)) - 1;
  if (!Number.isInteger(position) || position < 0 || position >= state.count) return null;
  history.replaceState(null, "", location.pathname + location.search);
  return position;
}

addEventListener("hashchange", () => once(async () => {
  const position = asked();
  if (position !== null) await open(position);
}));

once(async () => {
  const found = await session();
  document.title = `Audit: ${found.samples}`;
  showProgress(found);
  const position = asked() ?? found.next;
  if (position === null) { state.position = found.count - 1; finish(); }
  else await open(position);
});
