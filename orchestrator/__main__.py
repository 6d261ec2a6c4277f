"""`megaray`, or `python -m orchestrator`: the command line."""

import gc
import sys
from importlib.util import find_spec
from pathlib import Path

# A command lives for half a second or waits for others; collecting garbage would be a tenth of its work.
gc.set_threshold(100_000)

_PACKAGES = ("configs", "collectives", "faulttol", "trainer")
_CODE = Path(__file__).resolve().parents[1]
_MISTAKE = 2


def shadowed() -> str:
    """Why another module would be taken for one of ours; empty where none would.

    `python -m` looks into the current folder first, so a `trainer.py` that lies there is found before the package.
    """
    for name in _PACKAGES:
        spec = find_spec(name)
        if spec is None:
            return f"the package '{name}' isn't beside {_CODE / 'orchestrator'}: install megaray anew"
        # A folder without an `__init__.py` is a package too, one without an origin.
        origin = spec.origin or next(iter(spec.submodule_search_locations or ()), "")
        if Path(origin).resolve() != _CODE / name / "__init__.py":
            return (
                f"{origin} has the name of one of megaray's packages and would be taken for it: type `megaray` in place of "
                "`python -m orchestrator`, or type it in another folder"
            )
    return ""


def run() -> int:
    """One command; its exit code."""
    if why := shadowed():
        sys.stderr.write(f"megaray: {why}\n")
        return _MISTAKE
    # Loaded here, once it is known whose packages these are.
    from configs.errors import starting

    with starting():
        from orchestrator.cli import main
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run())
