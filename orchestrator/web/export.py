"""One run as one HTML file that opens anywhere: the page's own files joined, and the answers to all it asks."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import time
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.paths import HomePaths
from orchestrator.web.read_model import HomeReadModel
from orchestrator.web.redact import Redactor
from orchestrator.web.run_api import RunApi
from orchestrator.web.server import STATIC
from orchestrator.web.views import home as views

_LOADING = 120.0
_LOGS = 16
"""Ranks whose logs and stacks are taken along, those that incidents name first."""
_QUERIES: dict[str, dict[str, str]] = {
    "series": {"points": "2000"},
    "experts": {"columns": "200"},
    "log": {"lines": "1000"},
}
_IMPORT = re.compile(
    r"^import\s+(?:\{(?P<names>[^}]*)\}|\*\s+as\s+(?P<all>[\w$]+))\s+from\s+[\"'](?P<from>[^\"']+)[\"'];?\s*$",
    re.MULTILINE,
)
_EXPORT = re.compile(
    r"^export\s+(?P<rest>(?:async\s+function\*?|function\*?|class|const|let)\s+(?P<name>[\w$]+))",
    re.MULTILINE,
)
_LIST = re.compile(r"^export\s+\{(?P<names>[^}]*)\};?\s*$", re.MULTILINE)
_OTHER = re.compile(r"^\s*(?:import\b|export\b)|\bimport\s*\(|\bimport\.meta\b", re.MULTILINE)
_SCRIPT = re.compile(r"<script\b[^>]*\bsrc=[\"']/?static/(?P<name>[\w.-]+)[\"'][^>]*>\s*</script>")
_STYLE = re.compile(r"<link\b[^>]*\bhref=[\"']/?static/(?P<name>[\w.-]+\.css)[\"'][^>]*>")
_OTHER_LINK = re.compile(r"<link\b[^>]*>")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


def write(home: HomePaths, run_id: str, path: Path) -> int:
    """Write a run into a file; its size in bytes.

    Raises:
        UserError: where there is no such run, or the file can't be written.
    """
    live = HomeReadModel(home)
    live.turn()
    state = live.existing(home.existing(run_id).run_id)
    state.mark_viewed()
    if not state.load(time.monotonic() + _LOADING):
        raise UserError(
            f"run '{state.run.run_id}' couldn't be read in {_LOADING:.0f} s; is its storage slow? Try again"
        )
    text = page(live, state.run.run_id)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path} can't be written ({error.strerror}); name a file that you may write"
        ) from None
    return len(text.encode())


def page(live: HomeReadModel, run_id: str, folder: Path = STATIC) -> str:
    """The file's text.

    Raises:
        UserError: where the page's files are missing, or have what can't be joined.
    """
    # Secrets of this process's environment are taken out wherever they stand.
    answers = Redactor().tree(_answers(live, run_id))
    data = json.dumps(
        {"run": run_id, "exported": live.clock(), "answers": answers}, allow_nan=False, separators=(",", ":")
    )
    # In a script element only these end it or begin a comment; JSON takes them escaped, as it does all that isn't ASCII.
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return joined(folder, data, run_id)


def _answers(live: HomeReadModel, run_id: str) -> dict[str, Any]:
    """What the page asks, by path."""
    state, answers, root = live.existing(run_id), RunApi(live), f"/api/run/{run_id}"
    by_path: dict[str, Any] = {
        "/api/me": {"as_of": live.snapshot.as_of, "who": "", "home": "", "actions": [], "failed": ""},
        "/api/runs": {"as_of": live.snapshot.as_of, "runs": [views.row(state)], "left_out": 0, "damage": []},
    }
    for what in answers.handlers:
        path = f"{root}/{what}" if what else root
        if what in ("group", "log", "stack"):
            continue
        try:
            by_path[path] = answers.answer(run_id, what, _QUERIES.get(what, {}))
        except (UserError, OSError) as error:
            by_path[path] = {"error": str(error)}
    for field in ("wait", "data", "save", "step"):
        key = f"{root}/heat?field={field}"
        try:
            by_path[key] = answers.answer(run_id, "heat", {"field": field})
        except (UserError, OSError) as error:
            by_path[key] = {"error": str(error)}
    with state.lock:
        history = state.history
        named = (
            [(e.attempt, e.rank) for _, e in history.incidents.values() if e.rank is not None]
            if history
            else []
        )
        newest = max(history.attempts, default=0) if history else 0
    wanted = list(dict.fromkeys([*named, *((newest, rank) for rank in range(_LOGS))]))[:_LOGS]
    for attempt, rank in wanted:
        for what in ("log", "stack"):
            query = {"attempt": str(attempt), "rank": str(rank)}
            try:
                answer = answers.answer(run_id, what, query | _QUERIES.get(what, {}))
            except (UserError, OSError):
                continue
            by_path[f"{root}/{what}?attempt={attempt}&rank={rank}"] = answer
            by_path.setdefault(f"{root}/{what}", answer)
    return by_path


def joined(folder: Path, data: str, title: str) -> str:
    """`index.html` with its styles and modules inside, and the data before them.

    Raises:
        UserError: where a file is missing or has what can't be joined.
    """
    text = _COMMENT.sub("", _read(folder, "index.html"))
    scripts = [match["name"] for match in _SCRIPT.finditer(text)]
    script = bundle(folder, scripts)
    styles = "\n".join(_read(folder, match["name"]) for match in _STYLE.finditer(text)).replace("</", "<\\/")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(styles)}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    text = _OTHER_LINK.sub("", _STYLE.sub("", _SCRIPT.sub("", text)))
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">\n'
        f'<meta name="generator" content="megaray {html.escape(title)}">\n<style>{styles}</style>\n'
    )
    tail = f'<script type="application/json" id="megaray-export">{data}</script>\n<script>{script}</script>\n'
    if "<head>" not in text or "</body>" not in text:
        raise UserError(f"{folder / 'index.html'} has no <head> or no </body>; is megaray installed whole?")
    before, _, after = text.partition("<head>")
    after, _, end = after.rpartition("</body>")
    return f"{before}<head>\n{head}{after}{tail}</body>{end}"


def bundle(folder: Path, entries: list[str]) -> str:
    """Modules and all that they import as one plain script, each in a function of its own.

    Raises:
        UserError: where a module has what can't be joined, or imports itself.
    """
    done: dict[str, str] = {}
    for entry in entries:
        _module(folder, entry, done, ())
    parts = ['"use strict";\nconst modules = {};']
    parts += [f"modules[{json.dumps(name)}] = (() => {{\n{body}\n}})();" for name, body in done.items()]
    return (
        "(() => {\n"
        + "\n".join(parts).replace("</script", "<\\/script").replace("<!--", "<\\!--")
        + "\n})();"
    )


def _module(folder: Path, name: str, done: dict[str, str], path: tuple[str, ...]) -> None:
    if name in done:
        return
    if name in path:
        raise UserError(f"{folder / name} imports itself by {' -> '.join(path)}; take the ring apart")
    text, own = _read(folder, name), dict[str, str]()

    def imported(match: re.Match[str]) -> str:
        source = match["from"].rsplit("/", 1)[-1]
        _module(folder, source, done, (*path, name))
        if match["all"]:
            return f"const {match['all']} = modules[{json.dumps(source)}];"
        names = ", ".join(
            re.sub(r"\s+as\s+", ": ", one.strip()) for one in match["names"].split(",") if one.strip()
        )
        return f"const {{ {names} }} = modules[{json.dumps(source)}];"

    def listed(match: re.Match[str]) -> str:
        for one in filter(None, map(str.strip, match["names"].split(","))):
            inner, _, outer = one.partition(" as ")
            own[(outer or inner).strip()] = inner.strip()
        return ""

    def exported(match: re.Match[str]) -> str:
        own[match["name"]] = match["name"]
        return match["rest"]

    body = _EXPORT.sub(exported, _LIST.sub(listed, _IMPORT.sub(imported, text)))
    left = _OTHER.search(re.sub(r"/\*.*?\*/|^\s*//.*$", "", body, flags=re.DOTALL | re.MULTILINE))
    if left is not None:
        raise UserError(f"{folder / name} has '{left[0].strip()}', which can't be joined into one file")
    pairs = ", ".join(f"get {outer}() {{ return {inner}; }}" for outer, inner in own.items())
    done[name] = f"{body}\nreturn {{ {pairs} }};"


def _read(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{folder / name} can't be read ({error.strerror}); is megaray installed whole?"
        ) from None


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
