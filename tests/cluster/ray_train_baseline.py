"""The trainer's ranks under Ray Train, as its documentation has it: a worker each, all restarted when one fails.

    python -m tests.cluster.ray_train_baseline CONFIG RUN_FOLDER RANKS GPUS

Needs `pip install 'ray[train]'`. Each worker writes its process id to `RUN_FOLDER/pid-RANK`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from configs.rank import free_port


def work(order: dict[str, Any]) -> None:
    """One worker: the same program with the same configuration."""
    import ray.train

    from configs.compose import load
    from configs.paths import RunPaths
    from configs.rank import RankContext
    from trainer.loop import main

    context, root = ray.train.get_context(), Path(order["run"])
    number = context.get_world_rank()
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        # Ray shows a worker its own GPU alone; the program picks its own of all, as under torchrun.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(context.get_local_world_size())))
    (root / f"pid-{number}").write_text(str(os.getpid()))
    os.environ["OMP_NUM_THREADS"] = order["threads"]
    rank = RankContext(
        rank=number, world=context.get_world_size(), local_rank=context.get_local_rank(),
        local_world=context.get_local_world_size(), master_addr="127.0.0.1", master_port=order["port"],
        run=RunPaths(root), attempt=1,
    )  # fmt: skip
    main(load(Path(order["config"])), rank)


def run(config: str, folder: str, ranks: int, gpus: int) -> None:
    """Train to the end, from the newest checkpoint after each failure."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    port = free_port()
    ray.init(num_cpus=ranks + 1, num_gpus=gpus, include_dashboard=False, object_store_memory=100_000_000)
    order = {"config": config, "run": folder, "port": port, "threads": os.environ["OMP_NUM_THREADS"]}
    DataParallelTrainer(
        work,
        train_loop_config=order,
        scaling_config=ScalingConfig(num_workers=ranks, use_gpu=gpus > 0),
        run_config=RunConfig(storage_path=f"{folder}/ray", failure_config=FailureConfig(max_failures=9)),
    ).fit()


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
