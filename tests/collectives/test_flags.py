"""nccl-tests' flags: every one of them is done, mapped, or refused in one line that says why."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from collectives import cli, flags
from collectives.launch import refuse_both
from configs.compose import compose
from configs.errors import UserError
from configs.fabric import CollectivesConfig

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

THEIRS = {
    "t": "nthreads", "g": "ngpus", "b": "minbytes", "e": "maxbytes", "i": "stepbytes", "f": "stepfactor", "n": "iters",
    "m": "agg_iters", "w": "warmup_iters", "N": "run_cycles", "p": "parallel_init", "c": "check", "o": "op",
    "d": "datatype", "r": "root", "z": "blocking", "y": "stream_null", "T": "timeout", "G": "cudagraph",
    "C": "report_cputime", "S": "report_timestamps", "J": "output_file", "a": "average", "R": "local_register",
    "x": "cta_policy", "D": "device_implementation", "V": "device_cta_count", "M": "memory", "u": "unalign",
    "I": "per_iter_timing", "K": "per_iter_skip",
}  # fmt: skip
"""As release 2.19.6 declares them."""


def typed(words: str) -> flags.ParsedFlags:
    return flags.read(cli.parse(["run", *shlex.split(words)]), {})


def configured(words: str) -> CollectivesConfig:
    return compose(cli.overrides(cli.parse(["run", *shlex.split(words)]))).collectives


def test_all_their_flags_are_known_by_both_names() -> None:
    assert {letter[1:]: name for letter, name, _, _ in flags.FLAGS} == THEIRS


USUAL = {
    "average": "1", "stepfactor": "2", "iters": "20", "agg_iters": "1", "warmup_iters": "1",
    "run_cycles": "1", "check": "1",
    "op": "sum", "datatype": "float", "minbytes": "8", "maxbytes": "8M", "stepbytes": "1M", "nthreads": "1", "ngpus": "8",
    "output_file": "a.json", "device_cta_count": "16",
}  # fmt: skip
"""nccl-tests' own defaults, or its README's values; 0 elsewhere."""


@pytest.mark.parametrize("letter", THEIRS)
def test_their_default_is_accepted_by_letter_and_by_name(letter: str) -> None:
    value = USUAL.get(THEIRS[letter], "0")
    assert typed(f"-{letter} {value}") == typed(f"--{THEIRS[letter]} {value}")


def test_their_defaults_together_are_a_configuration() -> None:
    configured(" ".join(f"-{letter} {USUAL.get(name, '0')}" for letter, name in THEIRS.items()))


def test_the_first_command_of_their_readme() -> None:
    words = "-b 8 -e 128M -f 2 -g 8"
    assert typed(words).ranks == 8
    settings = configured(words)
    assert (settings.min_size, settings.max_size, settings.step_factor) == (8, 128 << 20, 2)


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("-b 1.5M -e 2.5GiB -i .5K", {"min_size": 3 << 19, "max_size": 5 << 29, "step_size": 512}),
        ("-e 100kb", {"max_size": 102400}),
        ("-f 1", {"step_size": 1 << 20}),
        ("-f 1 -i 64", {"step_size": 64, "step_factor": 2}),
        ("-f 3", {"step_factor": 3, "step_size": None}),
        ("-f 3 -i 1M", {"step_factor": 3, "step_size": None}),
        ("-f 3 collectives.step_size=4K", {"step_factor": 3, "step_size": None}),
        ("-n 1", {"min_iterations": 1, "max_iterations": 1000}),
        ("-n 5000 -w 500", {"min_iterations": 5000, "max_iterations": 5000, "min_warmup": 500, "max_warmup": 500}),
        ("-w 0", {"min_warmup": 0, "max_warmup": 0}),
        ("-N 3", {"passes": 3}),
        ("-c 0", {"check": 0}),
        ("-c 4", {"check": 4}),
        ("-o all", {"reductions": ("sum", "prod", "max", "min", "avg")}),
        ("-d all", {"dtypes": tuple(flags._TYPES.split(","))}),
        ("-d f8e4m3", {"dtypes": ("f8e4m3",)}),
        ("-r all", {"every_root": True}),
        ("-r 3", {"root": 3, "every_root": False}),
        ("-z 0", {"sync": "loop"}),
        ("-z 2", {"sync": "wait"}),
        ("-z 3", {"sync": "barrier"}),
        ("-G 0", {"timer": "auto"}),
        ("-G 10 hardware=h100", {"timer": "graph"}),
        ("-a 0", {"average": "rank0"}),
        ("-a 1", {"average": "mean"}),
        ("-a 2", {"average": "min"}),
        ("-a 3", {"average": "max"}),
        ("-u 1", {"unalign": 1}),
        ("-I 1 -S 1 -p 1 -V 32 -M 0 -C 0 -y 0 -D 0 -K 0 -m 1 -R 0", {}),
    ],
)  # fmt: skip
def test_what_a_flag_sets(words: str, fields: dict[str, object]) -> None:
    usual = compose(["workload=collectives"]).collectives
    assert configured(words) == usual.model_copy(update=fields)


def test_a_size_of_many_digits_is_refused_and_no_infinity() -> None:
    with pytest.raises(UserError, match=r"max_size=10\d+\.\.\. must be at most \d+; type e.g."):
        configured(f"-b 8 -e 1{'0' * 400}G")


def test_ranks_timeouts_and_variables_of_flags() -> None:
    assert typed("-t 2 -g 4").ranks == 8
    assert typed("-b 8").ranks is None
    assert typed("-R 1 -x 2").environment == {
        "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK": "1",
        "NCCL_CTA_POLICY": "2",
    }
    config = compose(cli.overrides(cli.parse(["run", "-T", "60"])))
    assert config.resilience.timeouts.seconds("collective") == pytest.approx(60)
    assert typed("-J out.json").copy == Path("out.json")


@pytest.mark.parametrize(
    ("env", "groups"),
    [
        ({}, ("world",)),
        ({"NCCL_TESTS_SPLIT": "MOD 8"}, ("MOD 8",)),
        ({"NCCL_TESTS_SPLIT": "AND 0x7"}, ("AND 0x7",)),
        ({"NCCL_TESTS_SPLIT_MASK": "0x7"}, ("AND0x7",)),
        ({"NCCL_TESTS_SPLIT_MASK": "7", "NCCL_TESTS_SPLIT": "MOD 2"}, ("AND0x7",)),
    ],
)
def test_their_variables_for_groups(
    env: dict[str, str], groups: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert configured("-b 8").groups == groups


def test_groups_that_are_typed_count_before_their_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a shell still had from another day took the place of what was typed."""
    monkeypatch.setenv("NCCL_TESTS_SPLIT", "MOD 2")
    assert configured("collectives.groups=world").groups == ("world",)
    monkeypatch.setenv("MEGARAY_PARENT", "1")
    assert configured("-b 8").groups == ("world",), (
        "a rank that is started here has its groups from the command"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("-m 4", "-m (agg_iters)=4: torch.distributed launches each call by itself"),
        ("-y 1", "-y (stream_null)=1: torch chooses the stream"),
        ("-C 1", "-C (report_cputime)=1: the launch is Python's here"),
        ("-D 1", "-D (device_implementation)=1: kernels of nccl-tests' own"),
        ("-M 1", "-M (memory)=1: the device's memory is nvidia-smi's or amd-smi's to report"),
        ("-K 5", "-K (per_iter_skip)=5: the warm-up lasts until times are steady"),
        ("-z 1", "-z 1 has the barrier inside the time; type -z 3"),
        ("-z 7", "-z (blocking)=7: type one of 0, 1, 2, 3"),
        ("-a 4", "-a (average)=4: type one of 0, 1, 2, 3"),
        ("-p yes", "-p (parallel_init)=yes: type one of 0, 1"),
        ("-N 0", "-N 0 never ends; type the number of passes"),
        ("-R 2", "-R 2 needs symmetric memory"),
        ("-o mulsum", "-o mulsum is not among torch.distributed's reductions; type -o sum"),
        ("-d uint32", "-d uint32 is not moved by torch.distributed; type -d int32"),
        ("-d float,uint64", "-d uint64 is not moved by torch.distributed; type -d int64"),
        ("-g four", "-g (ngpus)=four: type a whole number"),
        ("-J out.csv", "-J out.csv: only JSON is written"),
        ("-J out.json --ops all_reduce,broadcast", "-J out.json takes one operation"),
        ("-z 3 -G 1", "collectives.timer=graph (-G) excludes collectives.sync=barrier (-z)"),
        (
            "-G 1",
            "collectives.timer=graph (-G) replays graphs of a GPU, which hardware=cpu doesn't have; name the devices",
        ),
        (
            "-G 1 hardware=h100 --ops all_reduce,barrier",
            "excludes --ops=barrier, which waits on the host",
        ),
        (
            "-G 1 hardware=h100 collectives=acceptance",
            "excludes collectives.ops=barrier, which waits on the host",
        ),
        (
            "-G 1 hardware=h100 collectives.backend=gloo",
            "excludes collectives.backend=gloo, whose calls wait on the host",
        ),
        ("-G 1 hardware=h100 collectives=moe", "excludes collectives.study=moe, which replays no graphs"),
        ("-f 0", "-f (stepfactor)=0"),
        ("-b 1.5X", "megaray: -b (minbytes)='1.5X' is not a whole number; type e.g. -b 8"),
        ("--minbytes 4X collectives.max_size=5X", "collectives.max_size='5X'"),
        ("-b 16 -e 8", "-e (maxbytes)=8 is below -b (minbytes)=16; set -e (maxbytes) to at least 16"),
        ("-n 0", "-n (iters)=0 must be above 0; type e.g. -n 20"),
        ("-o foo", "-o (op)='foo' is not one of sum, prod"),
        ("--ops foo", "--ops='foo' is not one of all_reduce"),
        ("-u -1", "-u (unalign)=-1"),
        ("-g 1", "--ranks=1: a collective needs at least two ranks"),
        ("-g 2 --ranks 3", "--ranks=3 contradicts -t times -g, which are 2 ranks"),
    ],
)
def test_what_is_not_done_is_refused_with_its_reason(
    words: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["run", *shlex.split(words)]) == 2
    out, err = capsys.readouterr()
    assert told in err
    assert re.fullmatch(r"megaray: .+\n", err), err
    assert not out and not list(tmp_path.iterdir())


def test_a_flag_that_nobody_has_is_compared_with_theirs() -> None:
    with pytest.raises(
        UserError, match=r"'--minbyte' is not an option of `run` \(did you mean '--minbytes'\?\)"
    ):
        cli.parse(["run", "--minbyte", "8"])


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"RANK": "0", "WORLD_SIZE": "8"}, "torchrun"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "8"}, "srun"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "8"}, "Open MPI"),
        ({"PMI_RANK": "1", "PMI_SIZE": "8"}, "MPICH"),
    ],
)
def test_ranks_are_not_started_inside_ranks(env: dict[str, str], name: str) -> None:
    told = f"--ranks=2 inside {name}, which has started 8 ranks itself; leave --ranks (-g, -t) out, or type the command"
    with pytest.raises(UserError, match=re.escape(told)):
        refuse_both(env, 2)
    refuse_both({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "WORLD_SIZE": "8"}, 2)
