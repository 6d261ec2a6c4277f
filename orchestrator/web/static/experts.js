// Expert load over steps as a heat map, with drops and balance.

import { exported, get } from "./api.js";
import { chart, sharedCursor } from "./chart.js";
import { h } from "./dom.js";
import { count, number, percent } from "./format.js";
import { heat } from "./heat.js";
import { card, choice } from "./parts.js";

const cursor = sharedCursor();

export const experts = {
  name: "experts",
  title: "Experts",
  every: 4000,
  load(ctx, root, signal) {
    const { layer, from, to } = ctx.params;
    const columns = Math.max(24, Math.min(160, Math.round((document.getElementById("main").clientWidth || 800) / 7)));
    return get(`${root}/experts`, { layer, from, to, columns }, signal);
  },
  draw(ctx, told) {
    if (!told.values.length)
      return card(
        "Expert load",
        h("p", { class: "quiet" }, "No expert loads are logged: the model has no experts, or no step is logged yet."),
      );
    const flat = told.values.flat().filter((value) => value !== null);
    const all = told.layer === "all",
      most = flat.reduce((a, b) => Math.max(a, b), 1);
    const text = (value) => `${number(value, 3)}×`;
    const rows = (row) => (all ? `layer ${row}` : `expert ${row}`);
    const said = (row, column) =>
      `${rows(row)}, step ${count(told.step[column])}: ${all ? "its most loaded expert has " : ""}${told.values[row][column] === null ? "nothing" : text(told.values[row][column])} the mean load`;
    const zoom = (first, last) =>
      ctx.set(first === null ? { from: undefined, to: undefined } : { from: told.step[first], to: told.step[last] });
    const line = (values) => [{ x: told.step, y: values }];
    const range = told.step.length > 1 ? [told.step[0], told.step.at(-1)] : [told.step[0] - 1, told.step[0] + 1];
    const small = (key, title, values, format) =>
      values.some((value) => value !== null)
        ? chart(key, {
            title,
            format,
            axis: "step",
            range,
            cursor,
            series: [{ label: title, cls: "c1", lines: line(values) }],
            zoom: (from, to) =>
              ctx.set({
                from: from === null ? undefined : Math.round(from),
                to: to === null ? undefined : Math.round(to),
              }),
            zero: true,
          })
        : null;
    const share = told.dropped.map((value, i) => (value === null || !told.tokens[i] ? null : value / told.tokens[i]));
    return [
      card(
        "Expert load over steps",
        h(
          "div",
          { class: "controls" },
          exported
            ? null
            : choice(
                "Rows",
                told.layer,
                [
                  ["all", "all layers: the most loaded expert"],
                  ...Array.from({ length: told.layers }, (_, i) => [i, `experts of layer ${i}`]),
                ],
                (value) => ctx.set({ layer: value === "all" ? undefined : value }),
              ),
          ctx.params.from !== undefined
            ? h("button", { type: "button", on: { click: () => zoom(null, null) } }, "Show all")
            : null,
          h(
            "span",
            { class: "quiet" },
            `${count(told.layers)} layers of ${count(told.experts)} experts${told.sampled ? "; some of the steps" : ""}`,
          ),
        ),
        heat("experts", {
          label: all
            ? "Largest expert load over the mean, by layer and step"
            : `Expert load over the mean of layer ${told.layer}, by expert and step`,
          values: told.values,
          low: all ? 1 : Math.max(0, 2 - most),
          high: Math.max(most, 1.0001),
          kind: all ? "" : "around",
          format: text,
          rowText: rows,
          columnText: (column) => count(told.step[column]),
          said,
          zoom: exported ? null : zoom,
          left: 80,
          unit: "times the mean load",
          pick: all && !exported ? (row) => ctx.set({ layer: row }) : null,
          hint: all && !exported ? "Point at a cell, or use the arrow keys; a click opens the layer." : undefined,
        }),
      ),
      card(
        "Drops and balance",
        h(
          "div",
          { class: "charts" },
          small("dropped", "Dropped tokens of all", share, (value) => percent(value, 2)),
          small("entropy", "Balance entropy (1: even)", told.balance_entropy, (value) => number(value, 4)),
        ),
      ),
    ];
  },
};
