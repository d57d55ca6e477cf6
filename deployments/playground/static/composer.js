import { byId, element } from "./dom.js";
import { Refusal, readPicture } from "./pictures.js";
import { pictureButton } from "./viewer.js";

/** The message being written: its text, its pictures, and every way in which they come. */
export class Composer {
  #pictures = [];
  #refusals = [];
  #reading = 0;
  #busy = false;
  #field = byId("question");
  #tray = byId("tray");

  /** @param {function(string, Array)} send gets the text and the pictures of a message */
  constructor(send) {
    this.send = send;
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#field.addEventListener("input", () => this.#refresh());
    this.#field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#submit();
    });
    byId("choose").addEventListener("click", () => byId("files").click());
    byId("files").addEventListener("change", (event) => {
      this.add([...event.target.files]);
      event.target.value = ""; // the same file may be chosen again
    });
    addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (!files.length) return;
      event.preventDefault();
      this.add(files);
    });
    this.#setUpDrop();
    this.#refresh();
  }

  /** While an answer comes, a message can be written but not sent. */
  set busy(busy) {
    this.#busy = busy;
    byId("composer").dataset.busy = busy;
    byId("send").hidden = busy;
    byId("stop").hidden = !busy;
    this.#refresh();
  }

  /** Puts a message into the field, as to be edited. */
  fill(text, pictures = []) {
    this.#field.value = text;
    this.#pictures = [...pictures];
    this.#showTray();
    this.#refresh();
    this.focus();
  }

  /** Puts a question into the field, and leaves the pictures. */
  write(text) {
    this.fill(text, this.#pictures);
  }

  /** Where a finger types, the keyboard would cover the answer. */
  focus() {
    if (matchMedia("(pointer: coarse)").matches) this.#field.blur();
    else this.#field.focus();
  }

  /** Reads files into the tray, in their order; those that cannot be sent are named. */
  async add(files, { onlyOnes = false } = {}) {
    this.#refusals = [];
    this.#showRefusals();
    this.#reading += 1;
    this.#refresh();
    try {
      const read = await Promise.all(files.map((file) => readPicture(file).catch((error) => error)));
      if (onlyOnes) this.#pictures = [];
      for (const picture of read) {
        if (picture instanceof Refusal) this.#refusals.push(picture.message);
        else if (picture instanceof Error) throw picture;
        else this.#pictures.push(picture);
      }
    } finally {
      this.#reading -= 1;
      this.#showTray();
      this.#showRefusals();
      this.#refresh();
    }
    this.focus();
  }

  #submit() {
    const text = this.#field.value.trim();
    const pictures = this.#pictures;
    if (this.#busy || this.#reading || !(text || pictures.length)) return;
    this.#refusals = [];
    this.#showRefusals();
    this.fill("");
    this.send(text, pictures);
  }

  #refresh() {
    const empty = !this.#field.value.trim() && !this.#pictures.length;
    byId("send").disabled = empty || this.#reading > 0;
    this.#field.style.height = "auto";
    this.#field.style.height = `${this.#field.scrollHeight}px`;
  }

  #showTray() {
    this.#tray.hidden = !this.#pictures.length;
    this.#tray.replaceChildren(...this.#pictures.map((picture, index) => element("li", {},
      pictureButton(picture),
      element("button", {
        type: "button", class: "remove", "aria-label": `Remove ${picture.name}`, title: `Remove ${picture.name}`,
        onclick: () => this.#remove(index),
      }, "×"))));
  }

  #remove(index) {
    this.#pictures.splice(index, 1);
    this.#showTray();
    this.#refresh();
    const buttons = this.#tray.querySelectorAll(".remove");
    (buttons[Math.min(index, buttons.length - 1)] ?? this.#field).focus();
  }

  #showRefusals() {
    byId("refusals").replaceChildren(...this.#refusals.map((text) => element("li", {}, text)));
  }

  #setUpDrop() {
    const shade = byId("drop");
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    let depth = 0; // enter and leave come for every element on the way
    addEventListener("dragenter", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      depth += 1;
      shade.hidden = false;
    });
    addEventListener("dragleave", (event) => {
      if (!hasFiles(event)) return;
      depth = Math.max(0, depth - 1);
      shade.hidden = depth === 0;
    });
    addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
    addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      depth = 0;
      shade.hidden = true;
      this.add([...event.dataTransfer.files]);
    });
  }
}
