/**
 * What happened, and what can be done about it, in a sentence or two for the person who asked.
 * @param {Trouble} trouble
 * @param {Array} pictures all of the request's, in its order
 */
export function explained(trouble, pictures) {
  const said = sentence(named(trouble.message, pictures));
  switch (trouble.kind) {
    case "gone":
      return "The server cannot be reached. Your message is kept; it can be sent again once the server is back.";
    case "cut":
      return "The connection broke before the answer was complete.";
    case "draining":
      return "The server is shutting down and takes no new messages. If another one takes its place, try again in a moment.";
    case "busy":
      return `The server is busy. ${said}`;
    case "refused":
      return said;
    default:
      return `The server failed. ${said}`;
  }
}

/** Servers count pictures, people name them. */
function named(message, pictures) {
  return message.replace(/\bimages?\[(\d+)\]/g, (whole, index) => pictures[index]?.name ?? whole);
}

function sentence(text) {
  const trimmed = text.trim();
  if (!trimmed) return "";
  const first = trimmed[0].toUpperCase() + trimmed.slice(1);
  return /[.!?]$/.test(first) ? first : `${first}.`;
}
