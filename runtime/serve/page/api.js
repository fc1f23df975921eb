/** The server, as this page speaks with it. Every address is relative: the app may be mounted below a prefix. */

import { inTab } from "./kept.js";

const KEY = "flex-key";
const LOCKED = 401;

/** What went wrong, as a person can act on it. */
export class Problem extends Error {
  /**
   * @param {string} found what happened
   * @param {{expected?: string, fix?: string, status?: number, retryAfter?: number}} [more] `status`: of HTTP, 0 when
   *   the server was not reached; `retryAfter`: seconds
   */
  constructor(found, { expected = "", fix = "", status = 0, retryAfter = 0 } = {}) {
    super(found);
    Object.assign(this, { expected, fix, status, retryAfter });
  }
}

/** @param {string} key the API key for the rest of this tab's life; "" forgets it */
export function useKey(key) {
  if (key) inTab.setItem(KEY, key);
  else inTab.removeItem(KEY);
}

export function hasKey() {
  return inTab.getItem(KEY) !== null;
}

/** @returns {Promise<{id: string, flex: Object}>} the one model that is served */
export async function model() {
  return (await (await request("v1/models")).json()).data[0];
}

/** @returns {Promise<{image: string, question: string, answer?: string, history?: [string, string][]}[]>} */
export async function examples() {
  return (await request("flex/examples")).json();
}

/** @param {string} address as `examples` gives it: of a server behind a proxy only its last part is sure */
export async function exampleImage(address) {
  return (await request(`flex/examples/${address.split("/").at(-1)}`)).blob();
}

/** @returns {Promise<{seed: number, image: Blob, questions: {question: string, answer: string}[]}>} a new scene */
export async function scene() {
  const seed = crypto.getRandomValues(new Uint32Array(1))[0];
  const found = await (await request(`flex/scene?seed=${seed}`)).json();
  const bytes = Uint8Array.from(atob(found.image.split(",")[1]), (each) => each.charCodeAt(0));
  return { ...found, image: new Blob([bytes], { type: "image/png" }) };
}

/**
 * The chunks of a streamed answer. Throws a Problem, also for a stream that ends before it says so; AbortError after
 * `signal`.
 * @param {Object} body of /v1/chat/completions
 * @param {AbortSignal} signal
 */
export async function* complete(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw problemOf(chunk.error, response);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof Problem || error.name === "AbortError") throw error;
    throw cut();
  }
  throw cut();
}

function cut() {
  return new Problem("The connection ended in the middle of the answer.", {
    expected: "an answer to its end",
    fix: "See whether the server still runs, then ask again.",
  });
}

/** The data of server-sent events. @param {ReadableStream<Uint8Array>} stream */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop() ?? "";
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the server stops within one step
  }
}

/** @param {string} address @param {RequestInit} [options] */
async function request(address, options = {}) {
  const headers = new Headers(options.headers);
  const key = inTab.getItem(KEY);
  try {
    if (key) headers.set("Authorization", `Bearer ${key}`);
  } catch {
    throw new Problem("The key holds what no header can.", { status: LOCKED });
  }
  let response;
  try {
    response = await fetch(address, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer.", {
      expected: `a server at ${location.host}`,
      fix: "See whether it still runs, then ask again.",
    });
  }
  if (response.ok) return response;
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // not from our server: a proxy between, whose page says nothing to a reader of this one
  }
  throw problemOf(error, response);
}

/** @param {{message?: string, fix?: string}} error @param {Response} response */
function problemOf(error, response) {
  const message = error.message ?? `The server says ${response.status} ${response.statusText}`.trim();
  const [found, expected] = message.split(/; expected:? |\n *expected: /); // of the server's own, and of its engine's
  return new Problem(found, {
    expected,
    fix: error.fix ?? "",
    status: response.ok ? 0 : response.status,
    retryAfter: Number(response.headers.get("Retry-After")) || 0,
  });
}
