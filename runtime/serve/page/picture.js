/** A picture from a file, a paste or a camera: shown, measured, and as the data URL that is sent. */

import { Problem } from "./api.js";

const MOST_PIXELS = 12e6;
const MOST_BYTES = 8e6;
const MOST_SIDE = 16384; // pixels; the server reads no longer picture
const AS_IT_IS = ["", "image/png", "image/jpeg", "image/webp", "image/bmp"]; // types; others become a still PNG
const QUALITY = 0.92; // of the JPEG a large picture becomes

/**
 * @typedef {Object} Picture
 * @property {string} url of what is shown
 * @property {string} data the data URL that is sent
 * @property {number} width in pixels, upright
 * @property {number} height
 * @property {string} name
 * @property {string} note what was done to it, or ""
 */

/**
 * Shows a picture to this browser first: what it cannot show, nobody could see light up. Throws a Problem.
 * @param {Blob} blob @param {string} name @returns {Promise<Picture>}
 */
export async function openPicture(blob, name) {
  let url = URL.createObjectURL(blob);
  let image;
  try {
    image = await decoded(url);
  } catch {
    URL.revokeObjectURL(url);
    throw new Problem(`This browser cannot show ${name}${blob.type ? ` (${blob.type})` : ""}.`, {
      expected: "PNG, JPEG, WebP, GIF, BMP or AVIF",
      fix: "Save it as a PNG or JPEG, or paste a screenshot of it.",
    });
  }
  const { naturalWidth: width, naturalHeight: height } = image;
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (width * height)), MOST_SIDE / Math.max(width, height));
  const fits = scale === 1 && blob.size <= MOST_BYTES;
  if (fits && AS_IT_IS.includes(blob.type)) return { url, data: await dataUrl(blob), width, height, name, note: "" };
  const still = fits ? await drawn(image, 1, "image/png") : null; // what this browser shows, and the server may not read
  if (still && still.blob.size <= MOST_BYTES) {
    URL.revokeObjectURL(url);
    const note = "Sent as a still picture, as it looks here.";
    return { url: URL.createObjectURL(still.blob), data: await dataUrl(still.blob), width, height, name, note };
  }
  const small = await drawn(image, scale, "image/jpeg");
  URL.revokeObjectURL(url);
  const was = `${width} x ${height}, ${megabytes(blob)} MB`;
  const is = `${small.width} x ${small.height}, ${megabytes(small.blob)} MB`;
  url = URL.createObjectURL(small.blob);
  const note = `Made smaller before it is sent (${was} to ${is}); the model sees less than either.`;
  return { url, data: await dataUrl(small.blob), width: small.width, height: small.height, name, note };
}

/** @param {string} url @returns {Promise<HTMLImageElement>} */
async function decoded(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  if (!image.naturalWidth) throw new Error("a picture without a size"); // an SVG may have none
  return image;
}

/** Upright, as the browser draws it. @param {HTMLImageElement} image @param {number} scale @param {string} type */
async function drawn(image, scale, type) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.floor(image.naturalWidth * scale));
  canvas.height = Math.max(1, Math.floor(image.naturalHeight * scale));
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.fillStyle = "white"; // behind what is transparent: neither a JPEG nor the model knows that
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, type, QUALITY));
  if (!blob) throw new Problem("The picture is too large for this browser.", { fix: "Make it smaller first." });
  return { blob, width: canvas.width, height: canvas.height };
}

/** @param {Blob} blob @returns {Promise<string>} */
function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Problem("The file cannot be read.", { fix: "Choose it again." }));
    reader.readAsDataURL(blob);
  });
}

/** @param {Blob} blob */
const megabytes = (blob) => (blob.size / 1e6).toFixed(1);
