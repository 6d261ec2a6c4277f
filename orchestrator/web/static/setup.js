// What a run is made of: its plan with the reason of each choice, its configuration, its source, reports and commands.

import { Problem, get } from "./api.js";
import { h } from "./dom.js";
import { MISSING, bytes, layoutText, number, seconds, short, words } from "./format.js";
import { card, command, facts, note, table } from "./parts.js";

const text = (value) =>
  value === null || value === undefined ? MISSING : typeof value === "object" ? JSON.stringify(value) : String(value);

export const setup = {
  name: "setup",
  title: "Setup",
  every: 10000,
  load: (ctx, root, signal) =>
    get(`${root}/config`, {}, signal).catch((problem) => {
      if (problem instanceof Problem && problem.status === 404) return { problem };
      throw problem;
    }),
  draw(ctx, config, { run, plan, source, links, attempts }) {
    const step = plan.step_time ?? {},
      own = attempts.at(-1);
    return [
      card(
        "Plan",
        facts([
          ["Layout", layoutText(run.layout)],
          [
            "Asked layout",
            JSON.stringify(run.layout) === JSON.stringify(run.asked_layout) ? null : layoutText(run.asked_layout),
          ],
          ...Object.entries(plan.parameters ?? {})
            .filter(([, value]) => typeof value === "number")
            .map(([name, value]) => [`Parameters, ${words(name)}`, short(value)]),
          [
            "Step forecast",
            step.seconds
              ? `${seconds(step.seconds)}${step.low ? ` (${seconds(step.low)} to ${seconds(step.high)})` : ""}`
              : step.unknown,
          ],
          ["MFU basis", plan.mfu_basis],
          ...Object.entries(plan.memory ?? {})
            .filter(([, value]) => typeof value === "number")
            .map(([name, value]) => [`Memory, ${words(name)}`, bytes(value)]),
        ]),
        (plan.warnings ?? []).map((one) => note("warn", text(one))),
        (plan.notes ?? []).map((one) => note("plain", text(one))),
        plan.choices?.length
          ? table({
              key: "choices",
              label: "Automatic choices",
              rows: plan.choices.map((one, i) => ({ ...one, i })),
              id: (one) => one.i,
              columns: [
                { title: "Setting", cell: (one) => h("code", null, one.field), cls: "name" },
                { title: "Value", cell: (one) => text(one.value) },
                { title: "Why", cell: (one) => one.reason },
              ],
            })
          : h("p", { class: "quiet" }, "No automatic choice is on record."),
      ),
      card(
        "Reports and commands",
        h(
          "ul",
          { class: "plain" },
          links.map((one) =>
            h(
              "li",
              null,
              h("strong", null, one.title),
              " ",
              one.command ? command(one.command) : null,
              one.path ? [" ", h("code", null, one.path)] : null,
            ),
          ),
        ),
      ),
      card(
        "Source",
        facts([
          ...Object.entries(source ?? {})
            .filter(([, value]) => typeof value !== "object")
            .map(([name, value]) => [words(name), h("code", null, text(value))]),
          ...Object.entries(own?.facts ?? {}).map(([name, value]) => [words(name), text(value)]),
          ["Folder", run.folder ? h("code", null, run.folder) : null],
        ]),
      ),
      card(
        "Configuration",
        config.problem
          ? note("plain", config.problem.message)
          : [
              h(
                "p",
                { class: "quiet" },
                `${config.name} of the newest attempt, ${number(config.text.split("\n").length)} lines`,
              ),
              h("pre", { tabindex: "0", role: "region", "aria-label": "Configuration" }, config.text),
            ],
      ),
    ];
  },
};
