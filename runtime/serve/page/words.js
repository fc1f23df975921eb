/** What the light shows, in words. */

/** @param {number} value @param {number} [digits] */
const number = (value, digits = 1) => value.toFixed(digits).replace(/\.0+$/, "");

/** @param {number[]} places 0-based and sorted @param {string} word */
function span(places, word) {
  const [first, last] = [Math.min(...places) + 1, Math.max(...places) + 1];
  return first === last ? `${word} ${first}` : `${word}s ${first} to ${last}`;
}

/** Where most of the light is: "mostly row 4, columns 5 to 6". @param {Float32Array} share */
function place(share) {
  const grid = Math.sqrt(share.length);
  const most = Math.max(...share);
  const cells = [...share.keys()].filter((cell) => share[cell] >= most / 2);
  const rows = cells.map((cell) => Math.floor(cell / grid));
  const columns = cells.map((cell) => cell % grid);
  const area = (Math.max(...rows) - Math.min(...rows) + 1) * (Math.max(...columns) - Math.min(...columns) + 1);
  const all = cells.length === [...share].filter(Boolean).length;
  if (area <= 2 * cells.length) return `${all ? "" : "mostly "}${span(rows, "row")}, ${span(columns, "column")}`;
  const top = share.indexOf(most);
  return `scattered, brightest in row ${Math.floor(top / grid) + 1}, column ${(top % grid) + 1}`;
}

/** @param {string} text of a token @param {boolean} last of its answer */
export function nameOf(text, last) {
  if (text.trim()) return `“${text.trim()}”`;
  return last ? "The end of the answer" : "A token without text";
}

/**
 * "“star” read 3.2 pages per layer, mostly row 4, columns 5 to 6".
 * @param {string} who @param {Float32Array} share @param {number} layers that are switched on
 */
export function described(who, share, layers) {
  if (!layers) return `${who}: every layer is switched off`;
  const pages = share.reduce((sum, value) => sum + value, 0);
  if (!pages) return `${who} read no page, only the small picture`;
  const unit = pages > 0.95 && pages < 1.05 ? "page" : "pages";
  return `${who} read ${number(pages, pages < 0.95 ? 2 : 1)} ${unit} per layer, ${place(share)}`;
}

/** Where a whole answer looked. @param {Float32Array} share @param {number} layers */
export function describedWhole(share, layers) {
  if (!layers) return "Every layer is switched off";
  const cells = [...share].filter(Boolean).length;
  if (!cells) return "The whole answer read no page, only the small picture";
  return `The whole answer read ${cells} of ${share.length} pages, ${place(share)}`;
}

/**
 * The figures of an answer, in one line.
 * @param {Object} stats as the server gives them @param {number} pages that there are
 */
export function figures(stats, pages) {
  const parts = [`first token ${time(stats.first_token_ms)}`, `${number(stats.tokens_per_second, 0)} tokens/s`];
  parts.push(`${number(stats.pages_read)} of ${pages} pages per layer`, `${bytes(stats.page_bytes)} read`);
  if (stats.view_cached) parts.push("image already known");
  return parts.join(" · ");
}

/** @param {number} milliseconds */
function time(milliseconds) {
  return milliseconds < 1000 ? `${number(milliseconds, 0)} ms` : `${number(milliseconds / 1000)} s`;
}

/** @param {number} count */
function bytes(count) {
  return count < 1e5 ? `${number(count / 1e3, 0)} kB` : `${number(count / 1e6, count < 1e7 ? 1 : 0)} MB`;
}
