/** What is looked at: one answer, one of its tokens or all of it, through some of the layers. */

import { Light } from "./light.js";
import { part } from "./turn.js";

const REPLAY = 600; // milliseconds of a token; long answers go faster
const SHORTEST_REPLAY = 120;
const LONGEST_REPLAY = 8000;
const NOTHING = "Nothing is lit yet: ask a question";

const by = (id) => document.getElementById(id);

/** @typedef {import("./turn.js").Turn} Turn */

export class Looking {
  constructor() {
    this.light = new Light(by("light"));
    /** @type {Turn | null} */
    this.turn = null;
    /** @type {number | null} a token's, null for the whole answer */
    this.index = null;
    /** @type {number[]} numbers of all layers that read pages */
    this.layers = [];
    /** @type {Set<number>} of those that count */
    this.on = new Set();
    this.timer = 0;
    this.wire();
  }

  wire() {
    by("play").addEventListener("click", () => this.play());
    by("before").addEventListener("click", () => this.walk(-1));
    by("after").addEventListener("click", () => this.walk(1));
    by("time").addEventListener("input", () => {
      this.pause();
      const place = Number(by("time").value);
      this.look(this.turn, place < this.turn.tokens.length ? place : null);
    });
    by("layers-all").addEventListener("click", () => this.setLayers(this.layers));
    by("layers-none").addEventListener("click", () => this.setLayers([]));
    by("light").addEventListener("pointermove", (event) => this.point(event));
    by("light").addEventListener("pointerleave", () => this.look(this.turn, this.index));
  }

  /** @param {number[]} layers numbers of the layers that read pages */
  useLayers(layers) {
    this.layers = layers;
    by("layer-list").replaceChildren(
      ...layers.map((layer) => {
        const button = Object.assign(part("button", "layer", String(layer)), { type: "button" });
        button.setAttribute("aria-label", `Layer ${layer}`);
        button.addEventListener("click", () => {
          this.setLayers(this.on.has(layer) ? [...this.on].filter((each) => each !== layer) : [...this.on, layer]);
        });
        return button;
      }),
    );
    this.setLayers(layers);
  }

  /** @param {number[]} layers that count from now on */
  setLayers(layers) {
    this.on = new Set(layers);
    this.layers.forEach((layer, place) => {
      by("layer-list").children[place].setAttribute("aria-pressed", String(this.on.has(layer)));
    });
    this.look(this.turn, this.index);
  }

  /** @param {Turn | null} turn @param {number | null} index of its token; null: the whole answer */
  look(turn, index) {
    if (this.turn) {
      this.turn.markReaders(null, this.on);
      if (this.turn !== turn) this.turn.mark(null, this.on);
      this.turn.element.classList.remove("current");
    }
    [this.turn, this.index] = [turn, index];
    turn?.element.classList.add("current");
    turn?.mark(index, this.on);
    const count = turn?.tokens.length ?? 0;
    this.light.show(count ? turn.share(index, this.on) : null);
    this.say(count ? turn.words(index, this.on) : "");
    by("replay").hidden = !count;
    Object.assign(by("time"), { max: count, value: index ?? count });
    by("moment").textContent = index === null ? "whole answer" : `${index + 1} of ${count}`;
    by("before").disabled = index === 0;
    by("after").disabled = index === null;
  }

  /** @param {string} words what is lit */
  say(words) {
    by("caption").textContent = words;
    by("light").setAttribute("aria-label", words || NOTHING);
    by("time").setAttribute("aria-valuetext", words);
  }

  /** One token on or back; the whole answer stands behind the last. @param {number} step */
  walk(step) {
    this.pause();
    if (!this.turn?.tokens.length) return;
    const count = this.turn.tokens.length;
    const next = Math.max(0, Math.min(count, (this.index ?? count) + step));
    if (next < count && focusIsOnToken()) this.turn.options()[next].focus();
    else this.look(this.turn, next < count ? next : null);
  }

  /** The whole answer again. */
  stepBack() {
    this.pause();
    if (focusIsOnToken()) document.activeElement.blur();
    if (this.turn) this.look(this.turn, null);
  }

  play() {
    if (this.timer) {
      this.pause();
      return;
    }
    const { turn } = this;
    if (!turn?.tokens.length) return;
    const time = Math.max(SHORTEST_REPLAY, Math.min(REPLAY, LONGEST_REPLAY / turn.tokens.length));
    const from = (place) => {
      const more = place < turn.tokens.length;
      this.look(turn, more ? place : null);
      if (more) this.timer = setTimeout(() => from(place + 1), time);
      else this.pause();
    };
    by("play").textContent = "Pause";
    from(this.index !== null && this.index + 1 < turn.tokens.length ? this.index : 0);
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = 0;
    by("play").textContent = "Play";
  }

  /** Say which tokens read the place under the pointer. @param {PointerEvent} event */
  point(event) {
    const { turn } = this;
    if (!turn?.tokens.length) return;
    const box = by("light").getBoundingClientRect();
    const side = Math.max(box.width, box.height);
    const cellAt = (at, length) => {
      const place = Math.floor(((at + (side - length) / 2) / side) * turn.grid);
      return Math.min(turn.grid - 1, Math.max(0, place));
    };
    const column = cellAt(event.clientX - box.left, box.width);
    const row = cellAt(event.clientY - box.top, box.height);
    const readers = turn.markReaders(row * turn.grid + column, this.on);
    const names = readers.map((token) => (token.text.trim() ? `“${token.text.trim()}”` : "the end"));
    const who = names.length ? `read for ${names.join(", ")}` : "not read";
    by("caption").textContent = `Row ${row + 1}, column ${column + 1}: ${who}`;
  }
}

export function focusIsOnToken() {
  return document.activeElement?.classList.contains("token") ?? false;
}
