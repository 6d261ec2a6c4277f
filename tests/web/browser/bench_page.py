"""`python -m tests.web.browser.bench_page HOME`: how fast the page is with what `python -m tests.web.simulated HOME` wrote.

Prints when a cold page paints first and has its data, what it takes to change views, and how long the page is busy with one
move of a pointer, one key and one zoom. The server and the browser run on this machine, beside whatever else does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from configs.paths import HomePaths
from tests.web.browser.driving import DESK, BrowserPage, driving, reason
from tests.web.browser.homes import queue
from tests.web.serving import TOKEN, serving

VIEWS = ("", "time", "experts", "ranks", "ranks?mode=deviation", "ranks?group=node", "layout", "checkpoints")
BUSY = """
const plot = document.querySelector(arguments[0]), box = plot.getBoundingClientRect(), found = [];
for (let i = 0; i < 40; i++) {
  const began = performance.now();
  const [clientX, clientY] = [box.left + 90 + i * 20, box.top + 20 + i * 9];
  plot.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY, bubbles: true }));
  found.push(performance.now() - began);
}
for (const key of ["ArrowDown", "ArrowRight", "+"]) {
  plot.focus();
  const began = performance.now();
  plot.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  found.push(performance.now() - began);
}
return found;
"""


def paint(page: BrowserPage, where: str) -> None:
    """A cold load of a view."""
    page.driver.get("about:blank")
    page.driver.get(f"http://127.0.0.1:{page.client.port}/#/run/simulated/{where}")
    page.until(lambda: page.js("return document.body.dataset.loaded"), 60)
    first = page.js("return performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? NaN")
    ends = page.js("""
      const asked = performance.getEntriesByType("resource").filter((one) => one.name.includes("/run/"));
      return Math.max(...asked.map((one) => one.responseEnd));""")
    print(
        f"{where or 'progress'}: first paint {first:.0f} ms, its data there {ends:.0f} ms after the load began"
    )


def main() -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.web.browser.bench_page", description=__doc__)
    parser.add_argument("home", type=Path)
    parser.add_argument("--run", default="simulated")
    options = parser.parse_args()
    if why := reason():
        print(why)
        return 2
    home = HomePaths(options.home)
    queue(home, [])
    with serving(home) as client, driving() as driver:
        page = BrowserPage(driver, client)
        page.size(*DESK)
        page.driver.get(f"http://127.0.0.1:{client.port}/?token={TOKEN}")
        page.until(lambda: page.js("return document.body.dataset.loaded"), 60)
        client.until(f"/api/run/{options.run}", lambda tree: tree["indexed"] == 1.0, 120)
        for where in ("", "ranks"):
            paint(page, where)
        for where in VIEWS:
            spent = []
            for _ in range(5):
                began = time.perf_counter()
                page.go(f"run/{options.run}/{where}", 60)
                spent.append((time.perf_counter() - began) * 1e3)
            usual, worst = statistics.median(spent), max(spent)
            print(
                f"to {where or 'progress'}: median {usual:.0f} ms, worst {worst:.0f} ms, with the server's part"
            )
        for where, selector in (("", ".chart .plot"), ("ranks", ".heat .plot"), ("layout", ".layout .plot")):
            page.go(f"run/{options.run}/{where}", 60)
            spent = page.js(BUSY, selector)
            usual, worst = statistics.median(spent), max(spent)
            print(
                f"a move, a key or a zoom on {where or 'progress'}: median {usual:.1f} ms, worst {worst:.1f} ms"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
