"""The best rows alone, and preparing ahead of a run from the command line."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from configs.errors import UserError
from configs.schema import DataConfig
from tests.trainer.data.test_prepare import corpus as corpus
from tests.trainer.data.test_prepare import digests
from tests.trainer.data.test_tokenizer import bpe
from trainer import cli
from trainer.data import scores
from trainer.data.command import ProgressLine
from trainer.data.prepare import check, prepare
from trainer.data.store import TokenStore

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]


def _config(path: Path | str, **settings: Any) -> DataConfig:
    return DataConfig(path=str(path), **{"sequence": 8, **settings})


# ---- the best rows ----


@pytest.mark.parametrize("share", [0.001, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    "values",
    [
        [3.5], [1.0] * 50, list(range(-50, 51)), [-0.0, 0.0, -1e-308, 5e-324, 1e308, -1e308], [2.0, 1.0, 2.0, 3.0] * 9,
        np.random.default_rng(1).normal(size=999).tolist(),
    ],
    ids=["one", "equal", "whole", "extreme", "ties", "normal"],
)  # fmt: skip
def test_the_threshold_is_the_one_that_sorting_finds(
    tmp_path: Path, values: list[float], share: float
) -> None:
    (tmp_path / "scores").write_bytes(np.array(values, "<f8").tobytes())
    found, kept, rows = scores.threshold(tmp_path / "scores", share)
    best = sorted(values, reverse=True)
    assert found == best[int(np.ceil(len(values) * share)) - 1] and rows == len(values)
    assert kept == sum(value >= found for value in values) >= len(values) * share


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_only_the_best_share_of_the_rows_is_kept(tmp_path: Path, kind: str) -> None:
    values = [0.1, 0.9, 0.5, 0.7, 0.5, 0.3, 1, -2]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": f"row {v}", "q": v}) + "\n" for v in values))
    else:
        table = {"text": [f"row {v}" for v in values], "q": [float(v) for v in values]}
        pyarrow.parquet.write_table(pyarrow.table(table), path)
    store = prepare(_config(path, score_field="q", keep_fraction=0.5), 256, tmp_path / "cache")
    kept = [row for row in store.tokens.tobytes().decode().split("\0") if row]
    assert kept == [f"row {v}" for v in values if v >= 0.5] and len(kept) == 5
    assert store.notes == [
        "data.keep_fraction=0.5: 5 of 8 rows kept, those with data.score_field='q' >= 0.5, equal scores included"
    ]
    assert prepare(_config(path), 256, tmp_path / "cache").documents == 8, "another corpus"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"text": "x", "qq": 1},
            r"a.jsonl:2 has no score under data.score_field='q' \(did you mean 'qq'\?\)",
        ),
        (
            {"text": "x", "q": "high"},
            "a.jsonl:2 has no score .*: it is a string; each row needs a number there",
        ),
        ({"text": "x", "q": None}, "a.jsonl:2 has no score .*: it is null"),
        ({"text": "x", "q": True}, "a.jsonl:2 has no score .*: it is a truth value"),
        ({"text": "x", "q": float("nan")}, "a.jsonl:2 has no score .*: it is not finite"),
    ],
)
def test_a_row_without_a_score(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "q": 1}) + "\n" + json.dumps(row))
    with pytest.raises(UserError, match=told):
        prepare(_config(tmp_path / "a.jsonl", score_field="q", keep_fraction=0.5), 256, tmp_path / "cache")


def test_text_and_parquet_without_scores(corpus: Path, tmp_path: Path) -> None:
    for name, told in (
        ("c.txt", "c.txt is text and has no rows"),
        ("e.parquet", "has no score under data.score_field"),
    ):
        with pytest.raises(UserError, match=told):
            check(_config(corpus / name, score_field="q", keep_fraction=0.5), 256)


# ---- the command ----


def _command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["prepare", *words])
    return code, *capsys.readouterr()


def test_the_command(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGARAY_HOME", str(tmp_path / "home"))
    words = (f"data.path={corpus}/*", f"data.tokenizer={bpe(tmp_path)}")
    code, out, err = _command(capsys, *words, "--workers", "2", "--json")
    found = json.loads(out)
    assert code == 0 and found["documents"] == 1820 and found["parts"][0]["dtype"] == "uint16"
    assert err.startswith("tokenising ") and "100%" in err.splitlines()[-1] and "\r" not in err
    # A run finds it in the cache, and so does the command.
    store: TokenStore = prepare(
        DataConfig(path=f"{corpus}/*", tokenizer=str(tmp_path / "tokenizer.json"), sequence=8), 400,
        tmp_path / "home" / "data",
    )  # fmt: skip
    assert str(store.folder / "tokens.bin") == found["parts"][0]["file"]
    code, out, err = _command(capsys, *words, "--out", str(tmp_path / "out"))
    assert code == 0 and f"train on it: data.path={tmp_path / 'out' / 'tokens.bin'}" in out
    assert "data.end_token: '<|endoftext|>' (id 0), a known name" in out
    assert digests(tmp_path / "out") == digests(store.folder)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("data.path={}/gone",), "data.path=.*gone' does not exist"),
        (("data.pth={}",), "did you mean 'data.path'"),
        (("data.path={}", "--out", "{}/c.txt"), "--out .*c.txt is a file; name a folder"),
        (
            ("data.mixture={{a: 1, b: 2}}", "--out", "{}/out"),
            "--out .* takes one data.path; prepare the paths",
        ),
        (("data.path={}", "--workers", "0"), "'0' is not a whole number above 0"),
        (("data.path={}", "--wokers", "2"), "'--wokers' is not an option"),
        (("data.path={}/c.txt", "model=demo", "model.vocab=100"), "model.vocab=100 is below the 256 ids"),
        (
            ("data.path={}/c.txt", "data.keep_fraction=0.5"),
            "data.keep_fraction=0.5 needs the column of the score; type data.score_field=NAME",
        ),
    ],
)
def test_a_command_that_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...], told: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("MEGARAY_HOME", str(tmp_path / "home"))
    code, out, err = _command(capsys, *(word.format(corpus) for word in words))
    assert code == 2 and not out and err.count("\n") == 1
    assert re.search(told, err), err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_and_elsewhere() -> None:
    for stream in (_Terminal(), io.StringIO()):
        now = [0.0]
        bar = ProgressLine(stream, lambda now=now: now[0])
        for i in range(1, 201):
            now[0] += 0.5
            bar("tokens", i * 1_000_000, 200_000_000, i * 250_000)
        bar.close()
        text = stream.getvalue()
        if stream.isatty():
            assert text.count("\r") == 200 and text.endswith("\n") and text.count("\n") == 1
            assert (
                f"[{'#' * 15}{'.' * 15}] tokenising  50%, 100.0 of 200.0 MB, 25,000,000 tokens, 2.0 MB/s"
                in text
            )
        else:
            assert text.count("\n") == 10 and "\r" not in text, "one in ten seconds, and the last"
            assert "tokenising  50%" in text and ", 0:00:49 left\n" in text
