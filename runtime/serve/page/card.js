/** The picture people send each other: what was asked, what was answered, and where each token looked. */

import { drawLight } from "./light.js";

const WIDTH = 1200;
const EDGE = 56;
const MOST_PANELS = 12;
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
  const inner = WIDTH - 2 * EDGE;
  const scale = Math.min(inner / image.naturalWidth, 900 / image.naturalHeight);
  const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
  const panels = turn.tokens.slice(0, MOST_PANELS).map((token, place) => ({ text: token.text.trim(), place })).filter((each) => each.text);
  const across = panels.length > 1 ? Math.max(panels.length, 5) : 0;
  const wide = across ? (inner - 16 * (across - 1)) / across : 0;
  const small = across ? Math.min(wide / width, 190 / height) : 0;

  const canvas = document.createElement("canvas");
  const pen = canvas.getContext("2d");
  pen.font = `34px ${SERIF}`;
  const asked = wrapped(pen, turn.question, inner);
  pen.font = `64px ${SERIF}`;
  const answered = wrapped(pen, turn.text.trim(), inner).slice(0, 6);
  const strip = across ? small * height + 74 : 0;
  canvas.width = WIDTH;
  canvas.height = Math.ceil(EDGE + height + 44 + 46 * asked.length + 16 + 76 * answered.length + strip + 34 + 40);

  pen.fillStyle = PAPER;
  pen.fillRect(0, 0, canvas.width, canvas.height);
  const box = { x: EDGE + (inner - width) / 2, y: EDGE, width, height };
  framed(pen, image, box, turn.share(index, on), 4, 14);
  let y = EDGE + height + 44;
  pen.textBaseline = "top";
  y = lines(pen, asked, y, 46, `italic 34px ${SERIF}`, QUIET) + 16;
  y = lines(pen, answered, y, 76, `64px ${SERIF}`, INK);
  if (across) {
    y += 26;
    panels.forEach(({ text, place }, column) => {
      const x = EDGE + column * (wide + 16);
      framed(pen, image, { x, y, width: small * width, height: small * height }, turn.share(place, on), 2, 6);
      pen.font = `24px ${SERIF}`;
      pen.fillStyle = place === index ? LIT : INK;
      pen.fillText(fitting(pen, text, wide), x, y + small * height + 10);
    });
    y += small * height + 48;
  }
  pen.font = `22px ${SANS}`;
  pen.fillStyle = QUIET;
  const what = index === null ? "lit: what the whole answer read" : `lit: what ${turn.name(index)} read`;
  pen.fillText(fitting(pen, `Where it looks · ${model} · ${what}`, inner), EDGE, y + 22);
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

/** @param {CanvasRenderingContext2D} pen with its font set @param {string} text @param {number} width */
function wrapped(pen, text, width) {
  const result = [""];
  for (const word of text.split(/\s+/)) {
    const longer = `${result.at(-1)} ${word}`.trim();
    if (pen.measureText(longer).width <= width || !result.at(-1)) result[result.length - 1] = longer;
    else result.push(word);
  }
  return result.map((line) => fitting(pen, line, width));
}

function fitting(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  let shorter = text;
  while (shorter && pen.measureText(`${shorter}…`).width > width) shorter = shorter.slice(0, -1);
  return `${shorter}…`;
}
