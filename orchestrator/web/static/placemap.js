// The ranks of a layout on a canvas, by their places, with waits as arrows.

import { h, onWidth, widget } from "./dom.js";
import { MISSING, count, seconds, words } from "./format.js";
import { colour, onTheme } from "./theme.js";

const ARROWS = 160;

/** What a rank may do. */
export const KINDS = {
  culprit: "waited for",
  died: "died",
  held: "stands still",
  waiting: "waits for others",
  inside: "inside a call",
  working: "works",
  ended: "ended",
  unknown: "not seen",
};

/** A rank in words: its place, what it does and since when. */
export function rankText(told, kind, rank) {
  const own = told.ranks,
    node = told.nodes[told.node[rank]] ?? MISSING;
  const place = told.axes
    .filter((axis) => (told.layout[axis] ?? 1) > 1)
    .map((axis) => `${axis} ${told.coordinates[axis][rank]}`)
    .join(", ");
  const parts = [`rank ${rank}`, place, node, KINDS[kind]];
  if (own.step[rank] !== null) parts.push(`step ${count(own.step[rank])}`);
  if (own.phase[rank]) parts.push(words(own.phase[rank]));
  if (own.waits[rank]) parts.push(`in ${words(own.waits[rank])}`);
  if (own.held[rank]) parts.push(own.held[rank]);
  if (own.age[rank] !== null) parts.push(`for ${seconds(own.age[rank])}`);
  if (own.exit[rank] !== null && own.exit[rank] !== undefined) parts.push(`exit code ${own.exit[rank]}`);
  return parts.filter(Boolean).join(", ");
}

/** Units to a row: as many as fit, or rather fewer that fill all rows. */
function perRowOf(units, fit) {
  const most = Math.min(units, fit);
  for (let many = most; many > most / 2; many--) if (units % many === 0) return many;
  return most;
}

const CELLS = [44, 36, 26, 20, 16, 12, 10, 8, 6, 5, 4, 3];
const TALL = 640,
  BETWEEN = 16,
  HEAD = 20;

/** The largest cells with which all stages fit, as many of them side by side as can be. */
function sizes(stages, each, unit, width) {
  const units = Math.ceil(each / unit);
  let least = null;
  for (const cell of CELLS)
    for (let across = stages; across > 0; across--) {
      const wide = (width - (across - 1) * BETWEEN) / across,
        gap = cell > 8 ? 4 : 2;
      if (unit * cell > wide && across > 1) continue;
      const own = unit * cell > wide ? Math.max(1, Math.floor(wide / unit)) : cell;
      const perRow = perRowOf(units, Math.max(1, Math.floor((wide + gap) / (own * unit + gap))));
      const high = Math.ceil(units / perRow) * (own + (own > 8 ? 2 : 1)) + HEAD;
      const found = { cell: own, across, wide, gap, perRow, high, height: Math.ceil(stages / across) * (high + 12) };
      if (found.height <= TALL) return found;
      if (!least || found.height < least.height) least = found;
    }
  return least;
}

/** Places of all ranks: a block per stage, in it a cell per rank, those of a tensor group side by side. */
export function places(told, width) {
  const stages = Math.max(1, told.layout.pp ?? 1),
    each = Math.ceil(told.world / stages),
    unit = Math.max(1, (told.layout.tp ?? 1) * (told.layout.cp ?? 1));
  const { cell, across, wide, gap, perRow, high, height } = sizes(stages, each, unit, width);
  const blocks = Array.from({ length: stages }, (_, i) => [
    (i % across) * (wide + BETWEEN),
    Math.floor(i / across) * (high + 12),
  ]);
  const found = new Float32Array(told.world * 2);
  for (let rank = 0; rank < told.world; rank++) {
    const [x, y] = blocks[Math.min(stages - 1, Math.floor(rank / each))],
      own = rank % each,
      at = Math.floor(own / unit);
    found[2 * rank] = x + 2 + (at % perRow) * (unit * cell + gap) + (own % unit) * cell;
    found[2 * rank + 1] = y + HEAD + Math.floor(at / perRow) * (cell + (cell > 8 ? 2 : 1));
  }
  return { found, cell, blocks, height, row: perRow * unit };
}

/** The map. Props: `told` (`/layout`), `kinds` by rank, `marked` ranks, `chosen` rank or null, `pick(rank)`. */
export function placeMap(key, props) {
  return widget(key, create, props, { class: "layout" });
}

function create(root) {
  let props = null,
    width = 0,
    made = null,
    cursor = 0,
    pointed = false;
  const read = h("div", { class: "heat-read" });
  const canvas = h("canvas", { "aria-hidden": "true" });
  const plot = h(
    "div",
    { class: "plot", tabindex: "0", role: "slider", "aria-label": "Ranks by their place; arrows move, Enter opens" },
    canvas,
  );
  root.append(read, plot);
  const context = canvas.getContext("2d");
  const middle = (rank) => [made.found[2 * rank] + made.cell / 2, made.found[2 * rank + 1] + made.cell / 2];

  function arrow([x0, y0], [x1, y1]) {
    const far = Math.hypot(x1 - x0, y1 - y0);
    if (far < made.cell * 0.8) return;
    const ux = (x1 - x0) / far,
      uy = (y1 - y0) / far,
      r = made.cell / 2,
      head = Math.max(5, Math.min(9, made.cell / 2));
    const [bx, by, ex, ey] = [x0 + ux * r * 0.6, y0 + uy * r * 0.6, x1 - ux * r, y1 - uy * r];
    context.beginPath();
    context.moveTo(bx, by);
    context.lineTo(ex, ey);
    context.stroke();
    context.beginPath();
    context.moveTo(ex, ey);
    context.lineTo(ex - ux * head - uy * head * 0.6, ey - uy * head + ux * head * 0.6);
    context.lineTo(ex - ux * head + uy * head * 0.6, ey - uy * head - ux * head * 0.6);
    context.fill();
  }

  function draw() {
    if (!props || width < 60) return;
    const { told, kinds, marked, chosen } = props;
    made = places(told, width);
    const ratio = window.devicePixelRatio || 1,
      size = made.cell > 8 ? made.cell - 2 : made.cell - (made.cell > 4 ? 1 : 0);
    [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(made.height * ratio)];
    canvas.style.width = `${width}px`;
    canvas.style.height = `${made.height}px`;
    plot.style.height = `${made.height}px`;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, made.height);
    context.font = "13px system-ui, sans-serif";
    context.textAlign = "left";
    context.fillStyle = colour("--quiet");
    if (made.blocks.length > 1) made.blocks.forEach(([x, y], i) => context.fillText(`stage ${i}`, x, y + 13));
    const byKind = new Map();
    kinds.forEach((kind, rank) => (byKind.has(kind) ? byKind.get(kind).push(rank) : byKind.set(kind, [rank])));
    for (const [kind, all] of byKind) {
      context.fillStyle = colour(`--r-${kind}`);
      for (const rank of all) context.fillRect(made.found[2 * rank], made.found[2 * rank + 1], size, size);
    }
    if (made.cell >= 24) {
      context.textAlign = "center";
      context.textBaseline = "middle";
      kinds.forEach((kind, rank) => {
        context.fillStyle = colour(`--t-${kind}`);
        context.fillText(String(rank), made.found[2 * rank] + size / 2, made.found[2 * rank + 1] + size / 2);
      });
      context.textBaseline = "alphabetic";
    }
    const outline = (rank, name, wide) => {
      context.strokeStyle = colour(name);
      context.lineWidth = wide;
      context.strokeRect(made.found[2 * rank] - 1, made.found[2 * rank + 1] - 1, size + 2, size + 2);
    };
    for (const rank of marked) outline(rank, "--text", 1.5);
    context.strokeStyle = context.fillStyle = colour("--arrow");
    context.lineWidth = made.cell > 12 ? 2 : 1;
    let left = ARROWS;
    for (const one of told.waits) {
      if (left <= 0) break;
      const many = one.from.length * one.to.length > 32;
      const from = many ? one.from.filter((_, i) => i % Math.ceil(one.from.length / 8) === 0) : one.from;
      for (const a of from) for (const b of one.to.slice(0, 4)) if (left-- > 0) arrow(middle(a), middle(b));
    }
    for (const rank of told.culprits) outline(rank, "--bad", 3);
    if (chosen !== null) outline(chosen, "--focus", 3);
    if (pointed) outline(cursor, "--focus", 2);
  }

  function readout() {
    const text = rankText(props.told, props.kinds[cursor], cursor);
    read.textContent = pointed ? text : "Point at a rank, or use the arrow keys; a click opens it and marks its group.";
    plot.setAttribute("aria-valuetext", text);
    plot.setAttribute("aria-valuenow", String(cursor));
  }

  function to(rank) {
    if (!props?.told.world) return;
    cursor = Math.max(0, Math.min(props.told.world - 1, rank));
    pointed = true;
    draw();
    readout();
  }

  function under(event) {
    const box = plot.getBoundingClientRect(),
      x = event.clientX - box.left,
      y = event.clientY - box.top;
    let best = null,
      far = (made.cell + 6) ** 2;
    for (let rank = 0; rank < props.told.world; rank++) {
      const [mx, my] = middle(rank),
        off = (mx - x) ** 2 + (my - y) ** 2;
      if (off < far) [best, far] = [rank, off];
    }
    return best;
  }
  plot.addEventListener("pointermove", (event) => {
    const rank = under(event);
    if (rank !== null && (rank !== cursor || !pointed)) to(rank);
  });
  plot.addEventListener("pointerleave", () => {
    if (document.activeElement === plot) return;
    pointed = false;
    draw();
    readout();
  });
  plot.addEventListener("click", (event) => {
    const rank = under(event);
    if (rank !== null) props.pick(rank);
  });
  plot.addEventListener("focus", () => to(props.chosen ?? cursor));
  plot.addEventListener("blur", () => {
    pointed = false;
    draw();
    readout();
  });
  plot.addEventListener("keydown", (event) => {
    const row = made?.row ?? 1;
    const acts = {
      ArrowLeft: () => to(cursor - 1),
      ArrowRight: () => to(cursor + 1),
      ArrowUp: () => to(cursor - row),
      ArrowDown: () => to(cursor + row),
      Home: () => to(0),
      End: () => to(props.told.world - 1),
      Enter: () => props.pick(cursor),
      " ": () => props.pick(cursor),
      Escape: () => props.pick(null),
    };
    if (!acts[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    acts[event.key]();
  });
  const leave = onTheme(() => (root.isConnected ? draw() : leave()));
  onWidth(plot, () => width, (next) => {
    width = next;
    draw();
  });
  return (next) => {
    props = next;
    width = plot.clientWidth || width;
    plot.setAttribute("aria-valuemin", "0");
    plot.setAttribute("aria-valuemax", String(Math.max(0, next.told.world - 1)));
    cursor = Math.min(cursor, Math.max(0, next.told.world - 1));
    draw();
    readout();
  };
}
