"""One run as one file: everything inside, nothing from outside, no secret, no script but the page's own."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from orchestrator.web import export
from orchestrator.web.read_model import HomeReadModel
from tests.web.made import MadeRun, a_home
from tests.web.test_security import EVIL, SECRETS

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

INDEX = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>megaray</title>
<link rel="stylesheet" href="/static/page.css"><link rel="icon" href="/static/icon.svg">
<!-- <script src="/static/old.js"></script> -->
<script type="module" src="/static/app.js"></script></head><body><main id="app"></main></body></html>
"""
APP = """// the page
import { double as twice, NAME } from "./math.js";
import * as math from "./math.js";
export const total = twice(4);
globalThis.result = [total, NAME, math.half(4), JSON.parse(document.getElementById("megaray-export").textContent).run];
"""
MATH = """/* import everything */
import { base } from "./base.js";
export function double(x) { return base * x; }
export const NAME = "</script>";
const third = (x) => x / 3;
export { third, third as part };
export function half(x) { return x / base; }
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    folder = tmp_path / "static"
    folder.mkdir()
    for name, text in {"index.html": INDEX, "app.js": APP, "math.js": MATH, "base.js": "export let base = 2;\n",
                       "page.css": "main { color: red }", "icon.svg": "<svg/>"}.items():  # fmt: skip
        (folder / name).write_text(text)
    return folder


class _Scripts(HTMLParser):
    """As a browser takes the file apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._open = dict(attrs)
            self.scripts.append((self._open, ""))

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.scripts[-1] = self._open, self.scripts[-1][1] + data

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._open = None


def loaded(home: Any, run_id: str) -> HomeReadModel:
    live = HomeReadModel(home)
    live.turn()
    state = live.existing(run_id)
    state.mark_viewed()
    assert state.load(time.monotonic() + 30)
    return live


def exported(tmp_path: Path, page: Path, **more: Any) -> tuple[str, dict[str, Any], _Scripts]:
    home = a_home(tmp_path / "home")
    run = (
        MadeRun(home, "one", now=time.time() - 60, **more)
        .submit(runtime_env={"env_vars": SECRETS})
        .start()
        .train(12)
        .save()
        .train(3)
    )
    run.fault(detail=EVIL).start(step=12, part="restart").train(5)
    run.run.attempt(2).log(0).write_text(
        f"{EVIL}\nHF_TOKEN={SECRETS['HF_TOKEN']}\nplain {SECRETS['MY_PASSWORD']}\n"
    )
    run.run.source.write_text(json.dumps({"environment": SECRETS, "commit": "abc"}))
    text = export.page(loaded(home, "one"), "one", page)
    parsed = _Scripts(text)
    data = next(body for attributes, body in parsed.scripts if attributes.get("id") == "megaray-export")
    return text, json.loads(data), parsed


def test_the_file_holds_everything_and_asks_nobody(tmp_path: Path, page: Path) -> None:
    text, data, parsed = exported(tmp_path, page)
    answers = data["answers"]
    for what in (
        "",
        "/series",
        "/experts",
        "/checkpoints",
        "/incidents",
        "/attempts",
        "/ledger",
        "/forecast",
        "/heat",
        "/layout",
        "/log",
        "/config",
    ):
        assert f"/api/run/one{what}" in answers, what
        assert "error" not in answers[f"/api/run/one{what}"], what
    assert answers["/api/runs"]["runs"][0]["run_id"] == "one"
    assert "/api/run/one/log?attempt=1&rank=1" in answers, "the rank that the incident names"
    assert not [a for tag, a in parsed.tags if tag in ("link", "img", "iframe", "object") or "src" in a]
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", text)
    assert "/static/" not in text


def test_its_policy_allows_its_own_script_alone(tmp_path: Path, page: Path) -> None:
    text, _, parsed = exported(tmp_path, page, owner=EVIL, model=EVIL)
    policy = next(str(a["content"]) for tag, a in parsed.tags if tag == "meta" and a.get("http-equiv"))
    scripts = [body for attributes, body in parsed.scripts if "type" not in attributes]
    data = text.partition('id="megaray-export">')[2].partition("</script>\n<script>")[0]
    assert len(data) > 1000 and "<" not in data, "`</script ` and `<!--` would change what follows"
    assert len(scripts) == 1 and len(parsed.scripts) == 2, (
        "the data and the page; nothing that a run wrote became a script"
    )
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "unsafe" not in policy
    assert EVIL not in text and "onerror=alert" not in "".join(str(a) for _, a in parsed.tags)


def test_no_secret_goes_along(tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    text, data, _ = exported(tmp_path, page)
    for value in SECRETS.values():
        assert value not in text
    lines = [line["text"] for line in data["answers"]["/api/run/one/log?attempt=2&rank=0"]["lines"]]
    assert lines == [EVIL, "HF_TOKEN=[redacted]", "plain [redacted]"]


def test_joined_modules_run(page: Path) -> None:
    program = shutil.which("node") or shutil.which("nodejs")
    text = export.bundle(page, ["app.js"])
    assert "</script" not in text and not re.search(r"^\s*(?:import|export)\b", text, re.MULTILINE)
    if program is None:
        pytest.skip("node isn't installed; the browser's tests open an exported file")
    before = 'globalThis.document = { getElementById: () => ({ textContent: \'{"run": "one"}\' }) };\n'
    done = subprocess.run(
        [program, "-e", f"{before}{text}\nconsole.log(JSON.stringify(result))"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert json.loads(done.stdout) == [8, "</script>", 2, "one"], done.stderr


def test_a_style_or_a_script_of_the_page_does_not_end_its_element(page: Path) -> None:
    (page / "page.css").write_text('a::after { content: "</style><b>" }')
    (page / "base.js").write_text('export let base = "</script><b><!--";\n')
    text = export.joined(page, "{}", "one")
    assert text.count("</style>") == 1 and "<b>" not in [f"<{tag}>" for tag, _ in _Scripts(text).tags]
    assert text.count("</script>") == 2 and "<!--" not in text, "the data and the page"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("export default 1;\n", "export"),
        ("const x = await import('./y.js');\n", "import("),
        ("import './math.js';\n", "import"),
        ("export * from './math.js';\n", "export"),
        ("import { x } from './missing.js';\n", "missing.js can't be read"),
        ("import { total } from './app.js';\n", "imports itself by app.js -> base.js"),
    ],
)
def test_what_cannot_be_joined_is_named(page: Path, code: str, says: str) -> None:
    (page / "base.js").write_text(code)
    (page / "app.js").write_text("import { base } from './base.js';\n")
    with pytest.raises(UserError, match=re.escape(says)):
        export.bundle(page, ["app.js"])


def test_write_says_what_is_wrong(tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = a_home(tmp_path / "home")
    MadeRun(home, "one", now=time.time() - 60).submit().start().train(3)
    monkeypatch.setattr(export.page, "__defaults__", (page,))
    size = export.write(home, "on", tmp_path / "one.html")
    assert (tmp_path / "one.html").stat().st_size == size > 1000
    with pytest.raises(UserError, match="can't be written"):
        export.write(home, "one", tmp_path / "no" / "one.html")
    with pytest.raises(UserError, match="does not exist"):
        export.write(home, "two", tmp_path / "x.html")
