// Who is where in the layout, what each rank does, who entered the current collective and who didn't, and who waits for whom.

import { exported, get } from "./api.js";
import { ago, count, layoutText, plural, ranksText, when, words } from "./format.js";
import { h } from "./dom.js";
import { KINDS, placeMap, rankText } from "./placemap.js";
import { card, choice, facts, note, table } from "./parts.js";
import { loadRank, ofAttempt, rankPanel } from "./rank.js";

const DENSE = ["pp", "dp", "cp", "tp"],
  SPARSE = ["pp", "edp", "ep", "etp"];

/** The ranks that share a group along an axis with a rank. */
export function groupOf(told, axis, rank) {
  const others = (DENSE.includes(axis) ? DENSE : SPARSE)
    .filter((one) => one !== axis)
    .map((one) => told.coordinates[one]);
  return Array.from({ length: told.world }, (_, i) => i).filter((i) =>
    others.every((place) => place[i] === place[rank]),
  );
}

/** What a rank does, by one word that has a colour. */
export function kindOf(told, culprits, waiting, rank) {
  if (culprits.has(rank)) return "culprit";
  const { exit, state, waits, step, held } = told.ranks;
  if (exit[rank] !== null && exit[rank] !== undefined) return exit[rank] === 0 ? "ended" : "died";
  if (held[rank]) return "held";
  if (waiting.has(rank)) return "waiting";
  if (waits[rank]) return "inside";
  return step[rank] === null && !state[rank] ? "unknown" : "working";
}

export const layout = {
  name: "layout",
  title: "Layout",
  every: 3000,
  polls: () => !exported,
  async load(ctx, root, signal, newest) {
    const { attempt, rank } = ctx.params;
    const [told, opened] = await Promise.all([
      ofAttempt(() => get(`${root}/layout`, exported ? {} : { attempt }, signal), newest),
      rank === undefined ? null : ofAttempt(() => loadRank(root, ctx.params, newest, signal), newest),
    ]);
    return { told, opened, own: told?.attempt };
  },
  draw(ctx, { told, opened, own }, { attempts }) {
    if (!told?.world) return note("plain", "No attempt has been placed yet.");
    const culprits = new Set(told.culprits),
      waiting = new Set(told.waits.flatMap((one) => one.from));
    const kinds = Array.from({ length: told.world }, (_, rank) => kindOf(told, culprits, waiting, rank));
    const chosen = ctx.params.rank === undefined ? null : Math.min(told.world - 1, Number(ctx.params.rank));
    const axes = told.axes.filter((axis) => Math.max(...told.coordinates[axis]) > 0);
    const axis = axes.includes(ctx.params.axis) ? ctx.params.axis : axes[0];
    const marked = chosen !== null && axis ? groupOf(told, axis, chosen) : [];
    const tally = Object.entries(KINDS)
      .map(([kind, text]) => [kind, text, kinds.filter((one) => one === kind).length])
      .filter(([, , many]) => many);
    const rankLink = (rank) =>
      h("a", { href: ctx.link("layout", { attempt: ctx.params.attempt, rank, axis: ctx.params.axis }) }, String(rank));
    const some = (all) => [
      all.slice(0, 12).map((rank, i) => [i ? ", " : "", rankLink(rank)]),
      all.length > 12 ? ` and ${count(all.length - 12)} more` : "",
    ];
    const fresh = told.live
      ? "seen just now"
      : told.seen
        ? `seen ${exported ? when(told.seen) : ago(told.seen)}`
        : "nothing was told of what ranks do";
    return [
      told.culprits.length
        ? note("bad", told.said || `${ranksText(told.culprits)} is waited for`)
        : told.said
          ? note("warn", told.said)
          : null,
      card(
        "Layout",
        h(
          "div",
          { class: "controls" },
          !exported && attempts.length > 1
            ? choice("Attempt", own, attempts.map((one) => one.attempt).reverse(), (value) =>
                ctx.set({ attempt: value, rank: undefined }),
              )
            : null,
          axes.length ? choice("Group along", axis, axes, (value) => ctx.set({ axis: value })) : null,
          h(
            "span",
            { class: "quiet" },
            `${layoutText(told.layout)}; ${plural(told.world, "rank")} on ${plural(told.nodes.length, "node")}; ${fresh}`,
          ),
        ),
        h(
          "div",
          { class: "legend" },
          tally.map(([kind, text, many]) =>
            h("span", null, h("i", { class: `swatch r-${kind}` }), `${text} (${count(many)})`),
          ),
          told.waits.length ? h("span", null, "→ waits for") : null,
        ),
        placeMap("layout", {
          told,
          kinds,
          marked,
          chosen,
          pick: (rank) =>
            ctx.set(
              { rank: rank ?? undefined, show: undefined, before: undefined, search: undefined },
              true,
              rank === null ? null : "opened",
            ),
        }),
      ),
      card(
        "Who waits for whom",
        told.waits.length
          ? table({
              key: "waits",
              label: "Who waits for whom",
              rows: told.waits.map((one, i) => ({ ...one, i })),
              id: (one) => one.i,
              columns: [
                { title: "Collective", cell: (one) => `${words(one.call) || "a call"} of ${one.group}`, cls: "name" },
                { title: "Entered", cell: (one) => some(one.from) },
                { title: "Didn't enter", cell: (one) => h("span", { class: "bad" }, some(one.to)) },
              ],
            })
          : h("p", { class: "quiet" }, told.seen ? "No recorded collective has been entered by some of its ranks and not by others." : "It isn't known."),
        told.left_out ? h("p", { class: "quiet" }, `${plural(told.left_out, "group")} more.`) : null,
      ),
      chosen !== null
        ? h(
            "section",
            { class: "card", key: "opened" },
            h(
              "div",
              { class: "heading" },
              h("h2", { tabindex: "-1", id: "opened" }, `Rank ${chosen}`),
              h(
                "button",
                { type: "button", on: { click: () => ctx.set({ rank: undefined, show: undefined }) } },
                "Close",
              ),
            ),
            facts([
              ["Does", rankText(told, kinds[chosen], chosen)],
              ["Exit code", told.ranks.exit[chosen]],
              axis ? [`Its ${axis} group`, some(marked)] : null,
            ]),
            rankPanel(ctx, { ...ctx.params, attempt: own, rank: chosen }, opened, (values) => ctx.set(values)),
          )
        : null,
    ];
  },
};
