// The page: which view the address names, loading it, changing it when the server's data do, and saying what is wrong.

import { Problem, exported, exportedAt, get, link, listen, onLink } from "./api.js";
import { h, morph } from "./dom.js";
import { seconds, when } from "./format.js";
import { runs } from "./home.js";
import { actions, nodes } from "./nodes.js";
import { note } from "./parts.js";
import { run } from "./run.js";
import { start } from "./theme.js";

const main = document.getElementById("main");
const OLD = 20;
let ctx = null,
  view = null,
  loading = null,
  timer = 0,
  ended = 0,
  took = 0,
  wanted = false,
  focusOn = null;

function parse() {
  const [path, query] = location.hash.replace(/^#/, "").split("?");
  const parts = path.split("/").filter(Boolean).map(decodeURIComponent);
  const params = Object.fromEntries(new URLSearchParams(query ?? ""));
  if (parts[0] === "run" && parts[1]) return { view: run, id: parts[1], name: parts[2] ?? "", params };
  if (exported) return { view: run, id: exported, name: "", params };
  return { view: { nodes, actions }[parts[0]] ?? runs, id: "", name: "", params };
}

function address(id, name, params) {
  const query = new URLSearchParams(
    Object.entries(params)
      .filter(([, value]) => value !== undefined && value !== null && value !== "")
      .map(([k, v]) => [k, String(v)]),
  ).toString();
  return `#/run/${encodeURIComponent(id)}${name ? `/${name}` : ""}${query ? `?${query}` : ""}`;
}

function context(found) {
  const own = {
    id: found.id,
    view: found.name,
    params: found.params,
    data: null,
    problem: null,
    link: (name, params) => address(found.id, name, params),
    redraw: () => own === ctx && draw(),
    refresh: () => own === ctx && load(),
    set(values, again = true, focus = null) {
      Object.assign(own.params, values);
      for (const [name, value] of Object.entries(own.params))
        if (value === undefined || value === null || value === "") delete own.params[name];
      const path = location.hash.replace(/^#/, "").split("?")[0] || "/";
      const query = new URLSearchParams(own.params).toString();
      history.replaceState(null, "", `#${path}${query ? `?${query}` : ""}`);
      focusOn = focus;
      if (again) load();
      else draw();
    },
  };
  return own;
}

function draw() {
  if (!ctx) return;
  const parts = [];
  if (ctx.problem) parts.push(note("bad", ctx.problem.message));
  if (ctx.data) {
    const made = view.draw(ctx, ctx.data);
    parts.push(
      ...[made].flat(Infinity).filter((one) => one !== null && one !== undefined && one !== false && one !== ""),
    );
  } else if (!ctx.problem) parts.push(h("p", { class: "quiet" }, "Loading…"));
  if (!ctx.data && ctx.problem) parts.unshift(h("h1", { tabindex: "-1" }, "Not to be shown"));
  const log = main.querySelector(".log[data-follow]"),
    kept = log?.__key;
  const follows = !log || log.scrollHeight - log.scrollTop - log.clientHeight < 24;
  morph(
    main,
    parts.map((one) => (one instanceof Node ? one : document.createTextNode(String(one)))),
  );
  const after = main.querySelector(".log[data-follow]");
  if (after && (follows || after.__key !== kept)) after.scrollTop = after.scrollHeight;
  if (focusOn && ctx.data) {
    const place = focusOn === "h1" ? main.querySelector("h1") : document.getElementById(focusOn);
    if (place) {
      place.focus({ preventScroll: focusOn === "h1" });
      if (focusOn !== "h1") place.scrollIntoView({ block: "nearest" });
      focusOn = null;
    }
  }
}

async function load() {
  loading?.abort();
  clearTimeout(timer);
  timer = 0;
  wanted = false;
  const own = ctx,
    mine = new AbortController(),
    began = performance.now();
  loading = mine;
  try {
    const data = await view.load(own, mine.signal);
    if (own !== ctx || mine.signal.aborted) return;
    [own.data, own.problem] = [data, null];
  } catch (problem) {
    if (own !== ctx || mine.signal.aborted) return;
    if (!(problem instanceof Problem)) throw problem;
    own.problem = problem.status === 0 && own.data ? null : problem; // the banner tells that nothing answers
  } finally {
    if (loading === mine) {
      loading = null;
      [ended, took] = [performance.now(), performance.now() - began];
    }
  }
  const drawing = performance.now();
  draw();
  took += performance.now() - drawing;
  document.body.dataset.loaded = location.hash || "#/";
  if (wanted) soon();
}

/** Load again, as soon as that isn't too often. */
function soon() {
  if (loading) {
    wanted = true;
    return;
  }
  if (timer || !view) return;
  const every = typeof view.every === "function" ? view.every(ctx) : view.every;
  timer = setTimeout(
    () => {
      timer = 0;
      if (document.hidden) wanted = true;
      else load();
    },
    Math.max(0, Math.max(every, 4 * took) - (performance.now() - ended)),
  );
}

function show() {
  const found = parse(),
    before = ctx;
  view = found.view;
  ctx = context(found);
  delete document.body.dataset.loaded;
  if (before && before.id === ctx.id && view === run) ctx.known = before.known;
  if (before) focusOn = before.id === ctx.id && view === run ? null : "h1";
  document.title = `${typeof view.title === "function" ? view.title(ctx) : view.title} · megaray`;
  menu();
  if (!(before && before.id === ctx.id && before.view === ctx.view && view === run)) window.scrollTo(0, 0);
  load();
}

function menu() {
  const items = exported
    ? []
    : [
        ["#/", "Runs", runs],
        ["#/nodes", "Nodes", nodes],
        ["#/actions", "Actions", actions],
      ];
  morph(document.getElementById("menu"), [
    h(
      "ul",
      null,
      items.map(([href, text, own]) =>
        h(
          "li",
          null,
          h("a", { href, "aria-current": own === view ? "page" : view === run && own === runs ? "true" : null }, text),
        ),
      ),
    ),
  ]);
}

/** What is wrong with what is shown, above everything. */
function banners() {
  const parts = [],
    now = Date.now();
  if (exported) parts.push(note("plain", `A copy of run ${exported}, saved ${when(exportedAt)}. It doesn't change.`));
  else if (link.locked) parts.push(note("bad", link.locked));
  else if (link.down) {
    // Read out once, so without the seconds that pass.
    parts.push(
      note(
        "bad",
        `The dashboard's server doesn't answer since ${when(link.down / 1000)}. What is shown is from then; the page goes on by itself when it answers.`,
      ),
    );
  } else {
    const age = link.asOf ? now / 1000 - link.asOf : 0;
    if (age > OLD)
      parts.push(note("warn", `Storage is slow: what is shown was read ${seconds(Math.round(age / 10) * 10)} ago.`));
    if (!link.controller) parts.push(note("warn", link.said));
  }
  morph(document.getElementById("banners"), parts);
}

async function begin() {
  start(document.getElementById("theme"));
  document.getElementById("skip").addEventListener("click", () => main.focus());
  onLink(banners);
  banners();
  setInterval(banners, 5000);
  window.addEventListener("hashchange", show);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || /INPUT|SELECT|TEXTAREA/.test(event.target.nodeName)) return;
    const place = document.getElementById("find");
    if (!place) return;
    event.preventDefault();
    place.focus();
  });
  show();
  if (exported) return;
  listen((told) => {
    if (told.all || view.wants(told, ctx) || (told.beat && view.polls?.(ctx))) soon();
  });
  document.addEventListener("visibilitychange", () => !document.hidden && wanted && soon());
  try {
    const me = await get("/api/me");
    document.getElementById("who").textContent = me.who;
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
  }
}

begin();
