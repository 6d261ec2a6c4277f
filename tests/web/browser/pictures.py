"""`python -m tests.web.browser.pictures [FOLDER]`: the pictures of `docs/images`, of runs that our own writers made."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.web.browser import homes
from tests.web.browser.driving import PHONE, BrowserPage, browsing, reason
from tests.web.browser.homes import HUNG, RECOVERED
from tests.web.serving import serving

MOST = 150 << 10
PICTURES = {
    "dashboard-run.png": (f"run/{RECOVERED}", "light", (1200, 1180)),
    "dashboard-time.png": (f"run/{RECOVERED}/time", "light", (1200, 980)),
    "dashboard-ranks.png": (f"run/{HUNG}/ranks?mode=deviation&rank={homes.CULPRIT}", "dark", (1200, 980)),
    "dashboard-hang.png": (f"run/{HUNG}/layout", "light", (1200, 860)),
    "dashboard-phone.png": ("", "dark", PHONE),
}


def take(page: BrowserPage, folder: Path, name: str) -> None:
    """One picture; too large a one is an error."""
    where, theme, size = PICTURES[name]
    page.theme(theme)
    page.size(*size)
    page.go(where)
    time.sleep(0.5)  # what resizes is drawn in the next frames
    page.picture(folder / name)
    size_ = (folder / name).stat().st_size
    assert size_ <= MOST, f"{name} has {size_} bytes; at most {MOST}"
    assert page.console() == []
    print(f"{folder / name}: {size_ >> 10} KiB")


def main() -> int:
    """All of them."""
    if why := reason():
        print(why)
        return 2
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[3] / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        home = homes.a_full_home(Path(temporary) / "home", odd=False)
        with serving(home.paths) as client, browsing(client) as page:
            for name in PICTURES:
                homes.queue(home.paths, home.waiting)
                take(page, folder, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
