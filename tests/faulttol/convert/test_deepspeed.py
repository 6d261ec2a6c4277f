"""Checkpoints that plain DeepSpeed wrote: every master and moment is where it belongs, experts by their place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from faulttol.checkpoint.store import CheckpointStore
from faulttol.convert import pickles
from faulttol.convert.names import load
from faulttol.convert.zero import import_zero
from tests.faulttol.convert import deepspeed_ranks as ranks
from tests.faulttol.convert.converted import read
from tests.trainer.parallel.rank_pool import RankPool

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    started = RankPool()
    yield started
    started.end()


Made = tuple[Path, dict[str, np.ndarray]]


def made(pool: RankPool, folder: Path, stage: int, precision: str, dense: bool = False) -> Made:
    """A checkpoint's folder, and the live state of all ranks when it was saved."""
    world = 2 if dense else 4
    state: dict[str, np.ndarray] = {}
    for mine in pool.run(world, ranks.train, str(folder), stage, precision, dense):
        for name, values in mine.items():
            if name in state:  # ranks that share a parameter agree on it
                assert np.array_equal(state[name], values), name
            state[name] = values
    return folder, state


@pytest.fixture(scope="module")
def checkpoint(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Of ZeRO 2 in fp32: four ranks in two expert groups, so that experts are split over two ranks each."""
    return made(pool, tmp_path_factory.mktemp("two"), 2, "fp32")


def _assert_state(root: Path, state: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    found, _ = read(root)
    rest = {name: tensor for name, tensor in found.items() if name not in state}
    assert sorted(rest) == sorted(set(found) - set(state))
    for name, values in state.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], torch.from_numpy(values)), name
    return rest


def test_masters_and_moments_of_zero_2_are_read(checkpoint: Made, tmp_path: Path) -> None:
    folder, state = checkpoint
    assert sum("deepspeed_experts." in name and "/" not in name for name in state) == 3 * ranks.EXPERTS
    job = import_zero(folder, CheckpointStore(str(tmp_path)), "ours")
    done = job.run()
    rest = _assert_state(tmp_path, state)
    assert rest["optimizer/step"].item() == 3 and rest["seen"].tolist() == [0, 1, 2] and len(rest) == 2
    assert done.bytes_read == job.estimate.bytes_read == sum(v.nbytes for v in state.values()) + 4 + 24
    _, source = read(tmp_path)
    assert (source.manifest.step, source.manifest.facts["lineage"][0]["format"]) == (3, "deepspeed")


def test_zero_1_in_bf16_keeps_its_masters(pool: RankPool, tmp_path: Path) -> None:
    folder, state = made(pool, tmp_path / "theirs", 1, "bf16")
    import_zero(folder, CheckpointStore(str(tmp_path / "ours")), "ours").run()
    assert any((v != torch.from_numpy(v).bfloat16().float().numpy()).any() for v in state.values())
    assert _assert_state(tmp_path / "ours", state)["optimizer/step"].item() == 3


def test_a_universal_folder_is_read(pool: RankPool, tmp_path: Path) -> None:
    folder, state = made(pool, tmp_path / "theirs", 2, "fp32", dense=True)
    pool.run(1, ranks.universal, str(folder), str(tmp_path / "universal"))
    done = import_zero(tmp_path / "universal", CheckpointStore(str(tmp_path / "ours")), "ours").run()
    rest = _assert_state(tmp_path / "ours", state)
    assert rest["optimizer/step"].item() == 3 and done.tensors == len(state) + len(rest)


def test_experts_are_stacked_by_a_map(checkpoint: Made, tmp_path: Path) -> None:
    folder, state = checkpoint
    prefix = "moe.deepspeed_moe.experts.deepspeed_experts"
    rules = [
        {"from": r"moe\..*\.deepspeed_experts\.(\d+)\.(up|down)\.weight", "to": "experts.{2}", "at": ["{1}"]},
        {"from": r"moe\..*\.deepspeed_experts\..*", "to": None},
        {"from": "seen", "to": None},
        {"from": "(.*)", "to": "{1}"},
    ]
    (tmp_path / "map.json").write_text(json.dumps({"rules": rules}))
    import_zero(folder, CheckpointStore(str(tmp_path / "ours")), "ours", load(tmp_path / "map.json")).run()
    found, _ = read(tmp_path / "ours")
    for part in ("up", "down"):
        for slot in ("", "/exp_avg", "/exp_avg_sq"):
            whole = np.stack([state[f"{prefix}.{e}.{part}.weight{slot}"] for e in range(ranks.EXPERTS)])
            assert torch.equal(found[f"experts.{part}{slot}"], torch.from_numpy(whole)), (part, slot)
    assert (
        not any("deepspeed_experts" in name for name in found)
        and "seen" not in found
        and "optimizer/step" in found
    )


def _drop(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _swap_ranks(folder: Path) -> None:
    one, two = (folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (2, 3))
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def _another_step(folder: Path) -> None:
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = torch.load(path, weights_only=False)
    for slots in state["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        slots["step"] = torch.tensor(2.0)
    torch.save(state, path)


def _pickle(folder: Path) -> None:
    path = folder / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    torch.save(state | {"args": Path("x")}, path)


def _torn(folder: Path) -> None:
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-3000])


def _twice(folder: Path) -> None:
    """As where a run was saved again under another precision into the same tag."""
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(folder / name, folder / f"bf16_{name}")


def _pipeline(folder: Path) -> None:
    """A `PipelineModule` has its layers in files of their own, and no module beside them."""
    path = folder / "mp_rank_00_model_states.pt"
    torch.save(torch.load(path, weights_only=False) | {"module": None}, path)


def _older(folder: Path) -> None:
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    state = torch.load(path, weights_only=False)
    del state["optimizer_state_dict"]["param_slice_mappings"]
    torch.save(state, path)


DAMAGE: dict[str, tuple[Any, str]] = {
    "a rank": (_drop("zero_pp_rank_1_mp_rank_00_optim_states.pt"), "no optimizer state of rank 1"),
    "the last rank": (_drop("zero_pp_rank_3_mp_rank_00_optim_states.pt"), "optimizer state of 3 ranks of 4"),
    "an expert": (_drop("layer_0_expert_1_mp_rank_00_model_states.pt"), "no file of expert 1 of MoE layer 0"),
    "the last expert": (
        _drop("layer_0_expert_3_mp_rank_00_model_states.pt"), r"no file of the model has moe\..*deepspeed_experts\.3",
    ),
    "the model": (_drop("mp_rank_00_model_states.pt"), "holds no mp_rank_00_model_states.pt"),
    "ranks that changed places": (_swap_ranks, "isn't that of the model's weights"),
    "a rank's file twice": (_twice, r"optimizer state of rank 1 twice.*remove one of them"),
    "a pipeline": (_pipeline, "is of a pipeline.*make a universal folder"),
    "an older version": (_older, "has no param_slice_mappings, which DeepSpeed 0.19 writes"),
    "two steps": (_another_step, r"count different steps \(\[2, 3\]\)"),
    "a pickle": (_pickle, r"mp_rank_00_model_states.pt with pathlib.*is a pickle.*type --trust"),
    "a torn file": (_torn, "zero_pp_rank_0_mp_rank_00_optim_states.pt is not a file of torch.save"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_not_whole_is_refused(what: str, checkpoint: Made, tmp_path: Path) -> None:
    act, told = DAMAGE[what]
    shutil.copytree(checkpoint[0], tmp_path / "theirs")
    act(tmp_path / "theirs" / ranks.TAG)
    with pytest.raises(UserError, match=told):
        import_zero(tmp_path / "theirs", CheckpointStore(str(tmp_path / "ours")), "ours")
    if what == "a pickle":
        import_zero(tmp_path / "theirs", CheckpointStore(str(tmp_path / "ours")), "ours", trust=True)


class _ByName:
    """Pickled as Python before 3.11.4 pickles a member of an enumeration."""

    def __init__(self, kind: type, name: str) -> None:
        self._given = kind, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self._given


def test_a_member_that_is_pickled_by_its_name_is_not_looked_up(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    path = tmp_path / "a.pt"
    torch.save({"zero_stage": _ByName(ZeroStageEnum, "gradients")}, path)
    (found,) = pickles.load(path, trust=False).values()
    assert type(found) is pickles._Stub and found.given[1] == "gradients"
    torch.save({"x": _ByName(Path, "home")}, path)
    with pytest.raises(UserError, match=r"a.pt with pathlib.Path is a pickle.*type --trust"):
        pickles.load(path, trust=False)


def test_other_kinds_of_folders_are_told(checkpoint: Made, tmp_path: Path) -> None:
    out, theirs = CheckpointStore(str(tmp_path / "ours")), tmp_path / "theirs"
    with pytest.raises(UserError, match="nothing isn't there"):
        import_zero(checkpoint[0], out, "ours", tag="nothing")
    shutil.copytree(checkpoint[0] / ranks.TAG, theirs)
    assert import_zero(theirs, out, "ours").estimate == import_zero(checkpoint[0], out, "ours").estimate
    (theirs / "mp_rank_01_model_states.pt").touch()
    with pytest.raises(UserError, match="split over 2 tensor-parallel ranks"):
        import_zero(theirs, out, "ours")
    (theirs / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    with pytest.raises(UserError, match="is of ZeRO 3"):
        import_zero(theirs, out, "ours")
    for path in theirs.glob("*zero*"):
        path.unlink()
    (theirs / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(UserError, match="no optimizer states of ZeRO"):
        import_zero(theirs, out, "ours")
    (tmp_path / "universal/zero/w").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has no fp32\.pt"):
        import_zero(tmp_path / "universal", out, "ours")
