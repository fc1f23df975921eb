/** The page: the server, the picture, and the keys that lead through it. */

import * as api from "./api.js";
import { Conversation } from "./conversation.js";
import { inBrowser } from "./kept.js";
import { Looking } from "./looking.js";
import { openPicture } from "./picture.js";
import { hideProblem, showProblem } from "./problems.js";
import { part } from "./turn.js";

const THEMES = ["auto", "light", "dark"];
const THEME = "flex-theme";

const by = (id) => document.getElementById(id);
const looking = new Looking();
const conversation = new Conversation(looking, connect);
let choices = 0; // of pictures: one that is there late does not take the place of what was chosen after it

/** Ask the server what it has, and offer it. */
async function connect() {
  hideProblem(); // before, not after: what is told meanwhile stays
  try {
    const model = await api.model();
    conversation.model = model;
    const { pages, page_budget: budget, layers, backend, precision, device } = model.flex;
    by("model").textContent = [model.id, backend, precision, device].filter(Boolean).join(" · ");
    Object.assign(by("budget"), { max: pages, value: budget });
    showBudget();
    looking.useLayers(layers);
    by("alone").hidden = model.flex.conversation;
    by("scene").hidden = !model.flex.scenes;
    showExamples(await api.examples());
  } catch (problem) {
    showProblem(problem, { again: connect });
  }
}

/** @param {{image: string, question: string, answer?: string, history?: [string, string][]}[]} rows */
function showExamples(rows) {
  const images = [...new Set(rows.map((row) => row.image))];
  by("or-example").hidden = !images.length;
  by("examples").replaceChildren(
    ...images.map((image) => {
      const name = image.split("/").at(-1).replace(/\.\w+$/, "");
      const button = Object.assign(part("button", "thumbnail"), { type: "button", disabled: true });
      button.setAttribute("aria-label", `Example picture: ${name}`);
      fillThumbnail(button, image, name, rows.filter((row) => row.image === image));
      const item = part("li", "");
      item.append(button);
      return item;
    }),
  );
}

async function fillThumbnail(button, image, name, rows) {
  let found;
  try {
    found = await api.exampleImage(image);
  } catch (problem) {
    showProblem(problem, { again: connect });
    return;
  }
  button.append(Object.assign(part("img", ""), { src: URL.createObjectURL(found), alt: "" }));
  button.addEventListener("click", () => usePicture(found, name, rows));
  button.disabled = false;
}

/**
 * @param {Blob} blob @param {string} name @param {{question: string, answer?: string}[]} [questions] to start with
 * @param {number} [choice] which it is of the `choices`
 */
async function usePicture(blob, name, questions = [], choice = ++choices) {
  let picture;
  try {
    picture = await openPicture(blob, name);
  } catch (problem) {
    if (choice === choices) showProblem(problem);
    return;
  }
  if (choice !== choices) {
    URL.revokeObjectURL(picture.url);
    return;
  }
  hideProblem();
  document.body.classList.remove("empty");
  by("welcome").hidden = true;
  by("stage").hidden = by("controls").hidden = false;
  Object.assign(by("picture"), { src: picture.url, alt: `The picture you ask about: ${name}` });
  by("frame").style.setProperty("--ratio", String(picture.width / picture.height));
  by("note").textContent = picture.note;
  if (conversation.picture) URL.revokeObjectURL(conversation.picture.url);
  conversation.begin(picture, questions);
  if (matchMedia("(hover: hover)").matches) by("question").focus();
  else scrollTo({ top: 0 }); // no keyboard over the picture before it was seen
}

async function drawScene() {
  const button = by("scene");
  const choice = ++choices;
  Object.assign(button, { disabled: true, textContent: "Drawing …" });
  try {
    const scene = await api.scene();
    await usePicture(scene.image, `scene ${scene.seed}`, scene.questions, choice);
  } catch (problem) {
    if (choice === choices) showProblem(problem, { again: drawScene });
  }
  Object.assign(button, { disabled: false, textContent: "Draw a new scene" });
}

/** @param {FileList} files */
function useFiles(files) {
  if (files[0]) usePicture(files[0], files[0].name || "the pasted picture");
}

function showBudget() {
  by("budget-value").textContent = `${by("budget").value} of ${by("budget").max}`;
}

/** @param {string} theme one of THEMES */
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  by("theme").textContent = `Theme: ${theme}`;
  inBrowser.setItem(THEME, theme);
}

/** @param {KeyboardEvent} event */
function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { key, target } = event;
  if (key === "Escape") {
    if (conversation.asking) conversation.stop();
    else looking.stepBack();
    return;
  }
  const writes = target.matches("textarea, input:not([type=range])");
  const slides = target.matches("input[type=range]");
  const presses = target.matches("button, a");
  const arrow = { ArrowLeft: -1, ArrowRight: 1 }[key];
  const end = { Home: 0, End: -1 }[key];
  if (writes) return;
  if (key === "/") by("question").focus();
  else if (key === " " && !slides && !presses) looking.play();
  else if (arrow && !slides) looking.walk(arrow);
  else if (end !== undefined && target.matches(".token")) looking.turn.options().at(end).focus();
  else return;
  event.preventDefault();
}

function wire() {
  by("choose").addEventListener("click", () => by("file").click());
  by("photograph").addEventListener("click", () => by("camera").click());
  for (const input of [by("file"), by("camera")]) {
    input.addEventListener("change", () => {
      useFiles(input.files);
      input.value = ""; // so that the same file can be chosen again
    });
  }
  by("scene").addEventListener("click", drawScene);
  by("budget").addEventListener("input", showBudget);
  by("theme").addEventListener("click", () => {
    setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
  });
  document.addEventListener("keydown", onKey);
  document.addEventListener("paste", (event) => {
    const { files, types } = event.clipboardData;
    const text = types.includes("text/plain") && event.target.matches("textarea, input");
    if (!files.length || text) return;
    event.preventDefault();
    useFiles(files);
  });
  const holdsFiles = (event) => event.dataTransfer.types.includes("Files"); // not a word that is moved
  document.addEventListener("dragover", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    by("drop").hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) by("drop").hidden = true;
  });
  document.addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    by("drop").hidden = true;
    useFiles(event.dataTransfer.files);
  });
}

setTheme(THEMES.find((theme) => theme === inBrowser.getItem(THEME)) ?? "auto");
wire();
connect();
