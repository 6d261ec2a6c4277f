// Incidents with their evidence, verdicts, decision and cost; findings.

import { get } from "./api.js";
import { h } from "./dom.js";
import { bytes, count, number, plural, seconds, when, words } from "./format.js";
import { card, facts, note, table } from "./parts.js";

function one(ctx, told) {
  const open = !told.closed,
    decision = told.decision;
  const files = told.dossier.filter((file) => file.rank === null || file.rank === undefined);
  const ranks = [
    ...new Set(told.dossier.map((file) => file.rank).filter((rank) => rank !== null && rank !== undefined)),
  ];
  const rankLink = (rank) =>
    h("a", { href: ctx.link("ranks", { attempt: told.attempt, rank, show: "stack" }) }, `rank ${rank}`);
  return h(
    "section",
    { class: `card incident ${open ? "open" : ""}`, key: `incident ${told.incident}` },
    h(
      "h2",
      null,
      `Incident ${told.incident}: ${words(told.cause)}`,
      " ",
      h("span", { class: `badge ${open ? "failed" : "succeeded"}` }, open ? "open" : "closed"),
    ),
    h("p", null, told.detail),
    facts([
      ["Attempt", told.attempt],
      ["Rank", told.rank === null || told.rank === undefined ? null : rankLink(told.rank)],
      ["Node", told.node],
      ["Step", count(told.step)],
      ["Opened", when(told.opened)],
      ["Closed", told.closed ? when(told.closed) : null],
      ["Outcome", told.resolution],
      ["Stopped training", told.stops_nothing ? "no" : null],
      [
        "Lost",
        told.lost_steps === null
          ? null
          : `${plural(told.lost_steps, "step")}${told.predicted_steps !== null && told.predicted_steps !== undefined ? ` (predicted ${number(told.predicted_steps, 3)})` : ""}`,
      ],
      ["Down", told.downtime_seconds === null ? null : seconds(told.downtime_seconds)],
      [
        "Cost",
        told.cost
          ? Object.entries(told.cost)
              .map(([name, value]) => `${words(name)} ${seconds(value)}`)
              .join(", ")
          : null,
      ],
      [
        "Decision",
        decision
          ? `${words(decision.action)}, since ${words(decision.reason)}; restart ${count(decision.restarts_used)} of ${count(decision.restarts_allowed)}${decision.wait_seconds ? `, after ${seconds(decision.wait_seconds)}` : ""}${decision.detail ? `: ${decision.detail}` : ""}`
          : null,
      ],
      ["Evidence", told.evidence ? h("code", null, told.evidence) : null],
      ["Waits then", h("a", { href: ctx.link("layout", { attempt: told.attempt }) }, "who waited for whom")],
    ]),
    told.verdicts.length
      ? table({
          key: `verdicts ${told.incident}`,
          label: `Verdicts of incident ${told.incident}`,
          rows: told.verdicts.map((verdict, i) => ({ ...verdict, i })),
          id: (verdict) => verdict.i,
          columns: [
            { title: "When", cell: (verdict) => when(verdict.time) },
            { title: "Verdict", cell: (verdict) => words(verdict.kind) },
            { title: "Rank", cell: (verdict) => verdict.rank, number: true },
            { title: "Node", cell: (verdict) => verdict.node },
            { title: "Told", cell: (verdict) => verdict.detail },
          ],
        })
      : null,
    ranks.length
      ? h(
          "p",
          null,
          "Kept before the ranks were stopped: ",
          ranks.slice(0, 64).map((rank, i) => [i ? ", " : "", rankLink(rank)]),
          ranks.length > 64 ? ` and ${ranks.length - 64} more` : "",
          ".",
        )
      : null,
    files.length
      ? h(
          "ul",
          null,
          files.map((file) => h("li", null, h("code", null, file.name), ` ${bytes(file.bytes)}`)),
        )
      : null,
  );
}

export const incidents = {
  name: "incidents",
  title: "Incidents",
  every: 2000,
  load: (ctx, root, signal) => get(`${root}/incidents`, {}, signal),
  draw(ctx, told) {
    return [
      told.incidents.length ? told.incidents.map((each) => one(ctx, each)) : note("plain", "No incident."),
      told.findings.length
        ? card(
            "Findings",
            h(
              "ul",
              null,
              told.findings.map((each) =>
                h(
                  "li",
                  null,
                  typeof each === "string"
                    ? each
                    : [
                        h("strong", null, words(each.kind ?? each.severity ?? "")),
                        ` ${each.what ?? ""} ${each.where ?? ""}`,
                      ],
                ),
              ),
            ),
          )
        : null,
    ];
  },
};
