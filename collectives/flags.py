"""nccl-tests' flags, as a configuration: each is done, mapped, or refused in one line that says why.

Source: nccl-tests 2.19.6, `main` in `src/common.cu`, and its README.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from configs.errors import UserError
from configs.rank import PARENT
from configs.timeouts import FACTORS

FLAGS = (
    ("-t", "nthreads", "COUNT", "ranks to start here, times -g: a rank is a process, not a thread"),
    ("-g", "ngpus", "COUNT", "ranks to start here: one for each GPU, as --ranks"),
    ("-b", "minbytes", "BYTES", "smallest size, e.g. 8, 1.5M, 1G"),
    ("-e", "maxbytes", "BYTES", "largest size"),
    ("-i", "stepbytes", "BYTES", "bytes from one size to the next, without -f or with -f 1"),
    ("-f", "stepfactor", "FACTOR", "factor from one size to the next; above 1 it counts, whatever -i"),
    (
        "-n",
        "iters",
        "COUNT",
        "timed iterations at least, and in one burst or graph; more follow to know the mean",
    ),
    ("-m", "agg_iters", "1", "calls in one group; torch.distributed launches each by itself"),
    ("-w", "warmup_iters", "COUNT", "untimed iterations at least; 0: none"),
    ("-N", "run_cycles", "COUNT", "passes over the whole sweep"),
    ("-p", "parallel_init", "0|1", "accepted: ranks are processes, which always start at once"),
    ("-c", "check", "COUNT", "times that every element is checked; 0: never"),
    ("-o", "op", "NAMES", "sum, prod, max, min, avg, band, bor, bxor; all: the first five"),
    (
        "-d",
        "datatype",
        "NAMES",
        "int8, uint8, int32, int64, half, bfloat16, float, double, f8e4m3, f8e5m2; all",
    ),
    ("-r", "root", "RANK", "root of rooted operations; all: each in turn"),
    ("-z", "blocking", "0|2|3", "2: wait for each call; 3: a barrier, untimed, before each"),
    ("-y", "stream_null", "0", "torch chooses the stream"),
    ("-T", "timeout", "SECONDS", "of one collective, after which the measurement ends"),
    (
        "-G",
        "cudagraph",
        "COUNT",
        "1 or more: replay a graph at all sizes (GPU); 0: where launches would show",
    ),
    ("-C", "report_cputime", "0", "the time of a launch, which here is Python's"),
    ("-S", "report_timestamps", "0|1", "accepted: rows.jsonl says when each row was finished"),
    ("-J", "output_file", "FILE", "a copy of the operation's JSON"),
    (
        "-a",
        "average",
        "0|1|2|3",
        "whose time counts: rank 0's, the mean (as without it), the least, the most",
    ),
    ("-R", "local_register", "0|1", "1: torch registers its buffers with NCCL"),
    ("-x", "cta_policy", "0|1|2", "NCCL_CTA_POLICY"),
    ("-D", "device_implementation", "0", "kernels of nccl-tests' own"),
    ("-V", "device_cta_count", "COUNT", "accepted: matters to -D alone"),
    ("-M", "memory", "0", "report of GPU memory"),
    ("-u", "unalign", "COUNT", "elements by which buffers begin off their alignment"),
    ("-I", "per_iter_timing", "0|1", "accepted: single calls are always timed and reported as well"),
    ("-K", "per_iter_skip", "0", "samples to leave out; here the warm-up lasts until times are steady"),
)
"""Letter, long name, what it takes, and what it does here."""
_LETTERS = {name: f"{letter} ({name})" for letter, name, _, _ in FLAGS}
_PASSED_ON = {
    "minbytes": ("min_size",), "maxbytes": ("max_size",), "stepbytes": ("step_size",), "stepfactor": ("step_factor",),
    "iters": ("min_iterations", "max_iterations"), "warmup_iters": ("min_warmup", "max_warmup"),
    "run_cycles": ("passes",), "check": ("check",), "op": ("reductions",), "datatype": ("dtypes",), "root": ("root",),
    "unalign": ("unalign",), "ops": ("ops",),
}  # fmt: skip
"""Fields whose values are those of a flag as typed."""
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_TYPES = "int8,uint8,int32,int64,half,bfloat16,float,double,f8e4m3,f8e5m2"
_USUAL_MOST = {"iterations": 1000, "warmup": 200}
_REFUSED = {
    "agg_iters": ("1", "torch.distributed launches each call by itself, as training does; leave -m out"),
    "stream_null": ("0", "torch chooses the stream that training runs on; leave -y out"),
    "report_cputime": ("0", "the launch is Python's here, not NCCL's own; compare call_us with time_us for its cost"),
    "device_implementation": ("0", "kernels of nccl-tests' own, which no training calls; leave -D out"),
    "memory": ("0", "the device's memory is nvidia-smi's or amd-smi's to report; leave -M out"),
    "per_iter_skip": ("0", "the warm-up lasts until times are steady, so that none needs to be left out; leave -K out"),
}  # fmt: skip
"""What is the only value of a flag, and why."""
_CHOICES = {
    "parallel_init": ("0", "1"), "report_timestamps": ("0", "1"), "per_iter_timing": ("0", "1"),
    "blocking": ("0", "1", "2", "3"), "average": ("0", "1", "2", "3"), "local_register": ("0", "1", "2"),
    "cta_policy": ("0", "1", "2"),
}  # fmt: skip
_COUNTS = ("nthreads", "ngpus", "run_cycles", "cudagraph", "timeout", "device_cta_count")


@dataclass
class ParsedFlags:
    """What the flags stand for."""

    overrides: list[str] = field(default_factory=list)
    """`field=value` of the configuration."""
    ranks: int | None = None
    """Ranks to start on this machine; None where nothing is said of them."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of torch and NCCL."""
    copy: Path | None = None
    """Where a copy of the JSON goes."""


def add(parser: argparse._ArgumentGroup) -> None:
    """The flags, with their long names."""
    for letter, name, metavar, text in FLAGS:
        parser.add_argument(letter, f"--{name}", dest=name, metavar=metavar, help=text)


def read(options: argparse.Namespace, env: Mapping[str, str]) -> ParsedFlags:
    """What was typed, and `NCCL_TESTS_SPLIT` of the environment.

    Raises:
        UserError: for a flag that has no counterpart, with the reason.
    """
    values = {name: value for _, name, _, _ in FLAGS if (value := getattr(options, name)) is not None}
    _check(values)
    typed = ParsedFlags()
    for name, value in values.items():
        if name in _SET:
            typed.overrides += [f"collectives.{word}" for word in _SET[name](value)]
    if "minbytes" in values or "maxbytes" in values or "stepbytes" in values:
        typed.overrides += _sizes(values)
    if values.get("stepfactor") == "1" and "stepbytes" not in values:
        typed.overrides.append("collectives.step_size=1M")  # as there: a factor of 1 multiplies nothing
    if float(values.get("timeout", 0)):
        typed.overrides.append(
            f"resilience.timeouts.patience={float(values['timeout']) / FACTORS['collective']:g}"
        )
    if values.get("local_register") == "1":
        typed.environment["TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK"] = "1"
    if "cta_policy" in values:
        typed.environment["NCCL_CTA_POLICY"] = values["cta_policy"]
    if "nthreads" in values or "ngpus" in values:
        typed.ranks = int(values.get("nthreads", 1)) * int(values.get("ngpus", 1))
    # What is typed counts before what the shell has exported; a rank that is started here has it in its configuration.
    if not any(word.startswith("collectives.groups=") for word in options.overrides) and PARENT not in env:
        typed.overrides += _split(env)
    typed.copy = _copy(values.get("output_file"), options.ops)
    return typed


def as_typed(message: str, options: argparse.Namespace) -> str:
    """A complaint about the configuration with the flags that were typed in place of the fields that they set."""
    for name, fields in _PASSED_ON.items():
        if getattr(options, name) is not None:
            for each in fields:
                message = re.sub(rf"(?<=e\.g\. )collectives\.{each}=", f"{_short(name)} ", message)
                message = re.sub(rf"\bcollectives\.{each}\b", _LETTERS.get(name, f"--{name}"), message)
    return message


def _short(name: str) -> str:
    return _LETTERS[name].partition(" ")[0] if name in _LETTERS else f"--{name}"


def _check(values: Mapping[str, str]) -> None:
    for name, value in values.items():
        if name in _REFUSED and value != _REFUSED[name][0]:
            raise UserError(f"{_LETTERS[name]}={value}: {_REFUSED[name][1]}")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise UserError(f"{_LETTERS[name]}={value}: type one of {', '.join(_CHOICES[name])}")
        if name in _COUNTS and not value.isdecimal():
            raise UserError(f"{_LETTERS[name]}={value}: type a whole number, such as 1")
    if values.get("blocking") == "1":
        raise UserError(
            "-z 1 has the barrier inside the time; type -z 3, which leaves it out, or -z 2 without one"
        )
    if values.get("run_cycles") == "0":
        raise UserError("-N 0 never ends; type the number of passes, such as -N 3")
    if values.get("local_register") == "2":
        raise UserError(
            "-R 2 needs symmetric memory, which torch.distributed's collectives don't take; type -R 1"
        )
    if "mulsum" in values.get("op", "").split(","):
        raise UserError(
            "-o mulsum is not among torch.distributed's reductions; type -o sum, which moves the same bytes"
        )
    for name in ("uint32", "uint64"):
        if name in values.get("datatype", "").split(","):
            raise UserError(
                f"-d {name} is not moved by torch.distributed; type -d {name[1:]}, which has the same width"
            )


def _sizes(values: Mapping[str, str]) -> list[str]:
    fields = {"minbytes": "min_size", "maxbytes": "max_size"}
    if values.get("stepfactor", "1") == "1":
        fields["stepbytes"] = "step_size"
    return [f"collectives.{fields[name]}={_bytes(values[name])}" for name in fields if name in values]


def _bytes(text: str) -> str:
    """`1.5M` as `1572864`; what isn't a size stays, so that the field's own check says what is wrong."""
    match = _SIZE.fullmatch(text.strip())
    return str(int(Decimal(match[1]) * _UNITS[match[2].upper()])) if match else text


def _at_least(name: str, text: str) -> list[str]:
    """`-n` and `-w`: as many as typed, above the usual most."""
    above = text.isdecimal() and int(text) > _USUAL_MOST[name]
    return [f"min_{name}={text}", *([f"max_{name}={text}"] if above else [])]


_SET = {
    # As there, a factor above 1 counts, whatever the step.
    "stepfactor": lambda text: [] if text == "1" else [f"step_factor={text}", "step_size=null"],
    "iters": lambda text: _at_least("iterations", text),
    "warmup_iters": lambda text: (
        ["min_warmup=0", "max_warmup=0"] if text == "0" else _at_least("warmup", text)
    ),
    "run_cycles": lambda text: [f"passes={text}"],
    "check": lambda text: [f"check={text}"],
    "op": lambda text: [f"reductions={'sum,prod,max,min,avg' if text == 'all' else text}"],
    "datatype": lambda text: [f"dtypes={_TYPES if text == 'all' else text}"],
    "root": lambda text: ["every_root=true" if text == "all" else f"root={text}"],
    "blocking": lambda text: [f"sync={ {'0': 'loop', '2': 'wait', '3': 'barrier'}[text] }"],
    "cudagraph": lambda text: [f"timer={'graph' if int(text) else 'auto'}"],
    "average": lambda text: [f"average={('rank0', 'mean', 'min', 'max')[int(text)]}"],
    "unalign": lambda text: [f"unalign={text}"],
}
"""Fields of `collectives` by flag."""


def _split(env: Mapping[str, str]) -> list[str]:
    """nccl-tests' own variables for groups that run at once."""
    if mask := env.get("NCCL_TESTS_SPLIT_MASK"):
        return [f"collectives.groups=AND0x{mask.lower().removeprefix('0x')}"]
    return [f"collectives.groups={split}"] if (split := env.get("NCCL_TESTS_SPLIT")) else []


def _copy(path: str | None, ops: str | None) -> Path | None:
    if path is None:
        return None
    if not path.endswith(".json"):
        raise UserError(f"-J {path}: only JSON is written; type a name that ends in .json")
    if "," in (ops or ""):
        raise UserError(
            f"-J {path} takes one operation, and --ops={ops} has several; each has its JSON in --out"
        )
    return Path(path)
