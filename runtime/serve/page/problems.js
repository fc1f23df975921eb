/** Where the page says what went wrong: what was found, what was expected, and what helps. */

import { useKey } from "./api.js";

const LONGEST_WAIT = 120; // seconds that are counted down, whatever a server asks for
const BUSY = [429, 503];
const LOCKED = 401;

const by = (id) => document.getElementById(id);
let now = {}; // what the buttons do

/**
 * @param {import("./api.js").Problem} problem
 * @param {{again?: () => void, forget?: () => void}} [actions] asking again; and without the earlier turns
 */
export function showProblem(problem, actions = {}) {
  now = actions;
  const wait = BUSY.includes(problem.status) ? Math.min(problem.retryAfter, LONGEST_WAIT) : 0;
  say("problem-found", problem.message);
  say("problem-expected", problem.expected && `Expected: ${problem.expected}`);
  say("problem-fix", problem.fix);
  by("key-form").hidden = problem.status !== LOCKED;
  by("retry").hidden = !actions.again || problem.status === LOCKED;
  by("forget").hidden = !actions.forget || problem.status !== 400;
  by("problem").hidden = false;
  by("problem").scrollIntoView({ block: "nearest" });
  if (problem.status === LOCKED) by("key").focus();
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
by("forget").addEventListener("click", () => now.forget?.());
by("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(by("key").value.trim());
  by("key").value = "";
  const { again } = now;
  hideProblem();
  again?.();
});
