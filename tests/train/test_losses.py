"""Losses: closed forms, masks that are shifted exactly once, and batches that any step can be asked for."""

import math

import pytest
import torch
import torch.nn.functional as F
from training import rows, sparse

from moekit.errors import OptionError, TextError
from moekit.train import Objective, Preference, TrainOptions, batches_of, losses, padded, pair_batches
from moekit.train.preference import pair_batch
from moekit.train.sequences import targets


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_lm_is_the_models_own_loss():
    model, batch = sparse(), padded(rows(3))
    ids = batch["input_ids"]
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
    assert float(losses.lm(out.logits, batch)) == pytest.approx(float(out.loss), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_is_zero_only_for_equals_and_is_the_sum_it_says(temperature):
    batch = padded([torch.arange(5), torch.arange(3)])
    student, teacher = logits(2, 5, 7), logits(2, 5, 7, seed=1)
    assert float(losses.kl(student, student, batch, temperature)) == pytest.approx(0, abs=1e-6)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    per_position = (p * (p.log() - q.log())).sum(-1)
    by_hand = temperature**2 * (per_position[0, :4].sum() + per_position[1, :2].sum()) / 6
    assert float(losses.kl(student, teacher, batch, temperature)) == pytest.approx(float(by_hand), rel=1e-5)


def test_kl_cuts_a_larger_vocabulary():
    batch, student = padded([torch.arange(5)]), logits(1, 5, 7)
    wide = torch.cat([student, torch.full((1, 5, 3), 50.0)], dim=-1)
    assert float(losses.kl(student, wide, batch)) == pytest.approx(0, abs=1e-6)


def test_padding_and_what_weighs_nothing_have_no_say():
    batch = dict(padded([torch.arange(6), torch.arange(3)]))
    out = logits(2, 6, 9)
    changed = out.clone()
    changed[1, 2:] += 5  # predicts padding
    assert torch.equal(losses.lm(out, batch), losses.lm(changed, batch))
    weight = torch.zeros(2, 5)
    weight[0, 3] = 1
    only = float(losses.lm(out, {**batch, "weight": weight}))
    assert only == pytest.approx(-float(out[0, 3].log_softmax(-1)[batch["input_ids"][0, 4]]), rel=1e-5)
    with pytest.raises(TextError, match="no token of this batch counts"):
        losses.lm(out, {**batch, "weight": torch.zeros(2, 5)})


def test_pairs_count_the_answer_from_its_first_token_on():
    """The first answer token is predicted at the prompt's last position: one later would be the known bug."""
    batch = pair_batch([([1, 2, 3], [4, 5], [6])])
    out = logits(2, 5, 9)
    better, worse = losses.log_probability(out, batch)
    logp = out.log_softmax(-1)
    assert float(better) == pytest.approx(float(logp[0, 2, 4] + logp[0, 3, 5]), rel=1e-5)
    assert float(worse) == pytest.approx(float(logp[1, 2, 6]), rel=1e-5)


def test_dpo_and_kto_by_hand():
    policy = (torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.5]))
    reference = (torch.tensor([-1.5, -2.0]), torch.tensor([-2.5, -2.0]))
    margin = torch.tensor([(-1 + 3) - (-1.5 + 2.5), (-2 + 1.5) - 0])
    assert torch.allclose(losses.margin(policy, reference), margin)
    assert float(losses.dpo(policy, reference, 0.1)) == pytest.approx(float(-F.logsigmoid(0.1 * margin).mean()))
    assert float(losses.dpo(policy, policy, 0.1)) == pytest.approx(math.log(2))
    won, lost = torch.tensor([0.5, 0.0]), torch.tensor([-0.5, 0.5])
    halves = [1 - torch.sigmoid(0.1 * (won - 0.0)), 1 - torch.sigmoid(0.1 * (0.25 - lost))]
    assert float(losses.kto_pair(policy, reference, 0.1)) == pytest.approx(float(torch.cat(halves).mean()))


def test_a_batch_is_a_function_of_its_step():
    batches = batches_of(rows(7), 3, seed=4)
    assert torch.equal(batches(5)["input_ids"], batches_of(rows(7), 3, seed=4)(5)["input_ids"])
    assert not torch.equal(batches(0)["input_ids"], batches(2)["input_ids"])
    seen = torch.cat([batches(step)["input_ids"] for step in (0, 1)])
    assert len({tuple(row.tolist()) for row in seen}) == 6  # every row once before any comes again
    assert targets(batches(0))[0].shape == (3, 9)
    with pytest.raises(TextError, match="nothing to train on"):
        batches_of([torch.tensor([3])], 2)
    with pytest.raises(TextError, match="none of them empty"):
        pair_batches([([1], [], [2])], 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainOptions(steps=0), "steps=0: give a whole number from 1 on"),
        (lambda: TrainOptions(learning_rate=float("nan")), "learning_rate=nan: give a number above 0"),
        (lambda: TrainOptions(warmup=2), "warmup=2: give a share of the steps"),
        (lambda: TrainOptions(course="square"), "course='square': give one of constant"),
        (lambda: Objective(kl=0), "kl or lm must be positive"),
        (lambda: Objective(temperature=0), "temperature=0 must be above 0"),
        (lambda: Preference(kind="ipo"), "kind='ipo': choose one of dpo"),
        (lambda: Preference(beta=0), "beta=0 must be above 0"),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def test_the_course_of_the_rate():
    options = TrainOptions(steps=20, warmup=0.25, course="linear")
    factors = [options.factor(step) for step in range(21)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors[5] == 1.0
    assert factors[20] == 0.0
    assert TrainOptions(steps=20, warmup=0, course="cosine").factor(10) == pytest.approx(0.5)
    assert TrainOptions(steps=20, course="constant").factor(19) == 1.0
