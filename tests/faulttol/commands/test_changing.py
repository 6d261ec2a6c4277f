"""`python -m faulttol diff`, `reshard`, `prune`, `export`, `import` and `grow`, on checkpoints that really were saved."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.errors import USER_ERROR_EXIT
from faulttol import cli
from faulttol.checkpoint import retention
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.folder import CheckpointCommit, CheckpointFolder, folder_of
from faulttol.checkpoint.hashes import CheckpointSource, coverage_error_in, tensor_hashes
from faulttol.checkpoint.load import Restored
from faulttol.checkpoint.manifest import Tensor
from faulttol.checkpoint.pieces import BLOCK, DTYPES
from faulttol.checkpoint.store import CheckpointStore
from faulttol.commands import handlers
from faulttol.commands.dtype_values import numbers
from faulttol.commands.reshard import AXES, parse_layout, placed
from tests.faulttol.ranks import save_all

torch = pytest.importorskip("torch")
from tests.faulttol.commands.commanded import Ask, damage_two, files, flip, newest, save, tensors  # noqa: E402
from tests.faulttol.tensors import blank, equal, layout, restore_layout  # noqa: E402

pytestmark = [pytest.mark.dist, pytest.mark.timeout(60)]


# ---- diff ----


def test_equal_states_in_other_files_are_the_same(root: Path, ask: Ask) -> None:
    code, out, _ = ask("diff", root / folder_of(10), root / folder_of(20))
    assert code == 0 and "bitwise equal" in out and re.search(r"facts: 1\n +world +2 +3\n", out)
    data = json.loads(ask("diff", root, root, "--json")[1])
    assert data["same"] and data["by_digest"] == data["equal"] == len(tensors())
    assert data["read"] < 100_000  # indexes alone


@pytest.mark.parametrize("kind", ["rows", "flat"])
def test_diff_names_each_tensor_and_how_far_it_is(root: Path, tmp_path: Path, ask: Ask, kind: str) -> None:
    """Cut as the other, where digests tell most, and otherwise, where all is read."""
    values = tensors()
    values["blocks.1.feed.experts.up"][3, 2, 1] += 2.5
    values["blocks.1.feed.experts.up"][7, 63, 1099] -= 0.5
    values["embedding"][699, 998] = float("nan")
    values["steps"] = values["steps"].to(torch.int64)
    values["new"] = torch.zeros(3)
    del values["blocks.0.norm"]
    save(tmp_path / "b", 10, values, 2, kind)
    code, out, _ = ask("diff", root / folder_of(10), tmp_path / "b", "--json")
    data = json.loads(out)
    assert code == 1 and not data["same"]
    assert (data["only_first"], data["only_second"]) == (["blocks.0.norm"], ["new"])
    assert data["shapes"] == {"steps": ["float32[]", "int64[]"]}
    change, other = data["values"]
    assert (change["name"], change["differ"], change["largest"]) == ("blocks.1.feed.experts.up", 2, 2.5)
    assert (change["elements"], change["not_numbers"]) == (8 * 64 * 1100, 0)
    assert (other["name"], other["differ"], other["largest"], other["not_numbers"]) == ("embedding", 1, 0, 1)
    assert data["equal"] == len(tensors()) - 4
    if kind == "rows":  # 2 blocks of one tensor and 1 of the other, in both checkpoints
        assert data["by_digest"] == data["equal"] and data["read"] < 7 * BLOCK
    _, out, _ = ask("diff", root / folder_of(10), tmp_path / "b")
    for text in ("only in the first: 1", "only in the second: 1", "with other values: 2", "float32[]"):
        assert text in out


def test_diff_stops_at_damage(root: Path, ask: Ask) -> None:
    damage_two(root)
    code, _, err = ask("diff", root / folder_of(10), root / folder_of(20))
    assert code == 1 and "differs from what was saved in" in err


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_those_of_torch(dtype: str) -> None:
    item = DTYPES[dtype][1]
    raw = (
        bytes(range(256))
        if item == 1
        else torch.randint(0, 256, (4096,), dtype=torch.uint8).numpy().tobytes()
    )
    raw = bytes(byte & 1 for byte in raw) if dtype == "bool" else raw
    tensor = torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype))
    wide = torch.complex128 if dtype == "complex64" else torch.float64
    expected = tensor.to(wide)
    np = pytest.importorskip("numpy")
    found = torch.from_numpy(numbers(np.frombuffer(raw, f"u{item}"), dtype))
    assert torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_commit_whose_answer_was_lost_keeps_its_files(
    root: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The manifest may be there for all that is known: without its files it would be a wrong newest."""
    create, read, lost = CheckpointStore.create, CheckpointStore.read, []

    def broken(self: CheckpointStore, name: str, chunks: Any) -> int:
        create(self, name, chunks)
        lost.append(name)
        raise ConnectionError("the answer was lost")

    def unreachable(self: CheckpointStore, name: str) -> bytes:
        if name in lost:
            raise ConnectionError("still away")
        return read(self, name)

    with monkeypatch.context() as broken_store:
        broken_store.setattr(CheckpointStore, "create", broken)
        broken_store.setattr(CheckpointStore, "read", unreachable)
        code, _, err = ask("reshard", root, "--out", tmp_path / "cut", "--files", 2)
    assert code == 1 and "may be written or not" in err
    code, out, _ = ask("verify", tmp_path / "cut")
    assert code == 0 and "is whole" in out


# ---- reshard ----


@pytest.mark.parametrize("how", ["--files=1", "--files=5", "--layout=pp=2,dp=2,tp=2,ep=4"])
def test_reshard_keeps_every_bit(root: Path, tmp_path: Path, ask: Ask, how: str) -> None:
    out = tmp_path / "out"
    estimate = json.loads(ask("reshard", root, "--out", out, how, "--dry-run", "--json")[1])
    assert not out.exists()
    code, text, _ = ask("reshard", root, "--out", out, how, "--check", "--json")
    data = json.loads(text)
    assert code == 0 and data["equal"] == len(tensors())
    assert tensor_hashes(*newest(out)) == tensor_hashes(*newest(root))
    assert (estimate["bytes_read"], estimate["bytes_written"]) == (data["read"], data["bytes"])
    assert data["bytes"] == sum(p.stat().st_size for p in out.glob("*/*.safetensors"))
    values = sum(t.numel() * t.element_size() for t in tensors().values())
    assert 0 < estimate["bytes_moved"] <= values
    manifest = CheckpointSource(*newest(out)).manifest
    assert (manifest.run, manifest.attempt, manifest.step) == ("run-1", 1, 20)
    assert manifest.facts["world"] == 3 and manifest.facts["lineage"][-1]["how"] == "reshard"
    assert ask("verify", out)[0] == 0
    parts = layout(tensors(), 4, 8, "rows")
    there = blank(parts)
    assert all(isinstance(a, Restored) for a in restore_layout(out, there)) and equal(there, parts)


@pytest.mark.parametrize(
    "words", ["reshard --files 2", "export", "export --to dcp", "grow --layers 4", "import --from hf"]
)
def test_an_out_that_cannot_be_a_folder_is_a_mistake_of_what_was_typed(
    words: str, root: Path, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "shut").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "shut" and allowed(path, mode))
    for out, why in (
        ("", "--out is empty; name a folder"),
        (tmp_path / "file", "is a file; name a folder"),
        (tmp_path / "file" / "below", f"{tmp_path / 'file'} is a file"),
        (tmp_path / "shut" / "below", f"{tmp_path / 'shut'} can't be written"),
        (tmp_path / ("x" * 300), "File name too long"),
        ("nope://x", "--out='nope://x' can't be used"),
    ):
        command, *rest = words.split()
        code, text, err = ask(command, root, "--out", out, *rest)
        assert (code, text, err.count("\n")) == (USER_ERROR_EXIT, "", 1) and why in err, err
    assert files(tmp_path / "shut") == {}


def test_reshard_refuses_and_leaves_nothing(root: Path, tmp_path: Path, ask: Ask) -> None:
    out = tmp_path / "out"
    assert ask("reshard", root, "--out", out, "--files", 2)[0] == 0
    before = files(out)
    for words, why in (
        (("--out", out, "--files", 2), "has step 20 of run run-1 already"),
        (("--out", f"{root}/", "--files", 2), "is the folder of the checkpoint itself"),
        (("--out", out), "one of the arguments --files --layout is required"),
        (("--out", out, "--layout", "pp=2,xp=2"), "no axis 'xp'; the axes are pp, dp"),
        (("--out", out, "--layout", "pp=0"), "pp=0 is not a whole number above 0"),
        (("--out", out, "--layout", "dp=2,ep=4"), "ep*etp=4 doesn't divide dp*cp*tp=2"),
    ):
        code, _, err = ask("reshard", root, *words)
        assert code == USER_ERROR_EXIT and why in err and err.count("\n") == 1, err
    assert files(out) == before
    save_all(tmp_path / "other", 3, run="run-2")
    code, _, err = ask("reshard", root, "--out", tmp_path / "other", "--files", 2)
    assert code == USER_ERROR_EXIT and "belongs to run run-2" in err
    damage_two(root)
    code, _, err = ask("reshard", root, "--out", tmp_path / "third", "--files", 3)
    assert code == 1 and "differs from what was saved in" in err
    assert files(tmp_path / "third") == {}


def test_commands_work_on_s3(s3: str, tmp_path: Path, ask: Ask) -> None:
    for step in (1, 2):
        save_all(s3, step)
    assert ask("verify", s3, "--all")[0] == 0
    assert ask("reshard", s3, "--out", "s3://runs/cut", "--files", 3, "--check")[0] == 0
    assert ask("reshard", "s3://runs/cut/step-0000000002", "--out", tmp_path / "here", "--files", 1)[0] == 0
    assert ask("diff", s3, tmp_path / "here")[0] == 0
    assert ask("prune", s3, "--keep", 1)[0] == 0
    data = json.loads(ask("inspect", s3, "--json")[1])
    assert [one["step"] for one in data["checkpoints"]] == [2]


def test_placing_follows_the_layout() -> None:
    """Layers by stage, experts by group, large tensors evenly, small ones where there is room; all of it once."""
    names = {
        **{f"blocks.{i}.feed.experts.up": (8, 512, 1024) for i in range(4)},
        **{f"blocks.{i}.feed.experts.up/exp_avg": (8, 512, 1024) for i in range(4)},
        **{f"blocks.{i}.norm": (1024,) for i in range(4)},
        "embedding": (6000, 1024), "step": (), "none": (0, 4), "odd": (3, 5_000_000),
    }  # fmt: skip
    names |= {f"small_{i}": (40_000,) for i in range(40)}
    tensors = {name: Tensor("float32", shape, ((0, 0),)) for name, shape in names.items()}
    files = placed(tensors, parse_layout("pp=2,dp=2,tp=2,ep=2"))
    assert len(files) == 8
    boxes: dict[str, list[Box]] = {}
    for rank, rows in enumerate(files):
        for name, _, box in rows:
            boxes.setdefault(name, []).append(box)
            if name.startswith("blocks."):
                assert int(name.split(".")[1]) // 2 == rank // 4
            if "experts" in name:
                assert box.start[0] // 4 == (box.start[0] + box.shape[0] - 1) // 4 == rank % 2
    assert boxes.keys() == tensors.keys()
    assert all(coverage_error_in(Box.full(t.shape), boxes[name]) is None for name, t in tensors.items())
    loads = [sum(box.elements for _, _, box in rows) for rows in files]
    assert max(loads) < 1.02 * min(loads)
    assert parse_layout("pp=2") == {**dict.fromkeys(AXES, 1), "pp": 2}


def test_a_checkpoint_stays_until_it_was_compared(
    tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run saves and removes meanwhile, and what `--check` reads once more must still be there."""
    save_all(tmp_path / "run", 1)
    hashes = handlers.tensor_hashes

    def later(store: CheckpointStore, commit: CheckpointCommit, bar: Any) -> dict[str, str]:
        if store.url == str(tmp_path / "run"):
            for step in (2, 3, 4):
                save_all(tmp_path / "run", step, keep=1)
        return hashes(store, commit, bar)

    monkeypatch.setattr(handlers, "tensor_hashes", later)
    code, out, err = ask("reshard", tmp_path / "run", "--out", tmp_path / "out", "--files", 2, "--check")
    assert (code, err) == (0, "") and "the hashes of all 4 tensors are equal" in out
    save_all(tmp_path / "run", 5, keep=1)
    assert [commit.step for commit in CheckpointFolder(CheckpointStore(str(tmp_path / "run"))).commits] == [5]


# ---- prune ----


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Steps 10 to 50 of two ranks, and files of a save at step 25 that was interrupted."""
    root = tmp_path / "many"
    for step in range(10, 60, 10):
        save_all(root, step, keep=9)
    left = root / folder_of(25)
    left.mkdir()
    (left / "run-1.a0001.r00000.1234abcd.safetensors").touch()
    return root


def _steps(root: Path) -> list[int]:
    return [commit.step for commit in CheckpointFolder(CheckpointStore(str(root))).commits]


def test_prune_keeps_what_the_retention_says(many: Path, ask: Ask) -> None:
    before = files(many)
    _, out, _ = ask("prune", many, "--keep", 1, "--keep-every", 20, "--dry-run")
    assert "2 would go" in out and "3 stay" in out and files(many) == before
    data = json.loads(ask("prune", many, "--keep", 1, "--keep-every", 20, "--json")[1])
    assert [one["step"] for one in data["gone"]] == [10, 30] and _steps(many) == [20, 40, 50]
    assert all(one["bytes"] > 0 and "older than" in one["why"] for one in data["gone"])
    assert not (many / folder_of(10)).exists() and (many / folder_of(25)).exists()
    now = many / folder_of(60) / "run-1.a0001.r00000.1234abcd.safetensors"  # being written
    now.parent.mkdir()
    now.touch()
    _, out, _ = ask("prune", many, "--keep", 2, "--interrupted")
    assert now.exists()
    assert _steps(many) == [40, 50] and "never committed" in out
    assert not list((many / folder_of(25)).glob("*"))
    assert "0 would go" in ask("prune", many, "--keep", 2)[1]


def test_prune_takes_the_retention_of_the_run(many: Path, tmp_path: Path, ask: Ask) -> None:
    run = tmp_path / "home" / "runs" / "tiny-1"
    shutil.copytree(many, run / "checkpoints")
    (run / "events.jsonl").touch()
    (run / "config.yaml").write_text("checkpoint: {keep: 3}\n")
    assert ask("prune", "tiny")[0] == 0
    assert _steps(run / "checkpoints") == [30, 40, 50]


def test_prune_removes_steps_and_keeps_pins(many: Path, ask: Ask) -> None:
    assert ask("prune", many, "--pin", "best", "--step", 10)[0] == 0
    assert ask("prune", many / folder_of(20), "--pin", "second")[0] == 0
    assert ask("prune", many, "--pin", "last")[0] == 0
    assert retention.pins(CheckpointStore(str(many))) == {
        CheckpointCommit(1, step, "run-1"): [name]
        for step, name in ((10, "best"), (20, "second"), (50, "last"))
    }
    code, _, err = ask("prune", many, "--steps", "10,30")
    assert code == USER_ERROR_EXIT and "pinned as best: type --unpin best --step 10" in err
    assert ask("prune", many, "--unpin", "best", "--step", 10)[0] == 0
    assert ask("prune", many, "--steps", "10,30")[0] == 0
    assert _steps(many) == [20, 40, 50]
    assert ask("prune", many, "--keep", 1)[0] == 0
    assert _steps(many) == [20, 50]


def test_prune_never_removes_the_only_whole_one(many: Path, ask: Ask) -> None:
    for step in (40, 50):
        next((many / folder_of(step)).glob("*.r00001.*")).unlink()
    ask("prune", many, "--keep", 1)
    assert _steps(many) == [30, 40, 50]
    data = json.loads(ask("prune", many, "--steps", "30,40,50", "--json")[1])
    assert [one["step"] for one in data["spared"]] == [30] and _steps(many) == [30]


def test_prune_counts_no_checkpoint_that_is_damaged_inside(many: Path, ask: Ask) -> None:
    flip(next((many / folder_of(50)).glob("*.r00001.*")), 4100)
    _, out, _ = ask("prune", many, "--keep", 1, "--verify")
    assert _steps(many) == [40, 50] and "step 50, attempt 1 is damaged" in out


def test_prune_asks_at_a_terminal(many: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    from faulttol.commands import handlers

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for answer, steps in (("\n", [10, 20, 30, 40, 50]), ("", [10, 20, 30, 40, 50]), ("y\n", [40, 50])):
        screen = Terminal()
        monkeypatch.setattr(handlers.sys, "stdin", Terminal(answer))
        monkeypatch.setattr(handlers.sys, "stdout", screen)
        code = cli.main(["prune", str(many), "--keep", "2"])
        assert _steps(many) == steps and code == (0 if "y" in answer else 1)
        assert "older than the newest 2" in screen.getvalue()


def test_prune_refuses(many: Path, ask: Ask) -> None:
    for words, why in (
        ((), "no retention is configured"),
        (("--steps", "7"), "no such step is committed; there are 10, 20, 30, 40, 50"),
        (("--steps", "1,x"), "'x' is not a step"),
        (("--steps", ","), "--steps is empty"),
        (("--keep", "0"), "'0' is not a whole number above 0"),
        (("--step", "10"), "neither --pin nor --unpin"),
        (("--pin", "a/b"), "can't be pinned as 'a/b'"),
        (("--unpin", "nothing"), "isn't pinned as 'nothing'"),
    ):
        code, _, err = ask("prune", many, *words)
        assert code == USER_ERROR_EXIT and why in err and err.count("\n") == 1, err
    assert _steps(many) == [10, 20, 30, 40, 50]


# ---- export, import, grow ----


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A small Mixtral after seven steps."""
    from configs.model import ModelConfig, RouterConfig
    from faulttol.convert.families import tensors
    from tests.faulttol.convert import converted

    model = ModelConfig(
        name="mixtral", layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, vocab=96, experts=4, top_k=2,
        expert_width=40, rope_theta=1e6, norm_eps=1e-5, window=7, router=RouterConfig(balance="none"),
    )  # fmt: skip
    torch.manual_seed(1)
    weights = {one.name: torch.randn(one.box.whole) for one in tensors(model)}
    converted.commit(tmp_path / "trained", converted.trained(model, weights), converted.told(model))
    return tmp_path / "trained"


def _dry(ask: Ask, *words: object) -> dict[str, Any]:
    """What a dry run tells; it writes nothing."""
    code, out, err = ask(*words, "--dry-run", "--json")
    assert code == 0, err
    assert not Path(str(words[words.index("--out") + 1])).exists()
    code, text, _ = ask(*words, "--dry-run")
    assert code == 0 and "would write" in text and "peak memory" in text
    return dict(json.loads(out))


def test_weights_go_to_hugging_face_and_come_back(trained: Path, tmp_path: Path, ask: Ask) -> None:
    words = ("export", trained, "--out", tmp_path / "hf", "--dtype", "fp32", "--shard-size", "20K")
    estimate = _dry(ask, *words)
    code, out, _ = ask(*words)
    assert code == 0 and "note: the optimizer's state stays behind" in out
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3 and sum(f.stat().st_size for f in files) == estimate["bytes_written"]
    words = ("import", tmp_path / "hf", "--from", "hf", "--out", tmp_path / "back", "--run", "again")
    assert _dry(ask, *words)["bytes_read"] > 0
    assert ask(*words)[0] == 0
    before, after = tensor_hashes(*newest(trained)), tensor_hashes(*newest(tmp_path / "back"))
    parameters = [name for name in before if "/" not in name]
    assert all(before[name] == after[name] for name in parameters)
    manifest = CheckpointSource(*newest(tmp_path / "back")).manifest
    assert (manifest.run, manifest.step) == ("again", 0)
    code, _, err = ask(*words[:-3], tmp_path / "y", "--names", "x.json")
    assert code == USER_ERROR_EXIT and "--names=x.json is for dcp" in err


def test_an_import_takes_the_optimizer_that_goes_on(trained: Path, tmp_path: Path, ask: Ask) -> None:
    assert ask("export", trained, "--out", tmp_path / "hf")[0] == 0
    words = ("import", tmp_path / "hf", "--from", "hf", "--out", tmp_path / "muon", "optim.kind=muon")
    assert ask(*words)[0] == 0
    source = CheckpointSource(*newest(tmp_path / "muon"))
    assert any(name.endswith("/momentum") for name in source.tensors)
    assert source.manifest.facts["fingerprint"]["optim"]["kind"] == "muon"
    code, _, err = ask(*words[:-2], tmp_path / "x", "optim.kind=muom")
    assert code == USER_ERROR_EXIT and "did you mean 'muon'" in err
    code, _, err = ask(*words[:-2], tmp_path / "x", "muon")
    assert code == USER_ERROR_EXIT and "'muon'" in err


def test_all_of_a_checkpoint_goes_to_dcp_and_comes_back(trained: Path, tmp_path: Path, ask: Ask) -> None:
    words = ("export", trained, "--to", "dcp", "--out", tmp_path / "dcp")
    _dry(ask, *words)
    code, _, err = ask(*words)
    assert code == 0, err
    words = ("import", tmp_path / "dcp", "--from", "dcp", "--out", tmp_path / "back", "--run", "run-1")
    code, _, err = ask(*words)
    assert code == USER_ERROR_EXIT and "--trust" in err and err.count("\n") == 1
    assert ask(*words, "--trust")[0] == 0
    code, out, _ = ask("diff", trained, tmp_path / "back", "--json")
    assert code == 0 and json.loads(out)["equal"] == len(CheckpointSource(*newest(trained)).tensors)


def test_what_is_no_checkpoint_of_deepspeed_is_told(tmp_path: Path, ask: Ask) -> None:
    (tmp_path / "ds").mkdir()
    words = ("import", tmp_path / "ds", "--from", "deepspeed", "--out", tmp_path / "out")
    for more in ((), ("--tag", "global_step7"), ("--step", 7)):
        code, _, err = ask(*words, *more)
        assert code == USER_ERROR_EXIT and err.count("\n") == 1 and ("ds" in err or "--step" in err)


def test_a_model_grows_in_depth(trained: Path, tmp_path: Path, ask: Ask) -> None:
    words = ("grow", trained, "--layers", 4, "--out", tmp_path / "deep", "--optimizer", "copy")
    _dry(ask, *words)
    code, _, err = ask(*words)
    assert code == 0, err
    before, after = tensor_hashes(*newest(trained)), tensor_hashes(*newest(tmp_path / "deep"))
    assert len(after) > len(before) and all(
        after[name.replace("blocks.0", "blocks.2")] == value == after[name]
        for name, value in before.items()
        if name.startswith("blocks.0.")
    )
    manifest = CheckpointSource(*newest(tmp_path / "deep")).manifest
    assert manifest.run == "run-1-4-layers" and manifest.step == 7
    assert "lineage: how grow" in ask("inspect", tmp_path / "deep")[1]
    code, _, err = ask("grow", trained, "--layers", 3, "--out", tmp_path / "x")
    assert code == USER_ERROR_EXIT and err.count("\n") == 1
