// Numbers, times and names as people read them. What isn't known is "–", never 0.

export const MISSING = "–";
const known = (value) => value !== null && value !== undefined && Number.isFinite(Number(value));
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** A whole number with separators. */
export function count(value) {
  return known(value) ? whole.format(value) : MISSING;
}

/** A number with `digits` significant ones. */
export function number(value, digits = 4) {
  if (!known(value)) return MISSING;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 1e-3)
    return Number(value)
      .toExponential(Math.max(0, digits - 2))
      .replace("e+", "e");
  if (size >= 10 ** digits) return whole.format(value);
  return String(Number(Number(value).toPrecision(digits)));
}

/** A number with k, M, G. */
export function short(value, unit = "") {
  if (!known(value)) return MISSING;
  for (const [size, name] of [
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ])
    if (Math.abs(value) >= size) return `${number(value / size, 3)} ${name}${unit}`;
  return `${number(value, 3)}${unit ? ` ${unit}` : ""}`;
}

/** Bytes in powers of two. */
export function bytes(value) {
  if (!known(value)) return MISSING;
  let size = Number(value),
    at = 0;
  const names = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  while (Math.abs(size) >= 1000 && at < names.length - 1) [size, at] = [size / 1024, at + 1];
  return `${number(size, 3)} ${names[at]}`;
}

/** A span of time. */
export function seconds(value) {
  if (!known(value)) return MISSING;
  const size = Math.abs(value),
    sign = value < 0 ? "-" : "";
  if (size === 0) return "0 s";
  if (size < 0.001) return `${sign}${number(size * 1e6, 3)} µs`;
  if (size < 1) return `${sign}${number(size * 1e3, 3)} ms`;
  if (size < 120) return `${sign}${number(size, 3)} s`;
  if (size < 7200) return `${sign}${Math.floor(size / 60)} min ${Math.round(size % 60)} s`;
  if (size < 172800) return `${sign}${Math.floor(size / 3600)} h ${Math.round((size % 3600) / 60)} min`;
  return `${sign}${Math.floor(size / 86400)} d ${Math.round((size % 86400) / 3600)} h`;
}

/** A share as a percentage. */
export function percent(value, digits = 3) {
  return known(value) ? `${number(100 * value, digits)} %` : MISSING;
}

/** A moment, with its date where that isn't today's. */
export function when(time, now = Date.now() / 1000) {
  if (!known(time)) return MISSING;
  const at = new Date(time * 1000),
    today = new Date(now * 1000);
  if (Number.isNaN(at.getTime())) return MISSING; // later than a date can be
  const pad = (value) => String(value).padStart(2, "0");
  const clock = `${pad(at.getHours())}:${pad(at.getMinutes())}:${pad(at.getSeconds())}`;
  if (at.toDateString() === today.toDateString()) return clock;
  return `${at.getFullYear()}-${pad(at.getMonth() + 1)}-${pad(at.getDate())} ${clock}`;
}

/** How long ago. */
export function ago(time, now = Date.now() / 1000) {
  return known(time) ? `${seconds(Math.max(0, Math.round(now - time)))} ago` : MISSING;
}

/** A layout's axes that have more than one rank. */
export function layoutText(layout) {
  const parts = Object.entries(layout ?? {})
    .filter(([, size]) => size > 1)
    .map(([axis, size]) => `${axis} ${size}`);
  return parts.join(" · ") || "one rank";
}

/** `waiting_for` as words. */
export function words(name) {
  return String(name ?? "").replaceAll("_", " ");
}

/** "1 rank", "2 ranks". */
export function plural(many, name) {
  return `${count(many)} ${name}${Number(many) === 1 ? "" : "s"}`;
}

/** Ranks of a row: `[first, last]` or `{list}`. */
export function ranksOf(told) {
  if (!told) return [];
  if (told.list) return told.list;
  return Array.from({ length: told[1] - told[0] + 1 }, (_, i) => told[0] + i);
}

/** "rank 3", "ranks 3–8", "ranks 1, 5, 9". */
export function ranksText(ranks, most = 6) {
  if (!ranks.length) return "no rank";
  if (ranks.length === 1) return `rank ${ranks[0]}`;
  const last = ranks[ranks.length - 1];
  if (ranks.length > 2 && last - ranks[0] === ranks.length - 1) return `ranks ${ranks[0]}–${last}`;
  const more = ranks.length > most ? ` and ${count(ranks.length - most)} more` : "";
  return `ranks ${ranks.slice(0, most).join(", ")}${more}`;
}
