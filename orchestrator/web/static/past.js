// A run's past: attempts on one time axis, the goodput ledger, its checkpoints.

import { exported, get } from "./api.js";
import { timeAxis } from "./axis.js";
import { chart, sharedCursor } from "./chart.js";
import { h } from "./dom.js";
import { MISSING, bytes, count, layoutText, number, percent, plural, seconds, short, when, words } from "./format.js";
import { card, facts, note, stacked, table } from "./parts.js";

const OFTEN = new Set(["save"]);
const cursor = sharedCursor();

function ledgerCard(told) {
  const total = told.parts.reduce((sum, one) => sum + one.seconds, 0);
  return card(
    "Goodput ledger",
    facts([
      ["ETTR", h("strong", null, percent(told.ettr))],
      ["ETTR while it held slots", percent(told.ettr_held)],
      ["Wall time", seconds(told.wall_seconds)],
      [
        "Goodput",
        told.goodput_tokens_per_second === null ? MISSING : `${short(told.goodput_tokens_per_second)} tokens/s`,
      ],
    ]),
    told.indexed < 1
      ? note("warn", `${percent(told.indexed)} of the metric lines have been read so far: the parts are of those.`)
      : null,
    stacked(
      told.parts.map((one) => ({ name: one.part, share: one.share, text: seconds(one.seconds) })),
      "Where the time went",
    ),
    table({
      key: "ledger",
      label: "Parts of the wall time",
      rows: [
        ...told.parts.filter((one) => one.seconds > 0),
        {
          part: "sum",
          seconds: total,
          share: told.wall_seconds ? total / told.wall_seconds : null,
          means: "all parts together: the wall time",
        },
      ],
      id: (one) => one.part,
      columns: [
        {
          title: "Part",
          cell: (one) =>
            one.part === "sum"
              ? h("strong", null, "Sum")
              : [h("i", { class: `swatch part ${one.part}` }), words(one.part)],
          cls: "name",
        },
        { title: "Time", cell: (one) => seconds(one.seconds), number: true },
        { title: "Share", cell: (one) => percent(one.share), number: true },
        { title: "What it is", cell: (one) => one.means },
      ],
    }),
    told.by_attempt.length > 1
      ? h(
          "div",
          { class: "lanes" },
          told.by_attempt.map((one) => {
            const sum = Object.values(one.parts).reduce((a, b) => a + b, 0) || 1;
            return h(
              "div",
              { class: "lane" },
              h("span", null, `attempt ${one.attempt}`),
              stacked(
                Object.entries(one.parts).map(([name, value]) => ({ name, share: value / sum, text: seconds(value) })),
                `Attempt ${one.attempt}`,
              ),
            );
          }),
        )
      : null,
  );
}

export const time = {
  name: "time",
  title: "Time",
  every: 3000,
  async load(ctx, root, signal) {
    const [axis, ledger, series] = await Promise.all([
      get(`${root}/attempts`, {}, signal),
      get(`${root}/ledger`, {}, signal),
      get(`${root}/series`, { names: "loss", axis: exported ? "" : "time", points: 400 }, signal).catch(() => null),
    ]);
    return { axis, ledger, series };
  },
  draw(ctx, { axis, ledger, series }, { attempts }) {
    const used = axis.parts.filter((name) => axis.spans.some((one) => one.part === name));
    const steps = (series?.segments ?? []).map((one) => ({ x: one.time, y: one.step, lost: one.lost }));
    const marks = axis.marks
      .filter((one) => !OFTEN.has(one.kind))
      .slice(-200)
      .reverse();
    return [
      card(
        "Attempts on one time axis",
        axis.begin === null
          ? h("p", { class: "quiet" }, "Nothing has happened yet.")
          : [
              h(
                "div",
                { class: "legend" },
                used.map((name) => h("span", null, h("i", { class: `swatch part ${name}` }), words(name))),
                h("span", null, h("i", { class: "sign-save", "aria-hidden": "true" }), "save"),
                h("span", { class: "bad" }, "▲ incident"),
                h("span", null, "↓ rewind"),
              ),
              timeAxis("axis", axis),
              steps.length
                ? chart("steps", {
                    title: "Step over time",
                    format: count,
                    axis: "time",
                    range: [axis.begin, Math.max(axis.end, axis.begin + 1)],
                    cursor,
                    zoom: () => {},
                    zero: true,
                    series: [{ label: "step", cls: "c1", lines: steps }],
                    marks: axis.rewinds.map((one) => ({
                      x: one.time,
                      text: `step ${one.from_step} back to ${one.to_step}`,
                      cls: "attempt",
                    })),
                  })
                : null,
            ],
      ),
      ledgerCard(ledger),
      card(
        "Attempts",
        table({
          key: "attempts",
          label: "Attempts",
          rows: attempts,
          id: (one) => one.attempt,
          refresh: ctx.redraw,
          columns: [
            { title: "Attempt", cell: (one) => one.attempt, by: (one) => one.attempt, number: true },
            { title: "Placed", cell: (one) => when(one.placed) },
            {
              title: "To its first step",
              cell: (one) => (one.first_step ? seconds(one.first_step - one.placed) : MISSING),
              number: true,
            },
            {
              title: "Steps",
              cell: (one) =>
                one.last_step === null ? MISSING : `${count((one.resumed_step ?? 0) + 1)} to ${count(one.last_step)}`,
            },
            {
              title: "Lost",
              cell: (one) =>
                one.lost_from
                  ? `from ${count(one.lost_from)}: ${plural(one.last_step - one.lost_from + 1, "step")}`
                  : "none",
            },
            { title: "Ended", cell: (one) => (one.ended ? when(one.ended) : "goes on") },
            { title: "Why", cell: (one) => words(one.reason) || MISSING },
            { title: "Layout", cell: (one) => layoutText(one.layout) },
            { title: "Ranks", cell: (one) => count(one.ranks), number: true },
            {
              title: "Nodes",
              cell: (one) =>
                one.nodes.length > 4
                  ? plural(one.nodes.length, "node")
                  : one.nodes.map((node) => node.hostname || node.ip).join(", "),
            },
            { title: "Saves", cell: (one) => count(one.saves), number: true },
          ],
        }),
      ),
      card(
        `What happened (${marks.length}${axis.left_out ? ", older left out" : ""})`,
        marks.length
          ? table({
              key: "marks",
              label: "What happened, newest first",
              rows: marks,
              id: (one) => `${one.time} ${one.kind} ${one.text}`,
              columns: [
                { title: "When", cell: (one) => when(one.time) },
                { title: "What", cell: (one) => words(one.kind) },
                { title: "Attempt", cell: (one) => one.attempt || MISSING, number: true },
                { title: "Step", cell: (one) => count(one.step), number: true },
                { title: "Told", cell: (one) => one.text },
              ],
            })
          : h("p", { class: "quiet" }, "Nothing but saves."),
      ),
    ];
  },
};

export const checkpoints = {
  name: "checkpoints",
  title: "Checkpoints",
  every: 3000,
  load: (ctx, root, signal) => get(`${root}/checkpoints`, {}, signal),
  draw(ctx, told) {
    const good = told.saves.filter((one) => one.held !== null).reverse();
    const range =
      good.length > 1 ? [good[0].step, good.at(-1).step] : good.length ? [good[0].step - 1, good[0].step + 1] : [0, 1];
    const line = (name, tier) => [
      {
        x: good.filter((one) => one.tier === tier).map((one) => one.step),
        y: good.filter((one) => one.tier === tier).map((one) => one[name]),
        dots: true,
      },
    ];
    const tiers = [...new Set(good.map((one) => one.tier))];
    const ordered = good.every((one, i) => !i || one.step >= good[i - 1].step);
    return [
      card(
        "Checkpoints",
        told.overdue ? note("warn", told.overdue) : null,
        facts([
          ["Saved every", told.every ? `${count(told.every)} steps` : null],
          ["Next due", told.due ? `step ${count(told.due)}` : null],
          ["Saves", count(told.saves.length + told.left_out)],
        ]),
        good.length && ordered
          ? h(
              "div",
              { class: "charts" },
              ["held", "seconds"].map((name) =>
                chart(`saves ${name}`, {
                  title: name === "held" ? "Training stood still for" : "A save took",
                  format: seconds,
                  axis: "step",
                  range,
                  cursor,
                  zoom: () => {},
                  zero: true,
                  series: tiers.map((tier, i) => ({ label: tier, cls: `c${i + 1}`, lines: line(name, tier) })),
                }),
              ),
            )
          : null,
        told.saves.length
          ? table({
              key: "saves",
              label: "Saves, newest first",
              rows: told.saves,
              id: (one) => `${one.time} ${one.step} ${one.tier}`,
              refresh: ctx.redraw,
              columns: [
                { title: "Step", cell: (one) => count(one.step), by: (one) => one.step, number: true },
                { title: "When", cell: (one) => when(one.time), by: (one) => one.time },
                { title: "Attempt", cell: (one) => one.attempt, by: (one) => one.attempt, number: true },
                { title: "Tier", cell: (one) => one.tier, by: (one) => one.tier },
                { title: "Size", cell: (one) => bytes(one.bytes), by: (one) => one.bytes, number: true },
                { title: "Took", cell: (one) => seconds(one.seconds), by: (one) => one.seconds, number: true },
                { title: "Stall", cell: (one) => seconds(one.held), by: (one) => one.held, number: true },
                {
                  title: "Outcome",
                  cell: (one) =>
                    one.error
                      ? h("span", { class: "bad" }, `failed: ${one.error}`)
                      : one.lost
                        ? h("span", { class: "warn" }, "of steps trained again")
                        : one.differs
                          ? h("span", { class: "bad" }, `committed, though ${one.differs}`)
                          : "committed",
                },
                { title: "Path", cell: (one) => (one.path ? h("code", null, one.path) : MISSING) },
              ],
            })
          : h("p", { class: "quiet" }, "Nothing is saved yet."),
        told.left_out ? h("p", { class: "quiet" }, `${number(told.left_out)} older ones are left out.`) : null,
      ),
    ];
  },
};
