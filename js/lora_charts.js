// Charts of a LoRA's report: the size of its update by block, and how much of it each rank holds.

import { short } from "./chart.js";
import { el, svg } from "./dom.js";
import { say } from "./texts.js";

const KINDS = ["double", "single"];

// [{kind, bars: [{index, size}]}] of a report's block_norms. Blocks that are not changed have size 0.
export function blockBars(norms) {
  return KINDS.map((kind) => {
    const sizes = Object.entries(norms).filter(([name]) => name.startsWith(`${kind} `))
      .map(([name, size]) => [Number(name.slice(kind.length + 1)), size]);
    const last = Math.max(-1, ...sizes.map(([index]) => index));
    const byIndex = new Map(sizes);
    return { kind, bars: Array.from({ length: last + 1 }, (_, index) => ({ index, size: byIndex.get(index) ?? 0 })) };
  }).filter(({ bars }) => bars.length);
}

export function drawBlocks(norms) {
  const groups = blockBars(norms);
  const all = groups.flatMap(({ kind, bars }) => bars.map((bar) => ({ kind, ...bar })));
  const top = Math.max(...all.map(({ size }) => size));
  if (!(top > 0)) return null;
  const largest = all.find(({ size }) => size === top);
  const label = say("lora.blocks.label", { block: `${largest.kind} ${largest.index}`, size: short(top) });
  return el("figure.ct-figure", {}, el("figcaption", {}, say("lora.blocks")),
    el("div.ct-blocks", { role: "img", "aria-label": label },
      ...groups.map(({ kind, bars }) => el("div.ct-block-group", { style: `flex-grow: ${bars.length}` },
        el(`div.ct-bars.ct-${kind}`, {}, ...bars.map(({ index, size }) => el("span", {
          title: say("lora.block.tip", { block: `${kind} ${index}`, size: short(size) }),
        }, el("i", { style: `height: ${(100 * size) / top}%` })))),
        el("div.ct-axis", {}, el("span", {}, "0"), el("span", {}, say(`lora.blocks.${kind}`)),
          el("span", {}, bars.length > 1 ? String(bars.length - 1) : ""))))));
}

// The curve of the median layer in a band that holds eight tenths of the layers. points: {rank, low, median, high}.
export function drawSpectrum(points, needed) {
  if (points.length < 2) return null;
  const top = points.at(-1).rank;
  const x = (rank) => (top > 1 ? (100 * (rank - 1)) / (top - 1) : 0);
  const y = (share) => 100 * (1 - share);
  const line = (name, list = points) => list.map((point) => `${x(point.rank)} ${y(point[name])}`).join("L");
  const band = `M${line("high")}L${line("low", [...points].reverse())}Z`;
  const size = { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" };
  const mark = needed ? [svg("line.ct-needed", { x1: x(needed), x2: x(needed), y1: 0, y2: 100 })] : [];
  const label = say("lora.spectrum.label", { needed, rank: top });
  return el("figure.ct-figure", {}, el("figcaption", {}, say("lora.spectrum")),
    el("div.ct-spectrum", { role: "img", "aria-label": label },
      svg("svg", size, svg("path.ct-band", { d: band }), svg("line.ct-limit", { x1: 0, x2: 100, y1: 5, y2: 5 }),
        ...mark, svg("path.ct-smooth", { d: `M${line("median")}` }))),
    el("div.ct-axis", {}, el("span", {}, say("lora.rank", { rank: 1 })), el("span", {}, label),
      el("span", {}, String(top))));
}
