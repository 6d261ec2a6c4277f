"""Triton's kernels on a CPU: its interpreter runs them, where it is on while Triton is imported."""

from __future__ import annotations

import os
import sys

VARIABLE = "TRITON_INTERPRET"


def import_interpreted() -> bool:
    """Import Triton so that its functions are interpreted, if need be once more; False where it isn't installed.

    Torch's compiler imports it too, and whichever comes first decides. The compiler doesn't use it on a CPU.
    """
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        import triton.language as language

        if type(language.sum).__name__ != "InterpretedFunction":
            compiled = [name for name in sys.modules if name == "triton" or name.startswith("triton.")]
            for name in compiled:
                # What is compiled itself isn't loaded twice.
                if not name.startswith("triton._C"):
                    del sys.modules[name]
            import triton.language  # noqa: F401, F811
    except ImportError:
        return False
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before
    return True
