// Asks the server; in an exported file, takes what lies in it. Says whether the server answers, and tries again by itself.

import { words } from "./format.js";

const file = document.getElementById("megaray-export");
const kept = file ? JSON.parse(file.textContent) : null;
const PATIENCE = 15000;
const BACK_OFF = [500, 1000, 2000, 3000, 5000];

/** The run of an exported file; null on a server. */
export const exported = kept ? kept.run : null;
export const exportedAt = kept ? kept.exported : null;

/** How the server is: `down` since when (milliseconds), `locked` where it wants a token. */
export const link = { down: null, locked: "", asOf: null, controller: true, said: "", beatAge: null };
const watchers = new Set();

export class Problem extends Error {
  constructor(text, status, told) {
    super(text);
    [this.status, this.told] = [status, told];
  }
}

/** Be told when `link` changes. */
export function onLink(act) {
  watchers.add(act);
}

function changed(values) {
  if (Object.entries(values).every(([name, value]) => link[name] === value)) return;
  Object.assign(link, values);
  for (const act of watchers) act();
}

function fromFile(path, query) {
  const asked = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const own = new Map(asked.map(([name, value]) => [name, String(value)]));
  const what = path.split("/")[4] ?? "";
  if (what === "log" || what === "stack") {
    const found = kept.answers[`${path}?attempt=${own.get("attempt")}&rank=${own.get("rank")}`];
    if (!found)
      throw new Problem(
        "this file holds the logs and stacks of the first ranks and of those that incidents name, not this one",
        404,
      );
    return found;
  }
  if (what === "heat" && own.has("field") && own.get("field") !== "compute") path = `${path}?field=${own.get("field")}`;
  const found = kept.answers[path];
  if (!found) throw new Problem("this isn't in an exported file", 404);
  if (found.error) throw new Problem(found.error, 404);
  return found;
}

/** The JSON of a path; `query` has its parameters, empty ones are left out. Throws `Problem`. */
export async function get(path, query = {}, signal = undefined) {
  if (kept) return fromFile(path, query);
  const asked = new URLSearchParams();
  for (const [name, value] of Object.entries(query))
    if (value !== "" && value !== null && value !== undefined) asked.set(name, String(value));
  const text = asked.toString();
  return answered(await send(`${path}${text ? `?${text}` : ""}`, { signal }));
}

/** Ask for an action. The first call gives `{confirm, question}`, the one with `confirm` does it. */
export async function act(body) {
  const answer = await send(
    "/api/actions",
    {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    },
    120000,
  );
  if (answer.status === 409) {
    const told = await answer.json();
    if (told.confirm) return told;
    throw new Problem(told.error ?? "it wasn't done", 409, told);
  }
  return answered(answer);
}

async function send(url, options, patience = PATIENCE) {
  const limit = AbortSignal.timeout(patience);
  const signal = options.signal ? AbortSignal.any([options.signal, limit]) : limit;
  try {
    return await fetch(url, { credentials: "same-origin", cache: "no-store", ...options, signal });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    lost();
    throw new Problem(
      limit.aborted ? "the dashboard's server takes too long" : "the dashboard's server doesn't answer",
      0,
    );
  }
}

async function answered(answer) {
  let told = null;
  try {
    told = await answer.json();
  } catch {
    throw new Problem(`the server's answer can't be read (status ${answer.status})`, answer.status);
  }
  if (answer.ok) {
    if (told.as_of) changed({ asOf: told.as_of });
    changed({ locked: "" });
    return told;
  }
  if (answer.status === 401) changed({ locked: told.error ?? words("no_token") });
  throw new Problem(told.error ?? `status ${answer.status}`, answer.status, told);
}

// `tries` since an event came: a server that refuses this page (no cookie, too many pages) answers /healthz all the same.
let source = null,
  tries = 0,
  timer = 0,
  heard = () => {};

function lost() {
  changed({ down: link.down ?? Date.now() });
  again();
}

function again() {
  if (!timer) timer = setTimeout(look, BACK_OFF[Math.min(tries++, BACK_OFF.length - 1)]);
}

async function look() {
  timer = 0;
  try {
    const answer = await fetch("/healthz", { cache: "no-store", signal: AbortSignal.timeout(4000) });
    await answer.json();
  } catch {
    return lost();
  }
  const was = link.down !== null;
  changed({ down: null });
  open();
  if (was) heard({ all: true });
  return undefined;
}

function open() {
  source?.close();
  if (document.hidden) return;
  source = new EventSource("/api/events");
  source.addEventListener("changed", (event) => {
    const told = JSON.parse(event.data);
    tries = 0;
    changed({ asOf: told.as_of, controller: told.controller, said: told.said });
    heard(told);
  });
  source.addEventListener("beat", (event) => {
    const told = JSON.parse(event.data);
    changed({ asOf: told.as_of, beatAge: told.beat_age });
    heard({ beat: true, runs: {}, gone: [] });
  });
  source.onerror = () => {
    source?.close();
    source = null;
    if (!document.hidden) again();
  };
}

/** Call `act(told)` on each change of the server's data, `{all: true}` after it was away. */
export function listen(act) {
  if (kept) return;
  heard = act;
  open();
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      source?.close();
      source = null;
    } else if (!source) {
      open();
      heard({ all: true });
    }
  });
}

/** Say what the controller is like, which `/api/queue` tells. */
export function controllerIs(told) {
  changed({ controller: told.alive, said: told.alive ? "" : told.said });
}
