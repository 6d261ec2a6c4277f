"""Megatron's token files: read as its published layout says, written so that every byte is as it says."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import UserError
from configs.schema import DataConfig
from trainer.data import indexed
from trainer.data.prepare import check, prepare
from trainer.data.store import TokenStore

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

SEQUENCES = [[5, 6, 7, 9], [1, 2, 9], [9], [3, 3, 3, 3, 3, 9]]
BEGINS = [0, 2, 3, 4]
"""The first document has two sequences."""
CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "float32": 7, "uint16": 8}


def layout(kind: str, sequences: list[list[int]], begins: list[int]) -> tuple[bytes, bytes]:
    """The .bin and .idx of sequences, packed by hand from the published layout."""
    width = np.dtype(kind).itemsize
    lengths = [len(one) for one in sequences]
    starts = [sum(lengths[:i]) * width for i in range(len(lengths))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[kind])
    index += struct.pack("<QQ", len(sequences), len(begins))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(starts)}q", *starts)
    index += struct.pack(f"<{len(begins)}q", *begins)
    return np.array([i for one in sequences for i in one], dtype=kind).tobytes(), index


def made(
    folder: Path, kind: str = "uint16", sequences: Any = None, begins: Any = None, name: str = "text"
) -> Path:
    """A pair in a folder; its prefix."""
    ids, index = layout(kind, sequences or SEQUENCES, begins or BEGINS)
    (folder / f"{name}.bin").write_bytes(ids)
    (folder / f"{name}.idx").write_bytes(index)
    return folder / name


def _config(path: Path | str, **settings: Any) -> DataConfig:
    return DataConfig(path=str(path), **{"sequence": 4, **settings})


def _prepare(path: Path | str, home: Path, vocab: int = 256, **settings: Any) -> TokenStore:
    check(_config(path, **settings), vocab)
    return prepare(_config(path, **settings), vocab, home / "cache")


# ---- reading ----


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "int32", "int64"])
@pytest.mark.parametrize("name", ["text.bin", "text.idx", "text", "."])
def test_a_pair_trains_directly(tmp_path: Path, kind: str, name: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    made(data, kind)
    store = _prepare(data / name, tmp_path)
    assert store.tokens.tolist() == [i for one in SEQUENCES for i in one] and store.tokens.dtype == kind
    assert (store.documents, store.separator, store.count) == (3, 9, 14)
    assert isinstance(store.tokens, np.memmap) and str(store.tokens.filename).endswith("data/text.bin")
    assert "every document ends with id 9, taken as what separates them" in store.notes[0]
    assert sorted(p.name for p in data.iterdir()) == ["text.bin", "text.idx"], "nothing is written beside it"


def test_ends_of_documents(tmp_path: Path) -> None:
    index = indexed.read(made(tmp_path, begins=[0, 0, 2, 3, 3, 4]))
    assert index.documents == 5 and index.ends().tolist() == [0, 7, 8, 8, 14]


def test_a_pair_is_seen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _prepare(made(tmp_path), tmp_path)

    def never(*_: object) -> None:
        raise AssertionError("scanned again")

    monkeypatch.setattr(indexed, "scan", never)
    assert _prepare(tmp_path / "text.bin", tmp_path).parts[0].digest == first.parts[0].digest


def test_documents_without_a_common_end_need_a_word(tmp_path: Path) -> None:
    made(tmp_path, sequences=[[5, 6, 7], [1, 2], [9], [3, 3, 4]])
    with pytest.raises(
        UserError, match="not every document ends with the same id .*document_mask=false.*--append-eod"
    ):
        prepare(_config(tmp_path / "text"), 256, tmp_path / "cache")
    store = _prepare(tmp_path / "text", tmp_path, document_mask=False)
    assert store.separator is None and "attention crosses them" in store.notes[0]


# ---- writing ----


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int32"])
def test_an_index_is_what_the_layout_says(tmp_path: Path, kind: str) -> None:
    documents = [[5, 6, 7, 9], [1, 2, 9], [9], [3, 3, 3, 3, 3, 9]]
    ids, wanted = layout(kind, documents, [0, 1, 2, 3, 4])
    indexed.write_index(tmp_path / "a.idx", np.dtype(kind), np.array([4, 7, 8, 14]))
    assert (tmp_path / "a.idx").read_bytes() == wanted
    (tmp_path / "a.bin").write_bytes(ids)
    assert indexed.read(tmp_path / "a").ends().tolist() == [4, 7, 8, 14]


def test_long_documents_are_several_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths are int32, so a document of 2^31 tokens doesn't fit one sequence."""
    monkeypatch.setattr(indexed, "MAX_SEQUENCE_TOKENS", 3)
    monkeypatch.setattr(indexed, "_ROWS", 2)
    pieces = [[5, 6, 7], [9], [1, 2, 9], [9], [3, 3, 3], [3, 3, 9]]
    ids, wanted = layout("uint16", pieces, [0, 2, 3, 4, 6])
    indexed.write_index(tmp_path / "a.idx", np.dtype(np.uint16), np.array([4, 7, 8, 14]))
    assert (tmp_path / "a.idx").read_bytes() == wanted
    (tmp_path / "a.bin").write_bytes(ids)
    assert indexed.read(tmp_path / "a").ends().tolist() == [4, 7, 8, 14]


def test_what_is_prepared_is_a_pair_that_trains_again(tmp_path: Path) -> None:
    """Text prepared into a folder, the folder and its .bin as data, and a copy as if Megatron had made it: the same."""
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"text {i} of some"}) + "\n" for i in range(20))
    )
    out = tmp_path / "out"
    first = prepare(_config(tmp_path / "a.jsonl", validation=0.3), 256, tmp_path / "cache", out=out)
    assert (out / "tokens.bin").read_bytes() == first.tokens.tobytes() and not (tmp_path / "cache").exists()
    for end in (".bin", ".idx"):
        (tmp_path / f"copy{end}").write_bytes((out / f"tokens{end}").read_bytes())
    for path in (out, out / "tokens.bin", out / "tokens", tmp_path / "copy.idx"):
        again = _prepare(path, tmp_path, validation=0.3)
        assert again.tokens.tobytes() == first.tokens.tobytes()
        for name in ("documents", "separator", "held", "count"):
            assert getattr(again, name) == getattr(first, name)
        assert again.parts[0].digest == first.parts[0].digest
        assert again.parts[0].train.read(0, 99).tolist() == first.parts[0].train.read(0, 99).tolist()


# ---- mistakes ----


def _refused(path: Path | str, tmp_path: Path, told: str, vocab: int = 256, **settings: Any) -> None:
    with pytest.raises(UserError, match=told) as caught:
        check(_config(path, **settings), vocab)
    with pytest.raises(UserError, match=told):
        prepare(_config(path, **settings), vocab, tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("gone", "left"), [("text.idx", "text.bin"), ("text.bin", "text.idx")])
def test_half_of_a_pair(tmp_path: Path, gone: str, left: str) -> None:
    made(tmp_path)
    (tmp_path / gone).unlink()
    _refused(tmp_path / left, tmp_path, f"has no {gone} beside it; a token file is a pair of both")


def test_several_pairs(tmp_path: Path) -> None:
    made(tmp_path)
    made(tmp_path, name="more")
    _refused(
        tmp_path, tmp_path, "holds 2 token files; name one, such as .*more.bin, or several.*data.mixture"
    )


INDEX = layout("uint16", SEQUENCES, BEGINS)[1]
BROKEN = [
    (b"hello world, which is not an index at all", "is not an index of a token file"),
    (b"", "is not an index of a token file"),
    (INDEX[:9] + struct.pack("<Q", 2) + INDEX[17:], "is version 2 with type code 8"),
    (INDEX[:17] + b"\x63" + INDEX[18:], "is version 1 with type code 99"),
    (INDEX[:17] + b"\x07" + INDEX[18:], "holds no integers"),
    (INDEX[:-1], "is cut short"),
    (layout("int32", SEQUENCES, BEGINS)[1], "speaks of 56 bytes of tokens, the .bin beside it has 28"),
    (
        layout("uint16", SEQUENCES[:-1], BEGINS[:-1])[1],
        "speaks of 16 bytes of tokens, the .bin beside it has 28",
    ),
    (layout("uint16", SEQUENCES, [0, 2, 3])[1], "its documents aren't made of its sequences"),
    (layout("uint16", SEQUENCES, [0, 3, 2, 4])[1], "its documents aren't made of its sequences"),
    (INDEX[:50] + struct.pack("<q", 8) + INDEX[58:], "its sequences don't lie end to end"),
]


@pytest.mark.parametrize(("index", "told"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_index(tmp_path: Path, index: bytes, told: str) -> None:
    made(tmp_path)
    (tmp_path / "text.idx").write_bytes(index)
    _refused(tmp_path / "text.bin", tmp_path, told)


def test_ids_that_do_not_fit(tmp_path: Path) -> None:
    made(tmp_path, "int32", sequences=[[5, 700, 1, 1, 9]], begins=[0, 1])
    _refused(tmp_path / "text", tmp_path, "holds the id 700; set model.vocab=701 or more")
    made(tmp_path, "int32", sequences=[[5, -1, 1, 1, 9]], begins=[0, 1])
    _refused(tmp_path / "text", tmp_path, "holds the id -1; tokens are 0 or above")


def test_scores_of_what_is_prepared_already(tmp_path: Path) -> None:
    _refused(made(tmp_path), tmp_path, "data.score_field='q': .*prepared already", score_field="q")


def test_a_sequence_that_is_too_long(tmp_path: Path) -> None:
    _refused(made(tmp_path), tmp_path, "data.sequence=14 is longer than the data .14 tokens", sequence=14)
