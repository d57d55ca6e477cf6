import { health, modelName } from "./api.js";
import { byId } from "./dom.js";

const STEADY_MS = 30_000;
const FIRST_RETRY_MS = 1000;
const SLOWEST_RETRY_MS = 15_000;
const WORDS = {
  ok: "Ready", draining: "Shutting down", dead: "Model has stopped", gone: "Reconnecting",
};

/** Whether the server is there, shown in the bar; looks again ever less often while it is not. */
export class Connection extends EventTarget {
  model = "";
  state = "connecting";
  #timer = 0;
  #retryMs = FIRST_RETRY_MS;
  #looks = 0;

  constructor() {
    super();
    document.addEventListener("visibilitychange", () => document.hidden || this.look());
    addEventListener("online", () => this.look());
  }

  /** Looks now, and from then on regularly. A "back" event follows where it had been away. */
  async look() {
    clearTimeout(this.#timer);
    const mine = ++this.#looks;
    let state = await health();
    if (state === "ok" && this.state !== "ok") {
      try {
        this.#show(await modelName()); // another model may have come in the meantime
      } catch {
        state = "gone";
      }
    }
    if (mine !== this.#looks) return; // a later look knows better
    this.#become(state);
    const ok = state === "ok";
    this.#retryMs = ok ? FIRST_RETRY_MS : Math.min(2 * this.#retryMs, SLOWEST_RETRY_MS);
    if (ok && document.hidden) return; // the next look is when the page is seen again
    this.#timer = setTimeout(() => this.look(), ok ? STEADY_MS : this.#retryMs);
  }

  #show(model) {
    this.model = model;
    byId("model").textContent = model;
    byId("model").title = model;
  }

  #become(state) {
    const before = this.state;
    if (before === state) return;
    this.state = state;
    byId("link").dataset.state = state;
    byId("link").textContent = WORDS[state];
    if (state === "ok" && before !== "connecting") this.dispatchEvent(new Event("back"));
  }
}
