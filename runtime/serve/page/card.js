/** The picture people send each other: what was asked, what was answered, and where each token looked. */

import { drawLight } from "./light.js";

const WIDTH = 1200; // of a wide picture; a tall one makes a tall card
const NARROWEST = 832;
const TALLEST = 960; // of the picture
const EDGE = 56;
const MOST_PANELS = 24; // of single tokens
const IN_A_ROW = [5, 8]; // of them, at least and at most
const GAP = 16;
const LONG = 70; // characters, from which an answer is written smaller
const MOST_LINES = 10;
const SERIF = `"Iowan Old Style", "Palatino Linotype", Palatino, "TeX Gyre Pagella", Georgia, serif`;
const SANS = `system-ui, sans-serif`;
const PAPER = "#14161a";
const INK = "#f2f0ea";
const QUIET = "#a9a79f";
const LIT = "#ffb224";

/**
 * @param {HTMLImageElement} image
 * @param {import("./turn.js").Turn} turn
 * @param {number | null} index of the token whose pages are lit, null for the whole answer
 * @param {Set<number>} on numbers of the layers that count
 * @param {string} model @returns {Promise<Blob>} a PNG
 */
export async function drawCard(image, turn, index, on, model) {
  const widest = (TALLEST * image.naturalWidth) / image.naturalHeight;
  const inner = Math.round(Math.min(WIDTH, Math.max(NARROWEST, widest + 2 * EDGE)) - 2 * EDGE);
  const scale = Math.min(inner / image.naturalWidth, TALLEST / image.naturalHeight);
  const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
  const said = turn.tokens.map((token, place) => ({ text: token.text.trim(), place })).filter(({ text }) => text);
  const panels = said.length > 1 ? said.slice(0, MOST_PANELS) : []; // one alone would repeat the picture
  const across = Math.min(IN_A_ROW[1], Math.max(IN_A_ROW[0], panels.length));
  const wide = (inner - GAP * (across - 1)) / across;
  const small = Math.min(wide / width, 190 / height);
  const step = small * height + 52;

  const canvas = document.createElement("canvas");
  const pen = canvas.getContext("2d");
  const size = turn.text.length > LONG ? 40 : 64;
  const asked = wrapped(pen, `italic 34px ${SERIF}`, turn.question, inner);
  const answered = wrapped(pen, `${size}px ${SERIF}`, turn.text.trim(), inner);
  const rows = Math.ceil(panels.length / across);
  canvas.width = inner + 2 * EDGE;
  const words = 44 + 46 * asked.length + 16 + 1.2 * size * answered.length + 26;
  canvas.height = Math.ceil(EDGE + height + words + rows * step + 76);

  pen.fillStyle = PAPER;
  pen.fillRect(0, 0, canvas.width, canvas.height);
  framed(pen, image, { x: EDGE + (inner - width) / 2, y: EDGE, width, height }, turn.share(index, on), 4, 14);
  pen.textBaseline = "top";
  let y = EDGE + height + 44;
  y = lines(pen, asked, y, 46, `italic 34px ${SERIF}`, QUIET) + 16;
  y = lines(pen, answered, y, 1.2 * size, `${size}px ${SERIF}`, INK) + 26;
  panels.forEach(({ text, place }, count) => {
    const x = EDGE + (count % across) * (wide + GAP);
    const top = y + Math.floor(count / across) * step;
    framed(pen, image, { x, y: top, width: small * width, height: small * height }, turn.share(place, on), 2, 6);
    pen.font = `24px ${SERIF}`;
    pen.fillStyle = place === index ? LIT : INK;
    pen.fillText(fitting(pen, text, wide), x, top + small * height + 8);
  });
  y += rows * step;
  pen.font = `22px ${SANS}`;
  pen.fillStyle = QUIET;
  const parts = ["Where it looks", model, `lit: what ${index === null ? "the whole answer" : turn.name(index)} read`];
  if (said.length > panels.length && panels.length) parts.push(`first ${panels.length} of ${said.length} tokens`);
  pen.fillText(fitting(pen, parts.join(" · "), inner), EDGE, y + 10);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

function framed(pen, image, box, share, line, round) {
  pen.save();
  pen.beginPath();
  pen.roundRect(box.x, box.y, box.width, box.height, round);
  pen.clip();
  pen.imageSmoothingQuality = "high";
  pen.drawImage(image, box.x, box.y, box.width, box.height);
  drawLight(pen, box, share, 1, line);
  pen.restore();
}

function lines(pen, texts, y, step, font, colour) {
  pen.font = font;
  pen.fillStyle = colour;
  for (const text of texts) {
    pen.fillText(text, EDGE, y);
    y += step;
  }
  return y;
}

/** @param {CanvasRenderingContext2D} pen @param {string} font @param {string} text @param {number} width */
function wrapped(pen, font, text, width) {
  pen.font = font;
  const result = [""];
  for (const word of text.split(/\s+/)) {
    const longer = `${result.at(-1)} ${word}`.trim();
    if (pen.measureText(longer).width <= width || !result.at(-1)) result[result.length - 1] = longer;
    else result.push(word);
  }
  const shown = result.slice(0, MOST_LINES);
  if (shown.length < result.length) shown[MOST_LINES - 1] += " …";
  return shown.map((line) => fitting(pen, line, width));
}

/** As much of a text as fits into a width. */
function fitting(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  let shorter = text;
  while (shorter && pen.measureText(`${shorter}…`).width > width) shorter = shorter.slice(0, -1);
  return `${shorter}…`;
}
