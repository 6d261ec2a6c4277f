"""How good the run forecast is on real logs: the end forecast early on, the band's coverage, alarms.

python -m tests.trainer.sizing.bench_forecast RUN_FOLDER...

Each folder is that of a finished run. The divergence is made from its own log: from 70 % on the loss rises by 0.4 % a step.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import numpy as np

from configs.compose import load
from configs.paths import RunPaths
from trainer.sizing.forecast import CONFIDENCE, END, StepHistory, detect_alarm, forecast, read_history

SHARES = (0.4, 0.6, 0.8)


def diverging(history: StepHistory, share: float = 0.7, each: float = 0.004) -> StepHistory:
    """The same run with a loss that rises from a step on."""
    begin = int(share * len(history.loss))
    rise = np.maximum(0.0, np.arange(len(history.loss)) - begin) * each
    return StepHistory(history.steps, history.tokens, history.loss * (1 + rise))


def main(folders: list[str]) -> int:
    """Print a line for each run and share, and the sums."""
    misses: dict[float, list[float]] = {share: [] for share in SHARES}
    inside: dict[float, list[bool]] = {share: [] for share in SHARES}
    alarms = caught = 0
    for folder in folders:
        run = RunPaths(Path(folder))
        config, history = load(run.config), read_history(run)
        end, warmup = config.train.steps, config.optim.warmup_steps
        real = float(history.after(end * (1 - END)).loss.mean())
        parts = []
        for share in SHARES:
            final = forecast(history.until(share * end), warmup, end).final
            misses[share].append(final.value - real)
            inside[share].append(final.low <= real <= final.high)
            parts.append(f"{share:.0%}: {final.value:.3f} ({final.low:.3f} to {final.high:.3f})")
        healthy, broken = detect_alarm(history, warmup, end), detect_alarm(diverging(history), warmup, end)
        alarms, caught = alarms + (healthy is not None), caught + (broken is not None)
        after = f"alarm {(broken.step - 0.7 * end):+.0f} steps after it began" if broken else "no alarm"
        print(
            f"{run.root.name}: end {real:.3f}; {'; '.join(parts)}; healthy: {healthy or 'no alarm'}; diverging: {after}"
        )
    for share in SHARES:
        error = statistics.mean(map(abs, misses[share]))
        print(
            f"at {share:.0%}: mean miss {error:.3f} nats, bias {statistics.mean(misses[share]):+.3f}; "
            f"{sum(inside[share])} of {len(folders)} within the {CONFIDENCE:.0%} band"
        )
    print(f"false alarms {alarms} of {len(folders)}; divergences caught {caught} of {len(folders)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
