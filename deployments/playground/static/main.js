import { Trouble, chat } from "./api.js";
import { Composer } from "./composer.js";
import { Connection } from "./connection.js";
import { Conversation, Turn } from "./conversation.js";
import { announce, byId } from "./dom.js";
import { exampleButtons } from "./examples.js";
import { Settings } from "./settings.js";
import { setUpTheme } from "./theme.js";
import { explained } from "./troubles.js";
import { TurnView } from "./turn-view.js";
import { setUpFollowing } from "./following.js";
import { setUpViewer } from "./viewer.js";

const WAITING_TICK_MS = 100;
const USAGE = { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };

const settings = new Settings();
const connection = new Connection();
const composer = new Composer((text, pictures) => begin(new Turn(text, pictures)));
const following = setUpFollowing();
const views = new Map();
let conversation = new Conversation();
let answering = null; // the AbortController of the answer that is coming

function begin(turn) {
  const previous = conversation.last;
  conversation.turns.push(turn);
  const view = new TurnView(turn, { again: ask, edit });
  views.set(turn, view);
  if (previous) views.get(previous).update({ isLast: false });
  byId("conversation").append(view.root);
  showWhatIsThere();
  return ask(turn);
}

async function ask(turn) {
  if (answering) return;
  const view = views.get(turn);
  const { system } = settings.values;
  turn.restart();
  turn.request = conversation.request(turn, connection.model, system, settings.sampling());
  view.update();
  following.start();
  composer.focus();
  announce("Asked. The answer is coming.");
  const clock = setInterval(() => view.grow(), WAITING_TICK_MS);
  const mine = answering = new AbortController();
  composer.busy = true;
  try {
    for await (const piece of chat({ ...turn.request, ...USAGE }, mine.signal)) {
      turn.take(piece);
      view.grow();
      following.follow();
    }
    turn.status = "done";
    announce(turn.answer);
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

function fail(turn, error) {
  const trouble = error instanceof Trouble ? error : new Trouble("failed", String(error.message));
  turn.trouble = new Trouble(trouble.kind, explained(trouble, conversation.picturesUpTo(turn)), trouble);
  turn.status = "failed";
  announce(turn.trouble.message);
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
  if (event.key === "Escape" && answering && !document.querySelector("dialog[open]")) stop();
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
