import { copies } from "./clipboard.js";
import { element } from "./dom.js";
import { figures } from "./figures.js";
import { asCurl, asPython } from "./snippets.js";
import { pictureButton } from "./viewer.js";

/** One turn on the page. What it shows is the turn's; `update` brings it up to date. */
export class TurnView {
  /**
   * @param {Turn} turn
   * @param {Object} actions `again(turn)` and `edit(turn)`, for what its buttons do
   */
  constructor(turn, actions) {
    this.turn = turn;
    this.actions = actions;
    this.text = document.createTextNode("");
    this.answer = element("p", { class: "answer-text" }, this.text);
    this.foot = element("div", { class: "answer-foot" });
    this.notice = element("div", { class: "notice-place" });
    this.root = element("article", { class: "turn" },
      element("div", { class: "asked" },
        element("h2", { class: "unseen" }, "You asked"),
        ...(turn.pictures.length ? [element("div", { class: "pictures" }, ...turn.pictures.map(pictureButton))] : []),
        ...(turn.text ? [element("p", {}, turn.text)] : [])),
      element("div", { class: "answer" },
        element("h2", { class: "unseen" }, "Answer"), this.answer, this.notice, this.foot));
    this.update();
  }

  /** Called often while text comes: appends to the text that is there, and makes no new node. */
  grow() {
    const { answer } = this.turn;
    if (answer.startsWith(this.text.data)) this.text.appendData(answer.slice(this.text.data.length));
    else this.text.data = answer;
    this.foot.replaceChildren(figures(this.turn));
  }

  /** Called when it starts, ends, or is no longer the last. */
  update({ isLast = true } = {}) {
    const { turn } = this;
    const running = turn.status === "running";
    this.grow();
    this.root.dataset.status = turn.status;
    this.answer.hidden = !turn.answer && (!running || turn.patience !== "");
    this.answer.setAttribute("aria-busy", String(running));
    this.notice.replaceChildren(...this.#notices(isLast));
    if (!running) this.foot.replaceChildren(figures(turn), this.#tools(isLast));
  }

  /** Replaces what the notice of a failure says, as while it counts down. */
  say(text) {
    const sentence = this.notice.querySelector(".what");
    if (sentence) sentence.textContent = text;
  }

  #notices(isLast) {
    const { status, finish, trouble, request, patience } = this.turn;
    if (status === "running" && patience) return [element("p", { class: "aside what" }, patience)];
    if (status === "stopped") return [element("p", { class: "aside" }, "Stopped.")];
    if (finish === "length") {
      const limit = request.max_tokens ? ` at ${request.max_tokens} tokens` : "";
      return [element("p", { class: "aside" }, `Cut off${limit}. The settings allow more.`)];
    }
    if (status === "done" && !this.turn.answer) {
      return [element("p", { class: "aside" }, "The model had nothing to say.")];
    }
    if (status !== "failed") return [];
    const buttons = isLast ? [
      element("button", { type: "button", class: "quiet outlined again", onclick: () => this.actions.again(this.turn) }, "Try again"),
      element("button", { type: "button", class: "quiet outlined", onclick: () => this.actions.edit(this.turn) }, "Edit the message"),
    ] : [];
    if (trouble.kind === "refused") buttons.reverse();
    return [element("div", { class: "notice" },
      element("p", { class: "what" }, trouble.message), element("div", { class: "notice-row" }, ...buttons))];
  }

  #tools(isLast) {
    const button = (name, label, more = {}) =>
      element("button", { type: "button", class: "quiet small", "aria-label": label, ...more }, name);
    const { turn } = this;
    return element("div", { class: "answer-tools" },
      ...(turn.answer ? [copies(button("Copy", "Copy the answer"), () => turn.answer)] : []),
      copies(button("curl", "Copy the request as a curl command"), () => asCurl(turn.request)),
      copies(button("Python", "Copy the request as a Python program"), () => asPython(turn.request)),
      ...(isLast && turn.status !== "failed"
        ? [button("Ask again", "Ask the same again", { onclick: () => this.actions.again(turn) })] : []));
  }
}
