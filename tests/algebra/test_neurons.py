"""Neurons find the expert they came from, merging changes nothing where nothing differs, and pools are exact means."""

from __future__ import annotations

import pytest
import torch

from moekit.algebra import assign_neurons, merge_neurons
from moekit.bank import SILU_MUL, Activation, ExpertWeights
from moekit.errors import OptionError
from moekit.formats import DenseBank

RELU = Activation("relu", torch.relu, gated=False)
UNITS, HIDDEN = 6, 5


def bank(experts: int, activation: Activation = SILU_MUL, bias: bool = False, dtype=torch.float32, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    rows = 2 * UNITS if activation.gated else UNITS
    shapes = [(experts, rows, HIDDEN), (experts, HIDDEN, UNITS), (experts, rows), (experts, HIDDEN)]
    tensors = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    return DenseBank(*tensors[:2], *(tensors[2:] if bias else (None, None)), activation)


def join(*experts: ExpertWeights, activation: Activation = SILU_MUL) -> DenseBank:
    return DenseBank.stack(experts, activation)


def permuted(source: DenseBank, expert: int, order: torch.Tensor) -> ExpertWeights:
    return source.select([expert]).permute(order[None]).expert(0)


def neuron(expert: ExpertWeights, unit: int) -> torch.Tensor:
    return torch.cat([*expert.gate_up[unit::UNITS], expert.down[:, unit]])


def flipped(expert: ExpertWeights) -> ExpertWeights:
    """The same function with u and d of every second neuron negated."""
    sign = torch.ones(UNITS)
    sign[::2] = -1
    gate_up, down = expert.gate_up.clone(), expert.down * sign
    gate_up[UNITS:] *= sign[:, None]
    bias = None
    if expert.gate_up_bias is not None:
        bias = expert.gate_up_bias.clone()
        bias[UNITS:] *= sign
    return ExpertWeights(gate_up, down, bias, expert.down_bias)


def equal(a: DenseBank, b: DenseBank) -> bool:
    return a.tensors().keys() == b.tensors().keys() and all(
        torch.equal(t, b.tensors()[n]) for n, t in a.tensors().items()
    )


@pytest.mark.parametrize("likeness", ["joined", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("activation", "bias"), [(SILU_MUL, False), (SILU_MUL, True), (RELU, False), (RELU, True)])
def test_a_permuted_copy_changes_nothing_bit_for_bit(likeness, dtype, activation, bias) -> None:
    two = bank(2, activation, bias, dtype)
    order = torch.randperm(UNITS, generator=torch.Generator().manual_seed(1))
    three = join(two.expert(0), two.expert(1), permuted(two, 1, order), activation=activation)
    found = assign_neurons(three, [0, 1], alpha=0.99, likeness=likeness)
    assert found.dropped == (2,)
    assert found.expert.tolist() == [[1] * UNITS]
    assert found.unit[0].tolist() == order.tolist()
    assert found.likeness.min() > 0.999
    merged = merge_neurons(three, [0, 1], found, torch.tensor([0.1, 0.37, 0.61]))
    assert equal(merged, two)
    plain_mean = three.recombine(torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]]))
    assert not equal(plain_mean, two)


@pytest.mark.parametrize("likeness", ["joined", "mean"])
def test_halves_of_two_experts_go_to_their_owners(likeness) -> None:
    two = bank(2)
    a, b = two.expert(0), two.expert(1)
    half = [0, 1, 2]
    rows = torch.cat([a.gate_up[half], b.gate_up[half], a.gate_up[[6, 7, 8]], b.gate_up[[6, 7, 8]]])
    mixed = ExpertWeights(rows, torch.cat([a.down[:, half], b.down[:, half]], dim=1))
    found = assign_neurons(join(a, mixed, b), [0, 2], likeness=likeness)
    assert found.expert.tolist() == [[0, 0, 0, 2, 2, 2]]
    assert found.unit.tolist() == [[0, 1, 2, 0, 1, 2]]


@pytest.mark.parametrize("likeness", ["joined", "mean"])
@pytest.mark.parametrize("canonical", [False, True])
@pytest.mark.parametrize("block", [1, 100])
def test_assignment_equals_brute_force(likeness, canonical, block) -> None:
    five = bank(5, bias=False)
    kept = [3, 0, 4]
    found = assign_neurons(five, kept, alpha=0.4, likeness=likeness, canonical=canonical, block=block)
    cosine = torch.nn.functional.cosine_similarity
    for row, source in enumerate(found.dropped):
        for unit in range(UNITS):
            mine, best = neuron(five.expert(source), unit), (-2.0, -1, -1, 1)
            for expert in sorted(kept):
                for other in range(UNITS):
                    theirs = neuron(five.expert(expert), other)
                    for sign in (1, -1) if canonical else (1,):
                        turned = mine.clone()
                        turned[HIDDEN:] *= sign
                        parts = zip(turned.split(HIDDEN), theirs.split(HIDDEN), strict=True)
                        value = (
                            cosine(turned, theirs, dim=0)
                            if likeness == "joined"
                            else sum(cosine(x, y, dim=0) for x, y in parts) / 3
                        )
                        best = max(best, (float(value), expert, other, sign), key=lambda b: b[0])
            assert found.likeness[row, unit] == pytest.approx(best[0], abs=1e-5)
            expected = best[1:] if best[0] >= 0.4 else (-1, -1, 1)
            assert (found.expert[row, unit], found.unit[row, unit], found.sign[row, unit]) == expected
    assert (found.expert == -1).any()
    assert (found.expert >= 0).any()


@pytest.mark.parametrize("bias", [False, True])
def test_a_sign_flipped_copy_is_recognised_only_if_asked(bias: bool) -> None:
    two = bank(2, bias=bias)
    three = join(two.expert(0), two.expert(1), flipped(two.expert(1)))
    plain = assign_neurons(three, [0, 1], alpha=0.9)
    assert (plain.expert[0, ::2] == -1).all()
    found = assign_neurons(three, [0, 1], alpha=0.9, canonical=True)
    assert found.expert.tolist() == [[1] * UNITS]
    assert found.unit.tolist() == [list(range(UNITS))]
    assert found.sign.tolist() == [[-1, 1] * 3]
    assert equal(merge_neurons(three, [0, 1], found, torch.ones(3)), two)


def test_alpha_above_one_is_plain_pruning() -> None:
    four = bank(4, bias=True)
    found = assign_neurons(four, [2, 1], alpha=1.01)
    assert (found.expert == -1).all()
    assert (found.unit == -1).all()
    assert equal(merge_neurons(four, [2, 1], found, torch.ones(4)), four.select([2, 1]))


def test_pools_are_weighted_means() -> None:
    four = bank(4, bias=True)
    found = assign_neurons(four, [0, 2], alpha=-1.0)
    assert (found.expert >= 0).all()
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    merged = merge_neurons(four, [0, 2], found, weight)
    for slot, expert in enumerate([0, 2]):
        for unit in range(UNITS):
            pool = [(weight[expert], neuron(four.expert(expert), unit))]
            for row, source in enumerate(found.dropped):
                for i in ((found.expert[row] == expert) & (found.unit[row] == unit)).nonzero()[:, 0]:
                    pool.append((weight[source], neuron(four.expert(source), int(i))))
            mean = sum(w * v for w, v in pool) / sum(w for w, _ in pool)
            torch.testing.assert_close(neuron(merged.expert(slot), unit), mean)
    torch.testing.assert_close(merged.down_bias, four.down_bias[[0, 2]], rtol=0, atol=0)
    assert not torch.equal(merged.gate_up_bias, four.gate_up_bias[[0, 2]])


def test_weights_that_sum_to_zero_count_equally() -> None:
    two = bank(2)
    found = assign_neurons(two, [0], alpha=-1.0)
    zero, one = (merge_neurons(two, [0], found, weight) for weight in (torch.zeros(2), torch.ones(2)))
    torch.testing.assert_close(zero.gate_up, one.gate_up)


def test_merged_experts_compute_the_mean_function_of_flipped_twins() -> None:
    one = bank(1)
    pair = join(one.expert(0), flipped(one.expert(0)))
    found = assign_neurons(pair, [0], canonical=True)
    merged = merge_neurons(pair, [0], found, torch.tensor([0.3, 0.7]))
    assert equal(merged, one)


def test_ties_go_to_the_lowest_expert_and_neuron() -> None:
    one = bank(1).expert(0)
    twins = ExpertWeights(one.gate_up[[0, 0, 2, 3, 4, 5, 6, 6, 8, 9, 10, 11]], one.down[:, [0, 0, 2, 3, 4, 5]])
    found = assign_neurons(join(twins, twins, twins), [2, 1])
    assert found.expert.tolist() == [[1] * UNITS]
    assert found.unit.tolist() == [[0, 0, 2, 3, 4, 5]]


def test_keeping_all_keeps_all() -> None:
    three = bank(3)
    found = assign_neurons(three, [0, 1, 2])
    assert found.dropped == ()
    assert equal(merge_neurons(three, [0, 1, 2], found, torch.ones(3)), three)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: assign_neurons(b, [0, 3]), "expert 3 does not exist: this bank has experts 0 to 2"),
        (lambda b: assign_neurons(b, []), r"kept experts \[\] must be one or more different ids"),
        (lambda b: assign_neurons(b, [1, 1]), r"kept experts \[1, 1\]"),
        (lambda b: assign_neurons(bank(2, RELU), [0], canonical=True), "gated experts only"),
        (lambda b: merge_neurons(b, [0, 1], assign_neurons(b, [0, 1]), torch.ones(2)), "needs 3 finite weights"),
        (lambda b: merge_neurons(b, [0, 1], assign_neurons(b, [0, 1]), -torch.ones(3)), "needs 3 finite weights"),
        (
            lambda b: merge_neurons(b, [1], assign_neurons(b, [0], alpha=-1.0), torch.ones(3)),
            "points to expert 0, which is not kept",
        ),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call(bank(3))
