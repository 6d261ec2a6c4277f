"""torch's distributed checkpoint: what goes out is loaded by torch, what torch saved comes in."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from configs.errors import UserError
from faulttol.checkpoint.manifest import Incomplete
from faulttol.checkpoint.store import CheckpointStore
from faulttol.convert import dcp as converting
from faulttol.convert import placed
from faulttol.convert.dcp import export_dcp, import_dcp
from faulttol.convert.names import load
from tests.faulttol.convert.converted import commit, read, same, told, trained
from tests.faulttol.tensors import state
from tests.trainer.families import family
from trainer.model.initial import build

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 bytes and files of 500, so that small tensors have many."""
    monkeypatch.setattr(converting, "MAX_READ", 64)
    monkeypatch.setattr(converting, "_FILE", 500)


def mixed() -> dict[str, Tensor]:
    return state(3) | {"blocks.9.wide": torch.randn(7, 5, 9)}


@pytest.mark.usefixtures("small_chunks")
def test_what_goes_out_is_loaded_by_torch_and_comes_back(tmp_path: Path) -> None:
    saved = mixed()
    commit(tmp_path / "run", saved, {"loss": 2.5, "lineage": [{"run": "before"}]}, kind="boxes")
    shown: list[tuple[int, int]] = []
    job = export_dcp(CheckpointStore(str(tmp_path / "run")), tmp_path / "out")
    done = job.run(lambda *progress: shown.append(progress))
    assert len(list((tmp_path / "out").glob("*.distcp"))) == 3
    found = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    dcp.load(found, checkpoint_id=tmp_path / "out", no_dist=True)
    same(found, saved)
    # Torch's own metadata describes what is there.
    described = dcp.FileSystemReader(tmp_path / "out").read_metadata().state_dict_metadata
    assert len(described["blocks.9.wide"].chunks) > 10
    total = sum(t.nbytes for t in saved.values())
    assert shown[-1] == (total, total) and done.tensors == len(saved)
    assert job.estimate.bytes_moved == job.estimate.bytes_written == total
    back = import_dcp(tmp_path / "out", CheckpointStore(str(tmp_path / "back")), "back", trust=True)
    did = back.run()
    again, source = read(tmp_path / "back")
    same(again, saved)
    assert did.bytes_read == back.estimate.bytes_read == total
    assert (source.manifest.step, source.manifest.facts["loss"]) == (7, 2.5)
    assert [entry.get("format", entry.get("run")) for entry in source.manifest.facts["lineage"]] == [
        "before",
        "dcp",
    ]


def test_what_torch_saved_is_taken_up_under_its_names(tmp_path: Path) -> None:
    saved = {
        "layer.weight": torch.randn(5, 4),
        "layer.bias": torch.randn(3).bfloat16(),
        "count": torch.tensor(3),
    }
    dcp.save({**saved, "epoch": 3, "note": "x"}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    done = import_dcp(
        tmp_path / "theirs", CheckpointStore(str(tmp_path / "run")), "run", trust=True, step=12
    ).run()
    found, source = read(tmp_path / "run")
    same(found, saved)
    assert source.manifest.step == 12 and source.manifest.facts["fingerprint"] == {}
    (note,) = done.notes
    assert "epoch" in note and "note" in note


def test_a_map_of_names_stacks_experts_and_training_wants_the_rest(tmp_path: Path) -> None:
    model = family("qwen3").model_copy(update={"layers": 1})
    ours = dict(build(model, 1).named_parameters())
    theirs = {}
    for name, tensor in ours.items():
        if name.endswith("gate_up"):
            for expert in range(model.experts):
                theirs |= {
                    f"net.experts.{expert}.{w}": tensor[expert, i].bfloat16()
                    for i, w in enumerate(("w1", "w3"))
                }
        else:
            theirs[f"net.{name}"] = tensor.detach().bfloat16()
    dcp.save({**theirs, "net.cache": torch.zeros(2)}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    rules = [
        {"from": r"net\.experts\.(\d+)\.w1", "to": "blocks.0.feed.experts.gate_up", "at": ["{1}", 0]},
        {"from": r"net\.experts\.(\d+)\.w3", "to": "blocks.0.feed.experts.gate_up", "at": ["{1}", 1]},
        {"from": r".*\.cache", "to": None},
        {"from": r"net\.(.*)", "to": "{1}"},
    ]
    (tmp_path / "map.json").write_text(json.dumps({"rules": rules}))
    done = import_dcp(
        tmp_path / "theirs", CheckpointStore(str(tmp_path / "run")), "run", True, load(tmp_path / "map.json"), None,
        (model, "muon", "bf16"),
    ).run()  # fmt: skip
    found, source = read(tmp_path / "run")
    same(
        {name: found[name] for name in ours},
        {name: t.detach().bfloat16().float() for name, t in ours.items()},
    )
    made = {name: t for name, t in found.items() if name not in ours}
    expected = trained(model, {name: t.detach() for name, t in ours.items()}, "muon")
    slots = {name: t for name, t in expected.items() if "/" in name}
    assert sorted(made) == sorted([*slots, "blocks.0.feed.router.bias"])
    assert {t.dtype for name, t in made.items() if "/" in name and name != "optimizer/step"} == {
        torch.bfloat16
    }
    assert not any(t.any() for t in made.values())
    assert source.manifest.facts["fingerprint"]["optim"] == {"kind": "muon", "moments": "bf16"}
    assert any("left out by the map of names: 1 " in note for note in done.notes)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_read_with_trust_alone(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/.metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "went off")))
    out = CheckpointStore(str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"\.metadata is a pickle.*type --trust"):
        import_dcp(tmp_path / "theirs", out, "run", trust=False)
    assert not (tmp_path / "went off").exists()
    with pytest.raises(UserError, match="can't be read"):
        import_dcp(tmp_path / "theirs", out, "run", trust=True)
    with pytest.raises(UserError, match=r"holds no \.metadata"):
        import_dcp(tmp_path, out, "run", trust=True)


def test_what_cannot_be_whole_is_refused(tmp_path: Path) -> None:
    commit(tmp_path / "run", mixed(), {})
    out = tmp_path / "out"
    export_dcp(CheckpointStore(str(tmp_path / "run")), out).run()
    with pytest.raises(UserError, match="isn't an empty folder"):
        export_dcp(CheckpointStore(str(tmp_path / "run")), out)
    (file,) = out.glob("*.distcp")
    torn = CheckpointStore(str(tmp_path / "torn"))
    job = import_dcp(out, torn, "torn", trust=True)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(UserError, match=rf"{file} has \d+ of at least \d+ bytes; complete the files"):
        import_dcp(out, torn, "torn", trust=True)
    with pytest.raises(UserError, match="can't be read"):  # it was whole when it was looked at
        job.run()
    file.rename(out / "elsewhere")
    with pytest.raises(UserError, match=f"{file} is missing; complete the files"):
        import_dcp(out, torn, "torn", trust=True)
    assert not list((tmp_path / "torn").glob("*/*manifest*"))
    (shard,) = (tmp_path / "run").glob("*/*r00001*.safetensors")
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(Incomplete, match="differs from what was saved"):
        export_dcp(CheckpointStore(str(tmp_path / "run")), tmp_path / "other").run()
    assert not (tmp_path / "other" / ".metadata").exists()


def test_chunks_that_miss_something_are_refused(tmp_path: Path) -> None:
    dcp.save({"w": torch.randn(6, 2)}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    metadata = dcp.FileSystemReader(tmp_path / "theirs").read_metadata()
    metadata.state_dict_metadata["w"].size = torch.Size([7, 2])
    (tmp_path / "theirs/.metadata").write_bytes(pickle.dumps(metadata))
    job = import_dcp(tmp_path / "theirs", CheckpointStore(str(tmp_path / "run")), "run", trust=True)
    with pytest.raises(UserError, match=r"12 of 14 elements of w\[0:7, 0:2\] have a source"):
        job.run()


def by_columns(root: Path, whole: Tensor, count: int) -> None:
    """A checkpoint of DCP whose one tensor `w` is spread by columns, as tensor parallelism does with a second matrix."""
    width = whole.shape[1] // count
    properties = TensorProperties(dtype=whole.dtype)

    class Planner(dcp.DefaultSavePlanner):
        def resolve_data(self, write_item: WriteItem) -> Tensor:
            return whole.narrow(1, write_item.index.offset[1], width).contiguous()  # type: ignore[index]

    boxes = [
        ChunkStorageMetadata(torch.Size([0, at * width]), torch.Size([len(whole), width]))
        for at in range(count)
    ]
    items = [
        WriteItem(
            MetadataIndex("w", box.offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(box, properties, whole.shape),
        )
        for box in boxes
    ]
    writer = dcp.FileSystemWriter(root)
    writer.set_up_storage_writer(True)
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(dcp.SavePlan(items))])
    written = writer.write_data(plan, Planner()).value()
    described = TensorStorageMetadata(properties, whole.shape, boxes)
    writer.finish(dcp.Metadata(state_dict_metadata={"w": described}), [written])


def test_columns_that_are_spread_over_chunks_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stretch of rows touches all chunks: read whole each time, a terabyte would be for one table of 4 GiB."""
    whole = torch.randn(60, 24)
    by_columns(tmp_path / "theirs", whole, 6)
    monkeypatch.setattr(placed, "MAX_READ", 24 * 4 * 5)
    job = import_dcp(tmp_path / "theirs", CheckpointStore(str(tmp_path / "run")), "run", trust=True)
    assert job.run().bytes_read == job.estimate.bytes_read == whole.nbytes
    same(read(tmp_path / "run")[0], {"w": whole})
    metadata = dcp.FileSystemReader(tmp_path / "theirs").read_metadata()
    metadata.storage_data.popitem()
    (tmp_path / "theirs/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"names no file of w at \[0, 20\]"):
        import_dcp(tmp_path / "theirs", CheckpointStore(str(tmp_path / "other")), "run", trust=True)


def test_chunks_with_strides_are_read_too(tmp_path: Path) -> None:
    saved = {"w": torch.randn(7, 5).t(), "narrow": torch.randn(4, 6)[:, 1:3], "none": torch.zeros(0, 3)}
    dcp.save(saved, checkpoint_id=tmp_path / "theirs", no_dist=True)
    import_dcp(tmp_path / "theirs", CheckpointStore(str(tmp_path / "run")), "run", trust=True).run()
    same(read(tmp_path / "run")[0], saved)


def test_facts_of_training_come_back(tmp_path: Path) -> None:
    model = family("olmoe").model_copy(update={"layers": 1})
    saved = trained(model, {"embedding.weight": torch.randn(64, 32)})
    commit(tmp_path / "run", saved, told(model))
    export_dcp(CheckpointStore(str(tmp_path / "run")), tmp_path / "out").run()
    import_dcp(tmp_path / "out", CheckpointStore(str(tmp_path / "back")), "back", trust=True).run()
    _, source = read(tmp_path / "back")
    expected = told(model)
    facts = dict(source.manifest.facts)
    del expected["lineage"], facts["lineage"]
    assert facts == expected


def test_moments_take_the_precision_that_training_goes_on_with(tmp_path: Path) -> None:
    model = family("olmoe").model_copy(update={"layers": 1})
    saved = trained(model, {"embedding.weight": torch.randn(64, 32)})
    commit(tmp_path / "run", saved, told(model))
    export_dcp(CheckpointStore(str(tmp_path / "run")), tmp_path / "out").run()
    job = import_dcp(
        tmp_path / "out", CheckpointStore(str(tmp_path / "back")), "back", True, fill=(model, "adamw", "bf16")
    )
    job.run()
    found, source = read(tmp_path / "back")
    slot = "embedding.weight/exp_avg_sq"
    assert torch.equal(found[slot], saved[slot].bfloat16()) and torch.equal(
        found["optimizer/step"], torch.tensor(7.0)
    )
    assert torch.equal(found["embedding.weight"], saved["embedding.weight"])
    assert source.manifest.step == 0 and source.manifest.facts["samples"] == 0
