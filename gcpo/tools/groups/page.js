"use strict";
// Every text of the data is set with textContent or as an attribute; none is parsed as HTML.
const groups = JSON.parse(document.getElementById("rows").textContent);
const details = document.querySelectorAll("script.details"); // parsed when a group is shown
const severalRuns = new Set(groups.map((group) => group.run)).size > 1;
const FIRST_CHARACTERS = 4000, FIRST_TOKENS = 2000;
const FULL_COLOUR = 2; // |log ρ|
const NAMES = { score: "reward", grpo_advantage: "A", upsilon: "Υ", advantage: "B", kappa_kl: "κ-KL" };
const NOT_SHOWN = new Set(["step", "index", "question", "draw", "left_out"]);
const COLUMNS = [
  ["step", (g) => g.step], ["question", (g) => g.question], ["Υ spread", (g) => g.upsilon_spread],
  ["disagreement", (g) => g.disagreement], ["reward", (g) => g.reward], ["draws", (g) => g.draws],
];
if (severalRuns) COLUMNS.unshift(["run", (g) => g.run]);

function make(tag, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
}

function number(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "–" : String(value);
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(3)));
}

// ---- table of the groups

const weighted = groups.some((group) => group.upsilon_spread !== null);
const state = { column: weighted ? "Υ spread" : "disagreement", down: true, chosen: null };

function sorted() {
  const key = COLUMNS.find(([name]) => name === state.column)[1];
  const sign = state.down ? -1 : 1;
  return groups.map((_, i) => i).sort((i, j) => {
    const a = key(groups[i]), b = key(groups[j]);
    if (a === null || b === null) return (a === null) - (b === null) || i - j; // without a value: last
    const order = typeof a === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
    return sign * order || i - j;
  });
}

function drawList() {
  const table = make("table"), head = table.createTHead().insertRow(), body = table.createTBody();
  for (const [name] of COLUMNS) {
    const cell = head.appendChild(make("th")), button = cell.appendChild(make("button"));
    const chosen = state.column === name;
    button.textContent = name + (chosen ? (state.down ? " ▼" : " ▲") : "");
    if (chosen) cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    button.addEventListener("click", () => {
      state.down = chosen ? !state.down : true;
      state.column = name;
      drawList();
    });
  }
  for (const i of sorted()) {
    const row = body.insertRow();
    row.dataset.group = i;
    row.tabIndex = 0;
    if (i === state.chosen) row.className = "chosen";
    for (const [, value] of COLUMNS) row.insertCell().textContent = number(value(groups[i]));
  }
  const choose = (event) => {
    const row = event.target.closest("tr[data-group]");
    if (row && (event.type === "click" || event.key === "Enter")) drawGroup(Number(row.dataset.group));
  };
  body.addEventListener("click", choose);
  body.addEventListener("keydown", choose);
  document.getElementById("list").replaceChildren(table);
}

// ---- texts

function textNode(text) {
  const box = document.createDocumentFragment(), node = make("pre", text.slice(0, FIRST_CHARACTERS), "text");
  node.dir = "auto";
  box.append(node);
  if (text.length > FIRST_CHARACTERS) {
    box.append(more(`show all ${text.length.toLocaleString("en")} characters`, () => { node.textContent = text; }));
  }
  return box;
}

function more(label, action) {
  const button = make("button", label, "more");
  button.type = "button";
  button.addEventListener("click", () => { button.remove(); action(); });
  return button;
}

// Tokens with log rho as a heat map: blue where the reference is above the policy, red where it is below.
function heatMap(tokens, values) {
  const box = document.createDocumentFragment(), node = make("pre", undefined, "text");
  const add = (start, end) => {
    for (let i = start; i < Math.min(end, tokens.length); i += 1) {
      const span = node.appendChild(make("span", tokens[i])), value = values[i];
      if (typeof value !== "number") continue;
      const strength = Math.min(1, Math.abs(value) / FULL_COLOUR);
      span.style.backgroundColor = `rgb(${value > 0 ? "40 90 200" : "198 60 40"} / ${0.75 * strength})`;
      span.title = `log ρ ${number(value)}`;
    }
  };
  add(0, FIRST_TOKENS);
  box.append(node);
  if (tokens.length > FIRST_TOKENS) {
    box.append(more(`show all ${tokens.length.toLocaleString("en")} tokens`, () => add(FIRST_TOKENS, tokens.length)));
  }
  return box;
}

function legend() {
  const node = make("p", `log ρ of a token: −${FULL_COLOUR} or less`, "note");
  node.append(make("span", undefined, "scale"), `+${FULL_COLOUR} or more`);
  return node;
}

function hasHeatMap(line) {
  return Array.isArray(line.tokens) && Array.isArray(line.log_rho);
}

// ---- one group

function card(facts) {
  const node = make("section", undefined, "card"), head = node.appendChild(make("header"));
  for (const [name, value] of facts) {
    const fact = head.appendChild(make("span", `${name} `));
    fact.append(make("b", number(value)));
  }
  return node;
}

function factsOf(line) {
  const known = Object.keys(NAMES).filter((key) => typeof line[key] === "number");
  const others = Object.keys(line).filter((k) => typeof line[k] === "number" && !(k in NAMES) && !NOT_SHOWN.has(k));
  return [...known, ...others.sort()].map((key) => [NAMES[key] ?? key, line[key]]);
}

function responseCard(line, i) {
  const node = card([["response", line.index ?? i], ...factsOf(line)]);
  node.append(hasHeatMap(line) ? heatMap(line.tokens.map(String), line.log_rho) : textNode(String(line.output ?? "")));
  if (Array.isArray(line.episodes) && line.episodes.length) node.append(episodeTable(line.episodes));
  return node;
}

function episodeTable(episodes) {
  const names = Object.keys(episodes[0]).filter((name) => name !== "text"), table = make("table");
  const head = table.createTHead().insertRow();
  for (const name of ["episode", ...names, "text"]) head.append(make("th", name, name === "text" ? "left" : ""));
  const body = table.createTBody();
  episodes.forEach((episode, k) => {
    const row = body.insertRow();
    row.insertCell().textContent = k + 1;
    for (const name of names) row.insertCell().textContent = number(episode[name]);
    const cell = row.insertCell();
    cell.className = "left";
    cell.append(textNode(String(episode.text ?? "")));
  });
  return table;
}

function promptOf(group, draw) {
  const box = make("details"), blocks = Array.isArray(draw.prompt) ? draw.prompt : [];
  box.append(make("summary", `prompt: question, ${blocks.join(", ") || "no block"}`));
  box.addEventListener("toggle", () => {
    if (box.childElementCount > 1) return;
    box.append(textNode(group.prompt));
    for (const name of blocks) {
      const [kind, place] = String(name).split(" "), key = kind === "draw" ? "draw" : "index";
      const source = (kind === "draw" ? group.draws : group.responses).find((line) => line[key] === Number(place));
      const block = make("div", undefined, "block");
      block.append(make("b", name), textNode(String(source?.block ?? source?.output ?? "")));
      box.append(block);
    }
  });
  return box;
}

function drawCard(group, line, j) {
  const facts = [["draw", line.draw ?? j], ["kind", line.kind], ["outcome", line.outcome]];
  if (typeof line.left_out === "number") facts.splice(2, 0, ["without response", line.left_out]);
  if (typeof line.score === "number") facts.push(["reward", line.score]);
  const node = card(facts);
  node.append(textNode(String(line.output ?? "")), promptOf(group, line));
  return node;
}

function drawGroup(i) {
  const row = groups[i], group = JSON.parse(details[i].textContent), box = make("div");
  state.chosen = i;
  for (const line of document.querySelectorAll("#list tr[data-group]")) {
    line.className = Number(line.dataset.group) === i ? "chosen" : "";
  }
  box.append(make("h3", `step ${row.step}, question ${row.question}` + (severalRuns ? `, ${row.run}` : "")));
  box.append(textNode(group.prompt));
  if (group.truth !== null) box.append(make("p", "right answer:", "note"), textNode(String(group.truth)));
  box.append(make("h3", "Responses"), ...(group.responses.some(hasHeatMap) ? [legend()] : []));
  box.append(...group.responses.map(responseCard));
  box.append(make("h3", "Auxiliary generations"));
  if (!group.draws.length) box.append(make("p", "The dump has no draws of this group.", "note"));
  box.append(...group.draws.map((line, j) => drawCard(group, line, j)));
  document.getElementById("group").replaceChildren(box);
}

drawList();
const first = sorted().find((i) => groups[i].draws) ?? sorted()[0];
if (first !== undefined) drawGroup(first);
document.body.dataset.ready = groups.length;
