"""Defects of tensor, context and pipeline parallelism, and of what a rank holds."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_APPLY = "trainer/parallel/apply.py"
_COLLECTIVES = "trainer/parallel/exchange.py"
_CONTEXT = "trainer/parallel/context.py"
_DECODER = "trainer/model/decoder.py"
_MESH = "trainer/parallel/mesh.py"
_NORM = "trainer/model/norm.py"
_PIPELINE = "trainer/parallel/pipeline.py"
_STAGES = "trainer/parallel/stages.py"
_TENSOR = "trainer/parallel/tensor.py"
_LOSS = "trainer/kernels/loss.py"

_TEST = "tests/trainer/parallel/test_parallel.py::test_"
_LAYERS = f"{_TEST}tensor_parallel_layers[2]"
_VOCABULARY = f"{_TEST}a_vocabulary_that_is_split[2]"
_KERNELS = f"{_TEST}seams_by_kernels[vocabulary_by_kernels-more0-0.01]"
_PARTS = (
    "tests/trainer/model/test_kernels.py::test_parts_of_a_vocabulary_make_the_whole_loss_and_its_grads[20000]"
)
_ATTENTION = f"{_TEST}attention_over_split_samples"
_BEFORE = f"{_TEST}the_token_before_may_be_anothers"
_QUEUES = f"{_TEST}queues_and_totals_of_split_samples"
_MESHED = "tests/trainer/parallel/test_mesh.py::test_"
_AXIS = f"{_TEST}a_step_under_every_axis"

MUTANTS = [
    # Tensor parallelism.
    Mutant(
        "partial results aren't summed",
        _TENSOR,
        "return exchange.reduce_scatter(x_BSD, self._axis, 1)\n\n    def sum",
        "return x_BSD.chunk(self.size, 1)[self.index]\n\n    def sum",
        _LAYERS,
    ),
    Mutant(
        "the gradient of what is gathered isn't summed",
        _COLLECTIVES,
        "return reduce_scatter_raw(gradient, ctx.axis, ctx.dim), None, None",
        "return gradient.chunk(ctx.axis.size, ctx.dim)[ctx.axis.index].contiguous(), None, None",
        _LAYERS,
    ),
    Mutant(
        "the gradient of a sum is one rank's",
        _COLLECTIVES,
        "return all_reduce_raw(gradient, ctx.axis), None",
        "return gradient, None",
        _LAYERS,
    ),
    Mutant(
        "a split norm's mean is one rank's",
        _NORM,
        "self.tensors.sum(full.square().sum(dim=-1, keepdim=True))",
        "self.tensors.size * full.square().sum(dim=-1, keepdim=True)",
        _LAYERS,
    ),
    Mutant(
        "a split norm leaves out eps",
        _NORM,
        "torch.rsqrt(mean + self.eps)",
        "torch.rsqrt(mean)",
        _LAYERS,
    ),
    Mutant(
        "a rank takes another's part",
        _TENSOR,
        "return x.chunk(self.size, dim)[self.index]",
        "return x.chunk(self.size, dim)[self.size - 1 - self.index]",
        _LAYERS,
    ),
    Mutant(
        "parts are put together in another order",
        _COLLECTIVES,
        "return parts.movedim(0, dim).flatten(dim, dim + 1)",
        "return parts.flip(0).movedim(0, dim).flatten(dim, dim + 1)",
        _LAYERS,
    ),
    Mutant(
        "ids of another rank's rows embed to this one's first",
        _TENSOR,
        ".masked_fill(~mine.unsqueeze(-1), 0.0)\n        return exchange.reduce_scatter",
        "\n        return exchange.reduce_scatter",
        _VOCABULARY,
    ),
    Mutant(
        "the embedding's offset is left out",
        _TENSOR,
        "local = tokens_BS - self._axis.index * weight_vD.shape[0]",
        "local = tokens_BS - 0 * weight_vD.shape[0]",
        _VOCABULARY,
    ),
    Mutant(
        "the loss's offset is left out",
        _TENSOR,
        "local_T = targets_T - axis.index * logits_Tv.shape[1]",
        "local_T = targets_T - 0 * logits_Tv.shape[1]",
        _VOCABULARY,
    ),
    Mutant(
        "ranks shift logits by maxima of their own",
        _TENSOR,
        "        dist.all_reduce(top_T, op=dist.ReduceOp.MAX, group=group)\n",
        "",
        _VOCABULARY,
    ),
    Mutant(
        "every rank counts the loss of all tokens",
        _TENSOR,
        "(mine & (targets_BS >= 0))",
        "(targets_BS >= 0)",
        _VOCABULARY,
    ),
    Mutant(
        "targets below 0 count",
        _TENSOR,
        "(mine & (targets_BS >= 0))",
        "mine",
        _VOCABULARY,
    ),
    Mutant(
        "the loss's gradient stays on the token's rank",
        _TENSOR,
        "        dist.all_reduce(gradient_T, group=ctx.axis.process_group)\n",
        "",
        _VOCABULARY,
    ),
    Mutant(
        "the target's row isn't taken off the gradient",
        _TENSOR,
        "out_Tv[rows, local_T] -= gradient_T * mine_T",
        "out_Tv[rows, local_T] -= 0 * gradient_T",
        _VOCABULARY,
    ),
    Mutant(
        "what tp ranks have alike isn't summed",
        _APPLY,
        "Partition(Box.full(whole[name]), alike=True)",
        "Partition(Box.full(whole[name]), alike=False)",
        f"{_AXIS}[tp-tied]",
    ),
    # Context parallelism.
    Mutant(
        "places are put together in the order of ranks",
        _CONTEXT,
        "for index in range(size)]",
        "for index in reversed(range(size))]",
        f"{_ATTENTION}[True-0-gather-2]",
    ),
    Mutant(
        "pieces of the far end aren't put back in the order of the sample",
        _CONTEXT,
        "*reversed(pieces[1::2])",
        "*pieces[1::2]",
        f"{_ATTENTION}[False-0-gather-2]",
    ),
    Mutant(
        "pieces aren't dealt out from both ends",
        _CONTEXT,
        "pieces[index], pieces[2 * size - 1 - index]",
        "pieces[index], pieces[size + index]",
        f"{_TEST}gathering_gives_every_rank_equal_work[2]",
    ),
    Mutant(
        "heads come back in another order",
        _CONTEXT,
        "self._axis).movedim(0, 1).flatten(1, 2)",
        "self._axis).movedim(0, 2).flatten(1, 2)",
        f"{_ATTENTION}[False-0-ulysses-2]",
    ),
    Mutant(
        "a rank's heads are of its own tokens' order",
        _CONTEXT,
        "self._axis).movedim(0, 2).flatten(2, 3)",
        "self._axis).flip(0).movedim(0, 2).flatten(2, 3)",
        f"{_ATTENTION}[False-0-ulysses-2]",
    ),
    Mutant(
        "values of other ranks stay there",
        _CONTEXT,
        "v_BGSH = exchange.all_gather(v_BGSH, self._axis, 2)",
        "v_BGSH = v_BGSH.repeat(1, 1, self._axis.size, 1)",
        f"{_ATTENTION}[False-0-gather-2]",
    ),
    Mutant(
        "documents are forgotten under context parallelism",
        _CONTEXT,
        "            micro.documents_BS,\n            window,",
        "            None,\n            window,",
        f"{_ATTENTION}[True-0-gather-2]",
    ),
    Mutant(
        "the token before a stretch is the stretch's first",
        _CONTEXT,
        "last_places == spots[0] - 1",
        "last_places == spots[0]",
        f"{_BEFORE}[False-gather-2]",
    ),
    Mutant(
        "the token before a stretch is another stretch's",
        _CONTEXT,
        "for p in self.all_positions(micro).chunk(runs * self._axis.size)",
        "for p in reversed(self.all_positions(micro).chunk(runs * self._axis.size))",
        f"{_BEFORE}[False-ulysses-2]",
    ),
    Mutant(
        "totals are one rank's",
        _CONTEXT,
        "return exchange.all_reduce_raw(x.detach(), self._axis)",
        "return x.detach().clone()",
        f"{_QUEUES}[2-2-gather]",
    ),
    Mutant(
        "queues are counted in the order of ranks",
        _CONTEXT,
        "order = torch.cat(stretches).argsort()",
        "order = torch.cat(stretches).argsort().sort().values",
        f"{_QUEUES}[2-2-gather]",
    ),
    Mutant(
        "tp's parts of a sample are forgotten in the queue",
        _CONTEXT,
        "in_order.index_select(1, stretches[self._axis.index])",
        "in_order.index_select(1, stretches[self._axis.index - self._axis.index % self._tp])",
        f"{_QUEUES}[2-1-gather]",
    ),
    # Pipelines.
    Mutant(
        "a pipeline divides its gradients",
        _PIPELINE,
        '"scale_grads": False',
        '"scale_grads": True',
        f"{_AXIS}[pp]",
    ),
    Mutant(
        "a pipeline's loss is a micro-batch's mean",
        _PIPELINE,
        "for loss in losses]).sum()",
        "for loss in losses]).mean()",
        f"{_AXIS}[pp]",
    ),
    Mutant(
        "every micro-batch is the first one",
        _PIPELINE,
        "self.micros[int(index)]",
        "self.micros[0 * int(index)]",
        f"{_AXIS}[pp]",
    ),
    Mutant(
        "the V's second stages lie in a row",
        _STAGES,
        "return [index, 2 * pp - 1 - index]",
        "return [index, pp + index]",
        f"{_MESHED}layers_are_cut_evenly_and_stages_dealt_out",
    ),
    Mutant(
        "the last stage gets the layers that are over",
        _STAGES,
        "each + (part < more)",
        "each + (part >= parts - more)",
        f"{_MESHED}layers_are_cut_evenly_and_stages_dealt_out",
    ),
    Mutant(
        "the router's state ends with the stage",
        _DECODER,
        "state_BSR = x[..., self.config.hidden :]",
        "state_BSR = None",
        "tests/trainer/model/test_model.py::test_stages_in_a_row_are_the_whole_model[1-zaya]",
    ),
    # What a rank holds.
    Mutant(
        "every rank has the first part",
        _APPLY,
        "s + axis.index * size if d == dim else s for d, s in enumerate(box.start)",
        "s + 0 * axis.index * size if d == dim else s for d, s in enumerate(box.start)",
        f"{_AXIS}[tp-tied]",
    ),
    Mutant(
        "every shard begins as the first one",
        _APPLY,
        "begin = min(axis.index * size, whole)",
        "begin = min(0 * size, whole)",
        f"{_AXIS}[dp-zero3]",
    ),
    Mutant(
        "data-parallel gradients are averaged",
        _APPLY,
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(2.0)",
        f"{_AXIS}[dp-zero2]",
    ),
    Mutant(
        "recomputed blocks count again",
        _APPLY,
        "return nullcontext(), micro.tally.again()",
        "return nullcontext(), nullcontext()",
        f"{_AXIS}[cp-mtp]",
    ),
    Mutant(
        "experts' copies are sought among the wrong ranks",
        _MESH,
        '"edp": sparse(range(edp), [e], [f])',
        '"edp": sparse([x], [e], [f])',
        f"{_MESHED}groups_are_those_of_the_coordinates",
    ),
    # The loss by kernels, of a whole vocabulary and of a split one.
    Mutant(
        "targets behind the first columns that are read have another's logit",
        _LOSS,
        "start_of_row + tl.maximum(target, 0)",
        "start_of_row + tl.minimum(tl.maximum(target, 0), COLUMNS - 1)",
        "tests/trainer/model/test_kernels.py::test_cross_entropy[5000]",
    ),
    Mutant(
        "a part takes targets of the parts behind it for its own",
        _LOSS,
        "mine = (target >= 0) & (target < width)",
        "mine = (target >= 0) & (target <= width)",
        _PARTS,
    ),
    Mutant(
        "a part has targets as the whole numbers them",
        _LOSS,
        "target = tl.load(targets + row) - first\n",
        "target = tl.load(targets + row)\n",
        _PARTS,
    ),
    Mutant(
        "tokens with targets in parts before it have no gradient",
        _LOSS,
        "lse, target - first, target >= 0, width",
        "lse, target - first, target >= first, width",
        _PARTS.replace("20000", "300"),  # where its share of a gradient's norm is large enough
    ),
    Mutant(
        "sums of columns keep their old top",
        _LOSS,
        "total = total * tl.exp(top - seen) + tl.exp(one - seen)",
        "total = total + tl.exp(one - seen)",
        _PARTS,
    ),
    Mutant(
        "a turn begins one tile after the last",
        _LOSS,
        "range(0, width, 4 * COLUMNS)",
        "range(0, width, COLUMNS)",
        _PARTS,
    ),
    Mutant(
        "one tile of a turn isn't summed",
        _LOSS,
        "total += tl.exp(three - seen) + tl.exp(four - seen)",
        "total += tl.exp(three - seen)",
        _PARTS,
    ),
    Mutant(
        "all tokens' grads have the first one's scale",
        _LOSS,
        "int(scale.numel() > 1)",
        "0",
        _KERNELS,
    ),
    Mutant(
        "grads of what goes into the head aren't scaled",
        _LOSS,
        "_times(torch.mm(grad_TV, weight_VD), scale)",
        "torch.mm(grad_TV, weight_VD)",
        "tests/trainer/model/test_kernels.py::test_cross_entropy[5000]",
    ),
    Mutant(
        "kernels take a part's logit of the target for that of the whole",
        _TENSOR,
        "parts_n2T[:, 1].sum(dim=0)",
        "parts_n2T[axis.index, 1]",
        _KERNELS,
    ),
    Mutant(
        "grads of others' shares are those of this rank's",
        _TENSOR,
        "grads_n = exchange.all_gather_raw(grad.reshape(1), ctx.axis, 0)",
        "grads_n = grad.reshape(1).repeat(ctx.axis.size)",
        _KERNELS,
    ),
    Mutant(
        "shares' grads go to every second token",
        _TENSOR,
        "grads_n.repeat_interleave(x_BSD.shape[1] // ctx.axis.size)",
        "grads_n.repeat(x_BSD.shape[1] // ctx.axis.size)",
        _KERNELS,
    ),
    Mutant(
        "tokens that don't count have a loss by kernels",
        _TENSOR,
        "losses_BS = torch.where(targets_T >= 0, lse_T - logit_T, 0.0)",
        "losses_BS = (lse_T - logit_T)",
        _KERNELS,
    ),
    Mutant(
        "gradients are worked out where nobody learns",
        _TENSOR,
        "        if learn:\n            kernels.logits_to_grads",
        "        if True:\n            kernels.logits_to_grads",
        _KERNELS,
    ),
    Mutant(
        "a split vocabulary never takes the kernels",
        _TENSOR,
        "        if use_kernels(x_BSD):",
        "        if False:",
        _KERNELS,
    ),
]
