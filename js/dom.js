// Helpers that make DOM elements in one line, and the style sheet of everything this pack shows.

const SVG = "http://www.w3.org/2000/svg";

// el("div.name", {title: "x"}, child, "text")
export function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name.split(".")[0]), name, attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name.split(".")[0]), name, attributes, children);
}

function fill(element, name, attributes, children) {
  const [, ...classes] = name.split(".");
  if (classes.length) element.setAttribute("class", classes.join(" "));
  set(element, attributes);
  element.append(...children);
  return element;
}

// Sets attributes, or adds listeners if the name begins with "on". Uses DOM functions and never parses HTML from a
// string.
export function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
  }
  return element;
}

export function text(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

// A listener for clicks whose button is disabled until the call has ended.
export const disabledDuring = (call) => async ({ currentTarget }) => {
  currentTarget.disabled = true;
  await call();
  currentTarget.disabled = false;
};

export function addStyle() {
  const href = new URL("style.css", import.meta.url).href;
  if (!document.querySelector(`link[href="${href}"]`)) document.head.append(el("link", { rel: "stylesheet", href }));
}

// Makes a node's method also call this function, after the original.
export function after(node, name, call) {
  const before = node[name];
  node[name] = function (...values) {
    const result = before?.apply(this, values);
    call(...values);
    return result;
  };
}
