"""Defects around a step: weights of losses, the norm, clipping, skipping, accumulating, what ranks sum."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_COMMON = "trainer/engines/common.py"
_NATIVE = "trainer/engines/native.py"
_MESH = "trainer/parallel/mesh.py"
_APPLY = "trainer/parallel/apply.py"
_WARMING = "trainer/kernel_warmup.py"
_RESIDENT = "trainer/parallel/resident.py"
_ACCUMULATE = "trainer/parallel/accumulate.py"

_RUN = "tests/trainer/test_reference_runs.py::test_a_run"
_AXIS = "tests/trainer/parallel/test_parallel.py::test_a_step_under_every_axis"


def _beside(ranks: int) -> str:
    return f"tests/trainer/parallel/test_resident.py::test_weights_beside_their_masters_train_as_under_fsdp[{ranks}]"


_BESIDE = _beside(1)
_ADDED = "tests/trainer/parallel/test_accumulate.py::test_"
_GROUPS = "tests/trainer/parallel/test_mesh.py::test_"
_WARM = "tests/trainer/engines/test_kernel_warmup.py::test_"
_CLIPPING = "tests/trainer/engines/test_common.py::test_clipping_by_hand"

MUTANTS = [
    Mutant(
        "experts that FSDP leaves alone fill its units",
        _APPLY,
        "for parameter in block.parameters() if parameter not in left)",
        "for parameter in block.parameters())",
        "tests/trainer/parallel/test_resident.py::test_blocks_share_a_collective_by_what_fsdp_has_of_them[True-False-2]",
    ),
    Mutant(
        "losses are weighted by micro-batches",
        _COMMON,
        "weight = 1.0 / samples",
        "weight = 1.0 / len(batches)",
        f"{_RUN}[adamw]",
    ),
    Mutant(
        "document masks don't reach the model",
        _COMMON,
        "b.documents_BS, weight, tally",
        "None, weight, tally",
        f"{_RUN}[adamw]",
    ),
    Mutant(
        "gradients aren't clipped",
        _COMMON,
        "(limit / (norm + 1e-6)).clamp(max=1.0) if limit > 0",
        "torch.ones_like(norm) if limit > 0",
        f"{_RUN}[adamw-clipped]",
    ),
    Mutant(
        "small gradients are scaled up",
        _COMMON,
        "(limit / (norm + 1e-6)).clamp(max=1.0)",
        "(limit / (norm + 1e-6))",
        _CLIPPING,
    ),
    Mutant(
        "no clipping is a limit of 0",
        _COMMON,
        "if limit > 0 else",
        "if limit >= 0 else",
        f"{_RUN}[adamw-not-clipped]",
    ),
    Mutant(
        "gradients that aren't finite are used",
        _COMMON,
        "(~torch.isfinite(norm)).to(torch.float32)",
        "torch.zeros_like(norm)",
        f"{_RUN}[adamw]",
    ),
    Mutant(
        "only NaN is skipped",
        _COMMON,
        "(~torch.isfinite(norm))",
        "torch.isnan(norm)",
        _CLIPPING,
    ),
    Mutant(
        "the norm is the square of a sum",
        _COMMON,
        "parts.append(torch.dot(chunk_fp64, chunk_fp64))",
        "parts.append(chunk_fp64.sum())",
        "tests/trainer/engines/test_common.py::test_the_norm_by_hand",
    ),
    Mutant(
        "the norm is of first pieces",
        _COMMON,
        "gradient.flatten().split(_CHUNK_ELEMENTS)",
        "gradient.flatten().split(_CHUNK_ELEMENTS)[:1]",
        "tests/trainer/engines/test_common.py::test_the_norm_by_hand",
    ),
    Mutant(
        "the norm is one rank's",
        _COMMON,
        "    if world > 1:\n        dist.all_reduce(sums)",
        "    if world > 99:\n        dist.all_reduce(sums)",
        f"{_AXIS}[dp-zero2]",
    ),
    Mutant(
        "the load is one rank's",
        _COMMON,
        "if world > 1 and row:",
        "if world > 99 and row:",
        f"{_AXIS}[dp-zero2]",
    ),
    Mutant(
        "all routers are balanced by the first one's load",
        _COMMON,
        "[load[row[layer]] for layer in routers]",
        "[load[0] for layer in routers]",
        f"{_RUN}[adamw]",
    ),
    Mutant(
        "a skipped step moves the router's bias",
        _COMMON,
        "torch.stack(local_loads), applied, skip)",
        "torch.stack(local_loads), applied)",
        f"{_RUN}[adamw]",
    ),
    Mutant(
        "the auxiliary loss is the first router's",
        _COMMON,
        "torch.stack(tally.losses).sum()",
        "tally.losses[0]",
        f"{_RUN}[adamw-ramp]",
    ),
    Mutant(
        "drops are the first router's",
        _COMMON,
        "torch.stack(tally.dropped).sum()",
        "tally.dropped[0]",
        f"{_RUN}[adamw-selective]",
    ),
    Mutant(
        "weights stay behind a state that was loaded",
        _NATIVE,
        "        copy_masters_to_weights(self._shards)\n",
        "",
        _BESIDE,
    ),
    Mutant(
        "a micro-batch's gradient is lost",
        _RESIDENT,
        "gradient if earlier is None else accumulate(earlier, gradient)",
        "gradient",
        f"{_ADDED}sums_are_the_librarys_and_the_first_gradient_waits_in_bf16[1]",
    ),
    Mutant(
        "gradients add up in bf16",
        _ACCUMULATE,
        "return earlier.float().add_(gradient)",
        "return earlier.add_(gradient)",
        f"{_ADDED}sums_are_the_librarys_and_the_first_gradient_waits_in_bf16[1]",
    ),
    Mutant(
        "the first gradient is cast before the second is there",
        _RESIDENT,
        "gradient if earlier is None else",
        "gradient.float() if earlier is None else",
        f"{_ADDED}the_first_gradient_isnt_moved_and_each_later_one_in_one_pass",
    ),
    Mutant(
        "a lone gradient of several micro-batches stays bf16",
        _RESIDENT,
        "self._sums.pop(name).float()",
        "self._sums.pop(name)",
        f"{_ADDED}what_one_micro_batch_of_several_used_is_taken_in_fp32",
    ),
    Mutant(
        "FSDP casts the first gradient before the second is there",
        _APPLY,
        "        defer_first_cast(module)\n",
        "",
        f"{_ADDED}sums_are_the_librarys_and_the_first_gradient_waits_in_bf16[2]",
    ),
    Mutant(
        "FSDP reduces gradients of two dtypes",
        _ACCUMULATE,
        "earlier.float() if gradient is None else",
        "earlier if gradient is None else",
        f"{_ADDED}a_weight_that_later_micro_batches_leave_out_is_reduced_with_the_others[1]",
    ),
    Mutant(
        "FSDP adds a gradient twice",
        _ACCUMULATE,
        "        self.unsharded_accumulated_grad = total\n        self._unsharded_param.grad = None",
        "        self.unsharded_accumulated_grad = total",
        f"{_ADDED}sums_are_the_librarys_and_the_first_gradient_waits_in_bf16[2]",
    ),
    Mutant(
        "an unknown FSDP's methods are replaced",
        _ACCUMULATE,
        "if not issubclass(own, _DeferredCast) and all(hasattr",
        "if not issubclass(own, _DeferredCast) and any(hasattr",
        f"{_ADDED}a_torch_whose_fsdp_has_other_names_keeps_its_own_way",
    ),
    Mutant(
        "sums are a kernel's of tensors that lie otherwise",
        _ACCUMULATE,
        "use_kernels(gradient) and contiguous and",
        "use_kernels(gradient) and",
        f"{_ADDED}the_kernels_sum_is_fp32s",
    ),
    Mutant(
        "a kernel adds a gradient to itself",
        "trainer/kernels/accumulate.py",
        "other = tl.load(gradient + at",
        "other = tl.load(earlier + at",
        f"{_ADDED}the_kernels_sum_is_fp32s",
    ),
    Mutant(
        "small weights learn from one rank's tokens",
        "trainer/parallel/exchange.py",
        "    if axis.size > 1:\n",
        "    if axis.size > 9:\n",
        _beside(2),
    ),
    Mutant(
        "small gradients count twice",
        _RESIDENT,
        "all_reduce_packed(parts, self._axis)",
        "[2 * one for one in all_reduce_packed(parts, self._axis)]",
        _beside(1),
    ),
    Mutant(
        "small weights count in the norm once for each rank",
        _NATIVE,
        "replica, replicas = replica + replicas * data.index, replicas * data.size",
        "pass",
        _beside(2),
    ),
    Mutant(
        "weights stay behind LAMB's masters",
        "trainer/optim/lamb.py",
        "        copy_masters_to_weights(state.shard for state in nonempty)\n",
        "",
        _BESIDE,
    ),
    Mutant(
        "weights stay behind Muon's masters",
        "trainer/optim/muon.py",
        "        copy_masters_to_weights(state.shard for state in self._states.values())\n",
        "",
        _BESIDE,
    ),
    Mutant(
        "weights stay behind AdamW's masters",
        "trainer/optim/adamw.py",
        "            copy_masters_to_weights(state.shard for state in states)\n",
        "",
        _BESIDE,
    ),
    Mutant(
        "gradients aren't reset",
        _NATIVE,
        "                parameter.grad = None",
        "                pass",
        f"{_RUN}[adamw]",
    ),
    Mutant(
        "a step's loss is its last micro-batch's",
        _NATIVE,
        "            losses.append(share.detach())\n        return torch.stack(losses).sum()",
        "            losses.append(share.detach())\n        return losses[-1]",
        f"{_RUN}[adamw]",
    ),
    Mutant(
        "evaluation is of the last micro-batch",
        _NATIVE,
        "return torch.stack(shares).sum()",
        "return shares[-1]",
        "tests/trainer/parallel/test_parallel.py::test_evaluation_is_the_loss_and_moves_nothing[one]",
    ),
    Mutant(
        "ZeRO 1 never reduces what it accumulated",
        _NATIVE,
        "_set_backward_sync(stage, reduce_each or last,",
        "_set_backward_sync(stage, reduce_each,",
        f"{_AXIS}[dp-zero1]",
    ),
    Mutant(
        "a pipeline's gradients aren't reduced",
        _NATIVE,
        "                    reduce_now(stage)",
        "                    pass",
        f"{_AXIS}[dp-pp]",
    ),
    Mutant(
        "what tp ranks have alike has one rank's gradient",
        _NATIVE,
        "                shard.set_gradient(total)\n",
        "                pass\n",
        f"{_AXIS}[tp-tied]",
    ),
    Mutant(
        "gradients of tp ranks are mixed up",
        "trainer/parallel/exchange.py",
        "one.view_as(part) for one",
        "one.flip(0).view_as(part) for one",
        f"{_AXIS}[tp-tied]",
    ),
    Mutant(
        "the norm counts a replica twice",
        _NATIVE,
        "if shard.replica == 0 and not copy and",
        "if not copy and",
        f"{_AXIS}[tp-tied]",
    ),
    Mutant(
        "the norm counts a tied table twice",
        _NATIVE,
        "if shard.replica == 0 and not copy and",
        "if shard.replica == 0 and",
        f"{_AXIS}[pp]",
    ),
    Mutant(
        "tied copies on two ranks aren't summed",
        _NATIVE,
        "            dist.all_reduce(gradients[0], group=self._embedding_group)",
        "            pass",
        f"{_AXIS}[pp]",
    ),
    Mutant(
        "tied copies on one rank aren't summed",
        _NATIVE,
        "total = gradients[0] + gradients[1]",
        "total = gradients[0] + 0",
        f"{_AXIS}[pp-zbv-tied]",
    ),
    Mutant(
        "a rank's place is its number",
        _NATIVE,
        'self.data_parallel = DataParallelRank(mesh["dp"].index, mesh["dp"].size)',
        "self.data_parallel = DataParallelRank(mesh.rank, mesh.world)",
        f"{_AXIS}[cp]",
    ),
    Mutant(
        "every rank works on the first places of a sample",
        _NATIVE,
        'mesh["cp"].size, mesh["cp"].index, mesh.device\n',
        'mesh["cp"].size, 0, mesh.device\n',
        f"{_AXIS}[cp]",
    ),
    Mutant(
        "the build's collectives don't wait for their communicators",
        _APPLY,
        '    mesh.communicators.wait(mesh["dp_cp"], mesh["edp"])\n',
        "",
        f"{_GROUPS}no_collective_of_the_build_comes_before_its_communicator",
    ),
    Mutant(
        "the build waits for every communicator",
        _APPLY,
        'mesh.communicators.wait(mesh["dp_cp"], mesh["edp"])',
        "mesh.communicators.wait()",
        f"{_GROUPS}no_collective_of_the_build_comes_before_its_communicator",
    ),
    Mutant(
        "communicators are made and not used",
        _MESH,
        "                _use(backend, group.size(), device)\n",
        "",
        f"{_GROUPS}communicators_are_made_once_each_in_the_order_of_axes",
    ),
    Mutant(
        "a communicator that can't be made is waited for forever",
        _MESH,
        "            for made in self._made.values():\n                made.set()\n",
        "            pass\n",
        f"{_GROUPS}a_communicator_that_cannot_be_made_ends_the_start",
    ),
    Mutant(
        "libraries are asked for what they can't do",
        _WARMING,
        "F.grouped_mm(x, weights, offs",
        "F.grouped_mm(x, weights.transpose(1, 2), offs",
        f"{_WARM}what_libraries_are_asked_for_can_be_had[_grouped]",
    ),
]
