"""Defects of the update rules and the schedules."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_ADAMW = "trainer/optim/adamw.py"
_COMMON = "trainer/optim/common.py"
_LAMB = "trainer/optim/lamb.py"
_MUON = "trainer/optim/muon.py"
_ROUTES = "trainer/optim/matrix_exchange.py"
_SCHEDULE = "trainer/optim/schedule.py"

_TEST = "tests/trainer/optim/test_optim.py::test_"
_MATHS = f"{_TEST}steps_are_those_of_the_maths"
_SKIP = f"{_TEST}a_skipped_step_leaves_every_bit"
_RULE = "tests/trainer/test_reference.py::test_update_rule"
_TABLE = "tests/trainer/optim/test_schedule.py::test_rates_follow_the_table"
_GROWTH = "tests/trainer/optim/test_schedule.py::test_the_batch_grows_as_the_table_says"
_SUMS = "tests/trainer/optim/test_schedule.py::test_samples_before_a_step_are_the_sum_of_the_steps[32-8-6]"

MUTANTS = [
    # AdamW.
    Mutant(
        "averages aren't corrected for their start",
        _ADAMW,
        "return StepScalars(self.count + 1,",
        "return StepScalars(self.count + 10000,",
        f"{_MATHS}[adamw]",
    ),
    Mutant(
        "the betas are swapped",
        _ADAMW,
        "beta1=optim.beta1, beta2=optim.beta2",
        "beta1=optim.beta2, beta2=optim.beta1",
        f"{_MATHS}[adamw]",
    ),
    Mutant(
        "eps is left out",
        _ADAMW,
        "eps=optim.eps,",
        "eps=1e-8,",
        f"{_RULE}[adamw-eps]",
    ),
    Mutant(
        "eps is inside the root",
        _ADAMW,
        "eps=optim.eps,",
        "eps=optim.eps**0.5,",
        f"{_RULE}[adamw-eps]",
    ),
    Mutant(
        "gradients are divided by the clipping factor",
        _ADAMW,
        "factor.float().reciprocal()",
        "factor.float()",
        f"{_TEST}the_factor_scales_gradients[adamw]",
    ),
    Mutant(
        "a skipped step counts",
        _ADAMW,
        "self.count.add_(1 - scalars.skip)",
        "self.count.add_(1)",
        f"{_SKIP}[adamw-fp32]",
    ),
    Mutant(
        "a skipped step moves values and moments",
        _ADAMW,
        "factor.float().reciprocal(), skip.float())",
        "factor.float().reciprocal(), skip.float() * 0)",
        f"{_SKIP}[adamw-fp32]",
    ),
    Mutant(
        "nothing decays",
        _ADAMW,
        "weight_decay=decay,",
        "weight_decay=0.0,",
        f"{_MATHS}[adamw]",
    ),
    Mutant(
        "norms decay",
        _COMMON,
        'if kind != "matrix":',
        'if kind == "embedding":',
        f"{_TEST}vectors_and_embeddings_have_neither_decay_nor_width[adamw]",
    ),
    Mutant(
        "embeddings decay",
        _COMMON,
        'if kind != "matrix":',
        'if kind == "vector":',
        f"{_TEST}vectors_and_embeddings_have_neither_decay_nor_width[adamw]",
    ),
    Mutant(
        "a wider model keeps its rate",
        _COMMON,
        "return Hyperparameters(1 / wider,",
        "return Hyperparameters(1.0,",
        f"{_TEST}a_wider_model_moves_its_matrices_less_and_decays_them_as_much_more[adamw]",
    ),
    Mutant(
        "a wider model keeps its decay",
        _COMMON,
        "optim.weight_decay * math.sqrt(wider))",
        "optim.weight_decay)",
        f"{_TEST}a_wider_model_moves_its_matrices_less_and_decays_them_as_much_more[adamw]",
    ),
    # Muon.
    Mutant(
        "Nesterov's momentum is plain",
        _MUON,
        "part.add_(after, alpha=decay)",
        "part.copy_(after)",
        f"{_MATHS}[muon]",
    ),
    Mutant(
        "the iteration's coefficients are swapped",
        _MUON,
        "_A, _B, _C = 3.4445, -4.7750, 2.0315",
        "_A, _B, _C = 2.0315, -4.7750, 3.4445",
        f"{_MATHS}[muon]",
    ),
    Mutant(
        "the iteration has five steps whatever is asked",
        _MUON,
        "for _ in range(steps):",
        "for _ in range(5):",
        f"{_RULE}[muon-transfer]",
    ),
    Mutant(
        "matrices aren't normed before the iteration",
        _MUON,
        "(x_LMN / (norms_L11 + _TINY))",
        "(x_LMN / (norms_L11 * 0 + 20))",
        f"{_MATHS}[muon]",
    ),
    Mutant(
        "a stack is normed as one",
        _MUON,
        "torch.linalg.vector_norm(x_LMN, dim=(-2, -1), keepdim=True",
        "torch.linalg.vector_norm(x_LMN, dim=(-3, -2, -1), keepdim=True",
        f"{_TEST}muon_treats_each_matrix_of_a_stack_alone",
    ),
    Mutant(
        "updates are scaled by the short side",
        _MUON,
        "math.sqrt(max(shard.box.whole[-2:]))",
        "math.sqrt(min(shard.box.whole[-2:]))",
        f"{_MATHS}[muon]",
    ),
    Mutant(
        "matrices don't decay under Muon",
        _MUON,
        "1 - rate * self._hyper.weight_decay)",
        "1.0)",
        f"{_MATHS}[muon]",
    ),
    Mutant(
        "a skipped step moves the momentum",
        _MUON,
        "kept = torch.where(skipped, 1.0, decay)",
        "kept = torch.where(skipped, decay, decay)",
        f"{_SKIP}[muon-fp32]",
    ),
    Mutant(
        "a skipped step decays matrices",
        _MUON,
        "left = torch.where(skipped, 1.0, 1 - rate * self._hyper.weight_decay)",
        "left = 1 - rate * self._hyper.weight_decay + 0 * skipped",
        f"{_SKIP}[muon-fp32]",
    ),
    Mutant(
        "a copy of a block is sent as well",
        _ROUTES,
        "(part.replica == 0 and (part.rows",
        "((part.rows",
        "tests/trainer/optim/test_matrix_exchange.py::test_of_copies_one_is_sent_and_all_get_the_result",
    ),
    # LAMB.
    Mutant(
        "the trust ratio is upside down",
        _LAMB,
        "weight_norms / direction_norms, 1.0)",
        "direction_norms / weight_norms, 1.0)",
        f"{_MATHS}[lamb]",
    ),
    Mutant(
        "there is no trust ratio",
        _LAMB,
        "weight_norms / direction_norms, 1.0)",
        "1.0 + 0 * direction_norms, 1.0)",
        f"{_MATHS}[lamb]",
    ),
    Mutant(
        "the trust ratio is 0 where a norm is",
        _LAMB,
        "weight_norms / direction_norms, 1.0)",
        "weight_norms / direction_norms, 0.0)",
        f"{_TEST}lambs_ratio_is_one_where_a_norm_is_zero",
    ),
    Mutant(
        "LAMB's direction leaves out the decay",
        _LAMB,
        "alpha=state.hyper.weight_decay, out=grad)",
        "alpha=0.0, out=grad)",
        f"{_MATHS}[lamb]",
    ),
    Mutant(
        "a stack has one trust ratio",
        _LAMB,
        "numbers.append(first + flat)",
        "numbers.append(first + 0 * flat)",
        f"{_MATHS}[lamb]",
    ),
    Mutant(
        "vectors have a trust ratio",
        _LAMB,
        'if shard.kind == "vector"]',
        'if shard.kind == "vector" and False]',
        f"{_MATHS}[lamb]",
    ),
    # Schedules.
    Mutant(
        "there is no warm-up",
        _SCHEDULE,
        "if step < optim.warmup_steps:",
        "if False:",
        f"{_TABLE}[constant]",
    ),
    Mutant(
        "the warm-up begins at 0",
        _SCHEDULE,
        "optim.lr * (step + 1) / optim.warmup_steps",
        "optim.lr * step / optim.warmup_steps",
        f"{_TABLE}[constant]",
    ),
    Mutant(
        "cosine rises",
        _SCHEDULE,
        "0.5 * (1 + math.cos(math.pi * done))",
        "0.5 * (1 - math.cos(math.pi * done))",
        f"{_TABLE}[cosine]",
    ),
    Mutant(
        "linear rises",
        _SCHEDULE,
        "else 1 - done",
        "else done",
        f"{_TABLE}[linear]",
    ),
    Mutant(
        "wsd falls from the warm-up on",
        _SCHEDULE,
        'if optim.schedule == "wsd":',
        "if False:",
        f"{_TABLE}[wsd]",
    ),
    Mutant(
        "wsd begins to fall a step late",
        _SCHEDULE,
        "first = last - (optim.decay_steps",
        "first = last + 1 - (optim.decay_steps",
        f"{_TABLE}[wsd]",
    ),
    Mutant(
        "the last step isn't at the end",
        _SCHEDULE,
        "last = steps - 1",
        "last = steps",
        f"{_TABLE}[linear]",
    ),
    Mutant(
        "rates end at 0",
        _SCHEDULE,
        "return optim.min_lr + (optim.lr - optim.min_lr) * share",
        "return optim.lr * share",
        f"{_TABLE}[linear]",
    ),
    Mutant(
        "the batch begins a size too small",
        _SCHEDULE,
        "train.ramp_batch * (1 + step * sizes",
        "train.ramp_batch * (step * sizes",
        _GROWTH,
    ),
    Mutant(
        "the batch grows a step late",
        _SCHEDULE,
        "(1 + step * sizes // train.ramp_steps)",
        "(1 + max(0, step - 1) * sizes // train.ramp_steps)",
        _GROWTH,
    ),
    Mutant(
        "samples of the ramp aren't counted",
        _SCHEDULE,
        "if train.ramp_batch is None:\n        return train.global_batch * step",
        "if True:\n        return train.global_batch * step",
        _SUMS,
    ),
    Mutant(
        "sizes are reached a step late in the sum",
        _SCHEDULE,
        "sum(max(0, step - first)",
        "sum(max(0, step - 1 - first)",
        _SUMS,
    ),
]
