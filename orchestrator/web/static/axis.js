// Attempts on one time axis, in SVG.

import { onWidth, s, widget } from "./dom.js";
import { count, plural, seconds, when, words } from "./format.js";
import { ticks, xText } from "./scale.js";

const LANE = 22,
  LEFT = 84,
  RIGHT = 12,
  MOST = 40;
const SIGNS = {
  save: ["|", "save"],
  save_failed: ["✕", "failed save"],
  incident: ["▲", "incident"],
  verdict: ["△", "verdict"],
};
const OFTEN = new Set(["save"]);

/** Attempts on one time axis; props are what `/attempts` tells. */
export function timeAxis(key, props) {
  return widget(key, create, props, { class: "timeline" });
}

/** Attempts on one time axis: a lane for all, one per attempt, rewinds as arrows, saves and incidents as marks. */
function create(root) {
  let props = null,
    width = 0;
  const svg = s("svg", { role: "img" });
  root.append(svg);
  function draw() {
    if (!props || width < 120 || props.begin === null) return;
    const { begin, end } = props,
      span = end - begin || 1;
    const x = (time) => LEFT + ((Math.max(begin, Math.min(end, time)) - begin) / span) * (width - LEFT - RIGHT);
    const numbers = [...new Set(props.spans.map((one) => one.attempt))]
      .filter((one) => one > 0)
      .sort((a, b) => a - b)
      .slice(-MOST);
    const lane = new Map(numbers.map((one, i) => [one, i + 1]));
    const top = (row) => 20 + row * (LANE + 16),
      height = top(numbers.length + 1) + 12;
    const parts = [s("text", { x: LEFT - 8, y: top(0) + 12, class: "tick end" }, "all")];
    for (const at of ticks(begin, end, Math.max(2, Math.floor(width / 130)), "time")) {
      parts.push(s("line", { x1: x(at), x2: x(at), y1: top(0) - 6, y2: height - 18, class: "grid" }));
      const near = x(at) > width - 40;
      parts.push(
        s(
          "text",
          { x: near ? width - 2 : x(at), y: height - 4, class: `tick ${near ? "end low" : "middle"}` },
          xText(at, "time", begin, end),
        ),
      );
    }
    for (const one of numbers)
      parts.push(s("text", { x: LEFT - 8, y: top(lane.get(one)) + 12, class: "tick end" }, `attempt ${one}`));
    for (const one of props.spans) {
      const from = x(one.from),
        wide = Math.max(0.5, x(one.to) - from);
      const box = (row) =>
        s(
          "rect",
          { x: from.toFixed(2), y: top(row), width: wide.toFixed(2), height: LANE, class: `part ${one.part}` },
          s("title", null, `${words(one.part)}, ${seconds(one.to - one.from)} from ${when(one.from)}`),
        );
      parts.push(box(0));
      if (lane.has(one.attempt)) parts.push(box(lane.get(one.attempt)));
    }
    for (const one of props.marks) {
      const sign = SIGNS[one.kind];
      if (!sign || !lane.has(one.attempt)) continue;
      const y = top(lane.get(one.attempt));
      if (OFTEN.has(one.kind))
        parts.push(
          s(
            "line",
            { x1: x(one.time), x2: x(one.time), y1: y + LANE - 3, y2: y + LANE + 6, class: "saved" },
            s("title", null, `${one.text || sign[1]}, ${when(one.time)}`),
          ),
        );
      else
        parts.push(
          s(
            "text",
            { x: x(one.time), y: y - 2, class: `sign ${one.kind}` },
            sign[0],
            s("title", null, `${sign[1]}: ${one.text}, ${when(one.time)}`),
          ),
        );
    }
    for (const one of props.rewinds) {
      if (!lane.has(one.attempt) || !lane.has(one.attempt - 1)) continue;
      const before = props.spans.filter((span_) => span_.attempt === one.attempt - 1).at(-1);
      const from = top(lane.get(one.attempt - 1)) + LANE,
        to = top(lane.get(one.attempt)),
        px = x(one.time),
        start = x(before.to);
      parts.push(
        s(
          "path",
          { d: `M${start} ${from}V${from + 6}H${px}V${to - 1}m-4 -4l4 4l4 -4`, class: "rewind" },
          s("title", null, `step ${one.from_step} back to ${one.to_step}`),
        ),
      );
      const end_ = px > width * 0.7;
      parts.push(
        s(
          "text",
          { x: px + (end_ ? -8 : 8), y: to - 3, class: `tick ${end_ ? "end" : ""} low` },
          `${count(one.from_step)} → ${count(one.to_step)}`,
        ),
      );
    }
    svg.setAttribute("width", width);
    svg.setAttribute("height", height);
    svg.setAttribute(
      "aria-label",
      `Time axis of ${plural(numbers.length, "attempt")} from ${when(begin)} to ${when(end)}; the tables below have the same`,
    );
    svg.replaceChildren(...parts);
  }
  onWidth(root, () => width, (next) => {
    width = next;
    draw();
  });
  return (next) => {
    props = next;
    width = root.clientWidth || width;
    draw();
  };
}
