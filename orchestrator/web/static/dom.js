// Elements as plain trees, and `morph`, which changes what stands there into a new tree: what has the focus, is scrolled or
// opened stays so. Texts always go in as text nodes, so nothing that a run says can become HTML.

const SVG = "http://www.w3.org/2000/svg";
const KEPT = new Set(["open"]); // what the reader of the page has opened stays open

function called(event) {
  event.currentTarget.__on?.[event.type]?.(event);
}

function make(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "key") node.__key = value;
    else if (name === "memo") node.__memo = value;
    else if (name === "on") {
      node.__on = value;
      for (const type of Object.keys(value)) node.addEventListener(type, called);
    } else if (name === "vars") {
      node.__vars = value;
      for (const [key, one] of Object.entries(value)) node.style.setProperty(key, one);
    } else node.setAttribute(name, value === true ? "" : String(value));
  }
  append(node, children);
  return node;
}

function append(node, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    if (Array.isArray(child)) append(node, child);
    else node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

/** An HTML element. Props are attributes; `on` has listeners, `key` tells brothers apart, `memo` says what it was made of. */
export function h(tag, props, ...children) {
  return make(document.createElement(tag), props, children);
}

/** An SVG element. */
export function s(tag, props, ...children) {
  return make(document.createElementNS(SVG, tag), props, children);
}

/** A part with a life of its own: `create(element)` gives `update(props)`, called when it stands in the page and at each change. */
export function widget(key, create, props, attributes) {
  const node = h("div", { ...attributes, key });
  node.__create = create;
  node.__props = props;
  return node;
}

/** Start the widgets of a tree that now stands in the page. */
function adopt(node) {
  if (node.__create && !node.__update) {
    node.__update = node.__create(node);
    node.__update(node.__props);
    return;
  }
  for (let child = node.firstElementChild; child; child = child.nextElementSibling) adopt(child);
}

function same(old, made) {
  return old.nodeName === made.nodeName && old.__key === made.__key && old.__create === made.__create;
}

function attributes(old, made) {
  for (const { name } of [...old.attributes])
    if (!made.hasAttribute(name) && !KEPT.has(name) && name !== "style") old.removeAttribute(name);
  for (const { name, value } of [...made.attributes])
    if (name !== "style" && !KEPT.has(name) && old.getAttribute(name) !== value) old.setAttribute(name, value);
  for (const [key, value] of Object.entries(made.__vars ?? {})) old.style.setProperty(key, value);
  for (const type of Object.keys(made.__on ?? {})) old.addEventListener(type, called);
  old.__on = made.__on;
  if (old.nodeName === "INPUT" && document.activeElement !== old) {
    if (old.type === "checkbox") old.checked = made.hasAttribute("checked");
    else if (old.value !== (made.getAttribute("value") ?? "")) old.value = made.getAttribute("value") ?? "";
  }
}

function morphOne(old, made) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== made.data) old.data = made.data;
    return;
  }
  if (made.__memo !== undefined && made.__memo === old.__memo) return;
  old.__memo = made.__memo;
  if (!old.__create) attributes(old, made);
  if (old.__create) {
    old.__props = made.__props;
    old.__update(made.__props);
    return;
  }
  morph(old, [...made.childNodes]);
  if (old.nodeName === "SELECT" && document.activeElement !== old) {
    const chosen = [...old.options].findIndex((one) => one.hasAttribute("selected"));
    if (chosen >= 0) old.selectedIndex = chosen;
  }
}

/** Change the children of a node into `made`; what stays isn't moved where that can be, so it keeps the focus. */
export function morph(node, made) {
  const keyed = new Map(),
    wanted = new Set(made.map((one) => one.__key));
  for (const child of node.childNodes) if (child.__key !== undefined) keyed.set(child.__key, child);
  let at = node.firstChild;
  const drop = () => {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  };
  made.forEach((one, i) => {
    let old = at;
    if (one.__key !== undefined) {
      old = keyed.get(one.__key);
      while (old && at && at !== old && (at.__key === undefined || !wanted.has(at.__key))) drop();
    } else if (at && !same(at, one)) {
      const next = made[i + 1],
        inserted = next && same(at, next);
      if (!inserted && at.__key === undefined && at.nextSibling && same(at.nextSibling, one)) drop();
      old = at;
    }
    if (old && same(old, one)) {
      if (old === at) at = at.nextSibling;
      else node.insertBefore(old, at);
      morphOne(old, one);
    } else {
      node.insertBefore(one, at);
      if (one.nodeType === Node.ELEMENT_NODE) adopt(one);
    }
  });
  while (at) drop();
}

/** Calls `act` with the width of an element, each time that it isn't what `known` gives, while the element is shown. */
export function onWidth(element, known, act) {
  new ResizeObserver(() => {
    if (element.clientWidth && element.clientWidth !== known()) act(element.clientWidth);
  }).observe(element);
}
