import { announce } from "./dom.js";

const SHOWN_MS = 1600;

/** A button that copies; it says so on itself for a moment. `text` is called when it is pressed. */
export function copies(button, text) {
  const label = button.textContent;
  let timer = 0;
  button.addEventListener("click", async () => {
    const copied = await copy(text());
    button.textContent = copied ? "Copied" : "Not allowed";
    announce(copied ? "Copied." : "The browser did not allow copying.");
    clearTimeout(timer);
    timer = setTimeout(() => { button.textContent = label; }, SHOWN_MS);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyWithoutPermission(text);
  }
}

/** Over plain http, away from localhost, browsers offer no clipboard but this one. */
function copyWithoutPermission(text) {
  const focused = document.activeElement;
  const field = document.createElement("textarea");
  field.value = text;
  field.className = "unseen";
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return copied;
}
