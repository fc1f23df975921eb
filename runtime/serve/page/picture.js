/** A picture from a file, a paste or a camera: shown, measured, and as the data URL that is sent. */

import { Problem } from "./api.js";

const MOST_PIXELS = 12e6;
const MOST_BYTES = 8e6;
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
  if (width * height <= MOST_PIXELS && blob.size <= MOST_BYTES) {
    return { url, data: await dataUrl(blob), width, height, name, note: "" };
  }
  const small = await reduced(image, Math.min(1, Math.sqrt(MOST_PIXELS / (width * height))));
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

/** Upright, as the browser draws it. @param {HTMLImageElement} image @param {number} scale */
async function reduced(image, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.floor(image.naturalWidth * scale));
  canvas.height = Math.max(1, Math.floor(image.naturalHeight * scale));
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", QUALITY));
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
