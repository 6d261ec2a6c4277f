// Looks at the page as it stands: contrast of texts and marks, names of controls, headings, ids, sizes of targets, what sticks out.
// Returns a list of complaints.
const found = [];
const say = (node, text) => found.push(`${text}: ${(node.outerHTML ?? "").slice(0, 120)}`);
const seen = (node) => {
  if (node.closest("[hidden]")) return false;
  const box = node.getBoundingClientRect(), style = getComputedStyle(node);
  return box.width > 1 && box.height > 1 && style.visibility !== "hidden" && style.clipPath === "none";
};
const canvas = new OffscreenCanvas(1, 1), pen = canvas.getContext("2d", { willReadFrequently: true });
const rgb = (text) => {
  pen.clearRect(0, 0, 1, 1);
  pen.fillStyle = text;
  pen.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
};
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
const behind = (node) => {
  const layers = [];
  for (let at = node; at; at = at.parentElement) {
    const own = rgb(getComputedStyle(at).backgroundColor);
    if (own[3] > 0) layers.push(own);
    if (own[3] === 1) break;
  }
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
};
const light = (c) => {
  const [r, g, b] = c.slice(0, 3).map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => {
  const [x, y] = [light(a), light(b)].sort((m, n) => n - m);
  return (x + 0.05) / (y + 0.05);
};

// Texts: 4.5, large ones 3.
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let texts = 0;
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !node || /SCRIPT|STYLE|NOSCRIPT|TITLE|OPTION/i.test(node.nodeName) || !seen(node)) continue;
  texts += 1;
  const style = getComputedStyle(node), svg = node instanceof SVGElement;
  const below = behind(svg ? node.ownerSVGElement.closest("div, td, dd, section, body") : node);
  const own = over(rgb(svg ? style.fill : style.color), below);
  const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
  const ratio = contrast(own, below);
  if (ratio < (large ? 3 : 4.5)) say(node, `contrast ${ratio.toFixed(2)} of a text '${walker.currentNode.data.trim().slice(0, 30)}'`);
}
if (!texts) found.push("there is no text");

// Marks that mean something: 3.
for (const node of document.querySelectorAll(".swatch:not(.idle), .line, .stack, .saved, .rewind, rect.part:not(.idle), .filled, .dot")) {
  const style = getComputedStyle(node), svg = node instanceof SVGElement;
  const below = behind((svg ? node.ownerSVGElement : node).closest("section, .table, main") ?? document.body);
  const paint = svg ? (style.fill === "none" || node.nodeName === "line" ? style.stroke : style.fill) : style.backgroundColor;
  if (!svg && rgb(paint)[3] === 0) continue;
  const ratio = contrast(over(rgb(paint), below), below);
  if (ratio < 3 && !node.classList.contains("lost")) say(node, `contrast ${ratio.toFixed(2)} of a mark`);
}
for (const node of document.querySelectorAll("button, select, input:not([type=checkbox])")) {
  if (!seen(node)) continue;
  const style = getComputedStyle(node), below = behind(node.parentElement);
  if (style.borderTopWidth === "0px") continue;
  const ratio = Math.max(contrast(over(rgb(style.borderTopColor), below), below), contrast(behind(node), below));
  if (ratio < 3) say(node, `contrast ${ratio.toFixed(2)} of a control's edge`);
}

// Names.
const name = (node) => (node.getAttribute("aria-label") ?? "").trim()
  || (node.getAttribute("aria-labelledby") ?? "").split(/\s+/).filter(Boolean).map((id) => document.getElementById(id)?.textContent ?? "").join(" ").trim()
  || (node.labels?.length ? [...node.labels].map((one) => [...one.childNodes].filter((c) => c !== node && !c.contains?.(node) || c.nodeType === 3).map((c) => c.textContent).join("")).join(" ").trim() : "")
  || (/INPUT|SELECT/.test(node.nodeName) ? "" : node.textContent.trim());
for (const node of document.querySelectorAll("a[href], button, input, select, textarea, summary, [role=img], [role=slider], [role=region], [role=progressbar], [role=group], nav, dialog[open]"))
  if (!node.closest("[hidden]") && !name(node)) say(node, "without a name");
for (const node of document.querySelectorAll("[role=slider], [role=progressbar]"))
  for (const attribute of ["aria-valuemin", "aria-valuemax", "aria-valuenow"])
    if (!Number.isFinite(Number(node.getAttribute(attribute) ?? "x"))) say(node, `without ${attribute}`);
for (const node of document.querySelectorAll("[role=slider]")) if (!node.getAttribute("aria-valuetext")) say(node, "without aria-valuetext");
for (const node of document.querySelectorAll("svg, canvas, img"))
  if (node.getAttribute("aria-hidden") !== "true" && !name(node) && !node.closest("[aria-hidden=true], svg svg")) say(node, "a picture without a text");
for (const node of document.querySelectorAll("[aria-hidden=true]"))
  if (node.querySelector("a[href], button, input, select, [tabindex='0']")) say(node, "hidden, with something to reach in it");

// Structure.
const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
for (const id of new Set(ids.filter((one, i) => ids.indexOf(one) !== i))) found.push(`two elements have the id ${id}`);
if (document.querySelectorAll("main").length !== 1) found.push("not one main");
if (document.querySelectorAll("h1").length !== 1) found.push(`${document.querySelectorAll("h1").length} headings of the first level`);
let level = 0;
for (const node of document.querySelectorAll("h1, h2, h3, h4")) {
  const own = Number(node.nodeName[1]);
  if (!node.closest("dialog") && own > level + 1) say(node, `a heading of level ${own} after ${level}`);
  if (!node.closest("dialog")) level = own;
}
if (!document.documentElement.lang || !document.title) found.push("no language or no title");
for (const node of document.querySelectorAll("[tabindex]")) if (node.tabIndex > 0) say(node, "an order of its own for the tab key");
for (const node of document.querySelectorAll("ul > :not(li), ol > :not(li), dl > :not(div)")) say(node, "wrong in a list");
for (const node of document.querySelectorAll("th")) if (!node.textContent.trim()) say(node, "an empty heading of a column");
for (const node of document.querySelectorAll("[on], [onclick], [onerror], [style*='url']")) say(node, "an inline listener");

// Targets of at least 24 by 24, but links in a text; nothing sticks out sideways.
for (const node of document.querySelectorAll("button, select, input, summary, nav a")) {
  const box = node.getBoundingClientRect();
  if (seen(node) && (box.height < 23.5 && node.type !== "checkbox" || box.width < 17)) say(node, `only ${box.width.toFixed(0)}×${box.height.toFixed(0)} to hit`);
}
if (document.documentElement.scrollWidth > innerWidth + 1) {
  const wide = [...document.querySelectorAll("main *")].filter((node) => node.getBoundingClientRect().right > innerWidth + 1 && !node.closest(".table, .log, pre")).slice(0, 3);
  found.push(`${document.documentElement.scrollWidth - innerWidth} points wider than the window`);
  wide.forEach((node) => say(node, "sticks out"));
}
return found;
