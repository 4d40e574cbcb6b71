// A window over the whole page, for images that need room. Keys that are pressed in it do not reach the canvas.

import { el } from "./dom.js";
import { say } from "./texts.js";

// A dialog with a title; it is removed when it closes. onkey(event) gets the keys.
export function openDialog(title, children, { onkey, onclose } = {}) {
  const close = el("button.ct-back.pi.pi-times", { type: "button", title: say("dialog.close"), "aria-label": say("dialog.close"), onclick: () => dialog.close() });
  const dialog = el("dialog.ct-dialog", {
    "aria-label": title, onclose: () => {
      dialog.remove();
      onclose?.();
    },
    onkeydown: (event) => {
      event.stopPropagation();
      onkey?.(event);
    },
  }, el("div.ct-dialog-head", {}, el("b.ct-title", {}, title), close), ...children);
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}
