"""A real browser, Debian's Chromium without a window, and what a test asks of it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.web.serving import TOKEN, Client

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--window-size=1280,900",
)  # fmt: skip
PHONE, DESK = (390, 844), (1280, 900)


def reason() -> str:
    """Why there is no browser; empty where there is one."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium isn't installed: .venv/bin/pip install selenium"
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return (
        f"{', '.join(missing)} isn't installed: apt-get install chromium chromium-driver" if missing else ""
    )


needs_browser = pytest.mark.skipif(bool(reason()), reason=reason() or "there is one")


class BrowserPage:
    """The dashboard in a browser."""

    def __init__(self, driver: Any, client: Client) -> None:
        self.driver, self.client = driver, client

    def login(self) -> None:
        """Open the link that the command prints."""
        self.driver.get(f"http://127.0.0.1:{self.client.port}/?token={TOKEN}")

    def go(self, where: str, seconds: float = 20.0) -> None:
        """Show a view, such as `run/ID/time`, and wait until it is there."""
        self.js("delete document.body.dataset.loaded")
        target = f"#/{where}"
        if self.js("return location.hash") == target:
            self.js("dispatchEvent(new HashChangeEvent('hashchange'))")
        else:
            self.js("location.hash = arguments[0]", target)
        self.until(
            lambda: self.js("return document.body.dataset.loaded") is not None,
            seconds,
            f"{where} isn't shown",
        )

    def js(self, text: str, *given: Any) -> Any:
        """What a script returns."""
        return self.driver.execute_script(text, *given)

    def text(self, selector: str = "main") -> str:
        """Text of the first element of a selector; empty where there is none."""
        return str(self.js("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def button(self, text: str) -> Any:
        """The button with a text, once it is there."""
        return self.until(lambda: self._button(text), why=f"there is no button '{text}'")

    def _button(self, text: str) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException

        try:
            for button in self.driver.find_elements("css selector", "button"):
                if button.text == text and button.is_displayed():
                    return button
        except StaleElementReferenceException:
            pass  # the page was drawn anew meanwhile
        return None

    def rows(self, label: str) -> list[list[str]]:
        """Texts of the cells of a table."""
        return [list(row) for row in self.js("""
          const rows = document.querySelectorAll(`[role=region][aria-label="${arguments[0]}"] tbody tr`);
          return [...rows].map((row) => [...row.cells].map((cell) => cell.innerText));""", label)]  # fmt: skip

    def value(self, selector: str) -> str:
        """What is read out of a chart or a map."""
        return str(
            self.js("return document.querySelector(arguments[0]).getAttribute('aria-valuetext')", selector)
        )

    def keys(self, *keys: str) -> None:
        """Type into what has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def until(self, test: Callable[[], Any], seconds: float = 20.0, why: str = "") -> Any:
        """What the test gives once that is true."""
        deadline = time.monotonic() + seconds
        while not (found := test()):
            assert time.monotonic() < deadline, f"{why}\n{self.text('body')[:1500]}\n{self.console()}"
            time.sleep(0.05)
        return found

    def shows(self, text: str, selector: str = "main", seconds: float = 20.0) -> None:
        """Wait until a text stands there."""
        self.until(lambda: text in self.text(selector), seconds, f"'{text}' isn't shown")

    def size(self, width: int, height: int) -> None:
        """The window that the page sees, also one narrower than a browser's least."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )

    def theme(self, name: str) -> None:
        """What the system asks for: light or dark."""
        wanted = {"features": [{"name": "prefers-color-scheme", "value": name}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)

    def console(self) -> list[str]:
        """Errors and warnings of the console since the last call, policy violations among them."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING")
        ]

    def picture(self, path: Path) -> None:
        """A picture of the window."""
        assert self.driver.save_screenshot(str(path))


@contextmanager
def browsing(client: Client) -> Iterator[BrowserPage]:
    """A browser that is logged in, for as long as the block lasts."""
    with driving() as driver:
        page = BrowserPage(driver, client)
        page.size(*DESK)
        page.login()
        page.until(lambda: page.js("return document.body.dataset.loaded"), 40, "the page doesn't begin")
        yield page


@contextmanager
def driving() -> Iterator[Any]:
    """A browser, for as long as the block lasts."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        driver.set_page_load_timeout(60)
        yield driver
    finally:
        driver.quit()
