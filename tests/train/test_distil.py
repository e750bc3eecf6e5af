"""Distillation: it learns, only what it is told to, the same every time, interrupted or not."""

import builtins
import copy

import pytest
import torch
from training import dense, rows, sparse, states_equal

import families
from moekit.blocks import blocks
from moekit.errors import OptionError
from moekit.train import Objective, Preference, TrainOptions, batches_of, chosen, distil, pair_batches, prefer
from moekit.train.balance import Balance, term

OPTIONS = TrainOptions(steps=6, learning_rate=3e-3, seed=1)


def run(student, teacher, **more):
    options = more.pop("options", OPTIONS)
    objective = more.pop("objective", Objective())
    return distil(student, teacher, batches_of(rows(), 4), options, objective, **more)


def test_a_student_comes_closer_and_the_teacher_stays():
    student, teacher = sparse(0), sparse(1)
    before = copy.deepcopy(teacher)
    record = run(student, teacher, options=TrainOptions(steps=12, learning_rate=1e-2))
    assert record.parts["kl"][-1] < 0.8 * record.parts["kl"][0]
    assert len(record.losses) == 12
    assert record.last(2)["kl"] == pytest.approx(sum(record.parts["kl"][-2:]) / 2)
    assert states_equal(teacher, before)
    assert student.config.use_cache
    assert all(p.requires_grad and p.grad is None for p in student.parameters())


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    record = run(sparse(), sparse(), options=TrainOptions(steps=1))
    assert record.losses[0] < 1e-6


@pytest.mark.parametrize("what", ["router", "experts", "norms"])
def test_only_what_was_chosen_moves(what):
    student = sparse(0)
    before = copy.deepcopy(student.state_dict())
    record = run(student, sparse(1), what=(what,), options=TrainOptions(steps=2))
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    endings = {"router": "mlp.gate.weight", "experts": (".gate_up_proj", ".down_proj"), "norms": "norm.weight"}
    assert changed == set(record.trained) == {name for name in before if name.endswith(endings[what])}


def test_roles_and_patterns():
    model = sparse()
    assert chosen(model, ["router"]) == ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]
    assert chosen(model, ["*.1.*down_proj"]) == ["model.layers.1.mlp.experts.down_proj"]
    assert len(chosen(model, ["all"])) == len(list(model.parameters()))
    with pytest.raises(OptionError, match="'shared' names no parameter of Qwen3MoeForCausalLM: give a role"):
        chosen(model, ["shared"])
    with pytest.raises(OptionError, match=r"'\*\.nowhere' names no parameter"):
        chosen(model, ["router", "*.nowhere"])


def test_a_router_inside_its_experts_is_not_one_of_them():
    model, _ = families.build("jetmoe")
    router, experts = chosen(model, ["router"]), chosen(model, ["experts"])
    assert router
    assert experts
    assert not set(router) & set(experts)
    assert all("router" in name for name in router)


def test_the_same_run_twice_gives_the_same_bits():
    one, other = sparse(0), sparse(0)
    objective = Objective(lm=0.5, balance=0.1, temperature=2.0)
    first, second = (run(m, sparse(1), objective=objective) for m in (one, other))
    assert first.losses == second.losses
    assert states_equal(one, other)


class StoppedError(Exception):
    pass


def test_interrupted_and_resumed_is_as_undisturbed(tmp_path, monkeypatch):
    monkeypatch.setattr("moekit.train.loop.SAVE_EVERY", 2)
    whole = sparse(0)
    record = run(whole, sparse(1))

    def stop(done, total):
        if done == 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(sparse(0), sparse(1), folder=tmp_path, progress=stop)
    resumed = sparse(7)  # weights come from the folder for all that is trained
    resumed.load_state_dict(sparse(0).state_dict())
    again = run(resumed, sparse(1), folder=tmp_path)
    assert again.losses == record.losses
    assert states_equal(resumed, whole)
    done = run(sparse(0), sparse(1), folder=tmp_path)  # finished: nothing is trained any more
    assert done.losses == record.losses
    with pytest.raises(OptionError, match="holds a run with other options"):
        run(sparse(0), sparse(1), folder=tmp_path, options=TrainOptions(steps=9))


def test_what_cannot_be_trained():
    with pytest.raises(OptionError, match="a KL term needs a teacher"):
        run(sparse(), None)
    broken = sparse()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(OptionError, match="the loss at step 0 is nan"):
        run(broken, sparse(1))


def test_without_accelerate_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **more):
        if name.split(".")[0] == "accelerate":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(OptionError, match=r"pip install 'moekit\[train\]'"):
        run(sparse(), sparse())


def test_balance_is_one_where_all_is_even_and_the_count_where_one_takes_all():
    even = torch.full((8, 4), 0.25)
    assert float(term(even, torch.arange(8)[:, None] % 4)) == pytest.approx(1)
    one = torch.zeros(8, 4)
    one[:, 2] = 1
    assert float(term(one, torch.full((8, 1), 2))) == pytest.approx(4)


def test_balance_collects_every_router_with_gradients():
    model, ids = sparse(), torch.stack(rows(2))
    with Balance(model) as balance:
        model(input_ids=ids)
        found = balance.take()
    (gradient,) = torch.autograd.grad(found, blocks(model)[0].router_module.weight)
    assert gradient.abs().sum() > 0
    logits = model(input_ids=ids, output_router_logits=True).router_logits
    by_hand = sum(term(one.softmax(-1), one.topk(2).indices) for one in logits)
    assert float(found) == pytest.approx(float(by_hand), rel=1e-5)


def test_preferences_are_learnt_against_a_reference():
    pairs = [([1, 2, i], [3, 4], [5, 6]) for i in range(7, 15)]
    student, teacher = dense(0), dense(1)
    options = TrainOptions(steps=8, learning_rate=1e-2)
    record = prefer(student, teacher, pair_batches(pairs, 4), options, Preference(beta=0.5))
    assert record.parts["margin"][-1] > record.parts["margin"][0]
    assert record.losses[-1] < record.losses[0]
    kto = prefer(sparse(0), sparse(1), pair_batches(pairs, 4), options, Preference(kind="kto_pair", balance=0.01))
    assert kto.parts["preference"][-1] < kto.parts["preference"][0]
    assert "balance" in kto.parts
    with pytest.raises(OptionError, match="the reference is the student itself"):
        prefer(student, student, pair_batches(pairs, 4), options)
