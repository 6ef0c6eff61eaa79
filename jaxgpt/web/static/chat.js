// The page on which models answer side by side, and on which each token can be inspected.
"use strict";

const state = { models: [], turns: [], running: null, rollout: null };

// What tokens may be coloured by: name: [label, kind]. "rare": stronger for smaller values; "much": stronger for larger
// ones; "signed": one hue above 0 and another below.
const PAINTS = {
  p: ["probability", "rare"],
  kl: ["KL to the reference, nats", "much"],
  log_ratio: ["log π/ρ, nats", "signed"],
  entropy: ["entropy, nats", "much"],
  value: ["critic's value", "signed"],
  advantage: ["advantage", "signed"],
  return: ["return", "signed"],
  ratio: ["ratio after the update", "ratio"],
  logp: ["log π, nats", "rare"],
  ref_logp: ["log ρ, nats", "rare"],
};
// The legend of each kind: [the swatch's classes, its text].
const LEGENDS = {
  rare: [["warm pale", "pale: probable"], ["warm", "deep: improbable"]],
  much: [["cool pale", "pale: low"], ["cool", "deep: highest in this answer"]],
  signed: [["cool", "blue: above 0"], ["low", "red: below 0"]],
  ratio: [["low", "red: ≤ 0.8"], ["pale none", "pale: 1"], ["cool", "blue: ≥ 1.2"]],
};
const IN_CHAT = ["p", "kl", "log_ratio", "entropy", "value"];
const IN_ROLLOUTS = ["advantage", "logp", "ref_logp", "ratio", "value", "return"];

const FAINT = 0.1; // if no token of an answer exceeds this, the colours stay pale

function strength(kind, value, scale) {
  if (kind === "rare") return value <= 0 && scale.low < 0 ? Math.min(1, value / Math.min(-1, scale.low)) : 1 - value;
  if (kind === "ratio") return Math.max(-1, Math.min(1, (value - 1) / 0.2));
  const most = Math.max(Math.abs(scale.low), Math.abs(scale.high), FAINT);
  return (kind === "much" ? Math.max(0, value) : value) / most;
}

function paint(view) {
  const by = $("#paint").value;
  const values = view.figures[by];
  const scale = values ? { low: Math.min(...values), high: Math.max(...values) } : null;
  [...view.element.children].forEach((span, i) => {
    const much = values ? strength(PAINTS[by][1], values[i], scale) : 0;
    const hue = PAINTS[by]?.[1] === "much" ? "--cool" : much < 0 ? "--low" : PAINTS[by]?.[1] === "rare" ? "--warm" : "--cool";
    span.style.backgroundColor = much ? `color-mix(in srgb, var(${hue}) ${Math.round(Math.min(1, Math.abs(much)) * 55)}%, transparent)` : "";
  });
}

function repaint() {
  const legend = LEGENDS[PAINTS[$("#paint").value]?.[1]] || [];
  $("#legend").replaceChildren(...legend.map(([swatch, words]) => make("span", {}, make("i", { className: `swatch ${swatch}` }), words)));
  views.forEach(paint);
}

const number = (x) => (Math.abs(x) >= 100 || (x !== 0 && Math.abs(x) < 0.001) ? x.toExponential(2) : x.toFixed(3));

function tell(view, i) {
  view.element.querySelector(".here")?.classList.remove("here");
  view.element.children[i].classList.add("here");
  view.at = i;
  const rows = Object.entries(view.figures).filter(([, values]) => values)
    .map(([name, values]) => make("span", {}, `${PAINTS[name][0]} `, make("b", {}, number(values[i]))));
  $("#figures").replaceChildren(make("b", { className: "token" }, JSON.stringify(view.tokens[i])), ...rows);
}

const views = new Set();

/** Tokens that can be pointed at and stepped through with the arrow keys. */
function tokenView(name, tokens, figures) {
  const element = make("p", { className: "words tokens", tabIndex: 0, role: "group", "aria-label": `Tokens of ${name}` });
  const view = { element, tokens, figures, at: 0 };
  tokens.forEach((text, i) => {
    const special = /^<[^>]{1,20}>$/.test(text);
    element.append(make("span", { className: special ? "tag" : "", onpointerenter: () => tell(view, i), onclick: () => tell(view, i) }, text));
  });
  element.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    if (!step) return;
    tell(view, Math.max(0, Math.min(tokens.length - 1, view.at + step)));
    event.preventDefault();
  });
  views.add(view);
  paint(view);
  return element;
}

/** A small line chart of the values. */
function trace(name, values) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const low = Math.min(...values, 0), high = Math.max(...values, 0.001);
  const y = (v) => 30 - (28 * (v - low)) / (high - low);
  const x = (i) => (200 * i) / Math.max(values.length - 1, 1);
  svg.setAttribute("viewBox", "0 0 200 32");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${name}: from ${number(values[0])} to ${number(values.at(-1))}`);
  for (const [kind, points] of [["zero", [[0, y(0)], [200, y(0)]]], ["line", values.map((v, i) => [x(i), y(v)])]]) {
    const line = document.createElementNS(space, "polyline");
    line.setAttribute("class", kind);
    line.setAttribute("points", points.map((p) => p.map((v) => v.toFixed(1)).join(",")).join(" "));
    svg.append(line);
  }
  return make("div", { className: "trace" }, make("span", { className: "quiet" }, `${name} `), svg);
}

const sum = (values) => values.reduce((a, b) => a + b, 0);

function say(text, bad = false) {
  $("#message").textContent = text;
  $("#message").className = bad ? "message bad" : "message";
}

// ---- chat ----

const chosen = () => [...document.querySelectorAll("#models input:checked")].map((box) => Number(box.value));

function how() {
  const seed = $("#seed").value;
  return {
    temperature: Number($("#temperature").value), top_p: Number($("#top_p").value), top_k: Number($("#top_k").value),
    new_tokens: Number($("#new_tokens").value), ...(seed ? { seed: Number(seed) % 2 ** 31 } : {}),
  };
}

function summarise() {
  const names = chosen().map((i) => state.models[i].name).join(", ");
  $("#summary").textContent = `${names || "none"}; temperature ${$("#temperature").value}, top-p ${$("#top_p").value}`;
}

async function answer(turn, cell, i, signal) {
  const words = make("p", { className: "words" });
  const earlier = state.turns.slice(0, state.turns.indexOf(turn))
    .map((past) => ({ prompt: past.prompt, answer: past.cells.find((other) => other.model === i)?.text || "" }));
  const data = { model: i, turns: [...earlier, { prompt: turn.prompt }], ...how() };
  const reader = (await request("say", data, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.map((text) => JSON.parse(text))) {
      if (line.text && !cell.text) cell.body.replaceChildren(words);
      if (line.text) words.textContent = cell.text += line.text;
      if (line.error) throw new Error(line.error);
      if (line.done) finish(cell, state.models[i].name, line.done);
    }
  }
}

function finish(cell, name, found) {
  const { tokens, ended, seconds, score, how: drawn } = found;
  Object.assign(cell, { ended, how: drawn });
  const figures = Object.fromEntries(IN_CHAT.map((by) => [by, found[by]]));
  const facts = [`${tokens.length} tokens in ${seconds.toFixed(1)} s`, `log-probability ${sum(found.logp).toFixed(1)} nats`];
  if (found.log_ratio) facts.push(`log π/ρ ${sum(found.log_ratio).toFixed(2)}`, `KL ${sum(found.kl).toFixed(2)} nats`);
  if (score !== null) facts.push(`reward ${score.toFixed(2)}`);
  if (!ended) facts.push("cut off");
  cell.best = make("button", {
    type: "button", "aria-label": `The answer of ${name} is the best`, onclick: () => rate(cell.turn, cell),
  }, "Best");
  cell.body.replaceChildren(
    tokenView(name, tokens, figures),
    ...(found.value ? [trace("Critic's value", found.value)] : []),
    make("p", { className: "quiet facts" }, ...facts.map((fact) => make("span", {}, fact))),
    make("div", { className: "row" }, cell.best),
  );
  showVerdict(cell.turn);
}

const answered = (turn) => turn.cells.filter((cell) => cell.how);

/** The pressed button stays enabled: pressing it again takes the vote back. */
function showVerdict(turn) {
  const there = answered(turn);
  const buttons = [...there.map((cell) => [cell.best, cell]), [turn.bad, null]];
  for (const [button, cell] of buttons) {
    const pressed = turn.vote?.cell === cell;
    button.setAttribute("aria-pressed", String(pressed));
    button.disabled = Boolean(turn.vote) && !pressed;
  }
  turn.bad.parentElement.hidden = there.length < 2;
}

/** Vote for a cell as the best, or for null: all are bad. */
async function rate(turn, cell) {
  if (turn.busy) return;
  turn.busy = true;
  try {
    await (turn.vote ? takeBack(turn) : decide(turn, cell));
  } catch (error) {
    say(error.message, true);
  } finally {
    turn.busy = false;
    showVerdict(turn);
  }
}

async function takeBack(turn) {
  const { name, id } = turn.vote;
  const saved = await call("unrate", { id: newId(), annotator: name, vote: id });
  turn.vote = null;
  say(`Vote taken back: ${count(saved.votes, "vote")} by ${name}.`);
}

const count = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;

async function decide(turn, cell) {
  const name = (localStorage.getItem("name") || prompt("Your name, saved with your votes") || "").trim().slice(0, 64);
  if (!name) return;
  const cells = answered(turn);
  if (cells.length < 2) throw new Error("There is nothing to choose between; let two models answer.");
  const answers = cells.map((other) => ({ model: other.model, text: other.text, ended: other.ended, how: other.how }));
  const past = state.turns.slice(0, state.turns.indexOf(turn))
    .map((one) => ({ prompt: one.prompt, answer: one.cells.find((other) => other.model === (cell || cells[0]).model)?.text || "" }));
  const id = newId();
  const saved = await call("rate", {
    id, annotator: name, turns: [...past, { prompt: turn.prompt }], answers, best: cell && cells.indexOf(cell),
  });
  localStorage.setItem("name", name);
  turn.vote = { id, name, cell };
  say(`Saved: ${count(saved.votes, "vote")} by ${name}. Press the button again to take it back.`);
}

async function ask(prompt) {
  const picked = chosen();
  if (!picked.length) return say("Choose a model first.", true);
  const wrong = [...document.querySelectorAll("#settings input[type=number]")]
    .find((one) => !one.value || one.validity.rangeUnderflow || one.validity.rangeOverflow);
  if (wrong) return say(`${wrong.parentElement.textContent.trim()} must be from ${wrong.min} to ${wrong.max}.`, true);
  say("");
  hint();
  const turn = { prompt, cells: [], vote: null };
  turn.bad = make("button", { type: "button", onclick: () => rate(turn, null) }, "All bad");
  const grid = make("ol", { className: "answers" });
  for (const i of picked) {
    const body = make("div", { className: "body" }, make("p", { className: "quiet" }, "waiting… (the first answer of each length compiles)"));
    turn.cells.push({ model: i, turn, text: "", body });
    grid.append(make("li", { className: "answer still" }, make("h2", {}, state.models[i].name), body));
  }
  const past = state.turns.length && picked.some((i) => state.models[i].remembers);
  $("#turns").append(make("section", { className: "turn", "aria-label": `Turn ${state.turns.length + 1}` },
    make("div", { className: "prompt" }, make("h2", {}, past ? "You, continued" : "You"), make("p", { className: "words" }, prompt)), grid, make("div", { hidden: true }, turn.bad)));
  state.turns.push(turn);
  const stop = (state.running = new AbortController());
  busy(true);
  scrollTo(0, document.body.scrollHeight);
  await Promise.all(turn.cells.map((cell) => answer(turn, cell, cell.model, stop.signal).catch((error) => {
    const words = error.name === "AbortError" ? "stopped" : error.message;
    cell.body.append(make("p", { className: "message bad" }, words));
  })));
  busy(false);
  scrollTo(0, document.body.scrollHeight);
}

function busy(on) {
  $("#send").disabled = on;
  $("#send").hidden = on;
  $("#stop").hidden = !on;
  $("#again").disabled = $("#new").disabled = on || !state.turns.length;
  if (!on) state.running = null;
}

function forget() {
  state.turns = [];
  views.clear();
  $("#turns").replaceChildren();
  busy(false);
  $("#words").focus();
}

// ---- rollouts ----

async function showRollout() {
  const found = await call("rollout", { name: $("#iteration").value });
  $("#about").textContent = `β = ${found.beta.toFixed(3)} reward units per nat; the first ${found.answers.length} answers, as the update saw them`;
  $("#answers").replaceChildren(...found.answers.map((one, n) => {
    const figures = Object.fromEntries(IN_ROLLOUTS.map((name) => [name, one[name]]));
    const facts = [`reward ${one.score.toFixed(2)}`, `log π/ρ ${(sum(one.logp) - sum(one.ref_logp)).toFixed(2)} nats`];
    if (!one.ended) facts.push("never ended");
    return make("section", { className: "answer still rollout", "aria-label": `Answer ${n + 1}` },
      make("p", { className: "words quiet" }, one.prompt), tokenView(`answer ${n + 1}`, one.tokens, figures),
      make("p", { className: "quiet facts" }, ...facts.map((fact) => make("span", {}, fact))),
      make("div", { className: "traces" }, trace("Value", one.value), trace("Return", one.return), trace("Advantage", one.advantage)));
  }));
}

function choosePaint(names) {
  const before = $("#paint").value;
  $("#paint").replaceChildren(...names.map((name) => make("option", { value: name }, PAINTS[name][0])), make("option", { value: "" }, "none"));
  $("#paint").value = names.includes(before) ? before : names[0];
}

const HINT = "Point at a token of an answer, or move to it with the arrow keys, to see its figures.";

const hint = () => $("#figures").replaceChildren(make("span", { className: "quiet hint" }, HINT));

function view(name) {
  hint();
  for (const other of ["chat", "rollouts"]) {
    $(`#${other}`).hidden = other !== name;
    $(`#tab-${other}`).setAttribute("aria-selected", String(other === name));
    $(`#tab-${other}`).tabIndex = other === name ? 0 : -1;
  }
  $("#ask").hidden = name !== "chat";
  choosePaint(name === "chat" ? IN_CHAT : IN_ROLLOUTS);
  repaint();
  if (name === "rollouts") showRollout().catch((error) => { $("#about").textContent = error.message; });
}

// ---- start ----

for (const name of ["chat", "rollouts"]) {
  $(`#tab-${name}`).addEventListener("click", () => view(name));
  $(`#tab-${name}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
    const other = name === "chat" ? "rollouts" : "chat";
    if (!$(`#tab-${other}`).disabled) view(other), $(`#tab-${other}`).focus();
  });
}
$("#paint").addEventListener("change", repaint);
$("#iteration").addEventListener("change", showRollout);
$("#settings").addEventListener("input", summarise);
$("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const words = $("#words").value.trim();
  if (!words || state.running) return;
  $("#words").value = "";
  ask(words);
});
$("#words").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("#ask").requestSubmit();
  }
});
$("#stop").addEventListener("click", () => state.running?.abort());
$("#again").addEventListener("click", () => {
  const last = state.turns.pop();
  $("#turns").lastChild.remove();
  ask(last.prompt);
});
$("#new").addEventListener("click", forget);

(async () => {
  try {
    const found = await call("models", {}, (text) => say(text, Boolean(text)));
    state.models = found.models;
    $("#models").replaceChildren(...found.models.map((one, i) => make("label", {},
      make("input", { type: "checkbox", value: String(i), checked: true }),
      ` ${one.name} `, make("span", { className: "quiet" }, `${one.layers} layers of ${one.width}${one.raw ? ", continues your text" : ""}`))));
    $("#top_k").replaceChildren(...found.top_k.map((k) => make("option", { value: String(k) }, k ? String(k) : "off")));
    $("#iteration").replaceChildren(...found.rollouts.map((name) => make("option", { value: name }, String(Number(name)))));
    $("#iteration").value = found.rollouts.at(-1) || "";
    $("#tab-rollouts").disabled = !found.rollouts.length;
    choosePaint(IN_CHAT);
    repaint();
    summarise();
    $("#words").focus();
  } catch (error) {
    say(error.message, true);
  }
})();
