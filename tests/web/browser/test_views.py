"""Every view in a real browser: what it shows, that nothing is complained of, and that it can be used by anybody."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.paths import HomePaths
from orchestrator.web.server import STATIC
from tests.web import simulated
from tests.web.browser import homes
from tests.web.browser.driving import DESK, PHONE, BrowserPage, browsing, needs_browser
from tests.web.browser.homes import CULPRIT, HOSTILE, HUNG, LIVE, RECOVERED, Home
from tests.web.serving import serving

pytestmark = [pytest.mark.unit, pytest.mark.timeout(240), needs_browser]

AUDIT = (Path(__file__).parent / "audit.js").read_text()
TABS = ("", "time", "checkpoints", "incidents", "experts", "ranks", "layout", "logs", "setup")


def of(*runs: str) -> list[str]:
    """Addresses of the general views, and of all views of some runs."""
    return ["", "nodes", "actions", *(f"run/{run}/{tab}".rstrip("/") for run in runs for tab in TABS)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return homes.a_full_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def page(home: Home) -> Iterator[BrowserPage]:
    with serving(home.paths) as client, browsing(client) as page:
        yield page


@pytest.fixture(autouse=True)
def quiet(page: BrowserPage, home: Home) -> Iterator[None]:
    """The controller beats, and the console is silent after each test."""
    homes.queue(home.paths, home.waiting)
    page.size(*DESK)
    yield
    assert page.console() == []
    assert page.js("return window.hacked") is None


def audit(page: BrowserPage) -> list[str]:
    return [str(one) for one in page.js(AUDIT)]


# ---- what is shown ----


def test_all_runs_and_the_queue(page: BrowserPage) -> None:
    page.go("")
    text = page.text()
    assert "Active (4)" in text and "Queue (3)" in text and "Ended (1)" in text
    assert "needs 2 CPU slots on 1 node, 1 is free" in text
    assert [row[0] for row in page.rows("Runs that wait")] == ["1", "2", "3"]
    page.js("document.getElementById('find').focus()")
    page.keys("killed")
    page.until(lambda: "Active (1)" in page.text() and "Queue (0)" in page.text())
    page.js(
        "const find = document.getElementById('find'); find.value = ''; find.dispatchEvent(new Event('input'))"
    )
    page.button("Loss").click()
    losses = [float(row[3]) for row in page.rows("Active runs")]
    assert losses == sorted(losses, reverse=True) and len(losses) == 4
    assert page.js("return document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "descending"


def test_nodes(page: BrowserPage) -> None:
    page.go("nodes")
    text = page.text()
    assert (
        re.search(r"cordoned by ann, .*: disk", text) and "not in the cluster" in text and "rack=r1" in text
    )


def test_progress_of_a_recovered_run(page: BrowserPage) -> None:
    page.go(f"run/{RECOVERED}")
    titles = page.js("return [...document.querySelectorAll('.chart-title')].map((one) => one.innerText)")
    assert titles[:4] == ["Loss", "Phases of a step, stacked", "Learning rate", "Gradient norm"]
    assert {"Tokens/s", "Peak memory per rank", "Seconds of a step"} <= set(titles)
    text = page.text()
    assert "No MFU: none: cpu has no fp32 peak on record" in text
    assert "80 of 100" in text and "inside" in text and "Predicted finish" in text
    assert page.js("return document.querySelectorAll('.line.lost').length") > 0, (
        "what was trained again is drawn apart"
    )
    assert page.js("return document.querySelectorAll('.chart .band').length") > 0
    assert page.js("return document.querySelectorAll('.stack').length") >= 9, "three phases in three segments"


def test_a_chart_is_read_by_keyboard_and_zoomed(page: BrowserPage) -> None:
    page.go(f"run/{RECOVERED}")
    page.js("document.querySelector('.chart .plot').focus()")
    page.keys("\ue011")  # home
    first = page.js("return document.activeElement.getAttribute('aria-valuetext')")
    assert first.startswith("step 1: training loss 4.12"), first
    page.keys("\ue014")  # right
    assert page.js("return document.activeElement.getAttribute('aria-valuetext')").startswith("step 2: ")
    reads = page.js(
        "return [...document.querySelectorAll('.chart-read')].map((one) => one.innerText.split(':')[0])"
    )
    assert set(reads) == {"step 2"}, "all charts have one cursor"
    page.keys("+")
    page.shows("Show all")
    assert "from=" in page.js("return location.hash")
    page.keys("\ue00c")  # escape
    page.until(lambda: "from=" not in page.js("return location.hash"))
    drag(page, ".chart .plot", 0.3, 0.6)
    page.until(lambda: "from=" in page.js("return location.hash"), why="dragging zooms")
    begin, end = re.findall(r"(?:from|to)=(\d+)", page.js("return location.hash"))
    assert 20 <= int(begin) < int(end) <= 70
    page.button("Show all").click()
    page.until(lambda: "from=" not in page.js("return location.hash"))


def drag(page: BrowserPage, selector: str, begin: float, end: float) -> None:
    from selenium.webdriver import ActionChains

    node = page.one(selector)
    wide = node.size["width"]
    half = int((end - begin) * wide / 2)
    chain = ActionChains(page.driver, duration=20).move_to_element_with_offset(
        node, int((begin - 0.5) * wide), 0
    )
    chain.click_and_hold().move_by_offset(half, 0).move_by_offset(half, 0).release().perform()


def test_attempts_on_one_axis_and_the_ledger(page: BrowserPage) -> None:
    page.go(f"run/{RECOVERED}/time")
    assert page.js("return document.querySelectorAll('.timeline .rewind').length") == 1
    assert page.js("return document.querySelectorAll('.timeline .saved').length") == 2
    assert page.js("return document.querySelectorAll('.timeline .sign.incident').length") == 1
    assert "36 → 20" in page.js("return document.querySelector('.timeline').textContent")
    shares = {row[0]: float(row[2].removesuffix(" %")) for row in page.rows("Parts of the wall time")}
    assert shares.pop("Sum") == pytest.approx(100, abs=0.1)
    assert sum(shares.values()) == pytest.approx(100, abs=0.2)
    assert {"productive", "lost work", "detection", "restart", "waiting"} <= set(shares)
    assert "ETTR" in page.text() and "from 21: 16 steps" in page.text()


def test_checkpoints(page: BrowserPage) -> None:
    page.go(f"run/{RECOVERED}/checkpoints")
    text = page.text()
    assert "failed: rank 0: no space" in text and "committed" in text and "300 ms" in text and "store" in text


def test_an_incident_leads_to_its_evidence(page: BrowserPage) -> None:
    page.go(f"run/{RECOVERED}/incidents")
    assert "Incident 1: rank exit" in page.text() and "rank 1 was killed by SIGKILL" in page.text()
    page.one(".incident .facts a").click()
    page.shows("backward (trainer/loop.py:210)")
    page.button("Recorder").click()
    page.shows("#4  step 3  forward begin")


def test_expert_map(page: BrowserPage) -> None:
    page.go(f"run/{HUNG}/experts")
    page.js("document.querySelector('.heat .plot').focus()")
    page.keys("\ue015", "\ue014")  # down, right
    assert re.match(
        r"layer 1, step \d+: its most loaded expert has 1\.\d+× the mean load", page.text(".heat-read")
    )
    page.keys("\ue007")  # enter
    page.until(lambda: "layer=1" in page.js("return location.hash"))
    page.shows("experts of layer 1")
    page.until(lambda: page.value(".heat .plot").startswith("expert"))


def test_rank_map_opens_a_rank(page: BrowserPage, home: Home) -> None:
    page.go(f"run/{HUNG}/ranks")
    dark = darkest_row(page)
    assert dark == CULPRIT, "the slow rank stands out"
    page.js("document.querySelector('.heat .plot').focus()")
    page.keys("\ue015", "\ue015")
    assert page.value(".heat .plot").startswith("rank 2, step 1: ")
    page.keys("\ue007")
    page.shows("Rank 2, attempt 1")
    page.until(
        lambda: page.js("return document.activeElement.id") == "opened",
        why="the focus goes to what was opened",
    )
    page.shows("rank 2 begins")
    assert "rank=2" in page.js("return location.hash"), "the address leads back here"
    page.button("Stack").click()
    page.shows("no stack of this rank was kept")
    page.button("Close").click()
    page.until(lambda: "rank=" not in page.js("return location.hash"))
    choose(page, "As", "deviation")
    page.shows("is the median of the ranks of the same pipeline stage")
    choose(page, "Rows by", "node")
    page.until(lambda: page.value(".heat .plot").startswith("10.0.0.3 (ranks 16–23), "))
    choose(page, "Rows by", "pp")
    page.until(lambda: page.value(".heat .plot").startswith("pp 2 (ranks 32–47), "))
    choose(page, "Show", "save")
    page.until(lambda: "field=save" in page.js("return location.hash"))


def test_a_row_of_joined_ranks_opens_its_ranks(tmp_path: Path) -> None:
    made = simulated.write(tmp_path, ranks=1024, steps=400, lines=False)
    homes.queue(HomePaths(tmp_path), [])
    with serving(HomePaths(tmp_path)) as client, browsing(client) as page:
        page.go("run/simulated/ranks?mode=deviation")
        row = darkest_row(page, 256)
        assert row == made.slow_rank // 4, "the slow rank is seen among four that are one row"
        page.js("document.querySelector('.heat .plot').focus()")
        page.keys(*["\ue015"] * row, "\ue010")
        assert page.value(".heat .plot").startswith(f"ranks {row * 4}–{row * 4 + 3}, ")
        page.keys("\ue007")
        page.shows(f"Ranks {row * 4} to {row * 4 + 3} alone.")
        slow = darkest_row(page, 4)
        assert row * 4 + slow == made.slow_rank
        page.go("run/simulated/layout")
        assert page.js("return document.querySelector('.layout canvas').clientHeight") < 700, (
            "all ranks on one screen"
        )
        assert page.console() == []


def darkest_row(page: BrowserPage, rows: int = 64) -> int:
    """The row of the map's canvas that has the most of the scale's upper end in its right half."""
    return int(
        page.js(
            """
      const canvas = document.querySelector(".heat .plot canvas"), copy = new OffscreenCanvas(canvas.width, canvas.height);
      const own = copy.getContext("2d", { willReadFrequently: true });
      own.drawImage(canvas, 0, 0);
      const ratio = devicePixelRatio, [left, top, bottom] = [120 * ratio, 7 * ratio, 20 * ratio], rows = arguments[0];
      let best = -1, most = -1;
      for (let row = 0; row < rows; row++) {
        const y = top + ((row + 0.5) * (canvas.height - top - bottom)) / rows;
        const line = own.getImageData(left + (canvas.width - left) * 0.6, y, (canvas.width - left) * 0.35, 1).data;
        let sum = 0;
        for (let i = 0; i < line.length; i += 4) sum += 255 - line[i];
        if (sum > most) [best, most] = [row, sum];
      }
      return best;""",
            rows,
        )
    )


def choose(page: BrowserPage, label: str, value: str) -> None:
    assert page.js(
        """
      const label = [...document.querySelectorAll("label")].find((one) => one.firstChild.data?.trim() === arguments[0]);
      const select = label?.querySelector("select");
      if (!select) return false;
      select.value = arguments[1];
      select.dispatchEvent(new Event("change"));
      return true;""",
        label,
        value,
    ), f"there is no choice '{label}'"


def test_layout_names_the_culprit_of_a_hang(page: BrowserPage) -> None:
    page.go(f"run/{HUNG}/layout")
    assert f"for rank {CULPRIT}, which is stopped (state T)" in page.text(".note.bad")
    rows = page.rows("Who waits for whom")
    assert all(row[2] == str(CULPRIT) for row in rows) and len(rows) == 2
    assert {row[1] for row in rows} == {"33, 35, 39, 41, 43, 45, 47", "36"}
    assert "waited for (1)" in page.text() and "waits for others (8)" in page.text()
    page.js("document.querySelector('.layout .plot').focus()")
    page.keys("\ue010")  # end
    assert page.js("return document.activeElement.getAttribute('aria-valuetext')").startswith(
        "rank 63, pp 3, dp 7, tp 1, "
    )
    page.go(f"run/{HUNG}/layout?rank={CULPRIT}&axis=dp")
    page.shows("Its dp group")
    assert "33, 35, 37, 39, 41, 43, 45, 47" in page.text(".view")
    assert "backward" in page.text(".view") and "stopped (state T)" in page.text(".view")


def test_logs_with_search(page: BrowserPage) -> None:
    page.go(f"run/{LIVE}/logs")
    page.shows("step 1000 loss")
    end = "const log = document.querySelector('.log'); return log.scrollHeight - log.scrollTop - log.clientHeight"
    assert page.js(end) <= 2, "it begins at the newest line"
    page.button("Older lines").click()
    page.shows("step 700 loss")
    assert "step 1000 loss" not in page.text(".log")
    page.js("document.getElementById('find').focus()")
    page.keys("STEP 99", "\ue007")
    page.shows("11 lines with “STEP 99”")
    assert (
        page.js("return [...document.querySelectorAll('mark')].map((one) => one.innerText)")
        == ["step 99"] * 11
    )
    page.js("document.querySelector('input[type=checkbox]').click()")
    page.until(lambda: "rank=all" in page.js("return location.hash"))
    page.shows("rank 0", ".log")


def test_setup(page: BrowserPage) -> None:
    page.go(f"run/{LIVE}/setup")
    text = page.text()
    assert "python -m faulttol timeline" in text and "warmup_steps: 5" in text and "sizing report" in text


def test_a_live_run_goes_on_by_itself(page: BrowserPage, home: Home) -> None:
    page.go(f"run/{LIVE}")
    page.shows("60 of 400")
    page.js(
        "document.querySelector('.chart .plot').focus(); window.kept = document.querySelector('.chart .plot')"
    )
    home.live.now = time.time()
    home.live.train(4)
    page.shows("64 of 400")
    assert page.js("return window.kept === document.activeElement"), "what has the focus stays where it is"


def test_html_in_a_run_stays_text(page: BrowserPage) -> None:
    for tab in TABS:
        page.go(f"run/{HOSTILE}/{tab}".rstrip("/"))
        assert page.js("return document.querySelectorAll('main img, main script').length") == 0, tab
    page.go(f"run/{HOSTILE}/incidents")
    assert homes.SCRIPT in page.text()
    page.go("")
    assert homes.SCRIPT in page.text()


def test_what_isnt_there(page: BrowserPage) -> None:
    page.go("run/nothing")
    assert "names no run of this home" in page.text()
    page.console()  # the browser writes down each answer of 404


# ---- for everybody ----


@pytest.mark.parametrize(("theme", "runs"), [("light", (LIVE, RECOVERED, HUNG)), ("dark", (HUNG,))])
def test_contrast_names_and_structure(page: BrowserPage, theme: str, runs: tuple[str, ...]) -> None:
    page.theme(theme)
    wrong = {}
    for where in of(*runs):
        page.go(where)
        if found := audit(page):
            wrong[where] = found
    page.theme("light")
    assert wrong == {}


def test_on_a_phone(page: BrowserPage) -> None:
    page.size(*PHONE)
    wrong = {}
    for where in of(RECOVERED):
        page.go(where)
        page.until(
            lambda: page.js(
                "return [...document.querySelectorAll('.plot')].every((one) => one.clientWidth < 390)"
            )
        )
        if found := audit(page):
            wrong[where] = found
    page.go("")
    lefts, names = page.js("""
      const cells = [...document.querySelector("tbody tr").cells];
      const named = cells.every((one) => getComputedStyle(one, "::before").content.length > 4);
      return [[...new Set(cells.map((one) => Math.round(one.getBoundingClientRect().left)))], named];""")
    assert len(lefts) == 1 and names, "a row is a card, with each value beside its name"
    assert wrong == {}


def test_the_check_finds_what_is_wrong(page: BrowserPage) -> None:
    page.go("nodes")
    assert audit(page) == []
    page.js("""
      const main = document.getElementById("main");
      main.insertAdjacentHTML("beforeend", `<p class="faint">faint</p><button></button><h4>deep</h4>
        <div id="main"></div><div class="wide"></div><span role="slider"></span>
        <input type="text"><svg width="9" height="9"></svg><button class="low">low</button>`);
      main.querySelector(".faint").style.color = "#999";
      Object.assign(main.querySelector(".wide").style, { width: "3000px", height: "5px" });
      Object.assign(main.querySelector(".low").style, { minHeight: "0", height: "12px", padding: "0" });""")
    found = "\n".join(audit(page))
    for wrong in ("contrast 2.66 of a text", "without a name: <button", "level 4 after", "two elements have the id main",
                  "wider than the window", "without aria-valuenow", "without a name: <input",
                  "a picture without a text", "to hit"):  # fmt: skip
        assert wrong in found, f"{wrong} isn't in\n{found}"


def test_all_is_reached_by_tab(page: BrowserPage) -> None:
    for where in (f"run/{HUNG}/ranks", "nodes", f"run/{RECOVERED}/time"):
        page.go(where)
        page.js("document.activeElement.blur()")
        wanted = page.js("""
          const all = [...document.querySelectorAll("a[href], button, select, input, [tabindex='0'], summary")];
          window.wanted = all.filter((one) => one.checkVisibility() && !one.closest("[hidden], dialog"));
          return window.wanted.length;""")
        met = set()
        for _ in range(wanted + 3):
            page.keys("\ue004")
            i, seen, what = page.js("""
              const own = document.activeElement, style = getComputedStyle(own);
              const wide = style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth);
              const seen = own.nodeName === "BODY" || wide >= 2;
              return [window.wanted.indexOf(own), seen, own.outerHTML.slice(0, 200)];""")
            met.add(i)
            assert seen, f"the focus isn't seen on {what}"
        left = [
            page.js("return window.wanted[arguments[0]].outerHTML", i)[:200] for i in set(range(wanted)) - met
        ]
        assert left == []


def test_a_moment_that_no_date_can_be_is_left_out(page: BrowserPage) -> None:
    """Such as the end of a run whose steps take years."""
    shown = page.driver.execute_async_script(
        "const done = arguments[1]; import('/static/format.js').then((m) => done(arguments[0].map((t) => m.when(t, 0))))",
        [0, 1e11, 1e24],
    )
    assert re.fullmatch(r"\d\d:\d\d:\d\d", shown[0]) and shown[1].startswith("5138-")
    assert "NaN" not in shown[2] and len(shown[2]) == 1


def test_theme_is_the_readers_choice(page: BrowserPage) -> None:
    page.go("nodes")
    back = "return getComputedStyle(document.body).backgroundColor"
    light = page.js(back)
    for name, other in (("dark", True), ("light", False), ("", False)):
        choose(page, "Colours", name)
        assert (page.js(back) != light) == other


# ---- the files ----


def test_the_files_ask_for_nothing_else(page: BrowserPage) -> None:
    for path in STATIC.iterdir():
        text = path.read_text()
        outside = re.findall(r"https?://(?!www\.w3\.org/2000/svg)[^\s\"'`]+", text)
        assert not outside, f"{path.name} names {outside}"
        unsafe = r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|new Function)\b"
        assert not re.search(unsafe, text), path.name
    used = page.js("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert used and all(one.startswith(f"http://127.0.0.1:{page.client.port}/") for one in used)


def test_all_modules_are_fetched_at_once() -> None:
    told = set(
        re.findall(r'<link rel="modulepreload" href="/static/([\w.]+)">', (STATIC / "index.html").read_text())
    )
    assert told == {path.name for path in STATIC.glob("*.js")} - {"main.js"}
