// Shared by all pages: elements built from text only, and calls to the server.
"use strict";

const token = (() => {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem("token", given);
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem("token") || "";
})();

const $ = (selector) => document.querySelector(selector);

/** An element with properties and children; strings become text, never HTML. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && !name.includes("-")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const newId = () => [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");

class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(name, data, signal) {
  const headers = { "content-type": "application/json" };
  if (token) headers.authorization = `Bearer ${token}`;
  const response = await fetch(`/api/${name}`, { method: "POST", headers, body: JSON.stringify(data), signal });
  if (!response.ok) {
    const said = await response.json().catch(() => ({}));
    throw new Refusal(response.status, said.error || `the server answered ${response.status}`);
  }
  return response;
}

/** The answer to a call. Without a connection it retries until there is one: every call is safe to repeat. */
async function call(name, data, onWait = () => {}) {
  for (let wait = 300; ; wait = Math.min(wait * 1.6, 5000)) {
    try {
      const answer = await (await request(name, data)).json();
      onWait("");
      return answer;
    } catch (error) {
      if (error instanceof Refusal && error.status !== 429 && error.status < 500) throw error;
      onWait("No connection to the server. Nothing is lost; trying again…");
    }
    await new Promise((done) => setTimeout(done, wait));
  }
}
