// The part of the DOM that js/dom.js and js/chart.js use. Elements keep attributes, children, text and listeners; there is no layout.

class Element {
  constructor(name) {
    Object.assign(this, { name, attributes: new Map(), children: [], style: {}, dataset: {}, listeners: new Map(), hidden: false });
    Object.assign(this, { clientWidth: 0, clientHeight: 0, offsetWidth: 0 });
  }

  setAttribute(name, value) {
    this.attributes.set(name, String(value));
  }

  getAttribute(name) {
    return this.attributes.get(name) ?? null;
  }

  append(...children) {
    this.children.push(...children);
  }

  replaceChildren(...children) {
    this.children = children;
  }

  addEventListener(type, call) {
    this.listeners.set(type, call);
  }

  dispatch(type, event) {
    this.listeners.get(type)(event);
  }

  showModal() {
    this.setAttribute("open", "");
  }

  close() {
    this.attributes.delete("open");
    this.listeners.get("close")?.();
  }

  remove() {
    document.body.children = document.body.children.filter((child) => child !== this);
  }

  getBoundingClientRect() {
    return { left: 0, top: 0, width: Number(this.getAttribute("width")), height: Number(this.getAttribute("height")) };
  }

  get textContent() {
    return this.children.join("");
  }

  set textContent(value) {
    this.children = [value];
  }
}

globalThis.document = {
  createElement: (name) => new Element(name),
  createElementNS: (_, name) => new Element(name),
  querySelector: () => null,
  listeners: new Map(),
  addEventListener: Element.prototype.addEventListener,
  head: new Element("head"),
  body: new Element("body"),
};
