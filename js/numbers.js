// Numbers of our fields without needless zeros: 64 for 64.00, 0.0001 for 0.000100.

import { app } from "../../scripts/app.js";

// The decimals that a value has, at most this many.
export function decimalsOf(value, most) {
  const [, decimals = ""] = Number(value).toFixed(most).split(".");
  return decimals.replace(/0+$/, "").length;
}

// The page writes a number with as many decimals as its precision says. It also rounds a new value to them, in the
// widget's callback: there the precision is that of the field.
function trim(widget) {
  const { options, callback } = widget;
  const most = options?.precision;
  if (widget.type !== "number" || !(most > 0)) return;
  let isChanging = false;
  widget.callback = function (...values) {
    isChanging = true;
    try {
      return callback?.apply(this, values);
    } finally {
      isChanging = false;
    }
  };
  const get = () => (isChanging ? most : decimalsOf(widget.value, most));
  Object.defineProperty(options, "precision", { get, set: () => {}, enumerable: true, configurable: true });
}

app.registerExtension({
  name: "ChromaTrainer.Numbers",
  nodeCreated(node) {
    if (String(node.constructor.nodeData?.category ?? "").startsWith("ChromaTrainer")) node.widgets?.forEach(trim);
  },
});
