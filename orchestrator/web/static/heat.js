// A heat map on a canvas: rows by columns, drawn at once whatever their number, with a readout, a pointer and a keyboard.

import { h, widget } from "./dom.js";
import { colour, onTheme, ramp } from "./theme.js";

const MOST = 560,
  TOP = 7,
  BOTTOM = 20;

/**
 * A map. Props: `label`, `values[row][column]`, `low`, `high`, `kind` ("" or "around" a middle), `format(value)`,
 * `rowText(row)`, `columnText(column)`, `said(row, column)` for the readout, `pick(row, column)`, `zoom(first, last)` in columns
 * (null, null: all), `chosen` row, `unit` text of the scale.
 */
export function heat(key, props) {
  return widget(key, create, props, { class: "heat" });
}

function create(root) {
  let props = null,
    width = 0,
    height = 0,
    left = 60,
    picture = null,
    shown = null;
  let row = 0,
    column = 0,
    pointed = false,
    drag = null,
    sized = "";
  const read = h("div", { class: "heat-read" });
  const canvas = h("canvas", { "aria-hidden": "true" });
  const plot = h("div", { class: "plot", tabindex: "0", role: "slider" }, canvas);
  const bar = h("canvas", { class: "scale", width: "256", height: "10", "aria-hidden": "true" });
  const low = h("span"),
    high = h("span"),
    unit = h("span", { class: "quiet" });
  root.append(read, plot, h("div", { class: "heat-scale" }, low, bar, high, unit));
  const context = canvas.getContext("2d");

  const rows = () => props.values.length;
  const columns = () => props.values[0]?.length ?? 0;
  const inner = () => Math.max(1, width - left - 4);

  /** The values as a picture of one point per cell. */
  function paint() {
    const made = new OffscreenCanvas(Math.max(1, columns()), Math.max(1, rows()));
    const own = made.getContext("2d"),
      image = own.createImageData(made.width, made.height);
    const colours = ramp(props.kind),
      span = props.high - props.low || 1;
    let at = 0;
    for (const line of props.values)
      for (const value of line) {
        if (value !== null) {
          const found = colours[Math.max(0, Math.min(255, Math.round(((value - props.low) / span) * 255)))];
          image.data.set(found, at);
          image.data[at + 3] = 255;
        }
        at += 4;
      }
    own.putImageData(image, 0, 0);
    picture = made;
    const scale = bar.getContext("2d");
    colours.forEach(([r, g, b], i) => {
      scale.fillStyle = `rgb(${r} ${g} ${b})`;
      scale.fillRect(i, 0, 1, 10);
    });
  }

  function hatch() {
    const made = new OffscreenCanvas(6, 6),
      own = made.getContext("2d");
    own.strokeStyle = colour("--line");
    own.beginPath();
    own.moveTo(0, 6);
    own.lineTo(6, 0);
    own.stroke();
    return context.createPattern(made, "repeat");
  }

  function draw() {
    if (!props || width < 60 || !picture) return;
    const ratio = window.devicePixelRatio || 1,
      cells = height - BOTTOM - TOP;
    const size = `${Math.round(width * ratio)}x${Math.round(height * ratio)}`;
    if (sized !== size) {
      [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
      sized = size;
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.translate(0, TOP);
    context.imageSmoothingEnabled = false;
    context.fillStyle = hatch();
    context.fillRect(left, 0, inner(), cells);
    const [first, last] = shown ?? [0, columns()];
    context.drawImage(picture, first, 0, last - first, rows(), left, 0, inner(), cells);
    labels(cells);
    const w = inner() / (last - first),
      each = cells / rows();
    context.lineWidth = 2;
    context.strokeStyle = colour("--text");
    if (props.chosen !== null && props.chosen !== undefined && props.chosen >= 0)
      context.strokeRect(left + 1, props.chosen * each + 0.5, inner() - 2, Math.max(2, each - 1));
    if (pointed && columns()) {
      context.strokeStyle = colour("--focus");
      context.strokeRect(left + (column - first) * w - 1, row * each - 1, Math.max(4, w) + 2, Math.max(4, each) + 2);
    }
    if (drag && Math.abs(drag.to - drag.from) > 6) {
      context.strokeStyle = colour("--focus");
      context.strokeRect(Math.min(drag.from, drag.to), 1, Math.abs(drag.to - drag.from), cells - 2);
    }
  }

  function labels(cells) {
    context.fillStyle = colour("--quiet");
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const each = cells / rows(),
      every = Math.max(1, Math.ceil(15 / each));
    for (let i = 0; i < rows(); i += every) context.fillText(props.rowText(i), left - 6, (i + 0.5) * each, left - 8);
    context.textBaseline = "alphabetic";
    const many = Math.max(2, Math.min(columns(), Math.floor(inner() / 110)));
    const [first, last] = shown ?? [0, columns()];
    for (let i = 0; i < many && last - first > 0; i++) {
      const at = many === 1 ? first : Math.round(first + (i * (last - first - 1)) / (many - 1));
      context.textAlign = i === 0 ? "left" : i === many - 1 ? "right" : "center";
      const x = i === 0 ? left : i === many - 1 ? width - 4 : left + ((at - first + 0.5) / (last - first)) * inner();
      context.fillText(props.columnText(at), x, cells + BOTTOM - 5);
    }
  }

  function readout() {
    const some = rows() && columns();
    const text = some
      ? props.said(Math.min(row, rows() - 1), Math.min(column, columns() - 1))
      : "nothing is recorded here";
    read.textContent = pointed || !some ? text : (props.hint ?? "Point at a cell, or use the arrow keys.");
    plot.setAttribute("aria-valuetext", text);
    plot.setAttribute("aria-valuenow", String(some ? row * columns() + column : 0));
  }

  function to(newRow, newColumn) {
    const [first, last] = shown ?? [0, columns()];
    row = Math.max(0, Math.min(rows() - 1, newRow));
    column = Math.max(first, Math.min(last - 1, newColumn));
    pointed = true;
    draw();
    readout();
  }

  function zoom(first, last) {
    if (!props.zoom) return;
    if (first !== null) {
      first = Math.max(0, first);
      last = Math.min(columns() - 1, last);
      shown = [first, last + 1]; // at once; what is fetched comes later
      draw();
    }
    props.zoom(first, last);
  }

  const cell = (event) => {
    const box = plot.getBoundingClientRect(),
      [first, last] = shown ?? [0, columns()];
    const x = event.clientX - box.left,
      y = event.clientY - box.top - TOP;
    return [
      Math.floor((y / (height - BOTTOM - TOP)) * rows()),
      first + Math.floor(((x - left) / inner()) * (last - first)),
      x,
    ];
  };
  plot.addEventListener("pointermove", (event) => {
    const [r, c, x] = cell(event);
    if (drag) drag.to = Math.max(left, Math.min(width - 4, x));
    to(r, c);
  });
  plot.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    const [, , x] = cell(event);
    drag = { from: Math.max(left, x), to: Math.max(left, x) };
    plot.setPointerCapture(event.pointerId);
  });
  plot.addEventListener("pointerup", (event) => {
    const began = drag,
      [r, c] = cell(event);
    drag = null;
    if (!began) return;
    if (Math.abs(began.to - began.from) > 6 && props.zoom) {
      const [first, last] = shown ?? [0, columns()];
      const side = [began.from, began.to]
        .sort((a, b) => a - b)
        .map((x) => first + Math.floor(((x - left) / inner()) * (last - first)));
      zoom(side[0], Math.min(side[1], last - 1));
    } else if (r >= 0 && r < rows()) {
      to(r, c);
      props.pick?.(row, column);
    }
  });
  plot.addEventListener("pointercancel", () => (drag = null));
  plot.addEventListener("pointerleave", () => {
    if (drag || document.activeElement === plot) return;
    pointed = false;
    draw();
    readout();
  });
  plot.addEventListener("dblclick", () => zoom(null, null));
  plot.addEventListener("focus", () => to(row, column));
  plot.addEventListener("blur", () => {
    pointed = false;
    draw();
    readout();
  });
  plot.addEventListener("keydown", (event) => {
    const half = Math.max(1, Math.round(columns() / 4));
    const acts = {
      ArrowLeft: () => to(row, column - 1),
      ArrowRight: () => to(row, column + 1),
      ArrowUp: () => to(row - 1, column),
      ArrowDown: () => to(row + 1, column),
      PageUp: () => to(row - 16, column),
      PageDown: () => to(row + 16, column),
      Home: () => to(row, 0),
      End: () => to(row, columns()),
      Enter: () => props.pick?.(row, column),
      " ": () => props.pick?.(row, column),
      "+": () => zoom(column - half, column + half),
      "=": () => zoom(column - half, column + half),
      "-": () => zoom(null, null),
      Escape: () => zoom(null, null),
    };
    if (!acts[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    acts[event.key]();
  });
  const leave = onTheme(() => {
    if (!root.isConnected) return leave();
    paint();
    return draw();
  });
  const layout = () => {
    width = plot.clientWidth;
    left = width < 500 ? Math.min(props?.left ?? 70, 70) : (props?.left ?? 90);
    draw();
  };
  new ResizeObserver(() => props && plot.clientWidth !== width && layout()).observe(plot);

  return (next) => {
    const before = props;
    props = next;
    if (before?.values !== next.values || before?.kind !== next.kind || before?.low !== next.low || before?.high !== next.high) {
      shown = null;
      paint();
    }
    height = Math.max(60, Math.min(MOST, rows() * (rows() <= 24 ? 20 : rows() <= 64 ? 10 : 4))) + BOTTOM + TOP;
    plot.style.height = `${height}px`;
    plot.setAttribute("aria-label", `${props.label}; arrows move, Enter opens, plus zooms in, Escape shows all`);
    plot.setAttribute("aria-valuemin", "0");
    plot.setAttribute("aria-valuemax", String(Math.max(0, rows() * columns() - 1)));
    low.textContent = props.format(props.low);
    high.textContent = props.format(props.high);
    unit.textContent = props.unit ?? "";
    layout();
    readout();
  };
}
