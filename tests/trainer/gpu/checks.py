"""Measures on one GPU what sizing forecasts: matmuls, operators, steps and memory of models, and pairs of models.

python -m tests.trainer.gpu.checks CASES.json OUT.json [--parts NAMES] [--seconds S] [--dry]

Needs torch and the standard library alone, so that it runs where the platform isn't installed; the models are the
trainer's own. CASES is written by `python -m tests.trainer.gpu.cases`, OUT is read by
`python -m tests.trainer.sizing.bench_device_forecast`. OUT is written anew after each case, and an interrupt ends the
measurement with what there is. `--dry` runs everything once on a CPU with the sizes cut down.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.trainer.gpu.bench import SHARES, GpuBench, smi
from tests.trainer.gpu.matmuls import matmuls
from tests.trainer.gpu.models import measure_model, measure_pair, small, stand_in
from tests.trainer.gpu.operators import operators


def run(bench: GpuBench, parts: list[str]) -> None:
    """All parts, each within its share of the time that is left."""
    left = sum(SHARES[part] for part in parts)
    for part in parts:
        share = SHARES[part]
        now = time.monotonic()
        bench.until = now + (bench.end - now) * share / left
        left -= share
        bench.results["machine"].setdefault("smi_at", {})[part] = "" if bench.dry else smi()
        print(f"{part}: until {bench.until - bench.begun:.0f} s", flush=True)
        if part == "matmuls":
            matmuls(bench)
        elif part == "operators":
            operators(bench)
        else:
            for case in bench.cases[part]:
                if bench.late():
                    bench.results["errors"][f"{part}/{case['name']}"] = "left out: no time"
                    continue
                if part == "models":
                    bench.guarded(
                        part,
                        case["name"],
                        lambda case=case: measure_model(bench, small(case) if bench.dry else case),
                    )
                else:
                    bench.guarded(part, case["name"], lambda case=case: measure_pair(bench, case))
                bench.save()
                print(f"{part}/{case['name']}: {brief(bench.results[part].get(case['name']))}", flush=True)


def brief(found: dict[str, Any] | None) -> str:
    """A result in a few words."""
    if found is None:
        return "failed"
    if "step" in found:
        return f"{found['step'] * 1e3:.1f} ms, {found['memory'].get('peak', 0) / 2**30:.2f} GiB"
    return f"bad {found['bad']['step'] * 1e3:.1f} ms, good {found['good']['step'] * 1e3:.1f} ms"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A process group of this one process."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def main(arguments: list[str]) -> int:
    """Measure; 0 where every part has something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument(
        "--parts",
        default=",".join(SHARES),
        help="with commas; in a process of its own, one can't bring down another",
    )
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")

    def stop(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(f"signal {number}")

    signal.signal(signal.SIGTERM, stop)
    stand_in()
    torch.manual_seed(0)
    bench = GpuBench(json.loads(options.cases.read_text()), options.out, options.seconds, options.dry)
    try:
        with alone():
            run(bench, parts)
    except KeyboardInterrupt as reason:
        bench.results["errors"]["stopped"] = str(reason) or "interrupted"
    bench.save()
    print(f"{options.out}: {bench.results['seconds']} s, {len(bench.results['errors'])} errors", flush=True)
    return 0 if all(bench.results[part] for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
