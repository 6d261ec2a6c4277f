// All runs and the queue.

import { controllerIs, get } from "./api.js";
import { h } from "./dom.js";
import { MISSING, ago, count, layoutText, number, percent, plural, seconds, short, when, words } from "./format.js";
import { badge, card, command, facts, note, progress, table } from "./parts.js";

const ENDED = new Set(["succeeded", "failed", "cancelled"]);
const href = (id, view = "") => `#/run/${encodeURIComponent(id)}${view ? `/${view}` : ""}`;
/** A link to a run. */
export const runLink = (id, view) => h("a", { href: href(id, view) }, id);

function health(row) {
  const said = [];
  if (row.finite === false) said.push(h("span", { class: "bad" }, "loss isn't finite"));
  if (row.open_incidents)
    said.push(
      h("a", { href: href(row.run_id, "incidents"), class: "bad" }, plural(row.open_incidents, "open incident")),
    );
  else if (row.incidents) said.push(h("a", { href: href(row.run_id, "incidents") }, plural(row.incidents, "incident")));
  if (row.parked) said.push(h("span", { class: "bad" }, "parked"));
  if (row.saves) said.push(h("span", { class: "warn" }, row.saves));
  if (row.wandb_behind_bytes > 1 << 20) said.push(h("span", { class: "warn" }, "W&B is behind"));
  return said.length ? said.map((one, i) => [i ? ", " : "", one]) : "";
}

const COLUMNS = {
  run: { title: "Run", cell: (row) => runLink(row.run_id), by: (row) => row.run_id, cls: "name" },
  state: { title: "State", cell: (row) => badge(row.state), by: (row) => row.state },
  progress: {
    title: "Progress",
    cell: (row) =>
      row.kind === "measure" ? row.measured || "measures" : progress(row.step, row.steps, `progress of ${row.run_id}`),
    by: (row) => (row.steps ? (row.step ?? 0) / row.steps : 0),
  },
  loss: {
    title: "Loss",
    cell: (row) => (row.finite === false ? "not finite" : number(row.loss)),
    by: (row) => row.loss,
    number: true,
  },
  rate: {
    title: "Tokens/s",
    cell: (row) => short(row.tokens_per_second),
    by: (row) => row.tokens_per_second,
    number: true,
  },
  mfu: { title: "MFU", cell: (row) => percent(row.mfu), by: (row) => row.mfu, number: true },
  left: { title: "Left", cell: (row) => seconds(row.eta_seconds), by: (row) => row.eta_seconds, number: true },
  attempt: { title: "Attempt", cell: (row) => row.attempt || MISSING, by: (row) => row.attempt, number: true },
  health: { title: "Health", cell: health },
  owner: { title: "Owner", cell: (row) => row.owner || MISSING, by: (row) => row.owner },
  model: { title: "Model", cell: (row) => row.model, by: (row) => row.model },
  slots: {
    title: "Slots",
    cell: (row) =>
      row.slots === row.asked_slots ? count(row.slots) : `${count(row.slots)} of ${count(row.asked_slots)}`,
    by: (row) => row.slots,
    number: true,
  },
  ended: { title: "Ended", cell: (row) => when(row.ended_at), by: (row) => row.ended_at },
  reason: { title: "Why", cell: (row) => words(row.reason), by: (row) => row.reason },
};
const pickColumns = (...names) => names.map((name) => COLUMNS[name]);

export const runs = {
  title: "Runs",
  every: 1500,
  wants: (told) =>
    Object.keys(told.runs ?? {}).length > 0 || told.gone?.length > 0 || "queue" in told || "controller" in told,
  async load(ctx, signal) {
    const [all, queue] = await Promise.all([get("/api/runs", {}, signal), get("/api/queue", {}, signal)]);
    controllerIs(queue.controller);
    return { all, queue };
  },
  draw(ctx, { all, queue }) {
    const text = (ctx.params.find ?? "").toLowerCase();
    const fits = (row) =>
      !text ||
      [row.run_id, row.owner, row.model, row.state, ...(row.nodes ?? [])].some((one) =>
        String(one).toLowerCase().includes(text),
      );
    const shown = all.runs.filter(fits),
      queued = new Map(queue.waiting.map((one) => [one.run, one]));
    const going = shown.filter((row) => !ENDED.has(row.state) && !(queued.has(row.run_id) && row.state === "queued"));
    const waiting = shown.filter((row) => !ENDED.has(row.state) && queued.has(row.run_id) && row.state === "queued");
    const ended = shown.filter((row) => ENDED.has(row.state));
    const version = (row) => `${row.version} ${row.parked} ${row.saves} ${row.eta_seconds}`;
    const common = { id: (row) => row.run_id, refresh: ctx.redraw };
    return [
      h(
        "div",
        { class: "heading" },
        h("h1", { tabindex: "-1" }, "Runs"),
        h(
          "label",
          { class: "find" },
          "Find ",
          h("input", {
            type: "search",
            id: "find",
            value: ctx.params.find ?? "",
            placeholder: "run, owner, model, node",
            on: { input: (event) => ctx.set({ find: event.target.value }, false) },
          }),
        ),
      ),
      all.damage.length
        ? h(
            "details",
            { class: "note warn", key: "damage" },
            h("summary", null, `${plural(all.damage.length, "damaged file")} stepped over`),
            h(
              "ul",
              null,
              all.damage.map((one) => h("li", null, one)),
            ),
          )
        : null,
      queue.parked.map((one) =>
        note("bad", "Parked: ", runLink(one.run), ` raised ${one.error}. Evidence: `, h("code", null, one.evidence)),
      ),
      card(
        `Active (${going.length})`,
        going.length
          ? table({
              key: "going",
              label: "Active runs",
              rows: going,
              version,
              ...common,
              columns: pickColumns(
                "run",
                "state",
                "progress",
                "loss",
                "rate",
                "mfu",
                "left",
                "attempt",
                "health",
                "slots",
                "owner",
                "model",
              ),
            })
          : empty(text),
      ),
      card(
        `Queue (${waiting.length})`,
        waiting.length
          ? table({
              key: "queue",
              label: "Runs that wait",
              ...common,
              rows: waiting,
              first: { title: "Position", down: false },
              version: (row) => JSON.stringify(queued.get(row.run_id)) + Math.floor(Date.now() / 10000),
              columns: [
                {
                  title: "Position",
                  cell: (row) => queued.get(row.run_id).position,
                  by: (row) => queued.get(row.run_id).position,
                  number: true,
                },
                COLUMNS.run,
                { title: "Waits for", cell: (row) => queued.get(row.run_id).reason || row.waiting_for },
                { title: "Priority", cell: (row) => row.priority ?? 0, by: (row) => row.priority ?? 0, number: true },
                COLUMNS.slots,
                COLUMNS.owner,
                COLUMNS.model,
                {
                  title: "Since",
                  cell: (row) => ago(queued.get(row.run_id).queued_at ?? row.submitted_at),
                  by: (row) => queued.get(row.run_id).queued_at ?? row.submitted_at,
                  number: true,
                },
              ],
            })
          : h("p", { class: "quiet" }, "Nothing waits."),
      ),
      card(
        `Ended (${ended.length}${all.left_out ? ` of ${count(ended.length + all.left_out)}` : ""})`,
        ended.length
          ? table({
              key: "ended",
              label: "Runs that ended",
              rows: ended,
              version,
              ...common,
              columns: pickColumns(
                "run",
                "state",
                "reason",
                "progress",
                "loss",
                "attempt",
                "health",
                "ended",
                "owner",
                "model",
              ),
            })
          : h("p", { class: "quiet" }, "None has ended."),
      ),
    ];
  },
};

function empty(text) {
  return text
    ? h("p", { class: "quiet" }, "No run fits what is looked for.")
    : h("p", { class: "quiet" }, "No run goes on. ", command("python -m orchestrator submit experiment=demo"));
}

/** What is said of a run on all of its views. */
export function runFacts(run) {
  return facts([
    ["Model", run.model],
    ["Layout", layoutText(run.layout)],
    ["Owner", run.owner],
    [
      "Slots",
      run.slots === run.asked_slots ? count(run.slots) : `${count(run.slots)} of ${count(run.asked_slots)} asked`,
    ],
    ["Attempt", run.attempt || null],
    ["Nodes", (run.nodes ?? []).length > 4 ? plural(run.nodes.length, "node") : (run.nodes ?? []).join(", ")],
    ["Submitted", when(run.submitted_at)],
    ["Ended", run.ended_at ? when(run.ended_at) : null],
  ]);
}
