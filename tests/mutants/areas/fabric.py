"""Defects of what moves data and how it is timed: the library's calls, buffers, bursts, memory, nccl-tests beside it."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_NCCL = "collectives/ops/nccl.py"
_TRANSFERS = "collectives/ops/transfers.py"
_BURST = "collectives/timing/burst.py"
_MEASURE = "collectives/timing/measure.py"
_SWEEP = "collectives/studies/sweep.py"
_NCCL_TESTS = "tests/collectives/against_nccl_tests.py"

_OPS = "tests/collectives/ops/test_transfers.py::test_"
_OWN = "tests/collectives/ops/test_nccl.py::test_"
_TIMED = "tests/collectives/timing/test_measure.py::test_"
_ROOM = "tests/collectives/studies/test_room.py::test_"
_BESIDE = "tests/collectives/test_against_nccl_tests.py::test_"

_QUEUED = f"{_OPS}messages_are_queued_as_one_group_of_bytes_without_the_empty_ones"
_BROADCAST = f"{_OPS}a_broadcast_has_a_buffer_to_send_from_and_one_to_receive_in"
_RECEIVER = f"{_OPS}each_message_has_its_receiver_and_all_that_arrives_is_right"
_TURNS = f"{_OPS}calls_in_a_row_move_memory_of_their_own"
_PLACE = f"{_OPS}in_place_a_ranks_own_part_lies_at_its_place_in_the_whole"
_LOADED = f"{_OWN}the_library_that_torch_has_loaded_is_the_one_that_is_called[/opt/rocm/lib/librccl.so.1.0]"
_BURST_RUN = f"{_TIMED}a_burst_is_launched_in_a_row_and_waited_for_once"
_MET = f"{_TIMED}ranks_of_a_burst_meet_on_their_devices"
_HALF = f"{_ROOM}buffers_have_room_for_the_largest_message_or_half_of_the_memory"
_FREE = f"{_ROOM}a_fifth_of_what_is_free_stays_free"
_BUILT = f"{_BESIDE}programs_are_built_with_the_mpi_that_starts_them[mpi1-/opt/lib]"

MUTANTS = [
    # The library's own calls.
    Mutant(
        "messages without elements are queued",
        _NCCL,
        "            if part.numel()\n",
        "",
        _QUEUED,
    ),
    Mutant(
        "bytes of a message are its elements",
        _NCCL,
        "return ctypes.c_size_t(part.nbytes)",
        "return ctypes.c_size_t(part.numel())",
        _QUEUED,
    ),
    Mutant(
        "only the end of a group is asked for a refusal",
        _NCCL,
        "        if any(results):",
        "        if results[-1]:",
        f"{_OPS}a_refusal_is_an_error_with_its_reason[ncclSend]",
    ),
    Mutant(
        "what is in progress is taken for a refusal",
        _NCCL,
        "while state.value == _IN_PROGRESS:",
        "if state.value == _IN_PROGRESS:",
        f"{_OPS}a_communicator_that_does_not_block_is_waited_for",
    ),
    Mutant(
        "NCCL's plug-in for networks is taken for the library",
        _NCCL,
        'startswith(("libnccl.so", "librccl.so"))',
        'startswith(("libnccl", "librccl"))',
        _LOADED,
    ),
    Mutant(
        "RCCL isn't known by its name",
        _NCCL,
        'startswith(("libnccl.so", "librccl.so"))',
        'startswith("libnccl.so")',
        _LOADED,
    ),
    Mutant(
        "a communicator that doesn't exist yet isn't made",
        _NCCL,
        "    if not handle_of():\n",
        "    if False:\n",
        f"{_OWN}a_communicator_that_does_not_exist_yet_is_made_once",
    ),
    Mutant(
        "gloo's groups are taken for NCCL's",
        _NCCL,
        'if device.type == "cuda" and dist.get_backend(group) == "nccl" else None',
        'if device.type == "cuda" else None',
        f"{_OWN}groups_of_other_backends_and_devices_go_through_torch",
    ),
    Mutant(
        "a member of a group has no communicator",
        "collectives/timing/team.py",
        "self.device, communicator(group, self.device)",
        "self.device",
        f"{_OWN}a_member_has_its_groups_communicator_and_an_idle_rank_asks_for_none",
    ),
    Mutant(
        "a record says that gloo's data is moved by NCCL",
        "collectives/store/metadata.py",
        'if team.backend == "nccl" and nccl.loaded()',
        "if nccl.loaded()",
        f"{_OWN}a_record_says_whose_calls_moved_data",
    ),
    # Messages and buffers.
    Mutant(
        "a ring runs backwards",
        _TRANSFERS,
        "return [((me + 1) % n, send)], [((me - 1) % n, receive)]",
        "return [((me - 1) % n, send)], [((me + 1) % n, receive)]",
        f"{_RECEIVER}[sendrecv-False-5-3]",
    ),
    Mutant(
        "rank 0 scatters, whichever is the root",
        _TRANSFERS,
        "if self.is_root else [], [(root, receive)]",
        "if self.is_root else [], [(0, receive)]",
        f"{_RECEIVER}[scatter-False-5-3]",
    ),
    Mutant(
        "what arrives of an uneven exchange is as long as what is sent",
        _TRANSFERS,
        "list(enumerate(receive.split(receives)))",
        "list(enumerate(receive.split(sends)))",
        f"{_RECEIVER}[all_to_allv-False-5-3]",
    ),
    Mutant(
        "the library's root is a global rank",
        _TRANSFERS,
        "communicator.broadcast(send, receive, self._case.root)",
        "communicator.broadcast(send, receive, self._member.ranks[self._case.root])",
        _BROADCAST,
    ),
    Mutant(
        "the check copies what the library has to move",
        _TRANSFERS,
        "            and not self._by_library\n",
        "",
        _BROADCAST,
    ),
    Mutant(
        "in place a rank sends from the beginning of the whole",
        _TRANSFERS,
        "            return whole[mine], whole\n",
        "            return whole[:count], whole\n",
        f"{_PLACE}[all_gather]",
    ),
    Mutant(
        "in place the root receives at the beginning of the whole",
        _TRANSFERS,
        "            return whole, whole[mine]\n",
        "            return whole, whole[:count]\n",
        f"{_PLACE}[scatter]",
    ),
    Mutant(
        "room is counted in elements",
        _TRANSFERS,
        "room // (each * case.dtype.itemsize)",
        "room // each",
        f"{_TURNS}[all_reduce-False]",
    ),
    Mutant(
        "all calls receive in one place",
        _TRANSFERS,
        "self._buffers(send[turn * each :], receive[turn * each :])",
        "self._buffers(send[turn * each :], receive)",
        f"{_TURNS}[all_reduce-False]",
    ),
    Mutant(
        "calls in a row move the same memory",
        _TRANSFERS,
        "        next(self._turns)()",
        "        self._calls[0]()",
        f"{_TURNS}[all_reduce-False]",
    ),
    Mutant(
        "the second buffer isn't counted",
        _TRANSFERS,
        "        return whole if case.in_place else 2 * whole",
        "        return whole",
        f"{_ROOM}what_is_counted_is_what_is_allocated[gather-False]",
    ),
    Mutant(
        "in place there is a second buffer that nobody uses",
        _TRANSFERS,
        "send = receive if case.in_place else self._zeros(turns * each)",
        "send = self._zeros(turns * each)",
        f"{_ROOM}what_is_counted_is_what_is_allocated[all_reduce-True]",
    ),
    Mutant(
        "the check believes what an earlier call left there",
        _TRANSFERS,
        "        self._receive.fill_(1)  # no",
        "        # no",
        f"{_OPS}what_an_earlier_call_left_there_is_wrong_where_a_call_moves_nothing",
    ),
    # Bursts.
    Mutant(
        "ranks of a burst don't wait for each other's launches",
        _BURST,
        "            torch.cuda._sleep(_PAUSE)\n",
        "",
        _BURST_RUN,
    ),
    Mutant(
        "ranks of a burst don't meet",
        _BURST,
        "            align()\n",
        "",
        _BURST_RUN,
    ),
    Mutant(
        "ranks of a burst meet on their hosts",
        _MEASURE,
        "self._burst_size, self._meeting(group)",
        "self._burst_size, self._barrier(group) or _nothing",
        _MET,
    ),
    # Memory.
    Mutant(
        "each of two buffers may take all memory",
        _SWEEP,
        "min(self._settings.max_size, usable // 2)",
        "min(self._settings.max_size, usable)",
        f"{_HALF}[cuda-70-28]",
    ),
    Mutant(
        "buffers take more room than the largest message",
        _SWEEP,
        "min(self._settings.max_size, usable // 2)",
        "usable // 2",
        f"{_HALF}[cuda-1000-32]",
    ),
    Mutant(
        "memory that torch keeps for itself counts as taken",
        _SWEEP,
        "            torch.cuda.empty_cache()\n",
        "",
        f"{_FREE}[cuda]",
    ),
    Mutant(
        "ranks of a machine each take all of its memory",
        _SWEEP,
        ".available // here *",
        ".available *",
        f"{_FREE}[cpu]",
    ),
    # nccl-tests beside it.
    Mutant(
        "programs without MPI in them are compared",
        _NCCL_TESTS,
        "(ranks := ranks_of(done.stdout)) and len(ranks) < gpus",
        "not ranks_of(done.stdout)",
        f"{_BESIDE}programs_that_measure_fewer_gpus_are_refused[1]",
    ),
    Mutant(
        "nccl-tests is built without the MPI that starts it",
        _NCCL_TESTS,
        '*(("MPI=1", f"MPI_HOME={mpi}") if mpi else ()),',
        "",
        _BUILT,
    ),
    Mutant(
        "other libraries of the same names come first",
        _NCCL_TESTS,
        "[*map(str, folders), *([before] if before else [])]",
        "[*([before] if before else []), *map(str, folders)]",
        _BUILT,
    ),
]
