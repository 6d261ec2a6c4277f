// Line and stacked charts in SVG. Charts of a page share a cursor and a window; dragging chooses a window, and all that a
// pointer can do the keyboard can: arrows move the cursor, + and - change the window, Escape shows all.

import { h, onWidth, s, widget } from "./dom.js";
import { MISSING, count, when } from "./format.js";
import { area, at, bounds, nearest, path, ticks, xText } from "./scale.js";

const LEFT = 58,
  RIGHT = 10,
  TOP = 8,
  BOTTOM = 22;

/** A cursor that charts share. */
export function sharedCursor() {
  return { x: null, watchers: new Set() };
}

function point(cursor, x) {
  cursor.x = x;
  for (const act of cursor.watchers) act();
}

/**
 * A chart. Props: `title`, `series` as `[{label, cls, lines: [{x, y, low, high, lost}]}]`, `format(value)`, `axis` ("step" or
 * "time"), `range` of x, `zoom(from, to)` (null, null: all), `cursor`, `stacked`, `zero`, `band` `{x, value, low, high}`,
 * `marks` `[{x, text, cls}]`, `height`.
 */
export function chart(key, props) {
  return widget(key, create, props, { class: "chart" });
}

function create(root) {
  let props = null,
    width = 0,
    drag = null;
  const title = h("span", { class: "chart-title" }),
    read = h("span", { class: "chart-read" });
  const legend = h("div", { class: "legend" });
  const svg = s("svg", { "aria-hidden": "true" });
  const plot = h("div", { class: "plot", tabindex: "0", role: "slider", "aria-orientation": "horizontal" }, svg);
  root.append(h("div", { class: "chart-head" }, title, read), legend, plot);
  let scale = null,
    line = null,
    pick = null,
    watched = null;

  const domain = () => props.range;
  const toX = (x) => LEFT + ((x - domain()[0]) / (domain()[1] - domain()[0] || 1)) * (width - LEFT - RIGHT);
  const fromX = (px) => domain()[0] + ((px - LEFT) / (width - LEFT - RIGHT)) * (domain()[1] - domain()[0]);

  function readout() {
    if (!props) return;
    const all = props.series.flatMap((one) => one.lines);
    const x = props.cursor.x ?? domain()[1];
    const near = at(all, x);
    if (!near) {
      read.textContent = "nothing is recorded here";
      plot.setAttribute("aria-valuetext", "nothing is recorded here");
      return;
    }
    const [own, i] = near,
      place = own.x[i];
    const said = props.series.map((one) => {
      const found = at(one.lines, place);
      const value =
        found && Math.abs(found[0].x[found[1]] - place) < 1e-6 + Math.abs(place) * 1e-12
          ? (found[0].own?.[found[1]] ?? found[0].y[found[1]])
          : null;
      const text = value === null || value === undefined ? MISSING : props.format(value);
      return props.series.length > 1 ? `${one.label} ${text}` : text;
    });
    const where = props.axis === "time" ? when(place) : `step ${count(place)}`;
    const text = `${where}${own.lost ? " (trained again later)" : ""}: ${said.join(", ")}`;
    read.textContent = props.series.length > 4 && props.cursor.x === null ? where : text;
    plot.setAttribute("aria-valuetext", text);
    plot.setAttribute("aria-valuenow", String(Math.round(place)));
    if (line) {
      line.setAttribute("visibility", props.cursor.x === null ? "hidden" : "visible");
      line.setAttribute("transform", `translate(${toX(place).toFixed(1)} 0)`);
    }
  }

  function draw() {
    if (!props || width < 80) return;
    const height = props.height ?? 150,
      bottom = height - BOTTOM;
    const [from, to] = domain();
    const all = props.series.flatMap((one) => one.lines);
    const shown = props.band
      ? [...all, { x: props.band.x, y: props.band.value, low: props.band.low, high: props.band.high }]
      : all;
    scale = bounds(shown, [from, to], props.zero || props.stacked);
    const toY = (y) => bottom - ((y - scale[0]) / (scale[1] - scale[0])) * (bottom - TOP);
    const parts = [];
    let written = null;
    for (const y of ticks(scale[0], scale[1], Math.max(2, Math.floor(height / 45)), props.ticks)) {
      if (props.format(y) === written) continue; // whole numbers have nothing between them
      written = props.format(y);
      const py = toY(y).toFixed(1);
      parts.push(s("line", { x1: LEFT, x2: width - RIGHT, y1: py, y2: py, class: "grid" }));
      parts.push(s("text", { x: LEFT - 6, y: py, class: "tick end" }, props.format(y)));
    }
    for (const x of ticks(from, to, Math.max(2, Math.floor(width / 110)), props.axis))
      parts.push(
        s("text", { x: toX(x).toFixed(1), y: height - 5, class: "tick middle" }, xText(x, props.axis, from, to)),
      );
    parts.push(s("line", { x1: LEFT, x2: width - RIGHT, y1: bottom, y2: bottom, class: "axis" }));
    const inside = s("svg", {
      x: LEFT,
      y: 0,
      width: width - LEFT - RIGHT,
      height: bottom + 1,
      viewBox: `${LEFT} 0 ${width - LEFT - RIGHT} ${bottom + 1}`,
    });
    for (const mark of props.marks ?? []) {
      const x = toX(mark.x).toFixed(1);
      inside.append(
        s("line", { x1: x, x2: x, y1: TOP, y2: bottom, class: `mark ${mark.cls ?? ""}` }, s("title", null, mark.text)),
      );
    }
    if (props.band) {
      inside.append(s("path", { d: area(props.band.x, props.band.low, props.band.high, toX, toY), class: "band" }));
      inside.append(s("path", { d: path(props.band.x, props.band.value, toX, toY), class: "forecast" }));
    }
    for (const one of props.series)
      for (const own of one.lines) {
        const cls = `${one.cls} ${own.lost ? "lost" : ""}`;
        if (props.stacked)
          inside.append(s("path", { d: area(own.x, own.low, own.high, toX, toY), class: `stack ${cls}` }));
        else {
          if (own.low)
            inside.append(s("path", { d: area(own.x, own.low, own.high, toX, toY), class: `spread ${cls}` }));
          inside.append(s("path", { d: path(own.x, own.y, toX, toY), class: `line ${cls}` }));
          if (own.x.length === 1 || own.dots)
            for (let i = 0; i < own.x.length; i++)
              if (own.y[i] !== null)
                inside.append(s("circle", { cx: toX(own.x[i]), cy: toY(own.y[i]), r: 3, class: `dot ${cls}` }));
        }
      }
    line = s("line", { x1: 0, x2: 0, y1: TOP, y2: bottom, class: "cursor", visibility: "hidden" });
    pick = s("rect", { y: TOP, height: bottom - TOP, class: "pick", visibility: "hidden" });
    inside.append(pick, line);
    svg.setAttribute("width", width);
    svg.setAttribute("height", height);
    svg.replaceChildren(...parts, inside);
    readout();
  }

  function zoomBy(factor) {
    const [from, to] = domain(),
      x = props.cursor.x ?? (from + to) / 2;
    const half = Math.max(props.axis === "step" ? 2 : 1, ((to - from) / 2) * factor);
    props.zoom(x - half, x + half);
  }

  function move(steps) {
    const xs = [...new Set(props.series.flatMap((one) => one.lines.flatMap((own) => own.x)))]
      .filter((x) => x >= domain()[0] && x <= domain()[1])
      .sort((a, b) => a - b);
    if (!xs.length) return;
    const now = props.cursor.x === null ? xs.length - 1 : nearest(xs, props.cursor.x);
    const to = steps === -Infinity ? 0 : steps === Infinity ? xs.length - 1 : now + steps;
    point(props.cursor, xs[Math.max(0, Math.min(xs.length - 1, to))]);
  }

  plot.addEventListener("keydown", (event) => {
    const acts = {
      ArrowLeft: () => move(-1),
      ArrowRight: () => move(1),
      ArrowDown: () => move(-1),
      ArrowUp: () => move(1),
      PageDown: () => move(-20),
      PageUp: () => move(20),
      Home: () => move(-Infinity),
      End: () => move(Infinity),
      "+": () => zoomBy(0.5),
      "=": () => zoomBy(0.5),
      "-": () => zoomBy(2),
      Escape: () => props.zoom(null, null),
    };
    if (!acts[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    acts[event.key]();
  });
  const inPlot = (event) => Math.max(LEFT, Math.min(width - RIGHT, event.clientX - plot.getBoundingClientRect().left));
  plot.addEventListener("pointermove", (event) => {
    const px = inPlot(event);
    point(props.cursor, fromX(px));
    if (drag === null || !pick) return;
    pick.setAttribute("x", Math.min(px, drag));
    pick.setAttribute("width", Math.abs(px - drag));
    pick.setAttribute("visibility", Math.abs(px - drag) > 6 ? "visible" : "hidden");
  });
  plot.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    drag = inPlot(event);
    plot.setPointerCapture(event.pointerId);
  });
  const ends = (event) => {
    const px = inPlot(event),
      began = drag;
    drag = null;
    pick?.setAttribute("visibility", "hidden");
    if (event.type === "pointerup" && began !== null && Math.abs(px - began) > 6)
      props.zoom(...[fromX(began), fromX(px)].sort((a, b) => a - b));
  };
  plot.addEventListener("pointerup", ends);
  plot.addEventListener("pointercancel", ends);
  plot.addEventListener(
    "pointerleave",
    () => drag === null && document.activeElement !== plot && point(props.cursor, null),
  );
  plot.addEventListener("blur", () => point(props.cursor, null));
  plot.addEventListener("dblclick", () => props.zoom(null, null));
  onWidth(plot, () => width, (next) => {
    width = next;
    draw();
  });

  return (next) => {
    props = next;
    if (watched !== props.cursor) {
      watched?.watchers.delete(readout);
      props.cursor.watchers.add(readout);
      watched = props.cursor;
    }
    title.textContent = props.title;
    plot.setAttribute(
      "aria-label",
      `${props.title}, ${props.axis}; arrows move, plus and minus zoom, Escape shows all`,
    );
    plot.setAttribute("aria-valuemin", String(Math.round(props.range[0])));
    plot.setAttribute("aria-valuemax", String(Math.round(props.range[1])));
    legend.replaceChildren(
      ...(props.series.length > 1 || props.band ? props.series : []).map((one) =>
        h("span", null, h("i", { class: `swatch ${one.cls}` }), one.label),
      ),
      ...(props.band ? [h("span", null, h("i", { class: "swatch band" }), "forecast")] : []),
      ...(props.series.some((one) => one.lines.some((own) => own.lost))
        ? [h("span", null, h("i", { class: "swatch lost" }), "trained again later")]
        : []),
    );
    legend.hidden = !legend.childElementCount;
    width = plot.clientWidth || width;
    draw();
  };
}
