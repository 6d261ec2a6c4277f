"""Reads offline W&B folders back.

A `.wandb` file is a log in LevelDB's format (blocks of 32 KiB; each part of a record has a checksum of four
bytes, a length of two and a type of one) after a header of seven bytes; a record is one of W&B's own protobufs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2


def read_offline(folder: Path) -> dict[str, Any]:
    """History rows, configuration, summary, axes, artifacts and files of all offline runs under `folder`, oldest first."""
    found: dict[str, Any] = {
        "history": [],
        "config": {},
        "summary": {},
        "axes": {},
        "ids": set(),
        "complete": 0,
        "artifacts": [],
        "media": {},
    }
    for path in sorted(folder.rglob("*.wandb")):
        media = path.parent / "files" / "media"
        found["media"] |= {
            str(one.relative_to(path.parent / "files")): one for one in media.rglob("*") if one.is_file()
        }
        for data in _records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            _take(record, found)
    return found


def value(row: dict[str, Any], name: str) -> Any:
    """What a row has of that name: plain, or put together again from its parts; None where it has nothing of it."""
    parts = {key.removeprefix(f"{name}/"): part for key, part in row.items() if key.startswith(f"{name}/")}
    return row.get(name, parts or None)


def table(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Rows of the table of that name that was logged last."""
    told = [one for row in found["history"] if (one := value(row, name)) is not None]
    tree = json.loads(found["media"][told[-1]["path"]].read_text())
    return [dict(zip(tree["columns"], row, strict=True)) for row in tree["data"]]


_BLOCK, _HEADER, _PART = 1 << 15, 7, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B", "not a W&B file"
    at, whole = _HEADER, b""
    while at + _PART <= len(data):
        if _BLOCK - at % _BLOCK < _PART:
            at += _BLOCK - at % _BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part = data[at + _PART : at + _PART + length]
        if len(part) < length or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return
        whole = part if kind in (_FULL, _FIRST) else whole + part
        if kind in (_FULL, _LAST):
            yield whole
        at += _PART + length


def _take(record: Any, found: dict[str, Any]) -> None:
    match record.WhichOneof("record_type"):
        case "run":
            found["ids"].add(record.run.run_id)
            found["config"] |= {
                i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.run.config.update
            }
        case "config":
            found["config"] |= {
                i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.config.update
            }
        case "history":
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            found["history"].append(row)
        case "summary":
            found["summary"] |= {
                i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update
            }
        case "metric":
            metric = record.metric
            found["axes"][metric.name or metric.glob_name] = metric.step_metric
        case "artifact":
            one = record.artifact
            found["artifacts"].append(
                {
                    "name": one.name, "kind": one.type, "digest": one.digest, "aliases": list(one.aliases),
                    "facts": json.loads(one.metadata or "{}"), "used": one.use_after_commit,
                    "files": {entry.path: Path(entry.local_path) for entry in one.manifest.contents},
                }
            )  # fmt: skip
        case "exit":
            found["complete"] += 1
