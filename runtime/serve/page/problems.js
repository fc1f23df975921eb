/** Where the page says what went wrong: what was found, what was expected, and what helps. */

import { hasKey, useKey } from "./api.js";

const LONGEST_WAIT = 120; // seconds that are counted down, whatever a server asks for
const BUSY = [429, 503];
const LOCKED = 401;

const by = (id) => document.getElementById(id);
let now = {}; // what the buttons do

/**
 * @param {import("./api.js").Problem} problem
 * @param {{again?: () => void, alone?: () => void}} [actions] asking again; and without the earlier turns
 */
export function showProblem(problem, actions = {}) {
  now = actions;
  const wait = BUSY.includes(problem.status) ? Math.min(problem.retryAfter, LONGEST_WAIT) : 0;
  const locked = problem.status === LOCKED; // said in words for a person: the server's are for a program
  const asked = hasKey() ? "This key is not the right one." : "This server asks for a key.";
  say("problem-found", locked ? asked : problem.message);
  say("problem-expected", !locked && problem.expected && `Expected: ${problem.expected}`);
  say("problem-fix", locked ? "Whoever runs it knows the key. It is kept until this tab is closed." : problem.fix);
  by("key-form").hidden = !locked;
  by("retry").hidden = !actions.again || locked;
  by("alone-once").hidden = !actions.alone || problem.status !== 400;
  by("problem").hidden = false;
  by("problem").scrollIntoView({ block: "nearest" });
  if (locked) by("key").focus();
  if (wait) countDown(wait, actions);
}

export function hideProblem() {
  now = {};
  by("problem").hidden = true;
  Object.assign(by("retry"), { disabled: false, textContent: "Try again" });
}

function say(id, words) {
  by(id).textContent = words || "";
  by(id).hidden = !words;
}

/** The queue is full: not again before it may have room. @param {number} seconds */
function countDown(seconds, mine) {
  if (now !== mine) return;
  const text = seconds > 0 ? `Try again in ${seconds} s` : "Try again";
  Object.assign(by("retry"), { disabled: seconds > 0, textContent: text });
  if (seconds > 0) setTimeout(() => countDown(seconds - 1, mine), 1000);
}

by("dismiss").addEventListener("click", hideProblem);
by("retry").addEventListener("click", () => now.again?.());
by("alone-once").addEventListener("click", () => now.alone?.());
by("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(by("key").value.trim());
  by("key").value = "";
  const { again } = now;
  hideProblem();
  again?.();
});
