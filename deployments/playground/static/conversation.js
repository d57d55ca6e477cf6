/** One question and its answer. `status`: "running", "done", "stopped" or "failed". */
export class Turn {
  text;
  pictures;
  answer = "";
  status = "running";
  finish = null;
  usage = null;
  trouble = null;
  request = null;
  sentAt = 0;
  firstAt = 0;
  lastAt = 0;

  constructor(text, pictures) {
    this.text = text;
    this.pictures = pictures;
  }

  /** Whether later turns build on it. */
  get counts() {
    return this.answer !== "" && this.status !== "failed";
  }

  /** Forgets the answer, so that it can be asked again. */
  restart() {
    this.answer = "";
    this.status = "running";
    this.finish = this.usage = this.trouble = null;
    this.sentAt = performance.now();
    this.firstAt = this.lastAt = 0;
  }

  /** Takes one piece of the answer, as `chat` yields it. */
  take({ text, finish, usage }) {
    if (text) {
      this.lastAt = performance.now();
      this.firstAt ||= this.lastAt;
      this.answer += text;
    }
    this.finish = finish ?? this.finish;
    this.usage = usage ?? this.usage;
  }

  /** Milliseconds from sending to the first text; null before it. */
  get firstTokenMs() {
    return this.firstAt ? this.firstAt - this.sentAt : null;
  }

  /** Tokens per second after the first one; null where there is too little to tell. */
  get tokensPerSecond() {
    const seconds = (this.lastAt - this.firstAt) / 1000;
    const after = (this.usage?.completion_tokens ?? 0) - 1;
    return seconds > 0.005 && after > 1 ? after / seconds : null;
  }

  get #content() {
    const pictures = this.pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }));
    const text = this.text ? [{ type: "text", text: this.text }] : [];
    return pictures.length ? [...pictures, ...text] : this.text;
  }

  /** As messages of the API: the question, and the answer if there is one to build on. */
  messages() {
    const question = { role: "user", content: this.#content };
    return this.counts ? [question, { role: "assistant", content: this.answer }] : [question];
  }
}

/** The turns so far. */
export class Conversation {
  turns = [];

  get last() {
    return this.turns.at(-1);
  }

  /** The turns that `turn` builds on. */
  before(turn) {
    return this.turns.slice(0, this.turns.indexOf(turn)).filter((earlier) => earlier.counts);
  }

  /** The pictures that go along with `turn`, in the order in which the request holds them. */
  picturesUpTo(turn) {
    return [...this.before(turn), turn].flatMap(({ pictures }) => pictures);
  }

  /** The body of the request that asks `turn`. */
  request(turn, model, system, sampling) {
    const opening = system ? [{ role: "system", content: system }] : [];
    const earlier = this.before(turn).flatMap((before) => before.messages());
    return { model, messages: [...opening, ...earlier, ...turn.messages()], ...sampling };
  }

  remove(turn) {
    this.turns = this.turns.filter((other) => other !== turn);
  }
}
