// The frame of one run: its name and state, what must be known at once, its actions and the list of its views.

import { exported, get } from "./api.js";
import { h } from "./dom.js";
import { ago, seconds, words } from "./format.js";
import { experts } from "./experts.js";
import { runFacts } from "./home.js";
import { incidents } from "./incidents.js";
import { layout } from "./layout.js";
import { actionButton, badge, note, progress as bar } from "./parts.js";
import { checkpoints, time } from "./past.js";
import { progress } from "./progress.js";
import { logs } from "./rank.js";
import { ranks } from "./ranks.js";
import { setup } from "./setup.js";

const VIEWS = [progress, time, checkpoints, incidents, experts, ranks, layout, logs, setup];
const ENDED = new Set(["succeeded", "failed", "cancelled"]);

/** The view of a name; the first where there is none. */
export function viewOf(name) {
  return VIEWS.find((one) => one.name === (name ?? "")) ?? progress;
}

function notes(ctx, run) {
  const still = run.state === "running" && run.last_progress && !exported ? Date.now() / 1000 - run.last_progress : 0;
  const waits = [" ", h("a", { href: ctx.link("layout", {}) }, "See who waits for whom.")];
  return [
    run.finite === false ? note("bad", "The loss isn't finite.") : null,
    run.parked ? note("bad", `Parked: ${run.parked}`) : null,
    run.saves ? note("warn", run.saves) : null,
    run.detail && (run.state === "failed" || run.state === "recovering") ? note("bad", run.detail) : null,
    run.stopping ? note("plain", run.stopping) : null,
    run.next_step ? note("plain", run.next_step) : null,
    run.state === "queued" && run.waiting_for
      ? note("plain", `${run.position ? `Position ${run.position}: ` : ""}${run.waiting_for}`)
      : null,
    still > Math.max(15, 8 * (run.step_seconds ?? 0))
      ? note("warn", `No step has ended for ${seconds(Math.round(still))}.`, waits)
      : null,
    ...(run.damage ?? []).map((one) => note("warn", one)),
  ];
}

export const run = {
  title: (ctx) => `${ctx.id}: ${viewOf(ctx.view).title}`,
  every: (ctx) => viewOf(ctx.view).every,
  polls: (ctx) => viewOf(ctx.view).polls?.(ctx) ?? false,
  wants: (told, ctx) =>
    Object.keys(told.runs ?? {}).some((id) => id === ctx.known?.run.run_id || id.startsWith(ctx.id)),
  async load(ctx, signal) {
    const root = `/api/run/${encodeURIComponent(ctx.id)}`,
      view = viewOf(ctx.view);
    const first = get(root, {}, signal);
    // What is known may be older than the first attempt.
    const newest = async () => (ctx.known?.attempts.at(-1) ?? (await first).attempts.at(-1))?.attempt;
    const [known, data] = await Promise.all([first, view.load(ctx, root, signal, newest)]);
    ctx.known = known;
    return { known, data, view };
  },
  draw(ctx, { known, data, view }) {
    const own = known.run,
      over = ENDED.has(own.state);
    return [
      h(
        "div",
        { class: "heading" },
        h("h1", { tabindex: "-1" }, own.run_id),
        badge(own.state),
        h(
          "span",
          { class: "quiet" },
          words(own.reason),
          own.state === "running" && own.attempt > 1 ? `, attempt ${own.attempt}` : "",
        ),
        over
          ? null
          : h(
              "div",
              { class: "buttons" },
              own.nodes?.length
                ? actionButton("Write stacks", () => ({
                    action: "dump_stacks",
                    target: own.run_id,
                    title: "Write the stacks of all ranks?",
                    yes: "Yes, write them",
                    done: ctx.refresh,
                  }))
                : null,
              actionButton(
                "Cancel",
                () => ({
                  action: "cancel",
                  target: own.run_id,
                  title: "Cancel this run?",
                  yes: "Yes, cancel it",
                  done: ctx.refresh,
                }),
                "danger",
              ),
            ),
      ),
      h("div", { key: "notes" }, notes(ctx, own)),
      h("div", { key: "how far" }, own.steps ? bar(own.step, own.steps, "progress") : own.measured || null),
      runFacts(own),
      h(
        "nav",
        { class: "views", "aria-label": "Views of the run" },
        h(
          "ul",
          null,
          VIEWS.map((one) =>
            h(
              "li",
              null,
              h(
                "a",
                { href: ctx.link(one.name, {}), "aria-current": one === view ? "page" : null },
                one.title,
                one === incidents && own.open_incidents ? ` (${own.open_incidents} open)` : "",
              ),
            ),
          ),
        ),
      ),
      h("div", { class: "view", key: `view ${view.name}` }, view.draw(ctx, data, known)),
      exported
        ? null
        : h("p", { class: "quiet foot" }, own.last_progress ? `Newest line ${ago(own.last_progress)}.` : ""),
    ];
  },
};
