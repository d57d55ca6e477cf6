import { byId } from "./dom.js";

const NEAR_PX = 80;

/** Keeps the end of the conversation in sight, unless the reader has scrolled away from it. */
export function setUpFollowing() {
  const page = document.scrollingElement;
  const button = byId("latest");
  let following = true;
  const distance = () => page.scrollHeight - page.clientHeight - page.scrollTop;
  const toEnd = () => page.scrollTo({ top: page.scrollHeight, behavior: "instant" });
  const show = () => { button.hidden = following || distance() < NEAR_PX; };
  addEventListener("scroll", () => {
    following = distance() < NEAR_PX;
    show();
  }, { passive: true });
  button.addEventListener("click", () => {
    following = true;
    toEnd();
    byId("question").focus({ preventScroll: true });
  });
  return {
    /** A message has been sent: it comes into sight. */
    start() {
      following = true;
      toEnd();
    },
    /** Something has grown. */
    follow() {
      if (following) toEnd();
      show();
    },
  };
}
