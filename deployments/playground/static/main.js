import { Trouble, chat } from "./api.js";
import { Composer } from "./composer.js";
import { Connection } from "./connection.js";
import { Conversation, Turn } from "./conversation.js";
import { announce, byId } from "./dom.js";
import { exampleButtons } from "./examples.js";
import { setUpFollowing } from "./following.js";
import { Settings } from "./settings.js";
import { setUpTheme } from "./theme.js";
import { explained } from "./troubles.js";
import { TurnView } from "./turn-view.js";
import { setUpViewer } from "./viewer.js";

const TICK_MS = 100;
const RETRIES = 4;
/** Asked for besides, to show it: what an answer has cost so far, with every piece. */
const STREAMED = {
  stream: true, stream_options: { include_usage: true, continuous_usage_stats: true },
};

const settings = new Settings();
const connection = new Connection();
const composer = new Composer(begin);
const following = setUpFollowing();
const views = new Map();
let conversation = new Conversation();
let answering = null; // the AbortController of the answer that is coming

function begin(text, pictures) {
  const turn = new Turn(text, pictures);
  const previous = conversation.last;
  conversation.turns.push(turn);
  const view = new TurnView(turn, { again: ask, edit });
  views.set(turn, view);
  if (previous) views.get(previous).update({ isLast: false });
  byId("conversation").append(view.root);
  showWhatIsThere();
  ask(turn);
}

async function ask(turn) {
  if (answering) return;
  const mine = new AbortController();
  const view = views.get(turn);
  answering = mine;
  composer.busy = true;
  turn.request = conversation.request(turn, connection.model, settings.values.system, settings.sampling());
  composer.focus();
  announce("Sent.");
  const clock = setInterval(() => view.grow(), TICK_MS); // the time that is waited is shown
  try {
    await answered(turn, view, mine.signal);
    turn.status = "done";
    announce(turn.answer);
    if (connection.state !== "ok") connection.look(); // the next one would be seconds away
  } catch (error) {
    if (mine.signal.aborted) {
      turn.status = "stopped";
      announce("Stopped.");
    } else {
      fail(turn, error);
    }
  } finally {
    clearInterval(clock);
    if (answering === mine) {
      answering = null;
      composer.busy = false;
    }
    view.update();
    following.follow();
  }
}

/** Takes in the answer. Where the server is full, asks again a few times, ever more patiently. */
async function answered(turn, view, signal) {
  for (let attempt = 0; ; attempt += 1) {
    turn.restart();
    view.update();
    following.start();
    try {
      for await (const piece of chat({ ...turn.request, ...STREAMED }, signal)) {
        turn.take(piece);
        view.grow();
        following.follow();
      }
      return;
    } catch (error) {
      if (error.kind !== "busy" || attempt === RETRIES || turn.answer) throw error;
      await patience(turn, view, (error.retryAfter ?? 1) * 2 ** attempt, signal);
    }
  }
}

/** Waits, and says for how long. */
async function patience(turn, view, seconds, signal) {
  announce("The server is busy. Your message waits.");
  for (let left = seconds; left > 0; left -= 1) {
    turn.patience = `The server is busy. Trying again in ${left} s.`;
    view.update();
    await new Promise((resolve, reject) => {
      const timer = setTimeout(resolve, 1000 * Math.min(1, left));
      signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
    });
  }
}

function fail(turn, error) {
  const trouble = error instanceof Trouble ? error : new Trouble("failed", String(error.message));
  const text = explained(trouble, turn.request, conversation.picturesUpTo(turn));
  turn.trouble = new Trouble(trouble.kind, text);
  turn.status = "failed";
  announce(text);
  if (trouble.kind !== "refused") connection.look();
}

/** Takes a failed message back into the field. */
function edit(turn) {
  conversation.remove(turn);
  views.get(turn).root.remove();
  views.delete(turn);
  if (conversation.last) views.get(conversation.last).update();
  showWhatIsThere();
  composer.fill(turn.text, turn.pictures);
}

function stop() {
  answering?.abort();
}

function startAnew() {
  stop();
  answering = null;
  composer.busy = false;
  conversation = new Conversation();
  views.clear();
  byId("conversation").replaceChildren();
  showWhatIsThere();
  composer.fill("");
  announce("New conversation.");
}

function showWhatIsThere() {
  const empty = !conversation.turns.length;
  byId("welcome").hidden = !empty;
  byId("new").hidden = empty;
}

byId("stop").addEventListener("click", stop);
byId("new").addEventListener("click", startAnew);
addEventListener("keydown", (event) => {
  // In an open dialog, Escape closes that first.
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
});
connection.addEventListener("back", () => {
  const { last } = conversation;
  announce("The server is back.");
  if (last?.status === "failed" && last.trouble.kind !== "refused") {
    views.get(last).say("The server is back. Your message can be sent again.");
  }
});
byId("examples").append(...exampleButtons(async (file, question) => {
  await composer.add([file], { onlyOnes: true });
  composer.write(question);
}));
setUpTheme();
setUpViewer();
connection.look();
composer.focus();
