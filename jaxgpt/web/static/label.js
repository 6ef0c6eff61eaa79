// The page on which people rank answers. An unconfirmed vote is kept in localStorage and sent again under the same id,
// so that neither a closed page nor a server that goes away loses or doubles it.
"use strict";

const state = { task: null, ranking: null, tied: false, busy: false, since: 0, hidden: 0, edited: null };
const outbox = {
  get: () => JSON.parse(localStorage.getItem("vote") || "null"),
  set: (vote) => (vote ? localStorage.setItem("vote", JSON.stringify(vote)) : localStorage.removeItem("vote")),
};
const myName = () => localStorage.getItem("name") || "";

function say(text, bad = false) {
  $("#message").textContent = text;
  $("#message").className = bad ? "message bad" : "message";
}

const percent = (x) => `${Math.round(100 * x)} %`;

function showStats(stats) {
  const parts = [`${stats.mine} done`, `${stats.waiting} waiting for you`];
  if (stats.seconds !== null) parts.push(`${stats.seconds.toFixed(1)} s each`);
  if (stats.with_myself) parts.push(`same choice when asked again: ${percent(stats.with_myself.same)}`);
  if (stats.with_others) parts.push(`annotators agree: ${percent(stats.with_others.same)} (chance ${percent(stats.with_others.chance)})`);
  $("#stats").replaceChildren(...parts.map((text) => make("span", {}, text)));
}

function card(answer, place) {
  const number = place + 1;
  const choose = make("button", {
    type: "button", className: "choose", "aria-keyshortcuts": String(number),
    "aria-label": `Answer ${number} is the best`,
    onclick: (event) => { event.stopPropagation(); if (event.detail < 2) pick(place); },
  }, "Best", make("kbd", {}, String(number)));
  const edit = make("button", {
    type: "button", "aria-label": `Edit a copy of answer ${number}`,
    onclick: (event) => { event.stopPropagation(); openEditor(answer); },
  }, "Edit");
  const words = make("p", { className: "words" }, answer.text || "(an empty answer)");
  const item = make("li", { className: "answer", onclick: (event) => { if (event.detail < 2 && !String(getSelection())) pick(place); } }, words);
  if (!answer.ended) item.append(make("p", { className: "cut" }, "… cut off here"));
  item.append(make("div", { className: "row" }, choose, edit, make("span", { className: "place", "aria-live": "polite" })));
  return item;
}

function show(found) {
  showStats(found.stats);
  state.task = found.task;
  if (found.task) $("#answers").replaceChildren(...found.task.answers.map(card));
  stopRanking();
  $("#task").hidden = $("#tools").hidden = !found.task;
  $("#tools").classList.toggle("idle", !found.task);
  if (!found.task) {
    $("#tools").hidden = found.stats.mine === 0;
    const others = found.stats.waiting ? "Others have the remaining prompts; this page continues when there are more." : "";
    say(found.preparing ? `Waiting for answers: ${found.preparing}` : others || "All prompts are done. Thank you!");
    setTimeout(() => { if (!state.task && !state.busy) refresh(); }, 1500);
    return;
  }
  $("#prompt").textContent = found.task.prompt;
  state.since = performance.now();
  state.hidden = 0;
  scrollTo(0, 0);
}

async function during(work) {
  if (state.busy) return;
  state.busy = true;
  for (const button of document.querySelectorAll("#tools button, .choose")) button.disabled = true;
  try {
    await work();
  } catch (error) {
    say(error.message, true);
  } finally {
    state.busy = false;
    for (const button of document.querySelectorAll("#tools button, .choose")) button.disabled = false;
  }
}

const waiting = (text) => { if (text) say(text, true); else if ($("#message").classList.contains("bad")) say(""); };

async function deliver() {
  const vote = outbox.get();
  if (!vote) return null;
  try {
    const found = await call("vote", vote, waiting);
    outbox.set(null);
    return found;
  } catch (error) {
    if (error.status !== 401) outbox.set(null); // refused for good; without the token (401) the vote waits for a page that has it
    throw error;
  }
}

const refresh = () => during(async () => {
  await deliver();
  const found = await call("next", { annotator: myName() }, waiting);
  if (found.task) say("");
  show(found);
});

function decide(kind, tiers) {
  if (!state.task || state.busy) return;
  const shown = state.task.answers.map((answer) => answer.index);
  const seconds = Math.max(0, (performance.now() - state.since - state.hidden) / 1000);
  outbox.set({ id: newId(), task: state.task.id, annotator: myName(), kind, tiers, shown, seconds });
  during(async () => {
    const found = await deliver();
    say("Saved.");
    show(found);
  });
}

const all = () => [state.task.answers.map((answer) => answer.index)];

function pick(place) {
  if (!state.task || state.busy || place >= state.task.answers.length) return;
  const index = state.task.answers[place].index;
  if (!state.ranking) {
    decide("favourite", [[index], all()[0].filter((other) => other !== index)]);
    return;
  }
  if (state.ranking.flat().includes(index)) return;
  if (state.tied && state.ranking.length) state.ranking.at(-1).push(index);
  else state.ranking.push([index]);
  setTied(false);
  if (state.ranking.flat().length === state.task.answers.length) finishRanking();
  else showPlaces();
}

/** The answers without a place share the last one. */
function finishRanking() {
  const left = all()[0].filter((other) => !state.ranking.flat().includes(other));
  const tiers = left.length ? [...state.ranking, left] : state.ranking;
  decide(tiers.length === 1 ? "tie" : "ranking", tiers);
}

function showPlaces() {
  const places = document.querySelectorAll(".answer .place");
  state.task.answers.forEach((answer, i) => {
    const tier = state.ranking ? state.ranking.findIndex((group) => group.includes(answer.index)) : -1;
    places[i].textContent = tier < 0 ? "" : `place ${tier + 1}`;
    const item = places[i].closest(".answer");
    item.classList.toggle("placed", tier >= 0);
    item.querySelector(".choose").firstChild.textContent = state.ranking ? "Next" : "Best";
  });
}

function unplace() {
  state.ranking.at(-1).pop();
  if (!state.ranking.at(-1).length) state.ranking.pop();
  setTied(false);
  showPlaces();
}

function setTied(on) {
  state.tied = on;
  $("#equal").setAttribute("aria-pressed", String(on));
}

function startRanking() {
  if (!state.task) return;
  state.ranking = [];
  $("#rank").setAttribute("aria-pressed", "true");
  $("#equal").hidden = $("#rest").hidden = false;
  showPlaces();
  say("Ranking: pick the best, then the next best, and so on. Enter: the rest share the last place.");
}

function stopRanking() {
  state.ranking = null;
  setTied(false);
  $("#rank").setAttribute("aria-pressed", "false");
  $("#equal").hidden = $("#rest").hidden = true;
  if ($("#message").textContent.startsWith("Ranking")) say("");
  if (state.task) showPlaces();
}

/** Takes back the last place of a ranking or, outside one, the last vote. */
const undo = () => (state.ranking?.length ? unplace() : during(async () => {
  const found = await call("undo", { annotator: myName(), id: newId() }, waiting);
  show(found);
  say("Your last vote was taken back; here is its prompt again.");
}));

function openEditor(answer = null) {
  if (!state.task) return;
  state.edited = answer ? answer.index : null;
  $("#text").value = answer ? answer.text : "";
  $("#editor").showModal();
  $("#text").focus();
}

const addAnswer = () => during(async () => {
  const data = { annotator: myName(), task: state.task.id, id: newId(), text: $("#text").value };
  if (state.edited !== null) data.edited = state.edited;
  $("#editor").close();
  show(await call("answer", data, waiting));
  say("Your answer has been added.");
});

function begin() {
  $("#start").hidden = Boolean(myName());
  $("#who").textContent = myName();
  $("#change").hidden = !myName();
  if (myName()) refresh();
  else $("#name").focus();
}

const ACTIONS = {
  t: () => state.task && decide("tie", all()),
  x: () => state.task && decide("bad", all()),
  s: () => state.task && decide("skip", all()),
  r: () => (state.ranking ? stopRanking() : startRanking()),
  "=": () => state.ranking && state.ranking.length && setTied(!state.tied),
  enter: () => state.ranking && state.ranking.length && finishRanking(),
  escape: () => state.ranking && stopRanking(),
  w: () => openEditor(),
  u: undo,
  "?": () => $("#keys").showModal(),
};

const BUTTONS = { tie: "t", bad: "x", skip: "s", rank: "r", equal: "=", rest: "enter", write: "w", undo: "u", help: "?" };
for (const [id, key] of Object.entries(BUTTONS)) {
  $(`#${id}`).addEventListener("click", (event) => { if (event.detail < 2 || id === "undo") ACTIONS[key](); });
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.target.matches("input, textarea") || (event.key === "Enter" && event.target.matches("button")) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (document.querySelector("dialog[open]")) return;
  const key = event.key.toLowerCase();
  if (/^[1-9]$/.test(key)) pick(Number(key) - 1);
  else if (ACTIONS[key] && myName()) ACTIONS[key]();
  else return;
  event.preventDefault();
});

let hiddenAt = 0;
document.addEventListener("visibilitychange", () => {
  if (document.hidden) hiddenAt = performance.now();
  else if (hiddenAt) state.hidden += performance.now() - hiddenAt;
});

$("#begin").addEventListener("submit", (event) => {
  event.preventDefault();
  localStorage.setItem("name", $("#name").value.trim());
  begin();
});
$("#change").addEventListener("click", () => {
  localStorage.removeItem("name");
  $("#task").hidden = $("#tools").hidden = true;
  begin();
});
$("#editor-form").addEventListener("submit", (event) => { event.preventDefault(); addAnswer(); });
$("#text").addEventListener("keydown", (event) => { if (event.key === "Enter" && event.ctrlKey) $("#editor-form").requestSubmit(); });
$("#cancel").addEventListener("click", () => $("#editor").close());
$("#close-keys").addEventListener("click", () => $("#keys").close());
begin();
