import { byId } from "./dom.js";

const KEY = "tinychat.settings";
/** LLaVA's and TinyChat's own; an empty number is left to the server. */
const DEFAULTS = { system: "", temperature: 0.2, top_p: 0.7, max_tokens: 512, seed: null };
const NAMES = Object.keys(DEFAULTS);

/** The sheet of sampling options; what it says is kept in this browser. */
export class Settings {
  constructor() {
    this.values = { ...DEFAULTS, ...stored() };
    const sheet = byId("settings");
    byId("open-settings").addEventListener("click", () => sheet.showModal());
    byId("reset").addEventListener("click", () => this.#set({ ...DEFAULTS }));
    sheet.addEventListener("click", (event) => {
      if (event.target === sheet) sheet.close(); // beside it, on the backdrop
    });
    for (const name of NAMES) byId(name).addEventListener("input", () => this.#read());
    this.#set(this.values);
  }

  /** The fields of a request that they stand for, without `system`. */
  sampling() {
    const { temperature, top_p, max_tokens, seed } = this.values;
    const request = { temperature, top_p };
    if (max_tokens !== null) request.max_tokens = max_tokens;
    if (seed !== null) request.seed = seed;
    return request;
  }

  #read() {
    for (const name of NAMES) {
      const field = byId(name);
      if (name === "system") this.values.system = field.value.trim();
      else if (field.validity.valid) this.values[name] = field.value === "" ? null : Number(field.value);
    }
    this.#keep();
  }

  #set(values) {
    this.values = values;
    for (const name of NAMES) byId(name).value = values[name] ?? "";
    this.#keep();
  }

  #keep() {
    for (const output of document.querySelectorAll("#settings output")) {
      output.value = Number(byId(output.htmlFor.value).value).toFixed(2);
    }
    const changed = NAMES.filter((name) => this.values[name] !== DEFAULTS[name]);
    const button = byId("open-settings");
    button.classList.toggle("marked", changed.length > 0);
    button.setAttribute("aria-label", changed.length ? "Settings (changed)" : "Settings");
    try {
      if (!changed.length) localStorage.removeItem(KEY);
      else localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(changed.map((name) => [name, this.values[name]]))));
    } catch {
      // Storage is blocked or full; they hold for this visit.
    }
  }
}

function stored() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY)) ?? {};
    return Object.fromEntries(NAMES.filter((name) => name in found).map((name) => [name, found[name]]));
  } catch {
    return {};
  }
}
