/** Longest side that is sent; models look at far fewer pixels, and uploads take time. */
export const MAX_SIDE = 2048;
const MAX_FILE_BYTES = 100e6;
const MAX_SENT_BYTES = 8e6;
/** What servers decode as it is; whatever else the browser can show is drawn anew. */
const SENT_AS_THEY_ARE = new Set(["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"]);

/** A file that cannot be sent; the message names it and says what would be right. */
export class Refusal extends Error {}

/**
 * A picture as it is sent: its name, its data URL, its size in pixels.
 * @param {File} file
 * @throws {Refusal}
 */
export async function readPicture(file) {
  const name = file.name || "pasted picture";
  if (file.type && !file.type.startsWith("image/")) {
    throw new Refusal(`${name} is not a picture. PNG, JPEG, WebP and GIF work.`);
  }
  if (file.size === 0) throw new Refusal(`${name} is empty.`);
  if (file.size > MAX_FILE_BYTES) {
    throw new Refusal(`${name} is too large (${megabytes(file.size)}). At most ${megabytes(MAX_FILE_BYTES)} can be read.`);
  }
  const address = URL.createObjectURL(file);
  try {
    const image = await decode(address, name);
    const scale = Math.min(1, MAX_SIDE / Math.max(image.naturalWidth, image.naturalHeight));
    const asItIs = scale === 1 && file.size <= MAX_SENT_BYTES && SENT_AS_THEY_ARE.has(file.type);
    const width = Math.max(1, Math.round(image.naturalWidth * scale));
    const height = Math.max(1, Math.round(image.naturalHeight * scale));
    const url = await dataUrl(asItIs ? file : await redrawn(image, width, height));
    return { name, url, width, height };
  } finally {
    URL.revokeObjectURL(address);
  }
}

async function decode(address, name) {
  const image = new Image();
  image.src = address;
  try {
    await image.decode();
  } catch {
    throw new Refusal(`${name} cannot be read as a picture: it is damaged, or in a format that this browser does not know. PNG, JPEG, WebP and GIF work.`);
  }
  if (!image.naturalWidth || !image.naturalHeight) throw new Refusal(`${name} has no size.`);
  return image;
}

/** Upright, since the browser turns an image as its EXIF says before it draws it. */
function redrawn(image, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff"; // JPEG knows no transparency, and would make it black
  pen.fillRect(0, 0, width, height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(image, 0, 0, width, height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Refusal("The file went away while it was read."));
    reader.readAsDataURL(blob);
  });
}

function megabytes(bytes) {
  return `${Math.round(bytes / 1e6)} MB`;
}
