// What several views are made of: tables, badges, notes, facts, choices, and the question before an action.

import { act, exported } from "./api.js";
import { h } from "./dom.js";
import { MISSING, count, percent, words } from "./format.js";

const SIGNS = {
  running: "▶",
  queued: "…",
  placing: "…",
  starting: "…",
  recovering: "↻",
  cancelling: "■",
  cancelled: "■",
  failed: "✕",
  succeeded: "✓",
};

/** A run's state, told by a word, a sign and a colour. */
export function badge(state) {
  return h(
    "span",
    { class: `badge ${state}` },
    h("span", { "aria-hidden": "true" }, `${SIGNS[state] ?? "·"} `),
    words(state),
  );
}

/** A paragraph that stands out; `kind` is bad, warn or plain. */
export function note(kind, ...content) {
  const sign = { bad: "✕ ", warn: "! ", plain: "" }[kind];
  return h("p", { class: `note ${kind}` }, sign && h("span", { "aria-hidden": "true" }, sign), ...content);
}

/** A card with a heading. */
export function card(title, ...content) {
  return h("section", { class: "card", key: `card ${title}` }, h("h2", null, title), ...content);
}

/** Pairs of a name and a value; pairs without a value are left out. */
export function facts(pairs) {
  return h(
    "dl",
    { class: "facts" },
    pairs
      .filter((one) => one && one[1] !== "" && one[1] !== null && one[1] !== undefined)
      .map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))),
  );
}

/** How far a run is. */
export function progress(step, steps, label) {
  if (!steps) return MISSING;
  const share = Math.max(0, Math.min(1, (step ?? 0) / steps));
  return h(
    "div",
    { class: "progress" },
    h(
      "div",
      {
        class: "bar",
        role: "progressbar",
        "aria-label": label,
        "aria-valuemin": "0",
        "aria-valuemax": String(steps),
        "aria-valuenow": String(step ?? 0),
      },
      h("div", { class: "filled", vars: { width: `${share * 100}%` } }),
    ),
    h("span", null, `${count(step ?? 0)} of ${count(steps)}`),
  );
}

/** A command to type, with a button that copies it. */
export function command(text) {
  return h(
    "span",
    { class: "command" },
    h("code", null, text),
    h(
      "button",
      { type: "button", class: "small", "aria-label": `Copy ${text}`, on: { click: () => copy(text) } },
      "copy",
    ),
  );
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("copied");
  } catch {
    say("this browser doesn't let the page copy: mark the text and copy it");
  }
}

let clearing = 0;

/** Tell the reader something, to be read out too. */
export function say(text, kind = "") {
  const place = document.getElementById("said");
  place.textContent = text;
  place.className = `toast ${kind}`;
  place.hidden = false;
  clearTimeout(clearing);
  clearing = setTimeout(() => (place.hidden = true), kind === "bad" ? 20000 : 6000);
}

/** A choice of one of several: `options` are values, or `[value, text]`. */
export function choice(label, value, options, take) {
  return h(
    "label",
    { key: `choice ${label}` },
    `${label} `,
    h(
      "select",
      { on: { change: (event) => take(event.target.value) } },
      options.map((one) => {
        const [own, text] = Array.isArray(one) ? one : [one, words(one)];
        return h("option", { value: own, selected: String(own) === String(value) }, text);
      }),
    ),
  );
}

/** A whole number to type. */
export function whole(label, value, take, most) {
  return h(
    "label",
    { key: `whole ${label}` },
    `${label} `,
    h("input", {
      type: "number",
      min: "0",
      max: most,
      inputmode: "numeric",
      value: value ?? "",
      on: { change: (event) => take(event.target.value) },
    }),
  );
}

const orders = new Map();

/**
 * A table that can be sorted by its headings. `columns` are `{title, cell(row), by(row), number}`; `id(row)` tells rows apart,
 * `version(row)` says whether a row is as before.
 */
export function table({ key, label, columns, rows, id, version, refresh, first }) {
  const order = orders.get(key) ?? first ?? null;
  const sorted = [...rows];
  const by = order && columns.find((one) => one.title === order.title)?.by;
  if (by) {
    const value = (row) => by(row) ?? (order.down ? -Infinity : Infinity);
    sorted.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      return (x < y ? -1 : x > y ? 1 : 0) * (order.down ? -1 : 1);
    });
  }
  const heading = (one) => {
    const mine = order?.title === one.title;
    const turn = () => {
      orders.set(key, { title: one.title, down: mine ? !order.down : Boolean(one.number) });
      refresh();
    };
    return h(
      "th",
      {
        scope: "col",
        role: "columnheader",
        class: one.number ? "number" : "",
        "aria-sort": mine ? (order.down ? "descending" : "ascending") : null,
      },
      one.by && refresh
        ? h(
            "button",
            { type: "button", class: "sort", on: { click: turn } },
            one.title,
            h("span", { "aria-hidden": "true" }, mine ? (order.down ? " ▼" : " ▲") : ""),
          )
        : one.title,
    );
  };
  return h(
    "div",
    { class: "table", key: `table ${key}`, role: "region", "aria-label": label, tabindex: "0" },
    h(
      "table",
      { role: "table", "aria-label": label },
      h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, columns.map(heading))),
      h(
        "tbody",
        { role: "rowgroup" },
        sorted.map((row) =>
          h(
            "tr",
            { role: "row", key: String(id(row)), memo: version?.(row) },
            columns.map((one) =>
              h(
                "td",
                { role: "cell", "data-label": one.title, class: one.number ? "number" : (one.cls ?? "") },
                one.cell(row) ?? MISSING,
              ),
            ),
          ),
        ),
      ),
    ),
  );
}

/** A bar of parts: `[{name, share, text}]`, each a coloured stretch; read out as a whole. */
export function stacked(parts, label) {
  return h(
    "div",
    {
      class: "stacked",
      role: "img",
      "aria-label": `${label}: ${parts.map((one) => `${words(one.name)} ${percent(one.share)}`).join(", ")}`,
    },
    parts
      .filter((one) => one.share > 0)
      .map((one) =>
        h("div", {
          class: `part ${one.name}`,
          title: `${words(one.name)}: ${one.text}`,
          vars: { "flex-grow": String(one.share) },
        }),
      ),
  );
}

/** Buttons of an action; nothing in an exported file. */
export function actionButton(text, describe, cls = "") {
  return exported ? null : h("button", { type: "button", class: cls, on: { click: () => ask(describe()) } }, text);
}

/**
 * Ask for an action once more, and do it. `order` is `{action, target}`, with `reason: true` where one must be typed; `title` is its
 * heading, `yes` what the button says.
 */
export async function ask({ action, target, reason, title, yes, done }) {
  const dialog = document.getElementById("dialog");
  const close = () => dialog.close();
  const error = h("p", { class: "note bad", role: "alert", hidden: true });
  const failed = (problem) => {
    error.textContent = problem.message;
    error.hidden = false;
  };
  const buttons = (text, take, cls) =>
    h(
      "div",
      { class: "buttons" },
      h("button", { type: "button", on: { click: close } }, "No, leave it"),
      h("button", { type: "submit", class: cls, on: { click: take } }, text),
    );
  const show = (...content) =>
    dialog.replaceChildren(h("h2", { id: "dialog-title" }, title), h("form", { method: "dialog" }, ...content, error));
  const confirm = async (why) => {
    error.hidden = true;
    const told = await act({ action, target, reason: why });
    const take = async (event) => {
      event.preventDefault();
      event.target.disabled = true;
      event.target.textContent = "Asking the cluster…";
      try {
        const answer = await act({ action, target, reason: why, confirm: told.confirm });
        close();
        say(answer.said, "good");
        done?.();
      } catch (problem) {
        event.target.textContent = "It wasn't done";
        failed(problem);
      }
    };
    show(h("p", null, told.question), buttons(yes, take, "danger"));
    dialog.querySelector("button").focus();
  };
  if (reason) {
    const why = h("input", { type: "text", maxlength: "300", required: true });
    const take = (event) => {
      event.preventDefault();
      confirm(why.value).catch(failed);
    };
    show(h("label", { class: "wide" }, "Why? Whoever looks at it next reads this.", why), buttons("Next", take, ""));
    dialog.showModal();
    return;
  }
  try {
    show(h("p", null, "Asking…"));
    dialog.showModal();
    await confirm("");
  } catch (problem) {
    show(h("div", { class: "buttons" }, h("button", { type: "button", on: { click: close } }, "Close")));
    failed(problem);
  }
}
