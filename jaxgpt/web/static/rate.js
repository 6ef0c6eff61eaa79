// The page of a person who is the reward: one answer after another, one to five stars each.
"use strict";

const WORDS = ["bad", "poor", "fair", "good", "very good"];
let item = null, since = 0, busy = false, kept = null; // kept: stars given before the loop asked again

function say(text, bad = false) {
  $("#message").textContent = text;
  $("#message").className = bad ? "message bad" : "message";
}
const waiting = (text) => { if (text) say(text, true); };

function show(found) {
  $("#about").textContent = found.about;
  $("#count").textContent = found.of ? `${found.rated} of ${found.of} in this round` : "";
  $("#item").hidden = $("#tools").hidden = !found.item;
  if (found.item && found.item.id !== item?.id) since = performance.now();
  item = found.item;
  if (item) {
    $("#prompt").textContent = item.prompt;
    $("#answer").textContent = item.answer || "(an empty answer)";
    say("");
  } else {
    const soon = found.of ? "The model is learning from your stars, then it will ask again…" : "The model is writing its first answers…";
    say(found.finished ? "The run is done. Thank you!" : soon);
    if (!found.finished) setTimeout(refresh, 500);
  }
  if (kept && item) {
    const { id, stars } = kept;
    kept = null;
    if (id === item.id) setTimeout(() => rate(stars));
  }
}

const refresh = async () => show(await call("state", {}, waiting));

async function rate(stars) {
  if (!item || busy) return;
  busy = true;
  try {
    show(await call("rate", { id: item.id, stars, seconds: (performance.now() - since) / 1000 }, waiting));
  } catch (error) {
    if (error.status === 409) kept = { id: item.id, stars };
    say(error.message, true);
    item = null;
    setTimeout(refresh, 500);
  } finally {
    busy = false;
  }
}

$("#stars").append(...WORDS.map((word, i) => make("button", {
  type: "button", "aria-label": `${i + 1} stars: ${word}`, "aria-keyshortcuts": String(i + 1), onclick: (event) => { if (event.detail < 2) rate(i + 1); },
}, `${"★".repeat(i + 1)} ${word}`, make("kbd", {}, String(i + 1)))));
document.addEventListener("keydown", (event) => {
  if (/^[1-5]$/.test(event.key) && !event.repeat && !event.ctrlKey && !event.metaKey && !event.altKey) rate(Number(event.key));
});
refresh().catch((error) => say(error.message, true));
