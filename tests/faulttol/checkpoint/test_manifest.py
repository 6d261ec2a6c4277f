"""What a manifest keeps, and that any change to it is noticed."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest

from faulttol.checkpoint import coverage
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.coverage import CoverageCache, FilePlan, check_coverage
from faulttol.checkpoint.manifest import (
    DIRECTORY_BLOCK,
    Incomplete,
    Manifest,
    ManifestHead,
    ShardFile,
    Tensor,
    files_of,
    tensors_of,
)
from faulttol.checkpoint.shards import ShardIndex

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

TOLD = Manifest(
    run="run-1",
    attempt=2,
    step=5,
    layout={"dp": 2},
    token="abcd",
    tensors={"w": Tensor("float32", (4, 3), ((0, 0), (2, 3))), "s": Tensor("int64", (), ((1, 1),))},
    files=(ShardFile(100, 10, "ff"), ShardFile(200, 20, "ee")),
    facts={"loss": 0.1, "fingerprints": {"data": "x"}, "none": None},
)


def _plain(
    *boxes: tuple[tuple[int, ...], tuple[int, ...]], whole: tuple[int, ...] = (10,), kind: str = "float32"
):
    return [("w", kind, Box(whole, start, shape)) for start, shape in boxes]


def _joined(head: ManifestHead, texts: list[bytes]) -> Manifest:
    data = b"".join(texts)
    tensors, files = {}, []
    for block in head.tensors:
        tensors |= tensors_of(data[block.offset : block.offset + block.length])
    for block in head.files:
        files += files_of(data[block.offset : block.offset + block.length])
    return Manifest.join(head, tensors, files)


def test_a_manifest_comes_back() -> None:
    head, texts = TOLD.split()
    assert ManifestHead.parse(head.dump()) == head
    assert _joined(head, texts) == TOLD
    assert (head.world, head.size, head.count) == (2, 300, 2) == (TOLD.world, TOLD.bytes, len(TOLD.tensors))
    assert list(TOLD.tensors["w"].files()) == [0, 2, 3]


def test_facts_become_json() -> None:
    facts = {"tuple": (1, 2), "keys": {10: "a", 9: "b"}, "nan": float("inf")}
    head, _ = Manifest("r", 1, 1, {}, "t", {}, (), facts).split()
    back = ManifestHead.parse(head.dump())
    assert back.facts == {"tuple": [1, 2], "keys": {"10": "a", "9": "b"}, "nan": float("inf")}
    with pytest.raises(TypeError):
        Manifest("r", 1, 1, {}, "t", {}, (), {"set": {1}}).split()[0].dump()


def test_every_flipped_bit_is_noticed() -> None:
    head, _ = TOLD.split()
    text = head.dump()
    for place in range(8 * len(text)):
        changed = bytearray(text)
        changed[place // 8] ^= 1 << place % 8
        try:
            assert ManifestHead.parse(bytes(changed)) == head
        except Incomplete:
            continue
        pytest.fail(f"bit {place}: {changed[place // 8 - 9 : place // 8 + 9]!r}")


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"format": 2}', b"\xff", b"null", b'{"format": 2, "digest": 3}']
)
def test_a_manifest_that_is_none_is_incomplete(text: bytes) -> None:
    with pytest.raises(Incomplete):
        ManifestHead.parse(text)


def test_another_format_is_named() -> None:
    text = json.dumps(json.loads(TOLD.split()[0].dump()) | {"format": 3}).encode()
    with pytest.raises(Incomplete, match="of format 3, and this version reads 2"):
        ManifestHead.parse(text)
    with pytest.raises(Incomplete, match="index isn't of format 2"):
        ShardIndex.parse(b'{"format": 3}')


def test_what_the_ranks_wrote_is_checked() -> None:
    point = ("s", "int64", Box.full(()))
    found = check_coverage([_plain(((0,), (4,))), [point], _plain(((4,), (3,))), _plain(((7,), (3,)))])
    assert found == {"w": Tensor("float32", (10,), ((0, 0), (2, 3))), "s": Tensor("int64", (), ((1, 1),))}


@pytest.mark.parametrize(
    ("ranks", "why"),
    [
        ([_plain(((0,), (4,))), _plain(((4,), (5,)))], r"w\[9:10\] of \[10\] has no source"),
        ([_plain(((0,), (10,)))] * 2, r"w\[0:10\] has two sources"),
        (
            [_plain(((0,), (10,))), _plain(((0,), (10,)), kind="bfloat16")],
            r"w is float32\[10\] on rank 0 and bfloat16",
        ),
        (
            [_plain(((0,), (10,))), _plain(((0, 0), (5, 2)), whole=(5, 2))],
            r"w is float32\[10\] on rank 0 and .*\[5, 2\]",
        ),
        (
            [_plain(((0,), (4,))), _plain(((4,), (6,)), whole=(11,))],
            r"w is float32\[10\] on rank 0 and float32\[11\]",
        ),
        ([_plain(((5,), (10,)))], r"w\[10\] has a box \[5:15\] of \[10\], which is outside"),
    ],
)
def test_pieces_that_make_up_no_whole_are_refused(ranks: list, why: str) -> None:
    with pytest.raises(Incomplete, match=why):
        check_coverage(ranks)


def test_a_check_of_what_is_known_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [FilePlan(_plain(((0,), (4,)))), FilePlan(_plain(((4,), (6,))))]
    digests = [plan.digest for plan in plans]
    known = CoverageCache()
    assert not known.known(digests)
    with pytest.raises(Incomplete, match="sent the digest of its plan alone"):
        known.check(digests, [plans[0], None])
    found = known.check(digests, plans)
    monkeypatch.setattr(coverage, "check_coverage", lambda pieces: pytest.fail("checked again"))
    assert known.known(digests) and known.check(digests, [None, None]) == found
    assert not known.known(digests[::-1]), "ranks are distinguished"


def test_a_plan_is_what_it_was_made_of() -> None:
    rows = [
        ("a/exp_avg", "float32", Box((4, 3), (1, 0), (2, 3))),
        ("s", "int64", Box((), (), ())),
        ("e", "bool", Box((0, 3), (0, 0), (0, 3))),
    ]
    plan = FilePlan(rows)
    assert (
        list(pickle.loads(pickle.dumps(plan))) == rows == list(plan) and len(plan) == 3 and plan[1] == rows[1]
    )
    assert plan == FilePlan(rows) != FilePlan(rows[::-1]) and list(FilePlan([])) == []
    with pytest.raises(Incomplete, match="which has other dims"):
        FilePlan([("a", "float32", Box((4, 3), (1,), (2,)))])


def test_the_head_stays_short_and_blocks_are_bounded() -> None:
    """At 12,288 ranks and 8,000 tensors: what grows is in the directory, of which a rank reads the blocks it needs."""
    tensors = {
        f"blocks.{i}.feed.experts.gate_up/exp_avg": Tensor("float32", (64, 2, 1024, 2048), ((0, 12287),))
        for i in range(8000)
    }
    files = tuple(ShardFile(10**10 + i, 10**6, f"{i:032x}") for i in range(12288))
    told = Manifest("r", 1, 1, {}, "t", tensors, files, {})
    head, texts = told.split()
    assert len(head.dump()) < 10_000
    assert all(len(text) <= DIRECTORY_BLOCK for text in texts) and len(texts) > 20
    assert _joined(head, texts) == replace(told, tensors=dict(sorted(tensors.items())))
    for name in (*list(tensors)[::997], min(tensors), max(tensors)):
        (number,) = head.blocks_of([name])
        at = head.tensors[number]
        assert name in tensors_of(b"".join(texts)[at.offset : at.offset + at.length])


def test_a_row_longer_than_a_block_has_one_alone() -> None:
    many = Tensor("float32", (9,), tuple((rank, rank) for rank in range(0, 30_000, 2)))
    few = Tensor("float32", (9,), ((0, 0),))
    head, texts = Manifest("r", 1, 1, {}, "t", {"b": many, "a": few, "c": few}, (), {}).split()
    assert [block.first for block in head.tensors] == ["a", "b", "c"]
    assert _joined(head, texts).tensors == {"a": few, "b": many, "c": few}
