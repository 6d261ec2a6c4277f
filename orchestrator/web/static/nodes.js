// The nodes, and what was done through the page.

import { get } from "./api.js";
import { h } from "./dom.js";
import { MISSING, count, number, plural, when, words } from "./format.js";
import { runLink } from "./home.js";
import { actionButton, note, table } from "./parts.js";

function slots(have) {
  return (
    Object.entries(have ?? {})
      .map(([name, many]) => `${number(many)} ${name}`)
      .join(", ") || MISSING
  );
}

function nodeState(node) {
  if (!node.here) return h("span", { class: "bad" }, "not in the cluster");
  if (node.drain) return h("span", { class: "warn" }, `draining: ${node.drain.reason}`);
  if (node.cordon)
    return h(
      "span",
      { class: "warn" },
      `cordoned${node.cordon.by ? ` by ${node.cordon.by}` : ""}, ${when(node.cordon.time)}: ${node.cordon.reason}`,
    );
  if (node.barred) return h("span", { class: "warn" }, node.barred);
  if (node.check) return h("span", { class: "warn" }, node.check);
  return node.spare ? "spare" : "serves";
}

export const nodes = {
  title: "Nodes",
  every: 2000,
  wants: (told) => "nodes" in told || "queue" in told,
  load: (ctx, signal) => get("/api/nodes", {}, signal),
  draw(ctx, told) {
    const marks = (node) => {
      const order = node.cordon
        ? { action: "uncordon", title: `Use ${node.ip} again?`, yes: "Yes, use it again" }
        : { action: "cordon", reason: true, title: `Keep runs from ${node.ip}?`, yes: "Yes, cordon it" };
      return node.here
        ? actionButton(node.cordon ? "Uncordon" : "Cordon", () => ({ ...order, target: node.ip, done: ctx.refresh }))
        : "";
    };
    const barred = told.nodes.filter((node) => node.cordon || node.barred || node.drain || !node.here).length;
    return [
      h("div", { class: "heading" }, h("h1", { tabindex: "-1" }, "Nodes")),
      h(
        "p",
        { class: "quiet" },
        `${plural(told.nodes.length, "node")}; ${barred ? `${barred} not for new runs` : "all serve"}.`,
      ),
      told.nodes.length
        ? table({
            key: "nodes",
            label: "Nodes",
            rows: told.nodes,
            id: (node) => node.ip,
            refresh: ctx.redraw,
            version: (node) => JSON.stringify(node),
            columns: [
              {
                title: "Node",
                cell: (node) => [h("strong", null, node.hostname || node.ip), node.hostname ? ` ${node.ip}` : ""],
                by: (node) => node.ip,
                cls: "name",
              },
              { title: "State", cell: nodeState, by: (node) => `${node.here}${Boolean(node.cordon)}${node.barred}` },
              { title: "Slots", cell: (node) => slots(node.slots) },
              { title: "Free", cell: (node) => slots(node.free) },
              {
                title: "Runs here",
                cell: (node) => (node.runs.length ? node.runs.map((id, i) => [i ? ", " : "", runLink(id)]) : "none"),
              },
              {
                title: "Suspicion",
                cell: (node) => number(node.suspicion, 2),
                by: (node) => node.suspicion,
                number: true,
              },
              { title: "Left", cell: (node) => `${count(node.left)}×`, by: (node) => node.left, number: true },
              {
                title: "Faults",
                cell: (node) =>
                  node.faults.length
                    ? h(
                        "details",
                        null,
                        h("summary", null, plural(node.faults.length, "fault")),
                        h(
                          "ul",
                          null,
                          node.faults.map((one) =>
                            h("li", null, runLink(one.run, "incidents"), ` ${words(one.cause)}: ${one.detail}`),
                          ),
                        ),
                      )
                    : "none",
              },
              {
                title: "Labels",
                cell: (node) =>
                  Object.entries(node.labels ?? {})
                    .map(([name, value]) => `${name}=${value}`)
                    .join(", ") || MISSING,
              },
              { title: "Action", cell: marks },
            ],
          })
        : note("plain", "No node is known: the controller has published none yet."),
    ];
  },
};

export const actions = {
  title: "Actions",
  every: 3000,
  wants: (told) => told.beat === true || "queue" in told,
  load: (ctx, signal) => get("/api/actions", {}, signal),
  draw(ctx, told) {
    return [
      h("div", { class: "heading" }, h("h1", { tabindex: "-1" }, "Actions")),
      h("p", { class: "quiet" }, "What was done through this page, newest first."),
      told.actions.length
        ? table({
            key: "actions",
            label: "Actions",
            rows: told.actions,
            id: (one) => `${one.time} ${one.action} ${one.target}`,
            columns: [
              { title: "When", cell: (one) => when(one.time) },
              { title: "Who", cell: (one) => `${one.who} (${one.from})` },
              { title: "What", cell: (one) => words(one.action) },
              {
                title: "Target",
                cell: (one) => (/^[\d.:]+$/.test(one.target) ? one.target : runLink(one.target)),
                cls: "name",
              },
              { title: "Reason", cell: (one) => one.reason },
              { title: "Done", cell: (one) => (one.ok ? "yes" : h("span", { class: "bad" }, "no")) },
              { title: "Answer", cell: (one) => one.said },
            ],
          })
        : note("plain", "Nothing was done yet."),
    ];
  },
};
