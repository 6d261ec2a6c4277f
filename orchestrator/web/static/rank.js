// One rank: its log with search, its stack, its recorder. Shown beside the maps, and alone.

import { Problem, exported, get } from "./api.js";
import { h } from "./dom.js";
import { bytes, count, when, words } from "./format.js";
import { choice, note, whole } from "./parts.js";

const LINES = 300;

/** What `load` gives; null where the run has no attempt yet, which the server would refuse to answer about. */
export async function ofAttempt(load, newest) {
  return (await newest()) === undefined ? null : load();
}

/** What the panel of a rank shows: `show` is log, stack or recorder. `newest` gives the number of the newest attempt. */
export async function loadRank(root, { attempt, rank, show, search, before }, newest, signal) {
  try {
    const own = { attempt: attempt ?? (exported ? await newest() : undefined), rank };
    if (show === "stack" || show === "recorder") return { stack: await get(`${root}/stack`, own, signal) };
    return { log: await get(`${root}/log`, { ...own, search, before, lines: LINES }, signal) };
  } catch (problem) {
    if (problem instanceof Problem && problem.status !== 401 && problem.status !== 0) return { problem };
    throw problem;
  }
}

/** The text with what was looked for marked. */
function marked(text, search) {
  if (!search) return text || " ";
  const low = text.toLowerCase(),
    wanted = search.toLowerCase(),
    parts = [];
  let at = 0;
  for (let found = low.indexOf(wanted); found >= 0 && low.length === text.length; found = low.indexOf(wanted, at)) {
    parts.push(text.slice(at, found), h("mark", null, text.slice(found, found + wanted.length)));
    at = found + wanted.length;
  }
  return [...parts, text.slice(at)];
}

function logLines(ctx, told, search) {
  const everywhere = told.rank === "all";
  return [
    h(
      "p",
      { class: "quiet" },
      told.lines.length
        ? [
            plural(told),
            search ? ` with “${search}”` : "",
            told.complete || (!search && !everywhere) ? "" : "; the search ended early: time or size",
            told.bytes !== undefined ? ` of ${bytes(told.bytes)}` : "",
          ]
        : search
          ? `No line holds “${search}”.`
          : "The log is empty.",
    ),
    h(
      "div",
      {
        class: "log",
        key: `log ${told.attempt} ${told.rank}`,
        "data-follow": !search && !ctx.params.before,
        tabindex: "0",
        role: "region",
        "aria-label": everywhere ? "Lines of all ranks" : `Log of rank ${told.rank}`,
      },
      told.lines.map((one) =>
        h(
          "div",
          { class: "row", key: `${one.rank ?? told.rank} ${one.at}`, memo: `${search} ${one.text}` },
          everywhere
            ? h("a", { href: ctx.link("logs", { attempt: told.attempt, rank: one.rank }) }, `rank ${one.rank}`)
            : null,
          h("span", null, marked(one.text, search)),
        ),
      ),
    ),
  ];
}

const plural = (told) => `${count(told.lines.length)} line${told.lines.length === 1 ? "" : "s"}`;

/** The recorder as a table of its newest records. */
function records(told) {
  if (!told.recorder.length) return h("p", { class: "quiet" }, "No records were kept of this rank.");
  return h(
    "div",
    { class: "log", tabindex: "0", role: "region", "aria-label": `Recorder of rank ${told.rank}` },
    [...told.recorder]
      .reverse()
      .map((one) =>
        h(
          "div",
          { class: "row" },
          h(
            "span",
            null,
            `${when(one.time)}  #${one.sequence}  step ${count(one.step)}  ${words(String(one.phase)).toLowerCase()} ${String(one.mark).toLowerCase()}`,
          ),
        ),
      ),
  );
}

/** A rank's panel. `at` is `{attempt, rank, show, search, before}`, `take(values)` changes them. */
export function rankPanel(ctx, at, told, take) {
  const show = at.show || "log";
  const tab = (name, text) =>
    h(
      "button",
      {
        type: "button",
        "aria-pressed": String(show === name),
        on: { click: () => take({ show: name === "log" ? undefined : name, before: undefined }) },
      },
      text,
    );
  const body = [];
  if (!told) body.push(h("p", { class: "quiet" }, "Loading…"));
  else if (told.problem) body.push(note("plain", told.problem.message));
  else if (show === "log" && told.log) {
    body.push(logLines(ctx, told.log, at.search ?? ""));
    body.push(
      h(
        "div",
        { class: "controls" },
        !exported && told.log.before > 0 && told.log.rank !== "all"
          ? h("button", { type: "button", on: { click: () => take({ before: told.log.before }) } }, "Older lines")
          : null,
        at.before
          ? h("button", { type: "button", on: { click: () => take({ before: undefined }) } }, "Newest lines")
          : null,
        told.log.path ? h("code", null, told.log.path) : null,
      ),
    );
  } else if (told.stack) {
    if (show === "stack") {
      if (told.stack.note) body.push(note("plain", told.stack.note));
      if (told.stack.stack)
        body.push(
          h("p", { class: "quiet" }, `Written ${when(told.stack.time)}`),
          h("pre", { tabindex: "0", role: "region", "aria-label": `Stack of rank ${at.rank}` }, told.stack.stack),
        );
    } else body.push(records(told.stack));
  }
  return [
    h(
      "div",
      { class: "controls tabs", role: "group", "aria-label": "What is shown of the rank" },
      tab("log", "Log"),
      tab("stack", "Stack"),
      tab("recorder", "Recorder"),
    ),
    body,
  ];
}

export const logs = {
  name: "logs",
  title: "Logs",
  every: 2000,
  polls: (ctx) => !ctx.params.before && !ctx.params.search,
  async load(ctx, root, signal, newest) {
    const rank = ctx.params.rank ?? "0",
      search = ctx.params.search ?? "";
    if (rank === "all" && !search) return { rank };
    return { rank, told: await ofAttempt(() => loadRank(root, { ...ctx.params, rank }, newest, signal), newest) };
  },
  draw(ctx, { rank, told }, { attempts }) {
    const attempt = ctx.params.attempt ?? attempts.at(-1)?.attempt;
    if (attempt === undefined) return note("plain", "No attempt has begun, so no rank has a log.");
    const own = attempts.find((one) => String(one.attempt) === String(attempt)),
      most = (own?.ranks ?? 1) - 1;
    const take = (values) => ctx.set(values);
    const all = rank === "all";
    return h(
      "section",
      { class: "card" },
      h("h2", null, all ? `Logs of all ranks, attempt ${attempt}` : `Rank ${rank}, attempt ${attempt}`),
      h(
        "div",
        { class: "controls" },
        attempts.length > 1
          ? choice("Attempt", attempt, attempts.map((one) => one.attempt).reverse(), (value) =>
              take({ attempt: value, before: undefined }),
            )
          : null,
        all ? null : whole("Rank", rank, (value) => take({ rank: value, before: undefined }), most),
        exported
          ? null
          : h(
              "label",
              null,
              h("input", {
                type: "checkbox",
                checked: all,
                on: {
                  change: (event) =>
                    take({ rank: event.target.checked ? "all" : "0", show: undefined, before: undefined }),
                },
              }),
              " all ranks",
            ),
        exported
          ? null
          : h(
              "label",
              { class: "find" },
              "Search ",
              h("input", {
                type: "search",
                id: "find",
                value: ctx.params.search ?? "",
                placeholder: "plain text",
                on: { change: (event) => take({ search: event.target.value || undefined, before: undefined }) },
              }),
            ),
      ),
      all && !told
        ? h("p", { class: "quiet" }, "Type what to look for in the logs of all ranks.")
        : all
          ? told.problem
            ? note("plain", told.problem.message)
            : logLines(ctx, told.log, ctx.params.search ?? "")
          : rankPanel(ctx, { ...ctx.params, attempt, rank }, told, take),
    );
  },
};
