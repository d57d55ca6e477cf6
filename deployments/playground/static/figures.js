import { element } from "./dom.js";

/** Terms whose values say themselves what they are; only screen readers get them. */
const SELF_EXPLAINED = new Set(["Speed", "Answer"]);
const number = new Intl.NumberFormat("en");

/** What an answer cost, as terms and values. */
export function figures(turn) {
  const list = element("dl", { class: "figures" });
  for (const [term, value] of facts(turn)) {
    const unseen = SELF_EXPLAINED.has(term) && "unseen";
    list.append(element("div", {}, element("dt", { class: unseen }, term), element("dd", {}, value)));
  }
  return list;
}

function* facts(turn) {
  const { firstTokenMs, tokensPerSecond, usage } = turn;
  if (firstTokenMs !== null) yield ["First token", duration(firstTokenMs)];
  else if (turn.status === "running") yield ["Waiting", duration(performance.now() - turn.sentAt)];
  if (tokensPerSecond !== null) yield ["Speed", `${number.format(Math.round(tokensPerSecond))} tokens/s`];
  if (usage?.completion_tokens) yield ["Answer", tokens(usage.completion_tokens)];
  if (usage?.prompt_tokens) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    const rest = cached ? `, ${number.format(cached)} cached` : "";
    yield ["Prompt", number.format(usage.prompt_tokens) + rest];
  }
}

function tokens(count) {
  return `${number.format(count)} ${count === 1 ? "token" : "tokens"}`;
}

function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}
