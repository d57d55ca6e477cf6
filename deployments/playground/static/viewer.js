import { byId, element } from "./dom.js";

/** A picture as a button that shows it large. */
export function pictureButton({ url, name, width, height }) {
  const picture = element("img", { src: url, alt: name, width, height });
  const open = () => {
    byId("viewer-picture").src = url;
    byId("viewer-picture").alt = name;
    byId("viewer-name").textContent = `${name}, ${width} × ${height}`;
    byId("viewer").showModal();
  };
  return element("button", { type: "button", class: "picture", "aria-label": `Show ${name}`, onclick: open }, picture);
}

/** A press beside the picture closes it. */
export function setUpViewer() {
  byId("viewer").addEventListener("click", (event) => {
    if (event.target === byId("viewer")) byId("viewer").close();
  });
}
