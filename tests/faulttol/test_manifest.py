"""What a manifest keeps, and that any change to it is noticed."""

from __future__ import annotations

import json

import pytest

from faulttol.checkpoint import manifest
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.manifest import Incomplete, Manifest, ShardFile, Tensor
from faulttol.checkpoint.shards import Index

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


def test_a_manifest_comes_back() -> None:
    assert Manifest.parse(TOLD.dump()) == TOLD
    assert (TOLD.world, TOLD.bytes) == (2, 300) and list(TOLD.tensors["w"].files()) == [0, 2, 3]


def test_facts_become_json() -> None:
    odd = Manifest(
        "r", 1, 1, {}, "t", {}, (), {"tuple": (1, 2), "keys": {10: "a", 9: "b"}, "nan": float("inf")}
    )
    back = Manifest.parse(odd.dump())
    assert back.facts == {"tuple": [1, 2], "keys": {"10": "a", "9": "b"}, "nan": float("inf")}
    with pytest.raises(TypeError):
        Manifest("r", 1, 1, {}, "t", {}, (), {"set": {1}}).dump()


def test_every_flipped_bit_is_noticed() -> None:
    text = TOLD.dump()
    for place in range(8 * len(text)):
        changed = bytearray(text)
        changed[place // 8] ^= 1 << place % 8
        try:
            assert Manifest.parse(bytes(changed)) == TOLD
        except Incomplete:
            continue
        pytest.fail(f"bit {place}: {changed[place // 8 - 9 : place // 8 + 9]!r}")


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"format": 2}', b"\xff", b"null", b'{"format": 2, "digest": 3}']
)
def test_a_manifest_that_is_none_is_incomplete(text: bytes) -> None:
    with pytest.raises(Incomplete):
        Manifest.parse(text)


def test_another_format_is_named() -> None:
    text = json.dumps(json.loads(TOLD.dump()) | {"format": 3}).encode()
    with pytest.raises(Incomplete, match="of format 3, and this version reads 2"):
        Manifest.parse(text)
    with pytest.raises(Incomplete, match="index isn't of format 2"):
        Index.parse(b'{"format": 3}')


def test_what_the_ranks_wrote_is_surveyed() -> None:
    point = ("s", "int64", Box.all_of(()))
    found = manifest.survey([_plain(((0,), (4,))), [point], _plain(((4,), (3,))), _plain(((7,), (3,)))])
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
        ([_plain(((5,), (10,)))], r"w\[10\] has a box \[5:15\] of \[10\], which is outside"),
    ],
)
def test_pieces_that_make_up_no_whole_are_refused(ranks: list, why: str) -> None:
    with pytest.raises(Incomplete, match=why):
        manifest.survey(ranks)


def test_it_stays_short() -> None:
    """At 4,096 ranks and 8,000 tensors that all ranks share: the boxes and digests are in the files' own indexes."""
    tensors = {
        f"blocks.{i}.feed.experts.gate_up/exp_avg": Tensor("float32", (64, 2, 1024, 2048), ((0, 4095),))
        for i in range(8000)
    }
    files = tuple(ShardFile(10**10, 10**6, "f" * 32) for _ in range(4096))
    assert len(Manifest("r", 1, 1, {}, "t", tensors, files, {}).dump()) < 1_500_000
