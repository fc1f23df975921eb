/** One question with its answer: what arrived, and how it stands on the page, token by token. */

import { brightest, shareOf } from "./light.js";
import { described, describedWhole, nameOf } from "./words.js";

const LONG = 70; // characters, from which an answer is written smaller

/**
 * @typedef {Object} Token
 * @property {string} text may be ""
 * @property {number[][]} cells per reading layer, the indices of the cells it read
 */

export class Turn {
  /**
   * @param {string} question
   * @param {{look: (turn: Turn, index: number | null) => void}} looking told what is pointed at
   * @param {string} [expected] the right answer, where it is known
   */
  constructor(question, looking, expected) {
    Object.assign(this, { question, looking, expected });
    /** @type {Token[]} */
    this.tokens = [];
    this.text = "";
    this.grid = 9;
    /** @type {number[]} */
    this.layers = [];
    this.stats = null;
    this.forgotten = false; // not sent with later questions
    this.state = "asked"; // then "answering", and "done", "stopped" or "failed"
    this.element = document.createElement("article");
    this.element.className = "turn";
    this.element.append(part("p", "asked", question));
    this.answer = part("div", "answer");
    this.answer.setAttribute("role", "listbox");
    this.answer.setAttribute("aria-orientation", "horizontal");
    this.answer.setAttribute("aria-label", `Answer to “${question}”, token by token`);
    this.answer.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.leave());
    this.remark = part("p", "remark waits", "Looking …");
    this.figures = part("p", "figures");
    this.tools = part("div", "row tools");
    this.element.append(this.answer, this.remark, this.figures, this.tools);
  }

  /** What the first chunk says of the cells to come. @param {{grid: number, layers: number[]}} head */
  begin({ grid, layers }) {
    Object.assign(this, { grid, layers, state: "answering" });
  }

  /** @param {Token} token as the server sent it; without cells: text that was held back */
  add({ text, cells }) {
    this.text += text;
    this.element.classList.toggle("long", this.text.length > LONG);
    this.remark.textContent = "";
    this.remark.classList.remove("waits");
    const [, before, inside, after] = /^(\s*)([^]*?)(\s*)$/.exec(text);
    this.answer.append(before);
    if (!cells) {
      this.answer.append(inside + after);
      return;
    }
    const index = this.tokens.push({ text, cells }) - 1;
    const option = part("span", inside ? "token" : "token mark", inside || "·");
    option.setAttribute("role", "option");
    option.tabIndex = index ? -1 : 0;
    option.dataset.index = String(index);
    option.addEventListener("focus", () => this.looking.look(this, index));
    option.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && this.looking.look(this, index));
    option.addEventListener("click", () => option.focus());
    this.answer.append(option, after);
  }

  /** The mouse has left: back to the token that has the focus, or to the whole answer. */
  leave() {
    if (this.state === "answering") return;
    const focused = this.options().indexOf(/** @type {HTMLElement} */ (document.activeElement));
    this.looking.look(this, focused < 0 ? null : focused);
  }

  /** @param {"done" | "stopped" | "failed"} state @param {string} remark */
  end(state, remark) {
    this.state = state;
    this.remark.textContent = remark;
    this.remark.classList.remove("waits");
    const last = this.options().at(-1);
    if (last?.classList.contains("mark") && state === "done") last.textContent = "end";
  }

  /** @returns {HTMLElement[]} */
  options() {
    return [...this.answer.querySelectorAll(".token")];
  }

  /**
   * How bright each cell is. @param {number | null} index of a token, null for the whole answer
   * @param {Set<number>} on numbers of the layers that count
   */
  share(index, on) {
    const shown = [...this.layers.keys()].filter((place) => on.has(this.layers[place]));
    const of = (token) => shareOf(token.cells, shown, this.grid);
    return index === null ? brightest(this.tokens.map(of), this.grid) : of(this.tokens[index]);
  }

  /** The same in words. @param {number | null} index @param {Set<number>} on */
  words(index, on) {
    const count = this.layers.filter((layer) => on.has(layer)).length;
    const share = this.share(index, on);
    if (index === null) return describedWhole(share, count);
    return described(this.name(index), share, count);
  }

  /** @param {number} index */
  name(index) {
    return nameOf(this.tokens[index].text, index === this.tokens.length - 1);
  }

  /** Mark the token that is looked at, or none. @param {number | null} index @param {Set<number>} on */
  mark(index, on) {
    this.options().forEach((option, place) => {
      option.classList.toggle("lit", place === index);
      option.classList.toggle("later", index !== null && place > index);
      option.setAttribute("aria-selected", String(place === index));
      option.tabIndex = place === (index ?? 0) ? 0 : -1;
      if (place === index) option.setAttribute("aria-label", this.words(index, on));
    });
  }

  /** Mark the tokens that read a cell; null unmarks all. @param {number | null} cell @param {Set<number>} on */
  markReaders(cell, on) {
    const options = this.options();
    return this.tokens.filter((token, place) => {
      const reads = cell !== null && this.share(place, on)[cell] > 0;
      options[place].classList.toggle("reader", reads);
      return reads;
    });
  }
}

/** @param {string} kind @param {string} style @param {string} [text] */
export function part(kind, style, text = "") {
  const element = document.createElement(kind);
  element.className = style;
  element.textContent = text;
  return element;
}
