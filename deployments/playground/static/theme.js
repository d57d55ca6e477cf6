import { byId } from "./dom.js";

const KEY = "tinychat.theme";
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");

/** The button between light and dark. Back at the system's own, nothing is remembered. */
export function setUpTheme() {
  const button = byId("theme");
  const isDark = () => {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : systemIsDark.matches;
  };
  const name = () => button.setAttribute("aria-label", isDark() ? "Light theme" : "Dark theme");
  button.addEventListener("click", () => {
    const dark = !isDark();
    const remembered = dark === systemIsDark.matches ? null : dark ? "dark" : "light";
    if (remembered) document.documentElement.dataset.theme = remembered;
    else delete document.documentElement.dataset.theme;
    try {
      if (remembered) localStorage.setItem(KEY, remembered);
      else localStorage.removeItem(KEY);
    } catch {
      // Storage is blocked; the choice holds for this visit.
    }
    name();
  });
  systemIsDark.addEventListener("change", name);
  name();
}
