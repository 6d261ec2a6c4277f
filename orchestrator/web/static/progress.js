// One run live: its curves, the forecast beside what is measured, and its predicted finish.

import { exported, get } from "./api.js";
import { chart, sharedCursor } from "./chart.js";
import { h, s } from "./dom.js";
import { MISSING, ago, bytes, count, number, percent, seconds, short, when, words } from "./format.js";
import { card, choice, facts, note, table } from "./parts.js";

const CURVES = [
  { name: "loss", title: "Loss", format: number, forecast: true, tall: true },
  { name: "lr", title: "Learning rate", format: (value) => number(value, 3), zero: true },
  { name: "grad_norm", title: "Gradient norm", format: number, zero: true },
  { name: "tokens_per_second", title: "Tokens/s", format: (value) => short(value), zero: true },
  { name: "mfu", title: "MFU", format: (value) => percent(value, 3), zero: true, basis: true },
  { name: "memory_bytes", title: "Peak memory per rank", format: bytes, zero: true, ticks: "bytes" },
  { name: "step_seconds", title: "Seconds of a step", format: seconds, zero: true },
  { name: "balance_entropy", title: "Balance entropy of experts (1: even)", format: (value) => number(value, 3) },
  { name: "dropped", title: "Dropped tokens", format: count, zero: true, ticks: "step" },
  { name: "aux_loss", title: "Auxiliary loss", format: number, zero: true },
  { name: "skipped", title: "Skipped steps", format: count, zero: true, ticks: "step" },
];

/** A curve's lines, one per segment. */
function lines(told, name) {
  return told.segments
    .filter((one) => one.series[name]?.mean.some((value) => value !== null))
    .map((one) => ({
      x: one[told.axis],
      y: one.series[name].mean,
      low: one.series[name].min,
      high: one.series[name].max,
      lost: one.lost,
      attempt: one.attempt,
    }));
}

/** Phases as areas, one upon the other. */
function phases(told) {
  const names = told.names.filter((name) => name.startsWith("phase."));
  const series = names.map((name, i) => ({
    label: words(name.slice(6)),
    cls: `c${(i % 8) + 1}${i >= 8 ? " second" : ""}`,
    lines: [],
  }));
  for (const one of told.segments) {
    let below = one[told.axis].map(() => 0);
    names.forEach((name, i) => {
      const own = one.series[name].mean,
        above = below.map((value, k) => value + (own[k] ?? 0));
      series[i].lines.push({ x: one[told.axis], y: above, low: below, high: above, own, lost: one.lost });
      below = above;
    });
  }
  return series.filter((one) => one.lines.length);
}

function marks(told) {
  const found = [];
  told.segments.forEach((one, i) => {
    const x = one[told.axis][0],
      before = told.segments[i - 1];
    if (before && before.attempt !== one.attempt) found.push({ x, text: `attempt ${one.attempt}`, cls: "attempt" });
  });
  for (const one of told.nonfinite.slice(0, 50))
    if (told.axis === "step") found.push({ x: one.step, text: `${one.name} isn't finite`, cls: "bad" });
  return found;
}

/** An interval and what is measured, as a small picture. */
function interval(one) {
  if (one.low === null || one.low === undefined || one.measured === null) return "";
  const low = Math.min(one.low, one.measured),
    high = Math.max(one.high, one.measured),
    room = (high - low) * 0.15 || 1;
  const x = (value) => (((value - low + room) / (high - low + 2 * room)) * 120).toFixed(1);
  return s(
    "svg",
    { width: 120, height: 16, class: "interval", "aria-hidden": "true" },
    s("line", { x1: 0, x2: 120, y1: 8, y2: 8, class: "grid" }),
    s("rect", { x: x(one.low), y: 4, width: Math.max(2, x(one.high) - x(one.low)), height: 8, class: "range" }),
    s("line", { x1: x(one.forecast), x2: x(one.forecast), y1: 2, y2: 14, class: "forecast" }),
    s("circle", { cx: x(one.measured), cy: 8, r: 4, class: one.inside ? "good" : "bad" }),
  );
}

const UNITS = { step_seconds: seconds, memory_bytes: bytes, mfu: percent, tokens_per_second: (value) => short(value) };
const NAMES = {
  step_seconds: "Seconds of a step",
  memory_bytes: "Memory of a rank",
  mfu: "MFU",
  tokens_per_second: "Tokens/s",
};

function forecastCard(told) {
  const text = (one, value) => (UNITS[one.name] ?? number)(value);
  const inside = (one) =>
    one.inside === null || one.inside === undefined
      ? ""
      : one.inside
        ? h("span", { class: "good" }, "inside")
        : h("span", { class: "warn" }, "outside");
  const finish = told.finish,
    loss = told.loss;
  return card(
    "Forecast beside measured",
    table({
      key: "forecast",
      label: "Forecast beside measured",
      rows: told.figures,
      id: (one) => one.name,
      columns: [
        { title: "Figure", cell: (one) => NAMES[one.name] ?? words(one.name), cls: "name" },
        { title: "Forecast", cell: (one) => text(one, one.forecast), number: true },
        {
          title: "Interval",
          cell: (one) =>
            one.low === null || one.low === undefined ? MISSING : `${text(one, one.low)} to ${text(one, one.high)}`,
          number: true,
        },
        { title: "Measured", cell: (one) => text(one, one.measured), number: true },
        { title: "Ratio", cell: (one) => number(one.ratio, 3), number: true },
        { title: "Inside?", cell: (one) => [interval(one), " ", inside(one)] },
        { title: "Basis", cell: (one) => h("span", { class: "quiet" }, one.basis) },
      ],
    }),
    facts([
      [
        "Predicted finish",
        finish.time ? `${when(finish.time)} (${when(finish.low)} to ${when(finish.high)})` : MISSING,
      ],
      ["Why then", finish.basis],
      [
        `Loss at step ${count(loss.end_step)}`,
        loss.value === null ? MISSING : `${number(loss.value)} (${number(loss.low)} to ${number(loss.high)})`,
      ],
      ["Loss forecast", loss.note || null],
    ]),
  );
}

function headline(run) {
  return facts([
    ["Step", `${count(run.step)} of ${count(run.steps)}`],
    ["Loss", run.finite === false ? h("span", { class: "bad" }, "not finite") : number(run.loss)],
    ["Tokens/s", short(run.tokens_per_second)],
    ["MFU", run.mfu === null ? h("span", { class: "quiet" }, run.mfu_basis || MISSING) : percent(run.mfu)],
    ["Step takes", seconds(run.step_seconds)],
    ["Left", seconds(run.eta_seconds)],
    ["Tokens", short(run.tokens)],
    ["Newest checkpoint", run.checkpoint_step ? `step ${count(run.checkpoint_step)}` : "none yet"],
    ["Newest line", exported ? when(run.last_progress) : ago(run.last_progress)],
  ]);
}

const cursor = sharedCursor();

export const progress = {
  name: "",
  title: "Progress",
  every: 2000,
  async load(ctx, root, signal) {
    const axis = ctx.params.axis === "time" ? "time" : "step";
    const points = Math.max(120, Math.min(600, Math.round((document.getElementById("main").clientWidth || 800) / 2)));
    const [series, forecast] = await Promise.all([
      get(`${root}/series`, { axis: exported ? "" : axis, from: ctx.params.from, to: ctx.params.to, points }, signal),
      get(`${root}/forecast`, {}, signal).catch((problem) => ({ problem })),
    ]);
    return { series: { ...series, axis }, forecast };
  },
  draw(ctx, { series, forecast }, { run }) {
    const axis = series.axis,
      zoomed = ctx.params.from !== undefined;
    const xs = series.segments.flatMap((one) => [one[axis][0], one[axis][one[axis].length - 1]]);
    let range = xs.length ? [Math.min(...xs), Math.max(...xs)] : [0, 1];
    const band =
      ctx.params.forecast !== "off" && !zoomed && axis === "step" && !forecast.problem ? forecast.loss.band : null;
    if (zoomed) range = [Number(ctx.params.from), Number(ctx.params.to)];
    if (range[0] === range[1]) range = [range[0] - 1, range[1] + 1];
    const zoom = (from, to) => {
      if (from === null) return ctx.set({ from: undefined, to: undefined });
      const round = axis === "step" ? Math.round : (value) => Math.round(value * 1000) / 1000;
      return ctx.set({ from: round(Math.max(from, axis === "step" ? 0 : from)), to: round(to) });
    };
    const common = { axis, range, zoom, cursor, marks: marks(series) };
    const validation = {
      label: "held-out loss",
      cls: "c2",
      lines: series.validation.step.length
        ? [{ x: series.validation[axis], y: series.validation.loss, dots: true }]
        : [],
    };
    const curves = CURVES.map((one) => {
      const own = { label: words(one.name), cls: "c1", lines: lines(series, one.name) };
      if (!own.lines.length) return one.basis && run.mfu_basis ? note("plain", `No MFU: ${run.mfu_basis}`) : null;
      const wide = one.forecast && band ? [range[0], Math.max(range[1], band.x?.at(-1) ?? band.step.at(-1))] : range;
      const many =
        one.name === "loss" && validation.lines.length ? [{ ...own, label: "training loss" }, validation] : [own];
      return chart(`curve ${one.name}`, {
        ...common,
        ...one,
        series: many,
        range: wide,
        height: one.tall ? 220 : 150,
        band: one.forecast && band ? { ...band, x: band.step } : null,
      });
    });
    const stack = phases(series);
    if (stack.length)
      curves.splice(
        1,
        0,
        chart("curve phases", {
          ...common,
          title: "Phases of a step, stacked",
          format: seconds,
          series: stack,
          stacked: true,
          height: 220,
        }),
      );
    return [
      card("Now", headline(run)),
      card(
        "Curves",
        h(
          "div",
          { class: "controls" },
          choice(
            "Over",
            axis,
            [
              ["step", "steps"],
              ["time", "time"],
            ],
            (value) => ctx.set({ axis: value === "step" ? undefined : value, from: undefined, to: undefined }),
          ),
          axis === "step"
            ? h(
                "label",
                null,
                h("input", {
                  type: "checkbox",
                  checked: ctx.params.forecast !== "off",
                  on: { change: (event) => ctx.set({ forecast: event.target.checked ? undefined : "off" }) },
                }),
                " loss forecast",
              )
            : null,
          zoomed
            ? h("button", { type: "button", on: { click: () => zoom(null, null) } }, "Show all")
            : h("span", { class: "quiet" }, "Drag over a chart, or press + on it, to look closer."),
        ),
        series.indexed < 1
          ? note("warn", `${percent(series.indexed)} of the metric lines have been read so far.`)
          : null,
        series.segments.length
          ? h("div", { class: "charts" }, curves)
          : h("p", { class: "quiet" }, "No step is logged yet."),
      ),
      forecast.problem ? note("warn", `No forecast: ${forecast.problem.message}`) : forecastCard(forecast),
    ];
  },
};
