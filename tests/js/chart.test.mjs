// js/chart.js: what the loss chart draws, for ordinary and for hostile runs.

import assert from "node:assert/strict";
import { describe, test } from "node:test";

import "./dom_stub.mjs";
import { load } from "./load.mjs";
import { random } from "./random.mjs";

const { Chart, pace, rateText, short } = await load("chart.js");
const { RunState } = await load("run_state.js");

const [WIDTH, HEIGHT] = [600, 200];
const FRAME = { left: 40, right: WIDTH - 44, top: 8, bottom: HEIGHT - 20 };
const MILLION = 1_000_000;

function stateOf(loss, { step, rate = () => 1e-4, total = loss.length, name = "finished" } = {}) {
  const state = new RunState();
  const steps = step ?? loss.map((_, i) => i + 1);
  Object.assign(state, { state: name, total });
  Object.assign(state.steps, { step: steps, loss, learning_rate: steps.map(rate), grad_norm: steps.map(() => 1), seconds: steps.map(() => 2) });
  return state;
}

function draw(state, chart = new Chart()) {
  Object.assign(chart.element, { clientWidth: WIDTH, clientHeight: HEIGHT });
  chart.draw(state);
  return chart;
}

// The points of a path: every command is M or L with two finite numbers.
function points(path) {
  const d = path.getAttribute("d");
  assert.match(d, /^(M-?[\d.]+ -?[\d.]+(L-?[\d.]+ -?[\d.]+)*)?$/);
  return d.split(/[ML]/).slice(1).map((point) => point.split(" ").map(Number));
}

function assertInFrame(chart) {
  for (const name of ["raw", "smooth", "rate"])
    for (const [x, y] of points(chart.parts[name])) {
      assert.ok(x >= FRAME.left - 0.5 && x <= FRAME.right + 0.5, `${name}: x ${x}`);
      assert.ok(y >= FRAME.top - 0.01 && y <= FRAME.bottom + 0.01, `${name}: y ${y}`);
    }
}

const labels = (chart, anchor) =>
  chart.parts.grid.children
    .filter((part) => part.name === "text" && part.getAttribute("text-anchor") === anchor)
    .map((part) => ({ value: Number(part.textContent), text: part.textContent, x: Number(part.getAttribute("x")), y: Number(part.getAttribute("y")) }));

const lossLabels = (chart) => labels(chart, "end");
const stepLabels = (chart) => labels(chart, "middle");
const noise = (num, seed = 1) => Array.from({ length: num }, random(seed));

describe("hostile losses", () => {
  const cases = {
    "one step": [0.5],
    "one step without a loss": [null],
    "two steps": [1, 2],
    "equal losses": Array(50).fill(0.25),
    "zeros": Array(50).fill(0),
    "negative losses": noise(50).map((value) => -1 - value),
    "losses missing here and there": noise(60).map((value, i) => (i % 3 ? value : null)),
    "all losses missing": Array(30).fill(null),
    "the last losses missing": [...noise(30), null, null],
    "huge losses": noise(40).map((value) => value * 1e300),
    "tiny losses": noise(40).map((value) => value * 1e-300),
    "the smallest number": Array(40).fill(Number.MIN_VALUE),
    "losses that differ in the last bit": Array.from({ length: 40 }, (_, i) => 1 + (i % 2) * Number.EPSILON),
    "NaN among them": noise(60).map((value, i) => (i % 7 === 3 ? NaN : value)),
    "NaN first and last": [NaN, ...noise(20), NaN],
    "nothing but NaN": Array(20).fill(NaN),
    "infinite ones among them": noise(60).map((value, i) => (i === 30 ? Infinity : i === 40 ? -Infinity : value)),
  };
  for (const [name, loss] of Object.entries(cases))
    test(`${name}: every coordinate is a number inside the frame`, () => {
      const chart = draw(stateOf(loss));
      assertInFrame(chart);
      const known = loss.filter(Number.isFinite).length;
      assert.equal(points(chart.parts.raw).length > 0, known > 0);
      for (const { text } of lossLabels(chart)) assert.match(text, /^-?\d/);
      assert.ok(lossLabels(chart).length <= 12);
    });

  test("a missing loss does not change the curve of the others", () => {
    const loss = noise(200);
    const step = loss.map((_, i) => i + 1);
    const holes = (value) => draw(stateOf(loss.map((known, i) => (i % 9 === 4 ? value : known)), { step }));
    const kept = step.filter((_, i) => i % 9 !== 4);
    const left = draw(stateOf(kept.map((value) => loss[value - 1]), { step: kept, total: 200 }));
    for (const value of [null, NaN, Infinity]) {
      assert.deepEqual(points(holes(value).parts.raw), points(left.parts.raw));
      assert.deepEqual(points(holes(value).parts.smooth).at(-1), points(left.parts.smooth).at(-1));
    }
  });

  test("a missing learning rate leaves a gap", () => {
    for (const missing of [null, NaN]) {
      const chart = draw(stateOf(noise(50), { rate: (step) => (step === 20 ? missing : 1e-4) }));
      assertInFrame(chart);
      assert.equal(points(chart.parts.rate).length, 49);
    }
  });

  test("a run without steps has no curve, no mark and no learning rate", () => {
    const chart = draw(stateOf([], { total: 100, name: "running" }));
    for (const name of ["raw", "smooth", "rate"]) assert.deepEqual(points(chart.parts[name]), []);
    assert.deepEqual(chart.parts.marks.children, []);
    assert.deepEqual(chart.parts.grid.children, []);
    chart.element.dispatch("pointermove", { clientX: 100 });
    assert.equal(chart.tip.hidden, true);
  });

  test("an element that is too small draws nothing", () => {
    const chart = new Chart();
    Object.assign(chart.element, { clientWidth: 79, clientHeight: 300 });
    chart.draw(stateOf(noise(20)));
    assert.equal(chart.parts.raw.getAttribute("d"), null);
  });
});

describe("a million steps", () => {
  const loss = noise(MILLION);
  loss[123_456] = 0.0000001;
  const total = 1.3 * MILLION;
  const chart = draw(stateOf(loss, { total }));

  test("become at most two points per pixel", () => {
    assertInFrame(chart);
    for (const name of ["smooth", "rate"]) assert.ok(points(chart.parts[name]).length <= 2 * WIDTH, name);
    const num = points(chart.parts.raw).length;
    assert.ok(num > WIDTH / 2 && num <= 2 * WIDTH, `${num}`);
  });

  test("keep the lowest and the highest loss of each pixel", () => {
    const { x, y } = chart.view;
    const spans = new Map();
    loss.forEach((value, i) => {
      const place = Math.round(x(i + 1));
      const [low, high] = spans.get(place) ?? [Infinity, -Infinity];
      spans.set(place, [Math.min(low, value), Math.max(high, value)]);
    });
    const drawn = points(chart.parts.raw);
    for (const [place, [low, high]] of spans) {
      const column = drawn.filter(([at]) => at === place).map(([, at]) => at);
      assert.deepEqual([Math.min(...column), Math.max(...column)], [y(high), Math.min(y(low), FRAME.bottom)]);
    }
  });

  test("keep the last step", () => {
    for (const name of ["smooth", "rate"]) assert.equal(points(chart.parts[name]).at(-1)[0], chart.view.x(MILLION));
  });

  test("scale the axis of the learning rate to its highest value", () => {
    const last = draw(stateOf(loss, { rate: (step) => (step === 500_000 ? 0.5 : 0.1) }));
    assert.equal(labels(last, "start")[0].text, "0.5");
  });
});

describe("the scale of the losses", () => {
  test("a higher loss is drawn higher", () => {
    const chart = draw(stateOf([5, 4, 3, 2, 1]));
    const heights = points(chart.parts.raw).map(([, y]) => y);
    assert.deepEqual(heights, [...heights].sort((a, b) => a - b));
    assert.ok(heights.at(-1) - heights[0] > 0.8 * (FRAME.bottom - FRAME.top));
  });

  test("a single spike does not flatten the others, and touches the frame", () => {
    const loss = noise(400);
    loss[200] = 1e6;
    const chart = draw(stateOf(loss));
    const heights = points(chart.parts.raw).map(([, y]) => y);
    const low = heights.filter((y) => y > (FRAME.top + FRAME.bottom) / 2).length;
    assert.ok(chart.view.y.domain[1] > Math.max(...chart.view.smooth), "the smoothed curve is always inside");
    assert.equal(Math.min(...heights), FRAME.top);
    assert.ok(low > 0);
  });

  test("leaves out a few extreme losses at most", () => {
    const loss = noise(400);
    const [low, high] = draw(stateOf(loss)).view.y.domain;
    assert.ok(loss.filter((value) => value >= low && value <= high).length >= 0.97 * loss.length, `${low} to ${high}`);
  });

  test("has a margin around equal losses", () => {
    for (const value of [0, 1, -3, 1e-12, 1e12, 1e20]) {
      const [low, high] = draw(stateOf(Array(9).fill(value))).view.y.domain;
      assert.ok(low < value && value < high, `${value}: ${low} to ${high}`);
    }
  });
});

describe("ticks", () => {
  test("are few, round, evenly spaced and inside the frame", () => {
    const next = random(5);
    for (let attempt = 0; attempt < 300; attempt++) {
      const [size, offset] = [10 ** (next() * 12 - 6), next() * 3];
      const chart = draw(stateOf(noise(30, attempt).map((value) => (value + offset) * size)));
      const found = lossLabels(chart);
      const [low, high] = chart.view.y.domain;
      assert.ok(found.length >= 2 && found.length <= 8, `${found.length} of ${low} to ${high}`);
      const gaps = found.slice(1).map((tick, i) => found[i].y - tick.y);
      assert.ok(Math.max(...gaps) - Math.min(...gaps) < 0.1, `${gaps}`);
      for (const { y } of found) assert.ok(y >= FRAME.top && y <= FRAME.bottom + 3.01, `${y}`);
      const step = (high - low) * (gaps[0] / (FRAME.bottom - FRAME.top));
      const digit = step / 10 ** Math.floor(Math.log10(step * 1.001));
      assert.ok([1, 2, 5].some((round) => Math.abs(digit - round) < 0.02 * round), `${digit}`);
    }
  });

  test("are labelled with the loss at their height", () => {
    const chart = draw(stateOf(noise(30)));
    for (const { value, y } of lossLabels(chart)) assert.ok(Math.abs(chart.view.y(value) + 3 - y) < 0.02);
  });

  test("of steps are whole numbers within the run", () => {
    for (const total of [1, 2, 3, 7, 100, 12345, MILLION]) {
      const found = stepLabels(draw(stateOf(noise(1), { total })));
      assert.ok(found.every(({ value }) => Number.isInteger(value) && value >= 0 && value <= total), `${total}`);
      assert.ok(found.length >= 2 && found.length <= 8, `${total}: ${found.length}`);
    }
  });
});

describe("the axis of steps", () => {
  test("spans all steps of a run that has ended", () => {
    assert.deepEqual(draw(stateOf(noise(30), { total: 4000 })).view.x.domain, [0, 4000]);
  });

  test("leaves room for the next steps while it runs, and grows in jumps", () => {
    const ends = new Set();
    for (let num = 1; num <= 3000; num += 7) {
      const [, end] = draw(stateOf(Array(num).fill(1), { total: 5000, name: "running" })).view.x.domain;
      assert.ok(end >= num && end <= Math.max(50, num * 1.2 * 2.5), `${num} of ${end}`);
      ends.add(end);
    }
    assert.ok(ends.size <= 8, `${[...ends]}`);
  });

  test("never ends after the last step of the run", () => {
    assert.deepEqual(draw(stateOf(noise(3990), { total: 4000, name: "running" })).view.x.domain, [0, 4000]);
    assert.deepEqual(draw(stateOf(noise(3), { total: 20, name: "running" })).view.x.domain, [0, 20]);
  });
});

describe("marks", () => {
  const marksOf = (chart, name) => chart.parts.marks.children.filter((part) => part.getAttribute("class") === name);
  const places = (chart) => marksOf(chart, "ct-pictured").map((part) => Number(part.getAttribute("x")) + 3).sort((a, b) => a - b);

  test("few marks are all drawn, at their steps", () => {
    const state = stateOf(noise(100));
    state.checkpoints = [50, 100];
    state.pictures = [20, 60, 100].map((step) => ({ step, label: "64x64", url: "" }));
    const chart = draw(state);
    assert.equal(marksOf(chart, "ct-saved").length, 2);
    assert.deepEqual(places(chart), [20, 60, 100].map((step) => chart.view.x(step)));
  });

  test("many marks are thinned, and the last one is kept", () => {
    const state = stateOf(noise(3000));
    state.pictures = noise(900).map((value) => ({ step: 1 + Math.floor(value * 2990), label: "", url: "" }));
    state.pictures.push({ step: 3000, label: "", url: "" });
    const chart = draw(state);
    const found = places(chart);
    assert.equal(found.at(-1), chart.view.x(3000));
    assert.ok(found.length > 30 && found.length < 70, `${found.length}`);
    for (let i = 1; i < found.length; i++) assert.ok(found[i] - found[i - 1] >= 8.99, `${found[i] - found[i - 1]}`);
  });
});

describe("the pointer", () => {
  const hover = (chart, x) => {
    chart.element.dispatch("pointermove", { clientX: x });
    return chart.tip.textContent;
  };

  test("shows the values of the nearest step", () => {
    const steps = [1, 2, 3, 50, 60, 61, 99];
    const chart = draw(stateOf(steps.map((step) => step / 100), { step: steps, total: 100 }));
    const next = random(8);
    for (let i = 0; i < 200; i++) {
      const x = next() * WIDTH;
      const wanted = chart.view.x.invert(x);
      const nearest = Math.min(...steps.map((step) => Math.abs(step - wanted)));
      const found = Number(/^step (\d+)/.exec(hover(chart, x))[1]);
      assert.ok(Math.abs(Math.abs(found - wanted) - nearest) < 1e-6, `${wanted}: ${found}`);
    }
    assert.match(hover(chart, chart.view.x(50)), /^step 50\nloss 0\.5, smoothed [\d.]+\nlearning rate 1\.0e-4, 2 s\/step$/);
  });

  test("names the checkpoint of the step, and follows new steps", () => {
    const state = stateOf(noise(100));
    state.checkpoints = [100];
    state.leaks = [{ step: 100, leak: 0.3125, standard_error: 0.05 }];
    const chart = draw(state);
    assert.match(hover(chart, WIDTH), /^step 100\n.*checkpoint\nleak 0\.313 ± 0\.05$/s);
    state.append({ step: [101], loss: [1], learning_rate: [1e-4], grad_norm: [1], seconds: [2] }, 101);
    draw(state, chart);
    assert.match(chart.tip.textContent, /^step 101\n/);
    chart.element.dispatch("pointerleave");
    assert.equal(chart.tip.hidden, true);
  });

  test("shows a missing loss as a dash", () => {
    const chart = draw(stateOf([1, null, 1]));
    assert.match(hover(chart, chart.view.x(2)), /^step 2\nloss -, smoothed 1\n/);
  });

  test("keeps the tip inside the chart", () => {
    const chart = draw(stateOf(noise(100)));
    for (const width of [150, 500]) {
      chart.tip.offsetWidth = width;
      for (const x of [0, 100, WIDTH / 2, WIDTH]) {
        hover(chart, x);
        const left = parseFloat(chart.tip.style.left);
        assert.ok(left >= 0 && left + width <= WIDTH, `${left}`);
      }
    }
  });
});

describe("formatting", () => {
  test("short has three digits", () => {
    assert.deepEqual([0, 0.123456, 1234.5, null, undefined].map(short), ["0", "0.123", "1230", "-", "-"]);
  });

  test("small learning rates have an exponent", () => {
    assert.deepEqual([0, 1e-4, 2.5e-5, 0.005, null].map(rateText), ["0", "1.0e-4", "2.5e-5", "0.005", "-"]);
  });

  test("pace", () => {
    assert.deepEqual([0, null, 0.25, 99, 3661].map(pace), ["-", "-", "0.25 s/step", "99 s/step", "1:01:01 per step"]);
  });
});

describe("held-out images", () => {
  test("their loss is a line with a dot for each evaluation, in the frame, also where it is far above the others", () => {
    const state = stateOf([0.5, 0.4, 0.3, 0.2]);
    state.evals = [
      { step: 0, loss: 2, held_out: true }, { step: 2, loss: 1.5, trained: 0.4, held_out: true },
      { step: 4, loss: 3, trained: 0.1, held_out: true, overfits: true },
    ];
    const chart = draw(state);
    assert.equal(points(chart.parts.held).length, 3);
    assert.equal(points(chart.parts.trained).length, 2);
    for (const name of ["held", "trained"])
      for (const [x, y] of points(chart.parts[name]))
        assert.ok(x >= FRAME.left && x <= FRAME.right && y >= FRAME.top && y <= FRAME.bottom, `${name} ${x} ${y}`);
    assert.equal(chart.parts.evals.children.length, 3);
  });

  test("without them nothing of it is drawn", () => {
    const chart = draw(stateOf([0.5, 0.4]));
    assert.equal(chart.parts.held.getAttribute("d"), "");
    assert.equal(chart.parts.evals.children.length, 0);
  });
});
