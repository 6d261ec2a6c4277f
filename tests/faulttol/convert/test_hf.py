"""Hugging Face's files: what is exported computes the same in `transformers`, what is imported trains on."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.errors import UserError
from configs.model import ModelConfig, RouterConfig
from faulttol.checkpoint.manifest import Incomplete, flat
from faulttol.checkpoint.store import CheckpointStore
from faulttol.convert import placed as placing
from faulttol.convert import target as writing
from faulttol.convert.hf import export_hf, import_hf
from faulttol.convert.hf_config import model_in
from tests.faulttol.convert.converted import commit, read, same, told, trained
from tests.trainer import stages
from tests.trainer.model import hugging_face
from tests.trainer.model.hugging_face import FAMILIES, VOCAB, Weights, randomize, renamed, unstacked
from trainer.model.initial import build

pytestmark = pytest.mark.dist


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors go through in as many stretches, pieces and files as large ones."""
    monkeypatch.setattr(placing, "MAX_READ", 1500)
    monkeypatch.setattr(writing, "_PIECE", 2000)
    monkeypatch.setattr(writing, "_FILE", 50_000)


def published(name: str) -> tuple[ModelConfig, nn.Module, Weights]:
    """A small model of a family, and its weights under our names."""
    family = FAMILIES[name]()
    torch.manual_seed(3)
    theirs = family.build().eval()
    randomize(theirs)
    return family.ours, theirs, renamed(family.ours, weights(theirs))


def weights(theirs: nn.Module) -> Weights:
    both = (*theirs.named_parameters(), *theirs.named_buffers())
    return {key: tensor.detach() for key, tensor in both if "inv_freq" not in key}


def logits(theirs: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return theirs(input_ids=tokens[:, :-1], use_cache=False).logits


def loaded(path: Path) -> nn.Module:
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    found, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", output_loading_info=True, **options
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return found.eval()


@pytest.mark.parametrize(
    "name", ["mixtral", "olmoe", "qwen3-yarn", "deepseek-v3-yarn", "deepseek-v3-query-whole"]
)
def test_exported_weights_give_the_same_logits_in_transformers(name: str, tmp_path: Path) -> None:
    ours, theirs, state = published(name)
    commit(tmp_path / "run", trained(ours, state), told(ours), kind="boxes")
    shown: list[tuple[int, int]] = []
    job = export_hf(
        CheckpointStore(str(tmp_path / "run")),
        CheckpointStore(str(tmp_path / "out")),
        dtype="fp32",
        max_shard_bytes=9000,
    )
    done = job.run(lambda *progress: shown.append(progress))
    tokens = torch.randint(0, VOCAB, (2, 25))
    again = loaded(tmp_path / "out")
    same(weights(again), weights(theirs))
    assert torch.equal(logits(again, tokens), logits(theirs, tokens))
    torch.testing.assert_close(
        logits(again, tokens), stages.logits(stages.whole(ours, state), tokens), rtol=1e-5, atol=1e-5
    )
    # What was foretold is what came.
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (
        len(files) > 2
        and sum(file.stat().st_size for file in files) == job.estimate.bytes_written == done.bytes_written
    )
    indexes = sum(file.index for file in read(tmp_path / "run")[1].manifest.files)
    assert done.bytes_read == job.estimate.bytes_read - indexes and done.tensors == len(
        unstacked(weights(theirs))
    )
    assert shown[-1] == (job.estimate.bytes_moved, job.estimate.bytes_moved) and len(shown) >= len(files)
    assert "the optimizer's state stays behind" in done.notes


def test_bf16_is_rounded_as_torch_rounds_and_biases_stay(tmp_path: Path) -> None:
    ours, theirs, state = published("deepseek-v3")
    commit(tmp_path / "run", state, told(ours))
    export_hf(CheckpointStore(str(tmp_path / "run")), CheckpointStore(str(tmp_path / "out"))).run()
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = unstacked(weights(theirs))
    same(found, {k: t if "correction_bias" in k else t.bfloat16() for k, t in expected.items()})
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        # So all are aligned.
        assert file.offset_keys()[:2] == sorted(k for k in expected if "correction_bias" in k)
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == ["config.json", "model.safetensors"]
    assert loaded(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3", "deepseek-v3"])
def test_imported_weights_are_the_model(name: str, tmp_path: Path) -> None:
    ours, theirs, state = published(name)
    theirs.save_pretrained(tmp_path / "hub" / name, max_shard_size="20KB")
    job = import_hf(
        CheckpointStore(str(tmp_path / "hub" / name)), CheckpointStore(str(tmp_path / "run")), "imported"
    )
    done = job.run()
    found, source = read(tmp_path / "run")
    parameters = {k: t for k, t in found.items() if "/" not in k}
    biases = {
        k: torch.zeros(ours.experts) for k in parameters if k.endswith("router.bias") and k not in state
    }
    same(parameters, state | biases)
    made = {k: t for k, t in found.items() if "/" in k}
    assert sorted(made) == sorted(k for k in trained(ours, state) if "/" in k)
    assert not any(tensor.any() for tensor in made.values())
    assert any(note.startswith("made up as zeros: ") and "exp_avg_sq" in note for note in done.notes)
    facts = source.manifest.facts
    assert (source.manifest.step, facts["samples"], facts["loss"]) == (0, 0, None)
    assert facts["lineage"][0]["how"] == "import"
    shards = (tmp_path / "run").glob("*/*.r*.safetensors")
    assert sum(file.stat().st_size for file in shards) == job.estimate.bytes_written == done.bytes_written
    assert done.bytes_read == job.estimate.bytes_read
    # And back: the same files, and settings that say the same.
    export_hf(
        CheckpointStore(str(tmp_path / "run")), CheckpointStore(str(tmp_path / "out")), dtype="fp32"
    ).run()
    same(weights(loaded(tmp_path / "out")), weights(theirs))


def test_multi_token_prediction_goes_out_and_comes_back(tmp_path: Path) -> None:
    ours = FAMILIES["deepseek-v3"]().ours.model_copy(update={"mtp_layers": 1})
    state = {name: torch.randn_like(t) for name, t in build(ours, 1).state_dict().items()}
    commit(tmp_path / "run", state, told(ours))
    export_hf(
        CheckpointStore(str(tmp_path / "run")), CheckpointStore(str(tmp_path / "out")), dtype="fp32"
    ).run()
    files = load_file(tmp_path / "out" / "model.safetensors")
    D = ours.hidden
    project = files["model.layers.3.eh_proj.weight"]  # reads the token first (modeling_layers.py, MtpLayer)
    assert torch.equal(
        project, torch.cat((state["mtp.0.project.weight"][:, D:], state["mtp.0.project.weight"][:, :D]), 1)
    )
    assert torch.equal(files["model.layers.3.enorm.weight"], state["mtp.0.embedding_norm.weight"])
    assert torch.equal(files["model.layers.3.hnorm.weight"], state["mtp.0.hidden_norm.weight"])
    assert torch.equal(files["model.layers.3.shared_head.norm.weight"], state["mtp.0.final_norm.weight"])
    import_hf(CheckpointStore(str(tmp_path / "out")), CheckpointStore(str(tmp_path / "back")), "back").run()
    found, _ = read(tmp_path / "back")
    same({k: t for k, t in found.items() if "/" not in k}, state)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {"tie_embeddings": True}),
        (
            "qwen3",
            {"dense_layers": 1, "dense_width": 20, "router": RouterConfig(balance="aux", renormalize=False)},
        ),
    ],
)
def test_tied_embeddings_and_dense_layers_go_out_and_come_back(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    ours = FAMILIES[name]().ours.model_copy(update=changes)
    state = {
        name: torch.randn_like(t) * 0.2
        for name, t in build(ours, 1).state_dict().items()
        if "bias" not in name
    }
    commit(tmp_path / "run", state, told(ours))
    export_hf(
        CheckpointStore(str(tmp_path / "run")), CheckpointStore(str(tmp_path / "out")), dtype="fp32"
    ).run()
    tokens = torch.randint(0, VOCAB, (2, 25))
    expected = stages.logits(stages.whole(ours, state), tokens)
    torch.testing.assert_close(logits(loaded(tmp_path / "out"), tokens), expected, rtol=1e-5, atol=1e-5)
    import_hf(CheckpointStore(str(tmp_path / "out")), CheckpointStore(str(tmp_path / "back")), "back").run()
    found, _ = read(tmp_path / "back")
    same({k: t for k, t in found.items() if k in state}, state)


def test_weights_that_are_rotated_by_halves_keep_their_order(tmp_path: Path) -> None:
    """`rope_interleave` false: the rotary rows lie as ours do."""
    ours, theirs, _ = published("deepseek-v3")
    theirs.save_pretrained(tmp_path / "hub")
    tree = json.loads((tmp_path / "hub/config.json").read_text())
    (tmp_path / "hub/config.json").write_text(json.dumps(tree | {"rope_interleave": False}))
    import_hf(CheckpointStore(str(tmp_path / "hub")), CheckpointStore(str(tmp_path / "run")), "run").run()
    found, _ = read(tmp_path / "run")
    for mine, his in (("query_up", "q_b_proj"), ("key_value_down", "kv_a_proj_with_mqa")):
        expected = weights(theirs)[f"model.layers.1.self_attn.{his}.weight"]
        assert torch.equal(found[f"blocks.1.attention.{mine}.weight"], expected)


def test_another_file_system_is_as_good_as_a_folder(memory: str, tmp_path: Path) -> None:
    ours, theirs, state = published("olmoe")
    commit(memory, state, told(ours))
    export_hf(
        CheckpointStore(memory), CheckpointStore(f"{memory}/out"), dtype="fp32", max_shard_bytes=30_000
    ).run()
    import_hf(CheckpointStore(f"{memory}/out"), CheckpointStore(f"{memory}/back"), "back").run()
    found, _ = read(f"{memory}/back")
    same({k: t for k, t in found.items() if k in state}, state)


# ---- what is refused ----


@pytest.fixture
def run(tmp_path: Path) -> CheckpointStore:
    """A checkpoint of a small Mixtral of one layer."""
    ours = FAMILIES["mixtral"]().ours.model_copy(update={"layers": 1})
    commit(tmp_path / "run", dict(build(ours, 1).state_dict()), told(ours))
    return CheckpointStore(str(tmp_path / "run"))


def test_an_export_that_would_not_be_the_model_is_refused(run: CheckpointStore, tmp_path: Path) -> None:
    out = CheckpointStore(str(tmp_path / "out"))
    with pytest.raises(UserError, match="^dtype=int8 isn't known; type bf16 or fp32"):
        export_hf(run, out, dtype="int8")
    with pytest.raises(UserError, match="^max_shard_bytes=0 is below 1"):
        export_hf(run, out, max_shard_bytes=0)
    ours = FAMILIES["mixtral"]().ours.model_copy(update={"layers": 1})
    state = dict(build(ours, 1).state_dict())
    lost = "blocks.0.feed.experts.down"
    commit(tmp_path / "lost", {name: t for name, t in state.items() if name != lost}, told(ours))
    with pytest.raises(UserError, match=f"has no {lost}, which its model has"):
        export_hf(CheckpointStore(str(tmp_path / "lost")), out)
    commit(tmp_path / "wide", state | {lost: torch.zeros(4, 32, 41)}, told(ours))
    with pytest.raises(UserError, match=rf"{lost} is \[4, 32, 41\] and its model has \[4, 32, 40\]"):
        export_hf(CheckpointStore(str(tmp_path / "wide")), out)
    with pytest.raises(UserError, match="model.router.balance=bias can't be exported"):
        commit(tmp_path / "bias", state, told(ours.model_copy(update={"router": RouterConfig()})))
        export_hf(CheckpointStore(str(tmp_path / "bias")), out)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a model already \(config.json\)"):
        export_hf(run, out)


def test_an_export_of_a_damaged_checkpoint_leaves_nothing(run: CheckpointStore, tmp_path: Path) -> None:
    (shard,) = (tmp_path / "run").glob("*/*r00002*.safetensors")
    data = bytearray(shard.read_bytes())
    data[9000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(Incomplete, match="differs from what was saved in"):
        export_hf(run, CheckpointStore(str(tmp_path / "out")), max_shard_bytes=20_000).run()
    assert not [
        path.name for path in (tmp_path / "out").glob("*") if path.suffix in (".json", ".safetensors")
    ]


def test_an_export_to_a_storage_that_breaks_says_why(
    run: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can't be removed any more hides neither the reason nor keeps the rest."""
    out, removed = CheckpointStore(str(tmp_path / "out")), []

    def full(name: str, chunks: Any) -> int:
        raise OSError(28, "No space left on device")

    def stale(name: str) -> None:
        removed.append(name)
        raise OSError(116, "Stale file handle")

    job = export_hf(run, out, max_shard_bytes=20_000)
    monkeypatch.setattr(out, "write", full)
    monkeypatch.setattr(out, "remove", stale)
    with pytest.raises(OSError, match="No space left"):
        job.run()
    assert len(removed) == 5 and removed[-1] == "config.json"


@pytest.fixture
def hub(run: CheckpointStore, tmp_path: Path) -> Path:
    """The published files of that Mixtral, in several."""
    export_hf(run, CheckpointStore(str(tmp_path / "hub")), max_shard_bytes=20_000).run()
    return tmp_path / "hub"


def _change(hub: Path, change: Any) -> None:
    """Rewrite the tensors of the first file."""
    path = hub / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _set(name: str, value: Tensor) -> Any:
    return lambda hub: _change(hub, lambda tensors: tensors.update({name: value}))


def _pop(name: str) -> Any:
    return lambda hub: _change(hub, lambda tensors: tensors.pop(name))


EMBEDDING = "model.embed_tokens.weight"
WRONG: dict[str, tuple[Any, str]] = {
    "a tensor is missing": (_pop(EMBEDDING), f"^{EMBEDDING} isn't there \\(1 of 22 tensors are missing\\)"),
    "another shape": (_set(EMBEDDING, torch.zeros(95, 32)), rf"{EMBEDDING} is \[95, 32\], and \[96, 32\]"),
    "another kind": (
        _set(EMBEDDING, torch.zeros(96, 32, dtype=torch.int8)),
        f"{EMBEDDING} is int8, and quantised weights",
    ),
    "one too many": (
        _set("model.layers.1.mlp.gate.weight", torch.zeros(2)),
        "holds model.layers.1.mlp.gate.weight, which",
    ),
    "no config": (lambda hub: (hub / "config.json").unlink(), "config.json isn't there"),
    "no JSON": (lambda hub: (hub / "config.json").write_text("{"), "config.json is not a JSON"),
    "a file is missing": (
        lambda hub: (hub / "model-00002-of-00003.safetensors").unlink(),
        "00002.* is missing, which",
    ),
    "a torn header": (lambda hub: _cut(hub, 100), "is not a file of safetensors, or is torn"),
    "no header": (lambda hub: _cut(hub, 3), "is not a file of safetensors, or is torn"),
    "no index": (
        lambda hub: (hub / "model.safetensors.index.json").write_text("[]"),
        "is not an index of safetensors",
    ),
    "none at all": (
        lambda hub: [path.unlink() for path in hub.glob("model*")],
        "holds no .safetensors files",
    ),
    "twice": (_set("model.norm.weight", torch.zeros(32)), "both have model.norm.weight"),
}


def _cut(hub: Path, size: int) -> None:
    path = hub / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("what", WRONG)
def test_files_that_are_not_the_model_are_refused(what: str, hub: Path, tmp_path: Path) -> None:
    act, told_ = WRONG[what]
    act(hub)
    with pytest.raises(UserError, match=told_):
        import_hf(CheckpointStore(str(hub)), CheckpointStore(str(tmp_path / "ours")), "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("cut", [1, 3000])
def test_a_file_that_ends_early_is_refused_before_anything_is_written(
    hub: Path, tmp_path: Path, cut: int
) -> None:
    """A download that broke off; and where it is cut while it is read, nothing is committed."""
    path, theirs = hub / "model-00003-of-00003.safetensors", CheckpointStore(str(hub))
    ours = CheckpointStore(str(tmp_path / "ours"))
    job = import_hf(theirs, ours, "ours")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match=r"00003.* or is torn: it ends before byte \d+; copy it again"):
        import_hf(theirs, ours, "ours")
    with pytest.raises(UserError, match="00003.* is truncated: it ends within"):
        job.run()
    assert not list((tmp_path / "ours").glob("*/*"))


def test_one_file_is_the_model_whatever_lies_beside_it(run: CheckpointStore, tmp_path: Path) -> None:
    """As publishers lay their own format, or an adapter, beside `model.safetensors`."""
    export_hf(run, CheckpointStore(str(tmp_path / "hub"))).run()
    for name in ("consolidated", "adapter_model"):
        save_file({"layers.0.attention.wq.weight": torch.ones(2)}, tmp_path / "hub" / f"{name}.safetensors")
    out = CheckpointStore(str(tmp_path / "ours"))
    assert import_hf(CheckpointStore(str(tmp_path / "hub")), out, "ours").run().tensors > 20


def test_training_may_go_on_with_what_the_files_leave_open(hub: Path, tmp_path: Path) -> None:
    told_ = model_in(json.loads((hub / "config.json").read_text()), "config.json", "hub")
    other = told_.model_copy(update={"router": RouterConfig(balance="bias", bias_rule="load_error")})
    import_hf(
        CheckpointStore(str(hub)), CheckpointStore(str(tmp_path / "ours")), "ours", "lamb", "bf16", other
    ).run()
    found, source = read(tmp_path / "ours")
    prints = source.manifest.facts["fingerprint"]
    assert prints["model"]["router.balance"] == "bias" and prints["optim"] == {
        "kind": "lamb",
        "moments": "bf16",
    }
    assert not found["blocks.0.feed.router.bias_avg_sq"].any()
    assert found["embedding.weight/exp_avg"].dtype == torch.bfloat16
    with pytest.raises(
        UserError, match="^model.window=0 isn't that of .*config.json, 7; type model.window=7"
    ):
        import_hf(
            CheckpointStore(str(hub)),
            CheckpointStore(str(tmp_path / "x")),
            "x",
            model=other.model_copy(update={"window": 0}),
        )


# ---- training continues ----

WORDS = (
    "experiment=smoke", "data.sequence=24", "train.micro_batch=2", "train.global_batch=4", "train.steps=2",
    "checkpoint.every=9", "optim.warmup_steps=1", "train.precision=fp32", "train.engine=native", "train.log_every=1",
    "parallel.dp=1", "parallel.pp=1", "data.document_mask=false",
)  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), [("deepseek-v3", "muon")])
def test_an_imported_model_trains_on(name: str, kind: Any, tmp_path: Path) -> None:
    """The first loss is that of the model's own code on the same samples."""
    import torch.distributed as dist

    from configs.compose import compose
    from configs.metrics import ResumedLine, StepLine, read_from
    from configs.paths import RunPaths
    from configs.rank import RankContext, free_port
    from trainer import loop
    from trainer.data.prepare import prepare

    with mock.patch.object(hugging_face, "VOCAB", 260):  # all bytes
        ours, theirs, _ = published(name)
    theirs.save_pretrained(tmp_path / "hub")
    import_hf(
        CheckpointStore(str(tmp_path / "hub")),
        CheckpointStore(str(tmp_path / "imported")),
        "imported",
        kind=kind,
    ).run()
    (tmp_path / "text.txt").write_text("\n".join("abcdefghij"[i % 7 :] * 3 for i in range(99)))
    ours = model_in(json.loads((tmp_path / "hub/config.json").read_text()), "config.json", "hub")
    words = [
        f"{key}={value}"
        for key, value in flat(ours.model_dump(mode="json"), "model.").items()
        if value is not None
    ]
    words += [*WORDS, f"data.path={tmp_path}/text.txt", f"resume={tmp_path}/imported", f"optim.kind={kind}"]
    paths = RunPaths(tmp_path / "run")
    rank = RankContext(0, 1, 0, 1, "127.0.0.1", free_port(), paths, 1)
    paths.attempt(1).metrics.parent.mkdir(parents=True, exist_ok=True)
    with mock.patch.dict(os.environ, {"MEGARAY_HOME": str(tmp_path / "home")}):
        try:
            loop.main(compose(words), rank)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.unfreeze()
            gc.enable()
        config = compose(words)
        store = prepare(config.data, config.model.vocab, tmp_path / "data")
        sampler = store.train_sampler(config.data, config.train.seed)
    lines = read_from(rank.paths.metrics, 0)[0]
    assert [line.step for line in lines if isinstance(line, ResumedLine)] == [0]
    tokens = torch.from_numpy(sampler.batch(0, 0, 4, 0, 1).astype("int64"))
    log_shares = logits(theirs, tokens).double().log_softmax(-1)
    loss = -log_shares.gather(-1, tokens[:, 1:, None]).mean()
    steps = [line for line in lines if isinstance(line, StepLine)]
    assert steps[0].loss == pytest.approx(loss.item(), rel=1e-5) and len(steps) == 2
