/** Questions about one picture, and their answers as they come. */

import { complete } from "./api.js";
import { drawCard } from "./card.js";
import { inBrowser } from "./kept.js";
import { focusIsOnToken } from "./looking.js";
import { hideProblem, showProblem } from "./problems.js";
import { Turn, part } from "./turn.js";
import { figures } from "./words.js";

const PACE = 220; // milliseconds a token is looked at, at least: an eye follows a fast model
const CATCH_UP = 2400; // milliseconds in which everything that has arrived is shown
const LINGER = 900; // on the last token, before the whole answer is lit
const TALLEST = 160; // pixels of the question's field
const FOLLOW = "flex-follow"; // whether questions are follow-ups, kept by the browser

const by = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");
const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

export class Conversation {
  /**
   * @param {import("./looking.js").Looking} looking
   * @param {() => Promise<void>} connect asks the server for its model
   */
  constructor(looking, connect) {
    this.looking = looking;
    this.connect = connect;
    /** @type {{id: string, flex: Object} | null} as the server lists it */
    this.model = null;
    /** @type {import("./picture.js").Picture | null} */
    this.picture = null;
    /** @type {{question: string, answer?: string, history?: [string, string][]}[]} `history`: of a follow-up */
    this.suggested = [];
    /** @type {Turn[]} */
    this.turns = [];
    this.connecting = false; // a question waits for the model
    /** @type {AbortController | null} of the request that runs */
    this.asking = null;
    by("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask(by("question").value);
    });
    by("question").addEventListener("input", () => fit(by("question")));
    by("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.ask(by("question").value);
    });
    by("stop").addEventListener("click", () => this.stop());
    by("follow").addEventListener("change", () => inBrowser.setItem(FOLLOW, by("follow").checked ? "yes" : ""));
    by("follow").checked = Boolean(inBrowser.getItem(FOLLOW));
  }

  /** Earlier turns that the next question can be sent with: whole ones. @returns {Turn[]} */
  get history() {
    return this.model?.flex.conversation ? this.turns.filter((turn) => turn.state === "done") : [];
  }

  tellHistory() {
    const count = this.history.length;
    by("history").hidden = !count;
    const before = count === 1 ? "question" : `${count} questions`;
    by("history-words").textContent = `As a follow-up: send the ${before} before along`;
  }

  /**
   * @param {import("./picture.js").Picture} picture
   * @param {{question: string, answer?: string, history?: [string, string][]}[]} rows questions to start with
   */
  begin(picture, rows) {
    const suggested = rows.filter((row) => !row.history || this.model?.flex.conversation);
    this.stop();
    this.looking.pause();
    this.looking.look(null, null);
    Object.assign(this, { picture, suggested, turns: [] });
    this.tellHistory();
    by("turns").replaceChildren();
    by("suggestions").hidden = !suggested.length;
    by("suggestions").replaceChildren(
      ...suggested.map((row) => {
        const text = [...(row.history ?? []).map(([before]) => before), row.question].join(" … ");
        const button = Object.assign(part("button", "suggestion", text), { type: "button" });
        button.dataset.question = row.question;
        button.addEventListener("click", () => this.askSuggested(row));
        return button;
      }),
    );
    const telling = suggested.find(({ question }) => question.includes(" and ")) ?? suggested[0]; // looks at two places
    this.write(telling?.question ?? "");
  }

  /** Ends the answer that runs; the server stops within one step. */
  stop() {
    this.asking?.abort();
  }

  /** @param {string} question into the field */
  write(question) {
    by("question").value = question;
    fit(by("question"));
  }

  /**
   * A follow-up's earlier questions are asked before it.
   * @param {{question: string, history?: [string, string][]}} row
   */
  async askSuggested({ question, history }) {
    if (!history) return this.ask(question);
    for (const [place, [before]] of history.entries()) {
      const count = this.turns.length;
      await this.ask(before, { after: place });
      if (this.turns.length === count || this.turns.at(-1).state !== "done") return; // stopped, or it failed
    }
    await this.ask(question, { after: history.length });
  }

  /**
   * @param {string} text
   * @param {{alone?: boolean, after?: number}} [how] `alone`: without earlier turns, this once; `after`: with so many
   */
  async ask(text, { alone = !by("follow").checked, after } = {}) {
    const question = text.trim();
    if (!question || !this.picture || this.asking || this.connecting) return;
    if (!this.model) {
      this.connecting = true; // it was not there when the page was opened
      await this.connect();
      this.connecting = false;
    }
    if (!this.model) return;
    hideProblem();
    this.looking.pause();
    const history = this.history.slice(this.history.length - (after ?? (alone ? 0 : this.history.length)));
    const follows = ({ history: said = [] }) =>
      said.every(([before], place) => history.at(place - said.length)?.question === before);
    const expected = this.suggested.find((row) => row.question === question && follows(row))?.answer;
    const turn = new Turn(question, this.looking, expected);
    this.turns.push(turn);
    by("turns").append(turn.element);
    this.looking.look(turn, null);
    turn.element.scrollIntoView({ block: "nearest", behavior: still.matches ? "auto" : "smooth" });
    this.write("");
    const asking = new AbortController();
    this.asking = asking;
    this.setAnswering(true);
    try {
      await this.stream(turn, history, asking.signal);
      this.settle(turn);
    } catch (problem) {
      this.fail(turn, problem, history);
    }
    if (this.asking === asking) {
      this.asking = null;
      this.setAnswering(false);
    }
    this.tellHistory();
  }

  /** Tokens are taken as they come, and shown at a pace that an eye can follow. */
  async stream(turn, history, signal) {
    const arrived = [];
    let [ended, failure, wake] = [false, null, () => {}];
    const request = {
      model: this.model.id,
      messages: this.messages(history, turn.question),
      flex: { selection: true, page_budget: Number(by("budget").value) },
    };
    const reading = (async () => {
      try {
        for await (const chunk of complete(request, signal)) {
          arrived.push(chunk);
          wake();
        }
      } catch (error) {
        failure = error;
      }
      ended = true;
      wake();
    })();
    while (arrived.length || !ended) {
      if (!arrived.length) await new Promise((resolve) => (wake = resolve));
      else if (this.take(turn, arrived.shift()) && !still.matches && !signal.aborted) {
        await sleep(Math.min(PACE, CATCH_UP / (arrived.length + 1)));
      }
    }
    await reading;
    if (failure) throw failure;
  }

  /** The picture stands in the first question, as clients of the API send it. */
  messages(history, question) {
    const texts = [...history.flatMap((turn) => [turn.question, turn.text.trim()]), question];
    const image = { type: "image_url", image_url: { url: this.picture.data } };
    return texts.map((text, place) => ({
      role: place % 2 ? "assistant" : "user",
      content: place ? text : [image, { type: "text", text }],
    }));
  }

  /** @returns {boolean} whether this chunk lit something up */
  take(turn, { choices: [choice] = [], flex = {} }) {
    if (flex.layers) turn.begin(flex);
    if (flex.stats) turn.stats = flex.stats;
    if (choice?.finish_reason) turn.finish = choice.finish_reason;
    const text = choice?.delta?.content ?? "";
    if (!text && !flex.cells) return false;
    const latest = turn.tokens.length ? turn.tokens.length - 1 : null;
    const followed = this.looking.turn === turn && this.looking.index === latest;
    turn.add({ text, cells: flex.cells });
    if (flex.cells && followed) this.looking.look(turn, turn.tokens.length - 1);
    return Boolean(flex.cells);
  }

  /** @param {Turn} turn whose answer is whole */
  settle(turn) {
    const answer = turn.text.trim();
    const right = turn.expected !== undefined && plain(turn.expected) === plain(answer);
    const remarks = turn.finish === "length" ? ["Cut off: the answer was as long as it may be."] : [];
    if (turn.expected) remarks.push(right ? "✓ right" : `The picture says: ${turn.expected}`);
    turn.end("done", remarks.join(" "));
    turn.remark.classList.toggle("right", right);
    if (turn.stats) turn.figures.textContent = figures(turn.stats, this.model.flex.pages);
    this.addTools(turn);
    by("announce").textContent = `Answer: ${answer || "no text"}. ${turn.words(null, this.looking.on)}`;
    const last = turn.tokens.length - 1;
    const rest = () => {
      if (this.looking.turn === turn && this.looking.index === last && !focusIsOnToken()) this.looking.look(turn, null);
    };
    if (still.matches) rest();
    else setTimeout(rest, LINGER);
  }

  /** @param {Turn} turn @param {Error} problem @param {Turn[]} history it was asked with */
  fail(turn, problem, history) {
    const isCurrent = this.turns.includes(turn); // not so when another picture was chosen
    const stopped = problem.name === "AbortError";
    const some = turn.tokens.length > 0;
    turn.end(stopped ? "stopped" : "failed", stopped ? "Stopped." : "Not answered to its end.");
    if (!some) {
      turn.element.remove();
      this.turns = this.turns.filter((each) => each !== turn);
    }
    if (this.looking.turn === turn) this.looking.look(some ? turn : (this.turns.at(-1) ?? null), null);
    if (!isCurrent) return;
    if (!by("question").value) this.write(turn.question);
    if (stopped) by("announce").textContent = "Stopped.";
    else {
      const again = () => this.ask(turn.question);
      const alone = () => this.ask(turn.question, { alone: true });
      showProblem(problem, history.length ? { again, alone } : { again });
    }
  }

  setAnswering(yes) {
    by("stop").hidden = !yes;
    by("ask").hidden = yes;
    for (const button of by("suggestions").children) {
      button.disabled = yes;
      button.hidden = this.turns.some((turn) => turn.question === button.dataset.question);
    }
    by("suggestions").hidden = ![...by("suggestions").children].some((button) => !button.hidden);
  }

  /** What can be done with an answer. @param {Turn} turn */
  addTools(turn) {
    const { looking } = this;
    const picture = by("picture").cloneNode();
    const card = () => drawCard(picture, turn, looking.turn === turn ? looking.index : null, looking.on, this.model.id);
    const add = (text, action) => {
      const button = Object.assign(part("button", "quiet", text), { type: "button" });
      button.addEventListener("click", () => action(button));
      turn.tools.append(button);
    };
    if (navigator.clipboard?.write && window.ClipboardItem) add("Copy picture", (button) => copy(button, card()));
    add("Save picture", async () => save(await card()));
    add("Ask again", () => this.ask(turn.question));
  }
}

/** @param {HTMLButtonElement} button @param {Promise<Blob>} png */
async function copy(button, png) {
  const text = button.textContent;
  try {
    await navigator.clipboard.write([new ClipboardItem({ "image/png": png })]);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed by this browser";
  }
  setTimeout(() => (button.textContent = text), 2500);
}

/** @param {Blob} png */
function save(png) {
  const url = URL.createObjectURL(png);
  Object.assign(document.createElement("a"), { href: url, download: "where-it-looks.png" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Words alone: a model may begin a sentence, and end it. @param {string} text */
function plain(text) {
  return text.toLowerCase().replace(/[.!\s]+$/, "").trim();
}

/** As high as what is written. @param {HTMLTextAreaElement} field */
function fit(field) {
  field.style.height = "auto";
  field.style.height = `${Math.min(TALLEST, field.scrollHeight)}px`;
}
