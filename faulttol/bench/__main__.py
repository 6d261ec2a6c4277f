"""`python -m faulttol bench save` and `bench reshard`: what checkpoints cost beside DeepSpeed's and torch's."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.errors import USER_ERROR_EXIT, OneLineParser, UserError, unknown

_GIB = 1 << 30
_RANKS = (1, 2, 4, 8)
"""What the 8 experts of the measured state can be shared by."""


def main(arguments: Sequence[str]) -> int:
    """Measure and print; exit code 1 where a bar is missed, 2 for a user's mistake."""
    try:
        parser = _parser()
        options, more = parser.parse_known_args(arguments)
        if more:
            raise unknown(more[0], parser, options.bench)
        return _save(options) if options.bench == "save" else _reshard(options)
    except UserError as error:
        print(f"megaray: {error}", file=sys.stderr)
        return USER_ERROR_EXIT


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m faulttol bench", description=__doc__)
    commands = parser.add_subparsers(dest="bench", required=True)
    save = commands.add_parser("save", help="seconds that training is held, and until a save is durable")
    save.add_argument("--gib", type=float, default=4.0, help="of fp32 masters and moments over all ranks (4)")
    save.add_argument("--saves", type=int, default=3, help="of each contestant (3)")
    save.add_argument("--step", type=float, default=2.0, help="seconds of forward and backward in a step (2)")
    save.add_argument("--only", nargs="+", default=None, help="contestants by name (all)")
    reshard = commands.add_parser("reshard", help="a load under another layout")
    reshard.add_argument(
        "--gib", type=float, default=2.0, help="of fp32 masters and moments over all ranks (2)"
    )
    reshard.add_argument("--to", type=int, default=2, choices=_RANKS, help="processes that load (2)")
    for command in (save, reshard):
        command.add_argument("--ranks", type=int, default=4, choices=_RANKS, help="processes that save (4)")
        command.add_argument(
            "--path", type=Path, default=Path.cwd(), help="folder on the disk that is measured"
        )
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _folder(options: argparse.Namespace) -> Path:
    if not options.path.is_dir():
        raise UserError(f"--path={options.path} isn't a folder: make it, or name another")
    if not options.gib > 0:
        raise UserError(f"--gib={options.gib:g} must be above 0: type more than 0, such as 0.5")
    return Path(options.path.resolve())


def _told(name: str) -> None:
    print(f"{name} ...", file=sys.stderr)


def _save(options: argparse.Namespace) -> int:
    from faulttol.bench import save  # torch loads late: `--help` needs none of it

    spec = save.SaveSpec(
        round(options.gib * _GIB), options.ranks, options.saves, options.step, _folder(options)
    )
    unknown = sorted(set(options.only or ()) - set(save.KINDS))
    if unknown:
        raise UserError(
            f"--only={unknown[0]} is not a contestant: type of {', '.join(map(repr, save.KINDS))}"
        )
    rows = save.measure(spec, options.only or save.KINDS, _told)
    print(json.dumps(save.plain_data(spec, rows)) if options.json else save.report(spec, rows))
    return int(not all(bar.kept for bar in save.bars(rows)))


def _reshard(options: argparse.Namespace) -> int:
    from faulttol.bench import reshard

    spec = reshard.ReshardSpec(round(options.gib * _GIB), options.ranks, options.to, _folder(options))
    result = reshard.measure(spec, _told)
    print(json.dumps(reshard.plain_data(spec, result)) if options.json else reshard.report(spec, result))
    return int(not all(bar.kept for bar in reshard.bars(result)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
