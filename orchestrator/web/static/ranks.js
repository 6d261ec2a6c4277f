// Ranks by steps: where each rank's time goes, raw or beside its peers. A click opens a rank.

import { exported, get } from "./api.js";
import { h } from "./dom.js";
import { count, number, percent, ranksOf, ranksText, seconds } from "./format.js";
import { heat } from "./heat.js";
import { card, choice, command, note } from "./parts.js";
import { loadRank, ofAttempt, rankPanel } from "./rank.js";

const FIELDS = [
  ["compute", "compute"],
  ["wait", "wait for others"],
  ["data", "data"],
  ["save", "save"],
  ["step", "whole step"],
];
const OPENED = { rank: undefined, show: undefined, search: undefined, before: undefined };
const GROUPS = [
  ["rank", "rank"],
  ["node", "node"],
];

export const ranks = {
  name: "ranks",
  title: "Ranks",
  every: 4000,
  async load(ctx, root, signal, newest) {
    const { attempt, field, mode, group, from, to, rank, among } = ctx.params;
    const columns = Math.max(40, Math.min(240, Math.round((document.getElementById("main").clientWidth || 800) / 5)));
    const query = exported
      ? { field }
      : { attempt, field, mode, group: among ? undefined : group, from, to, columns, rows: 256, ranks: among };
    const [map, opened] = await Promise.all([
      ofAttempt(() => get(`${root}/heat`, query, signal), newest),
      rank === undefined ? null : ofAttempt(() => loadRank(root, ctx.params, newest, signal), newest),
    ]);
    return map ? { map, opened, own: map.attempt } : { map: { recorded: false }, opened: null };
  },
  draw(ctx, { map, opened, own }, { attempts, run }) {
    const { field = "compute", mode = "raw", group = "rank", rank, among } = ctx.params;
    const layout = attempts.find((one) => one.attempt === own)?.layout ?? run.layout;
    const around = mode === "deviation",
      format = around ? (value) => `${value > 0 ? "+" : ""}${percent(value)}` : seconds;
    const axes = ["pp", "dp", "cp", "ep", "etp", "tp"].filter((axis) => layout[axis] > 1);
    const set = (values) => ctx.set({ ...OPENED, ...values });
    const pair = (column) => map.columns[column];
    const span = (column) =>
      pair(column)[0] === pair(column)[1]
        ? `step ${count(pair(column)[0])}`
        : `steps ${count(pair(column)[0])}–${count(pair(column)[1])}`;
    const who = (row) => {
      const all = ranksOf(map.rows[row].ranks),
        label = map.rows[row].label;
      return label.startsWith("rank") ? label : `${label} (${ranksText(all)})`;
    };
    const said = (row, column) =>
      `${who(row)}, ${span(column)}: ${map.values[row][column] === null ? "nothing recorded" : `${format(map.values[row][column])}${ranksOf(map.rows[row].ranks).length > 1 ? " at most" : ""}`}`;
    const pick = (row) => {
      const all = ranksOf(map.rows[row].ranks),
        near = all.at(-1) - all[0] === all.length - 1;
      if (all.length === 1) ctx.set({ ...OPENED, rank: all[0] }, true, "opened");
      else if (near && !exported) set({ among: `${all[0]}-${all.at(-1)}`, group: undefined });
      else ctx.set({ ...OPENED, rank: all[0] }, true, "opened");
    };
    const zoom = (first, last) =>
      ctx.set(first === null ? { from: undefined, to: undefined } : { from: pair(first)[0], to: pair(last)[1] });
    const [low, high] = scaleOf(map, around),
      most = around ? high : 0;
    const chosen =
      rank === undefined || !map.rows ? null : map.rows.findIndex((one) => ranksOf(one.ranks).includes(Number(rank)));
    const none = h("p", { class: "quiet" }, "No step times of ranks are recorded for this attempt.");
    return [
      card(
        "Ranks by steps",
        h(
          "div",
          { class: "controls" },
          !exported && attempts.length > 1
            ? choice("Attempt", own, attempts.map((one) => one.attempt).reverse(), (value) =>
                set({ attempt: value, from: undefined, to: undefined, among: undefined }),
              )
            : null,
          choice("Show", field, FIELDS, (value) => ctx.set({ field: value === "compute" ? undefined : value })),
          exported
            ? null
            : choice(
                "As",
                mode,
                [
                  ["raw", "seconds"],
                  ["deviation", "deviation from peers of the stage"],
                ],
                (value) => ctx.set({ mode: value === "raw" ? undefined : value }),
              ),
          exported
            ? null
            : choice(
                "Rows by",
                among ? "rank" : group,
                [...GROUPS, ...axes.map((axis) => [axis, `${axis} group`])],
                (value) => set({ group: value === "rank" ? undefined : value, among: undefined }),
              ),
          among ? h("button", { type: "button", on: { click: () => set({ among: undefined }) } }, "All ranks") : null,
          ctx.params.from !== undefined
            ? h("button", { type: "button", on: { click: () => zoom(null, null) } }, "All steps")
            : null,
        ),
        among ? h("p", { class: "quiet" }, `Ranks ${among.replace("-", " to ")} alone.`) : null,
        map.recorded && map.values.length && map.columns.length
          ? heat("ranks", {
              label: `${FIELDS.find(([name]) => name === field)?.[1]} of ranks by steps`,
              values: map.values,
              kind: around ? "around" : "",
              low,
              high,
              format,
              rowText: (row) => map.rows[row].label,
              columnText: (column) => count(pair(column)[0]),
              said,
              pick,
              zoom: exported ? null : zoom,
              chosen,
              left: 120,
              unit: around ? "from the median of the same stage" : "",
              hint: "Point at a cell, or use the arrow keys; a click opens its rank, or the ranks of its row.",
            })
          : none,
        h(
          "p",
          { class: "quiet" },
          map.recorded ? `Steps ${count(map.first)} to ${count(map.last)} are recorded. ` : "",
          "All ranks on one timeline: ",
          command(`python -m faulttol timeline ${run.folder ?? run.run_id}`),
        ),
      ),
      rank !== undefined && own !== undefined
        ? h(
            "section",
            { class: "card", key: "opened" },
            h(
              "div",
              { class: "heading" },
              h("h2", { tabindex: "-1", id: "opened" }, `Rank ${rank}, attempt ${own}`),
              h("button", { type: "button", on: { click: () => ctx.set(OPENED) } }, "Close"),
            ),
            whereIs(ctx, own, rank, attempts),
            rankPanel(ctx, { ...ctx.params, attempt: own }, opened, (values) => ctx.set(values)),
          )
        : null,
      around && map.recorded
        ? note(
            "plain",
            `0 % is the median of the ranks of the same pipeline stage in the same steps; ${number(most * 100, 3)} % is the end of the scale.`,
          )
        : null,
    ];
  },
};

/** Ends of the scale: those of the usual values, wider where some are far beyond, so that these stand out. */
function scaleOf(map, around) {
  let most = -Infinity;
  for (const row of map.values ?? []) for (const value of row) if (value !== null && value > most) most = value;
  const low = around ? 0 : (map.low ?? 0),
    usual = Math.max((map.high ?? 1) - low, around ? Math.abs(map.low ?? 0) : 0, around ? 0.01 : 1e-9);
  const end = Math.sqrt(usual * Math.max(usual, most - low));
  return around ? [-end, end] : [low, low + end];
}

/** Where a rank runs, with a link to its place in the layout. */
function whereIs(ctx, attempt, rank, attempts) {
  const own = attempts.find((one) => one.attempt === Number(attempt));
  const node = own?.nodes.find((one) => one.ranks && Number(rank) >= one.ranks[0] && Number(rank) <= one.ranks[1]);
  return h(
    "p",
    { class: "quiet" },
    node ? `On ${node.hostname || node.ip}. ` : "",
    h("a", { href: ctx.link("layout", { attempt, rank }) }, "its place in the layout"),
  );
}
