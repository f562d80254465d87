// The server's API, on the page's own address. Errors are Refused, with the server's words.

import { stringify } from "./numbers.js";
import { apiKey } from "./store.js";

export class Refused extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

function headers(more = {}) {
  const key = apiKey();
  if (/[^\x21-\x7e]/.test(key)) throw new Refused("The API key holds characters that no key has.", 401);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

// Relative to /ui/, so that a proxy may serve all of it under a path of its own.
async function ask(path, options) {
  try {
    return await fetch(`../${path}`, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is it running?");
  }
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  try {
    const { error } = JSON.parse(text);
    return new Refused(error.message ?? String(error), response.status, error.code ?? null);
  } catch {
    return new Refused(`${response.status} ${response.statusText}: ${text.slice(0, 300)}`, response.status);
  }
}

export async function models() {
  const response = await ask("v1/models", { headers: headers() });
  if (!response.ok) throw await refusal(response);
  return (await response.json()).data;
}

// The data of server-sent events, as they come. Characters and lines may be cut anywhere.
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = rest.split(/\r?\n/);
      rest = done ? "" : lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Chunks of a streamed chat. An error inside of the stream, or a stream that ends too early, is Refused.
export async function* chat(body, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(chunk.error.message ?? String(chunk.error), 0, chunk.error.code);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof Refused || error.name === "AbortError") throw error;
    throw new Refused("The connection broke before the answer ended.");
  }
  throw new Refused("The connection broke before the answer ended.");
}
