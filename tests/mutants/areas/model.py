"""Defects of the decoder: attention, positions, norms, layers, losses, initial weights."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_ATTENTION = "trainer/model/attention.py"
_BLOCK = "trainer/model/block.py"
_CCA = "trainer/model/compressed.py"
_DECODER = "trainer/model/decoder.py"
_INITIAL = "trainer/model/initial.py"
_LATENT = "trainer/model/latent.py"
_MOE = "trainer/model/moe.py"
_MTP = "trainer/model/mtp.py"
_NORM = "trainer/model/norm.py"
_ROTARY = "trainer/model/rotary.py"
_SEAMS = "trainer/model/seams.py"

_TEST = "tests/trainer/model/test_model.py::test_"
_SEEN = f"{_TEST}a_token_sees_what_is_before_it_and_nothing_after"
_BY_HAND = f"{_TEST}grouped_attention_by_hand"
_LATENT_BY_HAND = f"{_TEST}latent_attention_by_hand"
_MTP_BY_HAND = f"{_TEST}multi_token_prediction_by_hand[False]"
_INTERLEAVED = "tests/trainer/model/test_interleaved.py::test_"
_MIXTURE = "tests/trainer/model/test_router.py::test_the_mixture_by_hand"
_STEP = "tests/trainer/test_reference.py::test_a_step_of_every_family"
_START = "tests/trainer/model/test_initial.py::test_"

MUTANTS = [
    # Which layers have experts.
    Mutant(
        "MoE layers are counted from 0",
        "configs/model.py",
        "(layer + 1) % every == 0",
        "layer % every == 0",
        f"{_INTERLEAVED}layers_whose_number_from_1_is_a_multiple_have_experts[6-0-2-moe2]",
    ),
    Mutant(
        "a router's state is expected behind a dense layer",
        _DECODER,
        "layer > min(model.moe_layers, default=model.layers)",
        "layer > model.dense_layers",
        f"{_INTERLEAVED}a_routers_state_crosses_a_boundary_only_behind_an_moe_layer",
    ),
    Mutant(
        "only leading layers are dense to whoever cuts stages by cost",
        "trainer/sizing/time/schedule.py",
        "costs[layer in moe]",
        "costs[layer >= moe[0]]",
        f"{_INTERLEAVED}stages_that_are_cut_by_cost_know_which_layers_are_the_dear_ones",
    ),
    # Attention.
    Mutant(
        "attention isn't causal",
        _SEAMS,
        "is_causal=True",
        "is_causal=False",
        f"{_SEEN}[gqa]",
    ),
    Mutant(
        "a masked query sees the key behind it",
        _SEAMS,
        "mask = distance >= 0",
        "mask = distance >= -1",
        f"{_SEEN}[window]",
    ),
    Mutant(
        "the window is one too wide",
        _SEAMS,
        "(distance < window)",
        "(distance <= window)",
        f"{_TEST}a_window_ends_where_it_says",
    ),
    Mutant(
        "the window is left out",
        _ATTENTION,
        "micro, self.window, None)",
        "micro, 0, None)",
        f"{_TEST}a_window_ends_where_it_says",
    ),
    Mutant(
        "documents see each other",
        _SEAMS,
        "        mask = mask & (q_documents[:, :, None] == k_documents[:, None, :])",
        "        mask = mask & (q_documents[:, :, None] >= k_documents[:, None, :])",
        f"{_TEST}documents_of_a_sample_do_not_see_each_other[gqa]",
    ),
    Mutant(
        "scores aren't scaled",
        _ATTENTION,
        "micro, self.window, None)",
        "micro, self.window, 1.0)",
        f"{_BY_HAND}[none]",
    ),
    Mutant(
        "queries take turns at the key heads",
        _SEAMS,
        "            q_BNSH, k_BGSH, v_BGSH, is_causal=True, enable_gqa=gqa, scale=scale",
        "            q_BNSH, *(x.repeat(1, q_BNSH.shape[1] // x.shape[1], 1, 1) for x in (k_BGSH, v_BGSH)), "
        "is_causal=True, scale=scale",
        f"{_BY_HAND}[none]",
    ),
    Mutant(
        "norms of heads leave out the keys",
        _ATTENTION,
        "self.query_norm(q_BNSH), self.key_norm(k_BGSH)",
        "self.query_norm(q_BNSH), k_BGSH",
        f"{_BY_HAND}[head]",
    ),
    Mutant(
        "norms of projections are left out",
        _ATTENTION,
        "q, k = self.query_norm(q), self.key_norm(k)",
        "q, k = q, k",
        f"{_BY_HAND}[projection]",
    ),
    # Positions.
    Mutant(
        "nothing is rotated",
        _ATTENTION,
        "q_BNSH, k_BGSH = angles.rotate(q_BNSH), angles.rotate(k_BGSH)",
        "q_BNSH, k_BGSH = q_BNSH, k_BGSH",
        f"{_BY_HAND}[none]",
    ),
    Mutant(
        "keys aren't rotated",
        _ATTENTION,
        "angles.rotate(q_BNSH), angles.rotate(k_BGSH)",
        "angles.rotate(q_BNSH), k_BGSH",
        f"{_TEST}documents_of_a_sample_do_not_see_each_other[gqa]",
    ),
    Mutant(
        "the rotation is a reflection",
        _ROTARY,
        "second * self.cos_SP + first * self.sin_SP",
        "first * self.sin_SP - second * self.cos_SP",
        f"{_TEST}rotation_is_by_halves_and_leaves_the_rest",
    ),
    Mutant(
        "all of a head is rotated",
        _ROTARY,
        "round(model.head_dim * model.rope_fraction)",
        "model.head_dim",
        f"{_TEST}rotation_is_by_halves_and_leaves_the_rest",
    ),
    Mutant(
        "theta is left out",
        _ROTARY,
        "plain_P = self.theta**-exponent_P",
        "plain_P = 10000.0**-exponent_P",
        f"{_TEST}rotation_is_by_halves_and_leaves_the_rest",
    ),
    Mutant(
        "YaRN stretches nothing",
        _ROTARY,
        "plain_P / self.yarn.factor * ramp_P",
        "plain_P * ramp_P",
        f"{_STEP}[yarn-whole]",
    ),
    Mutant(
        "YaRN stretches the fast pairs",
        _ROTARY,
        ".clamp(0, 1)\n",
        ".clamp(0, 1).flip(0)\n",
        f"{_STEP}[yarn-whole]",
    ),
    Mutant(
        "YaRN's attention factor is left out",
        _ROTARY,
        "return 0.1 * math.log(yarn.factor) + 1.0 if",
        "return 1.0 if",
        f"{_STEP}[yarn-whole]",
    ),
    # Norms and layers.
    Mutant(
        "the norm's eps is left out",
        _NORM,
        "upcast(self.weight), self.eps)",
        "upcast(self.weight), 0.0)",
        f"{_TEST}norms_by_hand",
    ),
    Mutant(
        "the norm's weight is left out",
        _NORM,
        "upcast(self.weight), self.eps)",
        "None, self.eps)",
        f"{_TEST}norms_by_hand",
    ),
    Mutant(
        "a dense layer leaves out SiLU",
        _MOE,
        "else F.silu(self.gate(x_BSD)) * up",
        "else self.gate(x_BSD) * up",
        f"{_TEST}a_parallel_block_adds_two_layers_of_one_input",
    ),
    Mutant(
        "experts leave out SiLU",
        _MOE,
        "return F.silu(gate) * up",
        "return gate * up",
        f"{_MIXTURE}[changes0]",
    ),
    Mutant(
        "gate and up are swapped",
        _MOE,
        "gate, up = inner.chunk(2, dim=-1)",
        "up, gate = inner.chunk(2, dim=-1)",
        f"{_MIXTURE}[changes0]",
    ),
    Mutant(
        "experts without a gate have another GELU",
        _MOE,
        "return F.gelu(inner)",
        'return F.gelu(inner, approximate="tanh")',
        f"{_MIXTURE}[changes1]",
    ),
    Mutant(
        "the shared expert is left out",
        _MOE,
        "y_BSD = y_BSD + shared_BSD",
        "y_BSD = y_BSD + 0 * shared_BSD",
        f"{_STEP}[no-gate-whole]",
    ),
    Mutant(
        "the feed-forward layer's residual is lost",
        _BLOCK,
        "self.attention_norm.add_norm(x_BSD, result_of(pending))",
        "self.attention_norm.add_norm(x_BSD if pending is None else 0 * x_BSD, result_of(pending))",
        f"{_STEP}[plain-whole]",
    ),
    Mutant(
        "residuals are scaled before the bias",
        _BLOCK,
        "return (x + self.bias) * self.scale",
        "return x * self.scale + self.bias",
        f"{_TEST}residual_scaling_by_hand",
    ),
    Mutant(
        "the parallel block's layers have other inputs",
        _BLOCK,
        "self.feed_forward(h_BSD, state_BSR, micro)",
        "self.feed_forward(x_BSD, state_BSR, micro)",
        f"{_TEST}a_parallel_block_adds_two_layers_of_one_input",
    ),
    Mutant(
        "the final norm is left out",
        _DECODER,
        "self.vocabulary.loss(self.final_norm(hidden_BSD),",
        "self.vocabulary.loss(hidden_BSD,",
        f"{_STEP}[plain-whole]",
    ),
    # Latent attention.
    Mutant(
        "latent attention is scaled by the plain part alone",
        _LATENT,
        "math.sqrt(model.head_dim + model.rope_head_dim)",
        "math.sqrt(model.head_dim)",
        _LATENT_BY_HAND,
    ),
    Mutant(
        "the shared key isn't rotated",
        _LATENT,
        "angles.rotate(key.unsqueeze(1)).expand(",
        "key.unsqueeze(1).expand(",
        _LATENT_BY_HAND,
    ),
    Mutant(
        "the shared key is one head's alone",
        _LATENT,
        "k_BNSH = torch.cat((k_plain, k_turned), dim=-1)",
        "k_BNSH = torch.cat((k_plain, torch.cat((k_turned[:, :1], 0 * k_turned[:, 1:]), dim=1)), dim=-1)",
        _LATENT_BY_HAND,
    ),
    Mutant(
        "latent keys and values are swapped",
        _LATENT,
        "k_plain, v_BNSH = kv_BNSH.chunk",
        "v_BNSH, k_plain = kv_BNSH.chunk",
        _LATENT_BY_HAND,
    ),
    Mutant(
        "the latent's norm is left out",
        _LATENT,
        "latent = self.key_value_norm(latent)",
        "latent = latent * 1",
        _LATENT_BY_HAND,
    ),
    Mutant(
        "YaRN's factor isn't in latent attention's scores",
        _LATENT,
        "attention_factor(model.yarn) ** 2 /",
        "1.0 /",
        f"{_STEP}[latent-yarn-whole]",
    ),
    Mutant(
        "the shared key learns nothing",
        _LATENT,
        "joined = self.tensors.enter(torch.cat((query, latent, key), dim=-1))",
        "joined = self.tensors.enter(torch.cat((query, latent, key.detach()), dim=-1))",
        f"{_STEP}[latent-whole]",
    ),
    # Compressed attention.
    Mutant(
        "the convolution's taps are swapped",
        _CCA,
        "before_BSC * taps_C2[:, 0] + x_BSC * taps_C2[:, 1]",
        "before_BSC * taps_C2[:, 1] + x_BSC * taps_C2[:, 0]",
        f"{_STEP}[zaya-whole]",
    ),
    Mutant(
        "the second convolution's taps are swapped",
        _CCA,
        "(self.core.previous(once_BSC, micro), once_BSC)",
        "(once_BSC, self.core.previous(once_BSC, micro))",
        f"{_STEP}[zaya-whole]",
    ),
    Mutant(
        "no value is the token before's",
        _CCA,
        "before[..., queries + keys :]",
        "v[..., here:]",
        f"{_STEP}[zaya-whole]",
    ),
    Mutant(
        "queries and keys are added, not averaged",
        _CCA,
        ") * 0.5\n",
        ")\n",
        f"{_STEP}[zaya-whole]",
    ),
    Mutant(
        "the convolution reaches into the document before",
        _SEAMS,
        "(self.documents_BS != before).index_select",
        "(before < -1).index_select",
        f"{_STEP}[zaya-documents]",
    ),
    # Multi-token prediction.
    Mutant(
        "the predictor is given the token itself",
        _MTP,
        "_ahead(micro, self.depth, past=0)",
        "_ahead(micro, self.depth - 1, past=0)",
        _MTP_BY_HAND,
    ),
    Mutant(
        "the predictor's target is the main model's",
        _MTP,
        "_ahead(micro, self.depth + 1, past=-1)",
        "_ahead(micro, self.depth, past=-1)",
        _MTP_BY_HAND,
    ),
    Mutant(
        "predictions past the end count",
        _MTP,
        "past=-1)",
        "past=0)",
        _MTP_BY_HAND,
    ),
    Mutant(
        "predictions are averaged over all places",
        _DECODER,
        "max(micro.sequence - prediction.depth, 1)",
        "micro.sequence",
        _MTP_BY_HAND,
    ),
    Mutant(
        "hidden state and embedding are swapped",
        _MTP,
        "(self.hidden_norm(hidden_BSD), self.embedding_norm(embedded_BSD))",
        "(self.embedding_norm(embedded_BSD), self.hidden_norm(hidden_BSD))",
        _MTP_BY_HAND,
    ),
    # The loss.
    Mutant(
        "targets are the inputs",
        _DECODER,
        "targets_BS = micro.tokens_BS[:, 1:]",
        "targets_BS = micro.tokens_BS[:, :-1]",
        f"{_TEST}the_loss_is_the_mean_cross_entropy_of_the_next_token",
    ),
    Mutant(
        "the loss is a micro-batch's mean",
        _DECODER,
        "loss = total * (micro.loss_weight / micro.sequence)",
        "loss = total / targets_BS.numel()",
        f"{_TEST}the_loss_is_the_mean_cross_entropy_of_the_next_token",
    ),
    Mutant(
        "a head of its own isn't used",
        _DECODER,
        "table = self.embedding if self.head is None else self.head",
        "table = self.head if self.embedding is None else self.embedding",
        f"{_TEST}every_parameter_learns_and_has_its_split[gqa]",
    ),
    # Initial weights.
    Mutant(
        "the seed's high bits are lost",
        _INITIAL,
        'f"{seed}/{name}"',
        'f"{seed & 0xFFFFFFFF}/{name}"',
        f"{_START}every_bit_of_the_seed_counts",
    ),
    Mutant(
        "all parameters begin alike",
        _INITIAL,
        'f"{seed}/{name}"',
        'f"{seed}"',
        f"{_START}every_name_has_values_of_its_own",
    ),
    Mutant(
        "a part begins as the first part does",
        _INITIAL,
        "torch.arange(box.start[-1], box.start[-1] + box.shape[-1], device=device)",
        "torch.arange(box.shape[-1], device=device)",
        f"{_START}a_box_is_a_slice_of_the_whole",
    ),
    Mutant(
        "what is added to the stream begins too large",
        _INITIAL,
        "math.sqrt(2 * model.layers)",
        "math.sqrt(model.layers)",
        f"{_START}deviations_and_constants",
    ),
    Mutant(
        "experts' outputs begin too large",
        _INITIAL,
        '(".down.weight", ".down", ".output.weight")',
        '(".down.weight", ".output.weight")',
        f"{_START}deviations_and_constants",
    ),
    Mutant(
        "documents are as long as samples to flash attention",
        _SEAMS,
        "cu_seqlens, max_seqlen = packed.cu_seqlens, packed.max_seqlen",
        "cu_seqlens, max_seqlen = packed.cu_seqlens, max_seqlen - 1",
        f"{_TEST}documents_known_on_the_host_need_no_mask[None-3]",
    ),
    Mutant(
        "documents known on the host have a mask",
        _SEAMS,
        "if micro.packed is not None and _flashes(q_BNSH, v_BGSH):",
        "if False:",
        f"{_TEST}documents_known_on_the_host_need_no_mask[None-0]",
    ),
    Mutant(
        "the head counts as a matrix",
        _INITIAL,
        'if name in ("embedding.weight", "head.weight"):',
        'if name in ("embedding.weight",):',
        f"{_START}kinds_of_parameters",
    ),
]
