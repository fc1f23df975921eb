/** The page: what is chosen, asked and looked at. */

import * as api from "./api.js";
import { drawCard } from "./card.js";
import { Light } from "./light.js";
import { openPicture } from "./picture.js";
import { Turn, part } from "./turn.js";
import { figures } from "./words.js";

const PACE = 220; // milliseconds a token is looked at, at least, so that an eye can follow a fast model
const REPLAY = 700; // milliseconds of a token in a replay; long answers go faster
const LONGEST_REPLAY = 8000;

const by = (id) => document.getElementById(id);
const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const still = matchMedia("(prefers-reduced-motion: reduce)");
const light = new Light(by("light"));

let model = null; // as the server lists it
let picture = null; // of picture.js
let suggested = []; // questions of this picture, with answers where they are known
let turns = []; // of this picture
let turn = null; // the one that is looked at
let index = null; // its token, null for the whole answer
let on = new Set(); // layers that count
let asking = null; // AbortController of the request that runs
let playing = 0; // timer
let again = null; // what "Ask again" does

// --- the server -----------------------------------------------------------------------------------------------------

async function connect() {
  hideProblem();
  try {
    model = await api.model();
  } catch (problem) {
    return showProblem(problem, connect);
  }
  const { pages, page_budget: budget, layers, conversation, scenes, backend, device } = model.flex;
  by("model").textContent = [model.id, backend, device].filter(Boolean).join(" · ");
  Object.assign(by("budget"), { max: pages, value: budget });
  showBudget();
  on = new Set(layers);
  by("layer-list").replaceChildren(...layers.map(layerButton));
  by("alone").hidden = conversation;
  by("scene").hidden = !scenes;
  try {
    await showExamples();
  } catch (problem) {
    showProblem(problem, connect);
  }
}

async function showExamples() {
  const rows = await api.examples();
  const images = [...new Set(rows.map((row) => row.image))];
  const items = await Promise.all(
    images.map(async (image) => {
      const found = await api.blob(image);
      const name = image.split("/").at(-1).replace(/\.\w+$/, "");
      const thumbnail = Object.assign(part("img", ""), { src: URL.createObjectURL(found), alt: "" });
      const button = Object.assign(part("button", "thumbnail"), { type: "button" });
      button.setAttribute("aria-label", `Example picture: ${name}`);
      button.append(thumbnail);
      button.addEventListener("click", () => usePicture(found, name, rows.filter((row) => row.image === image)));
      const item = part("li", "");
      item.append(button);
      return item;
    }),
  );
  by("examples").replaceChildren(...items);
}

// --- a picture ------------------------------------------------------------------------------------------------------

/** @param {Blob} blob @param {string} name @param {{question: string, answer?: string}[]} [questions] */
async function usePicture(blob, name, questions = []) {
  hideProblem();
  let opened;
  try {
    opened = await openPicture(blob, name);
  } catch (problem) {
    return showProblem(problem);
  }
  asking?.abort();
  pause();
  if (picture) URL.revokeObjectURL(picture.url);
  [picture, suggested, turns, turn, index] = [opened, questions, [], null, null];
  document.body.classList.remove("empty");
  by("welcome").hidden = true;
  by("stage").hidden = by("controls").hidden = false;
  by("picture").src = picture.url;
  by("picture").alt = `The picture you ask about: ${name}`;
  by("frame").style.setProperty("--ratio", picture.width / picture.height);
  by("turns").replaceChildren();
  by("figures").textContent = picture.note;
  by("replay").hidden = true;
  light.show(null);
  by("caption").textContent = "";
  by("light").setAttribute("aria-label", "Nothing is lit yet: ask a question");
  showSuggestions();
  const first = suggested.find((row) => row.question.includes(" and ")) ?? suggested[0];
  by("question").value = first?.question ?? "";
  fitQuestion();
  if (matchMedia("(hover: hover)").matches) by("question").focus();
  else scrollTo({ top: 0 });
}

function showSuggestions() {
  by("suggestions").hidden = !suggested.length;
  by("suggestions").replaceChildren(
    ...suggested.map(({ question }) => {
      const button = Object.assign(part("button", "suggestion", question), { type: "button" });
      button.addEventListener("click", () => ask(question));
      return button;
    }),
  );
}

async function drawScene() {
  const button = by("scene");
  button.disabled = true;
  button.textContent = "Drawing …";
  try {
    const scene = await api.scene();
    await usePicture(scene.image, `scene ${scene.seed}`, scene.questions);
  } catch (problem) {
    showProblem(problem, drawScene);
  }
  button.disabled = false;
  button.textContent = "Draw a new scene";
}

// --- a question -----------------------------------------------------------------------------------------------------

/** @param {string} question @param {{forget?: boolean}} [how] `forget`: leave the earlier turns out */
async function ask(question, { forget = false } = {}) {
  question = question.trim();
  if (!picture || !question || asking) return;
  hideProblem();
  pause();
  const budget = Number(by("budget").value);
  const expected = suggested.find((row) => row.question === question)?.answer;
  const history = model?.flex.conversation && !forget ? turns.filter((each) => each.state === "done") : [];
  if (forget) turns.splice(0);
  const current = new Turn(question, { budget, expected }, { look });
  turns.push(current);
  by("turns").append(current.element);
  current.element.scrollIntoView({ block: "nearest", behavior: still.matches ? "auto" : "smooth" });
  look(current, null);
  by("question").value = "";
  fitQuestion();
  asking = new AbortController();
  setAnswering(true);
  try {
    await stream(current, messages(history, question), budget, asking.signal);
    settle(current);
  } catch (problem) {
    fail(current, problem);
  }
  asking = null;
  setAnswering(false);
}

/** The picture stands in the first question, as clients of the API send it. @param {Turn[]} history @param {string} question */
function messages(history, question) {
  const texts = [...history.flatMap((each) => [each.question, each.text.trim()]), question];
  return texts.map((text, place) => ({
    role: place % 2 ? "assistant" : "user",
    content: place ? text : [{ type: "image_url", image_url: { url: picture.data } }, { type: "text", text }],
  }));
}

/** Tokens are taken as they come, and shown at a pace an eye can follow. */
async function stream(current, asked, budget, signal) {
  const arrived = [];
  let ended = false;
  let failure = null;
  let wake = () => {};
  const flex = { selection: true, page_budget: budget };
  const reading = (async () => {
    try {
      for await (const chunk of api.complete({ model: model?.id, messages: asked, flex }, signal)) arrived.push(chunk), wake();
    } catch (error) {
      failure = error;
    }
    ended = true;
    wake();
  })();
  for (;;) {
    const chunk = arrived.shift();
    if (chunk) {
      if (take(current, chunk) && !still.matches) await sleep(Math.min(PACE, 2400 / (arrived.length + 1)));
    } else if (ended) break;
    else await new Promise((resolve) => (wake = resolve));
    if (signal.aborted) break;
  }
  await reading;
  if (failure) throw failure;
}

/** @returns {boolean} whether it was a token that lights something up */
function take(current, { choices: [choice], flex }) {
  if (!choice && !flex) return false; // a chunk of usage
  if (flex?.layers) current.begin(flex);
  if (flex?.stats) current.stats = flex.stats;
  if (choice?.finish_reason) current.finish = choice.finish_reason;
  const text = choice?.delta?.content ?? "";
  if (!text && !flex?.cells) return false;
  const following = turn === current && (index === null || index === current.tokens.length - 1);
  current.add({ text, cells: flex?.cells });
  if (flex?.cells && following) look(current, current.tokens.length - 1);
  return Boolean(flex?.cells);
}

/** @param {Turn} current whose answer is whole */
function settle(current) {
  const answer = current.text.trim();
  const right = current.expected === answer;
  let remark = current.finish === "length" ? "Cut off: the answer was as long as it may be. " : "";
  if (current.expected) remark += right ? "✓ right" : `✗ the picture says: ${current.expected}`;
  current.end("done", remark);
  current.remark.classList.toggle("right", right);
  addTools(current);
  by("announce").textContent = `Answer: ${answer || "no text"}. ${current.words(null, on)}`;
  if (turn === current && index === current.tokens.length - 1) {
    setTimeout(() => turn === current && index === current.tokens.length - 1 && !focusIsOnToken() && look(current, null), still.matches ? 0 : 900);
  }
  showMoment();
}

/** @param {Turn} current @param {Error} problem */
function fail(current, problem) {
  const stopped = problem.name === "AbortError";
  const tokens = current.tokens.length;
  current.end(stopped ? "stopped" : "failed", stopped ? "Stopped." : tokens ? "Not answered to its end." : "Not answered.");
  if (tokens) look(current, null);
  if (stopped) {
    by("announce").textContent = "Stopped.";
    return;
  }
  if (!tokens) {
    current.element.remove();
    turns = turns.filter((each) => each !== current);
    if (turn === current) look(turns.at(-1) ?? null, null);
  }
  if (!by("question").value) by("question").value = current.question;
  fitQuestion();
  showProblem(problem, () => ask(current.question), () => ask(current.question, { forget: true }));
}

function setAnswering(yes) {
  document.body.classList.toggle("answering", yes);
  by("stop").hidden = !yes;
  by("ask").hidden = yes;
  for (const button of by("suggestions").children) button.disabled = yes;
}

/** @param {Turn} current */
function addTools(current) {
  const button = (text, action) => {
    const made = Object.assign(part("button", "quiet", text), { type: "button" });
    made.addEventListener("click", () => action(made));
    current.tools.append(made);
  };
  const card = () => drawCard(by("picture"), current, turn === current ? index : null, on, model.id);
  if (navigator.clipboard?.write && window.ClipboardItem) {
    button("Copy as picture", async (made) => {
      try {
        await navigator.clipboard.write([new ClipboardItem({ "image/png": card() })]);
        made.textContent = "Copied";
      } catch {
        made.textContent = "This browser does not allow it: save it instead";
      }
      setTimeout(() => (made.textContent = "Copy as picture"), 2500);
    });
  }
  button("Save as picture", async () => {
    const url = URL.createObjectURL(await card());
    Object.assign(document.createElement("a"), { href: url, download: "where-it-looks.png" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  });
  button("Ask again", () => ask(current.question));
}

// --- looking --------------------------------------------------------------------------------------------------------

/** @param {Turn | null} which @param {number | null} place of the token; null: the whole answer */
function look(which, place) {
  const readers = turn;
  if (turn && turn !== which) turn.mark(null, on), turn.element.classList.remove("current");
  readers?.markReaders(null, on);
  [turn, index] = [which, place];
  turn?.element.classList.add("current");
  turn?.mark(index, on);
  showMoment();
}

function showMoment() {
  const count = turn?.tokens.length ?? 0;
  by("replay").hidden = !count;
  const words = count ? turn.words(index, on) : turn ? "Looking …" : "";
  light.show(count ? turn.share(index, on) : null);
  by("caption").textContent = words;
  by("light").setAttribute("aria-label", words || "Nothing is lit yet: ask a question");
  by("figures").textContent = turn?.stats ? figures(turn.stats, model.flex.pages) : (picture?.note ?? "");
  const time = by("time");
  Object.assign(time, { max: count, value: index ?? count });
  const moment = index === null ? "whole answer" : `${index + 1} of ${count}`;
  by("moment").textContent = moment;
  time.setAttribute("aria-valuetext", words);
  by("before").disabled = index === 0;
  by("after").disabled = index === null;
}

/** One token on or back; the whole answer stands behind the last. @param {number} by_ */
function walk(by_) {
  if (!turn?.tokens.length) return;
  const count = turn.tokens.length;
  const next = Math.max(0, Math.min(count, (index ?? count) + by_));
  const focus = focusIsOnToken();
  if (focus && next < count) turn.options()[next].focus();
  else if (!focus) look(turn, next === count ? null : next);
}

function focusIsOnToken() {
  return document.activeElement?.classList.contains("token") ?? false;
}

function play() {
  if (playing) return pause();
  if (!turn?.tokens.length) return;
  const step = Math.max(120, Math.min(REPLAY, LONGEST_REPLAY / turn.tokens.length));
  by("play").textContent = "Pause";
  const next = (place) => {
    look(turn, place);
    playing = setTimeout(() => (place + 1 < turn.tokens.length ? next(place + 1) : (pause(), look(turn, null))), step);
  };
  next(index === null ? 0 : index + 1 < turn.tokens.length ? index : 0);
}

function pause() {
  clearTimeout(playing);
  playing = 0;
  by("play").textContent = "Play";
}

/** Which tokens read the place under the pointer. @param {PointerEvent} event */
function point(event) {
  if (!turn?.tokens.length || !picture) return;
  const box = by("light").getBoundingClientRect();
  const side = Math.max(box.width, box.height);
  const [x, y] = [event.clientX - box.left + (side - box.width) / 2, event.clientY - box.top + (side - box.height) / 2];
  const [column, row] = [x, y].map((at) => Math.min(turn.grid - 1, Math.max(0, Math.floor((at / side) * turn.grid))));
  const readers = turn.markReaders(row * turn.grid + column, on);
  const names = readers.map((token) => token.text.trim()).filter(Boolean);
  const who = readers.length ? `read for ${names.length ? names.map((name) => `“${name}”`).join(", ") : "the end"}` : "not read";
  by("caption").textContent = `Row ${row + 1}, column ${column + 1}: ${who}`;
}

// --- what counts ----------------------------------------------------------------------------------------------------

/** @param {number} layer */
function layerButton(layer) {
  const button = Object.assign(part("button", "layer", String(layer)), { type: "button" });
  button.setAttribute("aria-label", `Layer ${layer}`);
  button.setAttribute("aria-pressed", "true");
  button.addEventListener("click", () => setLayers(on.has(layer) ? [...on].filter((each) => each !== layer) : [...on, layer]));
  return button;
}

/** @param {Iterable<number>} layers that count from now on */
function setLayers(layers) {
  on = new Set(layers);
  model.flex.layers.forEach((layer, place) => by("layer-list").children[place].setAttribute("aria-pressed", String(on.has(layer))));
  if (turn) look(turn, index);
}

function showBudget() {
  by("budget-value").textContent = `${by("budget").value} of ${by("budget").max}`;
}

// --- problems -------------------------------------------------------------------------------------------------------

/**
 * @param {api.Problem} problem
 * @param {() => void} [retry] @param {() => void} [withoutHistory]
 */
function showProblem(problem, retry, withoutHistory) {
  const locked = problem.status === 401;
  const wait = problem.status === 429 || problem.status === 503 ? problem.retryAfter : 0;
  by("problem-found").textContent = problem.message;
  by("problem-expected").textContent = problem.expected ? `Expected: ${problem.expected}` : "";
  by("problem-fix").textContent = problem.fix || (wait ? `Ask again in ${wait} s.` : "");
  for (const id of ["problem-expected", "problem-fix"]) by(id).hidden = !by(id).textContent;
  by("key-form").hidden = !locked;
  by("retry").hidden = !retry || locked;
  by("forget").hidden = !(withoutHistory && problem.status === 400 && model?.flex.conversation && turns.length);
  by("problem").hidden = false;
  again = { retry, withoutHistory };
  if (locked) by("key").focus();
  if (wait) countDown(wait);
}

/** The queue is full: ask again when it may have room. @param {number} seconds */
async function countDown(seconds) {
  const button = by("retry");
  const mine = again;
  button.disabled = true;
  for (let left = Math.min(seconds, 120); left > 0 && again === mine; left--) {
    button.textContent = `Ask again in ${left} s`;
    await sleep(1000);
  }
  if (again === mine || again === null) Object.assign(button, { disabled: false, textContent: "Ask again" });
}

function hideProblem() {
  again = null;
  by("problem").hidden = true;
  Object.assign(by("retry"), { disabled: false, textContent: "Ask again" });
}

// --- wiring ---------------------------------------------------------------------------------------------------------

function fitQuestion() {
  const field = by("question");
  field.style.height = "auto";
  field.style.height = `${Math.min(160, field.scrollHeight + 2)}px`;
}

/** @param {FileList | File[]} files */
function useFiles(files) {
  const file = files[0];
  if (file) usePicture(file, file.name || "the pasted picture");
}

const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  localStorage.setItem("flex-theme", theme);
  document.documentElement.dataset.theme = theme;
  by("theme").textContent = `Theme: ${theme}`;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const writing = event.target.matches("textarea, input:not([type=range])");
  if (event.key === "Escape") {
    if (asking) asking.abort();
    else if (turn) pause(), focusIsOnToken() && document.activeElement.blur(), look(turn, null);
    return;
  }
  if (writing) return;
  if (event.key === "/") by("question").focus();
  else if (event.key === " " && !event.target.matches("button, input, a")) play();
  else if ((event.key === "ArrowLeft" || event.key === "ArrowRight") && !event.target.matches("input")) {
    pause();
    walk(event.key === "ArrowLeft" ? -1 : 1);
  } else if ((event.key === "Home" || event.key === "End") && focusIsOnToken()) turn.options().at(event.key === "Home" ? 0 : -1).focus();
  else return;
  event.preventDefault();
}

function wire() {
  by("composer").addEventListener("submit", (event) => (event.preventDefault(), ask(by("question").value)));
  by("question").addEventListener("input", fitQuestion);
  by("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), ask(by("question").value);
  });
  by("stop").addEventListener("click", () => asking?.abort());
  by("choose").addEventListener("click", () => by("file").click());
  by("photograph").addEventListener("click", () => by("camera").click());
  for (const id of ["file", "camera"]) by(id).addEventListener("change", (event) => (useFiles(event.target.files), (event.target.value = "")));
  by("scene").addEventListener("click", drawScene);
  by("play").addEventListener("click", play);
  by("before").addEventListener("click", () => (pause(), walk(-1)));
  by("after").addEventListener("click", () => (pause(), walk(1)));
  by("time").addEventListener("input", (event) => (pause(), look(turn, Number(event.target.value) < turn.tokens.length ? Number(event.target.value) : null)));
  by("budget").addEventListener("input", showBudget);
  by("layers-all").addEventListener("click", () => setLayers(model.flex.layers));
  by("layers-none").addEventListener("click", () => setLayers([]));
  by("light").addEventListener("pointermove", point);
  by("light").addEventListener("pointerleave", () => (turn?.markReaders(null, on), showMoment()));
  by("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % 3]));
  by("dismiss").addEventListener("click", hideProblem);
  by("retry").addEventListener("click", () => again?.retry());
  by("forget").addEventListener("click", () => again?.withoutHistory());
  by("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    api.useKey(by("key").value.trim());
    by("key").value = "";
    const retry = again?.retry;
    hideProblem();
    retry?.();
  });
  document.addEventListener("keydown", onKey);
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) event.preventDefault(), useFiles(event.clipboardData.files);
  });
  document.addEventListener("dragover", (event) => (event.preventDefault(), (by("drop").hidden = false)));
  document.addEventListener("dragleave", (event) => event.relatedTarget ?? (by("drop").hidden = true));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    by("drop").hidden = true;
    useFiles(event.dataTransfer.files);
  });
}

setTheme(THEMES.find((theme) => theme === localStorage.getItem("flex-theme")) ?? "auto");
wire();
connect();
