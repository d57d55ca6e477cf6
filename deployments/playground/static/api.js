import { serverSentEvents } from "./events.js";

/** The server's API, beside this page wherever it is mounted. */
export const API = new URL("v1/", document.baseURI);
const HEALTH = new URL("health", document.baseURI);

/**
 * Why there is no answer, or no whole one.
 * kind: "gone" (no connection), "busy", "draining", "refused" (the request is at fault),
 * "failed" (the server is), "cut" (the connection ended in mid-answer).
 */
export class Trouble extends Error {
  constructor(kind, message, { field = null, retryAfter = null } = {}) {
    super(message);
    this.kind = kind;
    this.field = field;
    this.retryAfter = retryAfter;
  }
}

/** "ok", "draining", "dead" (it answers, but its model does not) or "gone". */
export async function health() {
  try {
    const response = await fetch(HEALTH, { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (response.ok) return "ok";
    const { status } = await response.json();
    return status === "draining" ? "draining" : "dead";
  } catch {
    return "gone";
  }
}

/** The name of the served model. */
export async function modelName() {
  const response = await fetch(new URL("models", API), { cache: "no-store" });
  if (!response.ok) throw await trouble(response);
  const { data } = await response.json();
  return data[0].id;
}

/**
 * Streams one answer: objects of `text` (new), `finish` (the reason, once) and `usage` (so far).
 * @param {Object} request the body of /v1/chat/completions
 * @param {AbortSignal} signal
 */
export async function* chat(request, signal) {
  let begun = false;
  let finished = false;
  try {
    const response = await fetch(new URL("chat/completions", API), {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
      body: JSON.stringify(request),
      signal,
    });
    if (!response.ok) throw await trouble(response);
    for await (const data of serverSentEvents(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Trouble(chunk.error.code === 503 ? "busy" : "failed", wording(chunk.error));
      begun = true;
      const [choice] = chunk.choices ?? [];
      finished ||= Boolean(choice?.finish_reason);
      yield {
        text: choice?.delta?.content ?? "",
        finish: choice?.finish_reason ?? null,
        usage: chunk.usage ?? null,
      };
    }
  } catch (error) {
    if (error instanceof Trouble || error.name === "AbortError") throw error;
    if (error instanceof SyntaxError) throw new Trouble("failed", "The server's answer is garbled.");
    if (!begun) throw new Trouble("gone", "The server cannot be reached.");
  }
  if (!finished) throw new Trouble("cut", "The connection ended before the answer did.");
}

async function trouble(response) {
  const body = await response.json().catch(() => ({}));
  const error = body.error ?? body;
  const message = wording(error) || `The server answered with status ${response.status}.`;
  const seconds = Number.parseInt(response.headers.get("Retry-After"), 10);
  const more = { field: error.param ?? null, retryAfter: Number.isNaN(seconds) ? null : seconds };
  if (response.status === 429) return new Trouble("busy", message, more);
  if (response.status === 503) {
    const state = await health(); // the status alone does not tell why
    return new Trouble({ draining: "draining", dead: "failed" }[state] ?? "busy", message, more);
  }
  return new Trouble(response.status < 500 ? "refused" : "failed", message, more);
}

function wording(error) {
  if (typeof error === "string") return error;
  return typeof error?.message === "string" ? error.message : "";
}
