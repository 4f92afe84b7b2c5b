"use strict";
// Everything here is an extra: the tables and figures stand in the page without it. All text goes in as text, never as html.
document.documentElement.classList.add("scripted");

const data = JSON.parse(document.getElementById("run-data").textContent);
const byId = (id) => document.getElementById(id);

/** An element with a class and children; strings become text. */
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function say(text) {
  byId("announce").textContent = text;
}

// --- sorting ---

const words = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

/** A cell's number, or its text; null where there is none, which always comes last. */
function sortValue(cell, isNumber) {
  if (isNumber) {
    const value = Number(cell.dataset.value ?? NaN);
    return Number.isNaN(value) ? null : value;
  }
  const text = (cell.dataset.value ?? cell.textContent).trim();
  return text === "" || text === "–" ? null : text;
}

function compareValues(left, right, isNumber, direction) {
  if (left === null || right === null) return (left === null) - (right === null);
  return direction * (isNumber ? left - right || 0 : words.compare(left, right));
}

function sortBy(head) {
  const direction = head.ariaSort === "ascending" ? "descending" : "ascending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", direction);
  const isNumber = head.classList.contains("number");
  const body = head.closest("table").tBodies[0];
  const rows = Array.from(body.rows, (row) => [sortValue(row.cells[head.cellIndex], isNumber), row]);
  rows.sort((left, right) => compareValues(left[0], right[0], isNumber, direction === "ascending" ? 1 : -1));
  body.append(...rows.map(([, row]) => row));
  say(`sorted by ${head.dataset.sort}, ${direction}`);
}

function makeSortable(head) {
  head.dataset.sort ??= head.textContent.trim();
  const button = make("button", "", ...head.childNodes);
  button.type = "button";
  button.addEventListener("click", () => sortBy(head));
  head.append(button);
}

// --- filter ---

function filter() {
  const wanted = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const items = document.querySelectorAll("[data-words]");
  let shownRuns = 0;
  for (const item of items) {
    item.hidden = !wanted.every((word) => item.dataset.words.includes(word));
    if (!item.hidden && item.querySelector(".tick")) shownRuns += 1;
  }
  for (const section of document.querySelectorAll("section.runs, #figures")) {
    section.hidden = section.querySelector("[data-words]:not([hidden])") === null;
  }
  const every = data.runs.length;
  byId("filter-result").textContent = wanted.length ? `${shownRuns} of ${every} finished runs` : "";
}

// --- side by side ---

const ticks = () => Array.from(document.querySelectorAll(".tick"));
const tickedRuns = () =>
  ticks().filter((tick) => tick.checked).map((tick) => Number(tick.dataset.run)).sort((left, right) => left - right);

function onTick() {
  for (const tick of ticks()) tick.closest("tr").classList.toggle("ticked", tick.checked);
  const count = tickedRuns().length;
  byId("chosen").hidden = count === 0;
  byId("chosen-count").textContent = count === 1 ? "1 run ticked: tick another" : `${count} runs ticked`;
  byId("chosen-show").disabled = count < 2;
  byId("chosen-show").hidden = count < 2;
  if (count < 2) byId("compare").hidden = true;
  else if (!byId("compare").hidden) drawComparison();
}

function showComparison() {
  byId("compare").hidden = false;
  drawComparison();
  byId("compare").scrollIntoView();
  byId("compare").focus({ preventScroll: true });
}

function clearTicks() {
  for (const tick of ticks()) tick.checked = false;
  onTick();
}

/** [group, [[field, [text of each run, or null where the run has no such field]]]] over all runs. */
function mergedGroups(runs) {
  const groups = new Map();
  runs.forEach((run, place) => {
    for (const [group, rows] of run.groups) {
      if (!groups.has(group)) groups.set(group, new Map());
      for (const [field, text] of rows) {
        const fields = groups.get(group);
        if (!fields.has(field)) fields.set(field, new Array(runs.length).fill(null));
        fields.get(field)[place] = text;
      }
    }
  });
  return groups;
}

function rowHead(text, differs) {
  const head = make("th", "", make("span", "mark", differs ? "≠" : ""), text);
  if (differs) head.append(make("span", "unseen", " (differs)"));
  head.scope = "row";
  return head;
}

function columnHead(run) {
  const head = make("th", "", run.method, make("small", "", `${run.title}, ${run.model}`), make("small", "", run.id));
  head.scope = "col";
  return head;
}

function comparisonHead(runs) {
  const corner = make("th", "", "field");
  corner.scope = "col";
  return make("thead", "", make("tr", "", corner, ...runs.map(columnHead)));
}

function groupBody(name, fields, runs, onlyDifferences) {
  const rows = [];
  for (const [field, texts] of fields) {
    const differs = texts.some((text) => text !== texts[0]);
    if (onlyDifferences && !differs) continue;
    const cells = texts.map((text) => make("td", "", text ?? "–"));
    rows.push(make("tr", differs ? "differs" : "", rowHead(field, differs), ...cells));
  }
  if (rows.length === 0) return null;
  const head = make("th", "", name);
  head.scope = "rowgroup";
  head.colSpan = runs.length + 1;
  return make("tbody", "", make("tr", "group", head), ...rows);
}

function drawComparison() {
  const runs = tickedRuns().map((number) => data.runs[number]);
  const onlyDifferences = byId("only-differences").checked;
  const bodies = Array.from(mergedGroups(runs), ([name, fields]) => groupBody(name, fields, runs, onlyDifferences));
  byId("compare-table").replaceChildren(comparisonHead(runs), ...bodies.filter(Boolean));
  byId("compare-samples").replaceChildren(...sampleComparison(runs));
}

// --- sample by sample, of two runs of one task ---

function sampleComparison(runs) {
  if (runs.length !== 2 || runs[0].task !== runs[1].task) return [];
  const [left, right] = runs;
  const others = new Map(right.samples.map((sample) => [sample.id, sample]));
  const pairs = left.samples.filter((sample) => others.has(sample.id)).map((sample) => [sample, others.get(sample.id)]);
  const title = make("h3", "", "Sample by sample");
  if (pairs.length === 0) return [title, make("p", "note", "The two runs share no sample.")];
  const scroll = make("div", "scroll", sampleTable(left, right, pairs));
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Samples of the two runs");
  return [title, make("p", "note", sampleNotes(left, right).join(" ")), scroll];
}

function sampleNotes(left, right) {
  const notes = [];
  if (left.protocol !== right.protocol) {
    notes.push("The runs differ in data, model or protocol, so one id may stand for two different samples.");
  }
  if (Math.max(left.sampleCount, right.sampleCount) > data.mostSamples) {
    notes.push(`Only the first ${data.mostSamples} samples of a run are kept in this page.`);
  }
  if (left.cut || right.cut) notes.push(`Texts are cut after ${data.mostLetters} characters.`);
  return notes;
}

function sampleTable(left, right, pairs) {
  const measure = pairs.flat().find((sample) => sample.measure)?.measure;
  const hasText = pairs.flat().some((sample) => sample.prediction !== null);
  const names = [left.method, right.method];
  if (names[0] === names[1]) names.forEach((name, place) => (names[place] = `${name} (${[left, right][place].id})`));
  const heads = [["id", ""]];
  if (measure) heads.push(...names.map((name) => [`${measure}, ${name}`, "number"]), ["difference", "number"]);
  if (hasText) heads.push(["answers", ""], ...names.map((name) => [`prediction, ${name}`, ""]));
  const headRow = make("tr", "", ...heads.map(([text, className]) => make("th", className, text)));
  for (const head of headRow.cells) head.scope = "col";
  const rows = pairs.map((pair) => sampleRow(pair, measure, hasText));
  const table = make("table", "", make("thead", "", headRow), make("tbody", "", ...rows));
  for (const head of headRow.cells) makeSortable(head);
  return table;
}

function sampleRow([left, right], measure, hasText) {
  const head = make("th", "", left.id);
  head.scope = "row";
  const row = make("tr", "", head);
  if (measure) row.append(numberCell(left.value, left.shown), numberCell(right.value, right.shown), differenceCell(left, right));
  if (hasText) {
    row.append(make("td", "answers", left.answers ?? "–"));
    for (const sample of [left, right]) row.append(make("td", "prediction", (sample.prediction ?? "–").trim()));
  }
  return row;
}

function numberCell(value, text) {
  const cell = make("td", "number", text);
  if (value !== null) cell.dataset.value = value;
  return cell;
}

function differenceCell(left, right) {
  if (left.value === null || right.value === null) return numberCell(null, "–");
  const difference = right.value - left.value;
  const text = Number.isInteger(difference) ? String(difference) : difference.toFixed(4);
  return numberCell(difference, difference > 0 ? `+${text}` : text);
}

// --- figures and commands ---

function enlarge(button) {
  const picture = button.querySelector("img");
  const dialog = byId("enlarged");
  dialog.querySelector("img").src = picture.src;
  dialog.querySelector("img").alt = picture.alt;
  dialog.querySelector("p").textContent = picture.alt;
  dialog.showModal();
}

async function copyCommand(button) {
  const code = button.parentElement.querySelector("code");
  let done = "Copied";
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    getSelection().selectAllChildren(code); // a browser that keeps its clipboard to itself
    done = "Selected";
  }
  button.textContent = done;
  say(done);
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

for (const head of document.querySelectorAll("th[data-sort]")) makeSortable(head);
for (const tick of ticks()) {
  tick.checked = false; // a browser that goes back may have kept old ticks
  tick.addEventListener("change", onTick);
}
for (const button of document.querySelectorAll(".enlarge")) button.addEventListener("click", () => enlarge(button));
for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", () => copyCommand(button));
function showAllFigures() {
  for (const picture of document.images) picture.loading = "eager";
}
// Printing does not wait for figures that were never scrolled to, so they follow once the page stands.
addEventListener("load", () => setTimeout(showAllFigures, 300));
byId("filter").addEventListener("input", filter);
byId("only-differences").addEventListener("change", drawComparison);
byId("chosen-show").addEventListener("click", showComparison);
byId("chosen-clear").addEventListener("click", clearTicks);
byId("enlarged").addEventListener("click", (event) => {
  if (event.target === byId("enlarged")) byId("enlarged").close();
});
