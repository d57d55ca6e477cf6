/**
 * What happened, and what can be done about it, in a sentence or two for the person who asked.
 * @param {Trouble} trouble
 * @param {Object} request
 * @param {Array} pictures all of the request's, in its order
 */
export function explained(trouble, request, pictures) {
  const said = sentence(named(trouble.message, request, pictures));
  switch (trouble.kind) {
    case "gone":
      return "The server cannot be reached. Your message is kept; it can be sent again once the server is back.";
    case "cut":
      return "The connection broke before the answer was complete.";
    case "draining":
      return "The server is shutting down and takes no new messages. If another one takes its place, try again in a moment.";
    case "refused":
      if (trouble.field === "body") {
        return `Message and pictures together are too much for the server: the ${said[0].toLowerCase()}${said.slice(1)}`;
      }
      return said;
    case "busy":
      return said || "The server is busy. Try again in a moment.";
    default:
      return `The server failed. ${said}`;
  }
}

/** Servers name a picture by its place in the request, people by its file. */
function named(message, request, pictures) {
  const place = /\bmessages\[(\d+)\]\.content\[(\d+)\](\.image_url)?(\.url)?:?/;
  const found = place.exec(message);
  if (found) {
    const [, messageIndex, partIndex] = found.map(Number);
    const earlier = request.messages.slice(0, messageIndex).flatMap(pictureParts).length;
    const parts = request.messages[messageIndex]?.content.slice(0, partIndex) ?? [];
    const name = pictures[earlier + parts.filter(isPicture).length]?.name;
    if (name) return message.replace(place, name);
  }
  return message.replace(/\bimages\[(\d+)\]:?/, (whole, index) => pictures[index]?.name ?? whole);
}

function pictureParts({ content }) {
  return Array.isArray(content) ? content.filter(isPicture) : [];
}

function isPicture(part) {
  return part.type === "image_url";
}

/** A file's name stays as it is; other sentences begin with a capital. */
function sentence(text) {
  const trimmed = text.trim();
  if (!trimmed) return "";
  const word = trimmed.split(/\s/, 1)[0];
  const first = word.includes(".") ? trimmed : trimmed[0].toUpperCase() + trimmed.slice(1);
  return /[.!?]$/.test(first) ? first : `${first}.`;
}
