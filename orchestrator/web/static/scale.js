// Scales and paths of charts: plain functions of numbers.

import { count, when } from "./format.js";

const CLOCK = [
  1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 604800,
];

/** Round numbers between two ends, `most` at most; of whole ones only, or of a clock's. */
export function ticks(low, high, most, kind = "") {
  if (!(high > low)) return [low];
  const rough = (high - low) / Math.max(1, most);
  let step;
  if (kind === "time") step = CLOCK.find((one) => one >= rough) ?? Math.ceil(rough / 604800) * 604800;
  else if (kind === "bytes") step = 2 ** Math.ceil(Math.log2(rough));
  else {
    const size = 10 ** Math.floor(Math.log10(rough));
    step = size * [1, 2, 5, 10].find((one) => one * size >= rough * 0.999);
    if (kind === "step") step = Math.max(1, step);
  }
  const shift = kind === "time" ? new Date(low * 1000).getTimezoneOffset() * 60 : 0;
  const found = [];
  for (let at = Math.ceil((low - shift) / step) * step + shift; at <= high + step * 1e-6; at += step) found.push(at);
  return found;
}

/** What stands at an axis' tick. */
export function xText(value, kind, low, high) {
  if (kind !== "time") return count(value);
  const text = when(value);
  if (high - low > 86400) return text.slice(5, -3);
  return high - low < 300 ? text.slice(-8) : text.slice(-8, -3);
}

/** Ends of all finite values of the lines within `[from, to]`; [0, 1] where there are none. */
export function bounds(lines, [from, to], zero) {
  let low = Infinity,
    high = -Infinity;
  for (const line of lines)
    for (let i = 0; i < line.x.length; i++) {
      if (line.x[i] < from || line.x[i] > to) continue;
      const below = line.low?.[i] ?? line.y[i],
        above = line.high?.[i] ?? line.y[i];
      if (below !== null && below < low) low = below;
      if (above !== null && above > high) high = above;
    }
  if (low > high) return [0, 1];
  if (zero) [low, high] = [Math.min(0, low), Math.max(0, high)];
  if (low === high) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
  const room = (high - low) * 0.05;
  return [zero && low === 0 ? 0 : low - room, high + room];
}

/** A line's path, with a gap where nothing is known. */
export function path(xs, ys, toX, toY) {
  let text = "",
    pen = false;
  for (let i = 0; i < xs.length; i++) {
    if (ys[i] === null || ys[i] === undefined) pen = false;
    else {
      text += `${pen ? "L" : "M"}${toX(xs[i]).toFixed(1)} ${toY(ys[i]).toFixed(1)}`;
      pen = true;
    }
  }
  return text;
}

/** The path of what lies between two lines. */
export function area(xs, lows, highs, toX, toY) {
  let text = "",
    run = [];
  const close = () => {
    if (run.length > 1) {
      text += run.map((i, k) => `${k ? "L" : "M"}${toX(xs[i]).toFixed(1)} ${toY(highs[i]).toFixed(1)}`).join("");
      text +=
        run
          .reverse()
          .map((i) => `L${toX(xs[i]).toFixed(1)} ${toY(lows[i]).toFixed(1)}`)
          .join("") + "Z";
    }
    run = [];
  };
  for (let i = 0; i < xs.length; i++) {
    if (lows[i] === null || highs[i] === null || lows[i] === undefined) close();
    else run.push(i);
  }
  close();
  return text;
}

/** Index of the value nearest to `x` in a sorted list. */
export function nearest(xs, x) {
  let low = 0,
    high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

/** The line that is shown nearest to the cursor, kept ones first: `[line, index]`. */
export function at(lines, x) {
  let best = null,
    far = Infinity;
  for (const line of lines) {
    if (!line.x.length) continue;
    const i = nearest(line.x, x),
      off = Math.abs(line.x[i] - x) + (line.lost ? 1e-9 : 0);
    if (off < far) [best, far] = [[line, i], off];
  }
  return best;
}
