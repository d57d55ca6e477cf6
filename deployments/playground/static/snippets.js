import { API } from "./api.js";

/** The request as a shell command. Pictures are in it, too long for an argument: hence stdin. */
export function asCurl(request) {
  const address = new URL("chat/completions", API);
  const body = JSON.stringify({ ...request, stream: true });
  return [
    `curl -N ${address} \\`,
    `  -H 'Content-Type: application/json' \\`,
    `  --data-binary @- <<'REQUEST'`,
    body,
    "REQUEST",
    "",
  ].join("\n");
}

/** The request as a Python program for the openai package. */
export function asPython(request) {
  const pictures = [];
  const messages = JSON.stringify(request.messages, (key, value) => {
    if (key !== "url") return value;
    pictures.push(value);
    return `\0${pictures.length - 1}\0`;
  }, 4).replace(/"\\u0000(\d+)\\u0000"/g, "pictures[$1]");
  const { model, messages: _, ...options } = request;
  return [
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(API.href.replace(/\/$/, ""))}, api_key="none")`,
    ...(pictures.length ? ["pictures = [", ...pictures.map((url) => `    ${JSON.stringify(url)},`), "]"] : []),
    "stream = client.chat.completions.create(",
    `    model=${JSON.stringify(model)},`,
    `    messages=${messages.replaceAll("\n", "\n    ")},`,
    ...Object.entries(options).map(([name, value]) => `    ${name}=${JSON.stringify(value)},`),
    "    stream=True,",
    ")",
    "for chunk in stream:",
    "    if chunk.choices:",
    '        print(chunk.choices[0].delta.content or "", end="", flush=True)',
    "print()",
    "",
  ].join("\n");
}
