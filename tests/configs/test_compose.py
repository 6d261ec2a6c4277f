"""From presets, files and overrides to one configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from configs import wording
from configs.compose import choices, compose, dump, groups, load
from configs.errors import UserError
from configs.section import Bytes

pytestmark = pytest.mark.unit


def test_the_defaults_are_the_demo_on_a_cpu() -> None:
    config = compose([])
    assert (config.model.name, config.hardware.name, config.cluster.name) == ("demo", "cpu", "local")


def test_the_line_of_the_documentation() -> None:
    config = compose(["model=demo", "hardware=cpu", "cluster=local", "parallel.ep=2", "train.steps=200"])
    assert (config.parallel.ep, config.train.steps) == (2, 200)


@pytest.mark.parametrize("group", groups())
def test_every_preset_composes(group: str) -> None:
    for name in choices(group):
        compose([f"{group}={name}"])


@pytest.mark.parametrize(
    "value",
    [
        "/data/*.jsonl",
        "s3://bucket/a path/x,y=z.txt",
        "C++ code/[ab].txt",
        "http://host:80/a?b=c&d",
        "{x}",
        "a: b",
    ],
)
def test_values_arrive_as_they_were_typed(value: str) -> None:
    assert compose([f"data.path={value}"]).data.path == value


def test_later_wins_and_the_command_line_wins_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: olmoe_1b_7b\ntrain:\n  steps: 7000\n  micro_batch: 2\n")
    config = compose(["train.steps=9000"], file)
    assert (config.model.name, config.train.steps, config.train.micro_batch) == ("olmoe_1b_7b", 9000, 2)


def test_a_saved_configuration_comes_back_equal(tmp_path: Path) -> None:
    config = compose(["experiment=demo", "resilience.timeouts.patience=12", "data.path=/a b/*.txt"])
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load(path) == config


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError):
        compose([]).train.steps = 3  # type: ignore[misc]  # that is the point


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(UserError) as error:
        compose(["train.steps=0", "optim.lr=-1"])
    assert "train.steps" in str(error.value) and "optim.lr" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"), [("peak_tflops", "1"), ("achieved_tflops", "1"), ("achieved_shapes", "[8, 8, 8]")]
)
def test_a_rate_of_an_unknown_precision_names_the_nearest_one(field: str, value: str, tmp_path: Path) -> None:
    """Nothing would read it, so a slip of a key left the device without its rate."""
    reason = (
        rf"hardware\.{field}\.bf99: 'bf99' is not a precision that matmuls are priced in "
        r"\(did you mean 'bf16'\?\); use one of fp32, "
    )
    with pytest.raises(UserError, match=reason):
        compose([f"hardware.{field}={{bf99: {value}}}"])
    (tmp_path / "device.yaml").write_text(f"hardware: {{{field}: {{bf99: {value}}}}}")
    with pytest.raises(UserError, match=reason):
        compose(["hardware=h100"], tmp_path / "device.yaml")
    if field != "achieved_shapes":  # three numbers, which are typed as a mapping
        with pytest.raises(UserError, match=reason):
            compose([f"hardware.{field}.bf99={value}"])


def test_a_name_is_as_long_as_a_folders_may_be() -> None:
    assert compose([f"name={'x' * 64}"]).name == "x" * 64
    with pytest.raises(UserError) as error:
        compose([f"name={'x' * 65}"])
    assert str(error.value).endswith(f"name='{'x' * 65}' has 65 characters; type at most 64")


@pytest.mark.parametrize("key", ["tracking.api_key", "data.password", "tracking.token"])
def test_secrets_are_refused_without_being_repeated(key: str) -> None:
    with pytest.raises(UserError) as error:
        compose([f"{key}=hunter2"])
    assert "hunter2" not in str(error.value) and "WANDB_API_KEY" in str(error.value)


def test_planning_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom orchestrator.cli import main\nassert main(['plan']) == 0\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'wandb', 'numpy'} & sys.modules.keys()\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_a_run_that_was_saved_with_one_source_of_its_device_can_be_resumed(tmp_path: Path) -> None:
    config = compose(["hardware=h100"])
    tree = yaml.safe_load(dump(config))
    tree["hardware"] = {"source": "a datasheet"} | {
        k: v for k, v in tree["hardware"].items() if k != "sources"
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert load(tmp_path / "config.yaml").hardware.peak_tflops == config.hardware.peak_tflops


@pytest.mark.parametrize(
    ("text", "size"),
    [("4M", 4 << 20), ("1.5M", 3 << 19), (".5k", 512), ("2GiB", 2 << 30), ("8", 8), ("1.25KB", 1280)],
)
def test_sizes_are_read_as_nccl_tests_reads_them(text: str, size: int) -> None:
    assert TypeAdapter(Bytes).validate_python(text) == size


def test_no_whole_number_is_too_large_to_compute_with() -> None:
    """`train.steps=1000…` of 401 digits was a traceback of the first division."""
    counted, long = 0, f"1{'0' * 400}"
    for path, annotation in wording._schema().items():
        if wording.wrong_type(path, "x").startswith(
            f"{path}='x' is not a whole number"
        ) and int in wording._kinds(annotation):
            counted += 1
            with pytest.raises(UserError, match=rf"{path}=10+\.\.\. must be at most \d+; type e.g. {path}="):
                compose([f"{path}={long}"])
    assert counted > 50
    with pytest.raises(UserError, match=r"collectives.max_size='10+\.\.\.' must be at most"):
        compose([f"collectives.max_size={long}T"])
