/** Pieces that lie in the browser together come within less, and say nothing of the model. */
const LEAST_TIMED_S = 0.01;

/**
 * One question and its answer.
 * `status`: "running", "done", "stopped" or "failed" (then `trouble` says why).
 * `patience`: what is waited for before it is asked once more, in words.
 */
export class Turn {
  text;
  pictures;
  answer = "";
  status = "running";
  finish = null;
  usage = null;
  trouble = null;
  patience = "";
  request = null;
  sentAt = 0;
  firstAt = 0;
  lastAt = 0;
  #tokensAtFirst = 0;

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
    this.patience = "";
    this.sentAt = performance.now();
    this.firstAt = this.lastAt = 0;
  }

  /** Takes one piece of the answer, as `chat` yields it. */
  take({ text, finish, usage }) {
    this.finish = finish ?? this.finish;
    this.usage = usage ?? this.usage;
    if (!text) return;
    this.lastAt = performance.now();
    if (!this.firstAt) {
      this.firstAt = this.lastAt;
      this.#tokensAtFirst = usage?.completion_tokens ?? 1; // the first piece may hold several
    }
    this.answer += text;
  }

  /** Milliseconds from sending to the first text; null before it. */
  get firstTokenMs() {
    return this.firstAt ? this.firstAt - this.sentAt : null;
  }

  /** Tokens per second after the first piece of text; null where that is too short to tell. */
  get tokensPerSecond() {
    const seconds = (this.lastAt - this.firstAt) / 1000;
    const later = (this.usage?.completion_tokens ?? 0) - this.#tokensAtFirst;
    return seconds >= LEAST_TIMED_S && later > 0 ? later / seconds : null;
  }

  /** The question as a message of the API; pictures first, as models were trained. */
  get asked() {
    const pictures = this.pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }));
    const text = this.text ? [{ type: "text", text: this.text }] : [];
    return { role: "user", content: pictures.length ? [...pictures, ...text] : this.text };
  }

  /** The answer as one. */
  get answered() {
    return { role: "assistant", content: this.answer };
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
    const earlier = this.before(turn).flatMap(({ asked, answered }) => [asked, answered]);
    const messages = [...opening, ...earlier, turn.asked];
    return { ...(model && { model }), messages, ...sampling };
  }

  remove(turn) {
    this.turns = this.turns.filter((other) => other !== turn);
  }
}
