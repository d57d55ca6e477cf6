// Not a module, so that it runs before the first paint: a remembered theme must not flash.
try {
  const theme = localStorage.getItem("tinychat.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is blocked; the system's theme it is.
}
