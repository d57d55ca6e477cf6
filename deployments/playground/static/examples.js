import { element } from "./dom.js";

/** Drawn by draw_examples.py; the model that is served out of the box answers all of them. */
const EXAMPLES = [
  { file: "star-and-circle", shows: "A red circle and a blue star", asks: "Where is the star?" },
  { file: "three-shapes", shows: "A square, a triangle and a cross", asks: "What is in this picture?" },
  { file: "number", shows: "A written number", asks: "What number is written here?" },
  { file: "ring", shows: "A ring above a square", asks: "What shape is the blue object?" },
];

/**
 * The examples as buttons.
 * @param {function(File, string)} choose gets the picture and the question that goes with it
 */
export function exampleButtons(choose) {
  return EXAMPLES.map(({ file, shows, asks }) => {
    const source = new URL(`examples/${file}.png`, import.meta.url);
    const take = async () => {
      const blob = await (await fetch(source)).blob();
      choose(new File([blob], `${file}.png`, { type: blob.type }), asks);
    };
    const picture = element("img", { src: source, alt: `${shows}.`, width: 336, height: 336 });
    return element("li", {},
      element("button", { type: "button", class: "example", onclick: take },
        picture, element("span", {}, asks)));
  });
}
