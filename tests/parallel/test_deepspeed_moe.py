"""Residual layers, pyramids, staged students, and an exchange among ranks of equal index that changes nothing."""

import copy

import pytest
import rank_coordinated
import torch

from moekit.errors import OptionError
from moekit.lab.experiments import deepspeed_moe as experiment
from moekit.lab.experiments._coordinating import coordinated, rows_sent
from moekit.nn import MoekitConfig, MoekitForCausalLM
from moekit.parallel.deepspeed_moe import Mixed, Students, mixed, pyramid, shallower
from moekit.train import TrainOptions

SIZES = {"vocab_size": 17, "hidden_size": 16, "moe_intermediate_size": 8, "num_attention_heads": 2, "num_experts": 4}


def model(seed=0, **more):
    torch.manual_seed(seed)
    sizes = SIZES | {"num_hidden_layers": 2, "num_experts_per_tok": 1, "shared_expert_intermediate_size": 8} | more
    return MoekitForCausalLM(MoekitConfig(**sizes)).eval()


def ids(rows=2, seed=0):
    return torch.randint(0, 17, (rows, 9), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("degree", "owner"), [(2, None), (4, [0, 1, 2, 3, 2, 1]), (1, None), (2, [3, 0, 0, 1, 2, 1])])
def test_coordinated_equals_one_process(four_ranks, degree, owner):
    for found in four_ranks.ask(coordinated, degree, owner):
        assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("degree", [1, 2])
def test_coordinated_on_two_ranks_with_plans(two_ranks, degree):
    for found in two_ranks.ask(rank_coordinated.with_plans, degree):
        assert max(found.values()) < 1e-12, found


def test_every_row_travels_once(four_ranks):
    """All together send a degree-th of the flat rows, to p / t - 1 peers each; sums cost t - 1 messages of [T, H]."""
    found = four_ranks.ask(rows_sent, 2)
    assert 2 * sum(one["coordinated"] for one in found) == sum(one["flat"] for one in found)
    assert (max(one["peers, coordinated"] for one in found), max(one["peers, flat"] for one in found)) == (1, 3)
    assert all(one["sums"] == one["x"] for one in found)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("ranks", "this layout has 5 ranks and 1 slices of each expert: make it for 4 ranks"),
        ("slices", "this layout has 4 ranks and 2 slices"),
        ("few", "no expert lies on ranks of index 1: 2 experts are too few"),
    ],
)
def test_layouts_that_do_not_fit(four_ranks, case, message):
    told = four_ranks.ask(rank_coordinated.refused, case)
    assert any(message in one for one in told)


def test_mixing_begins_as_half_the_sum_and_follows_its_coefficients():
    torch.manual_seed(0)
    layer = Mixed(torch.nn.Identity(), torch.nn.Linear(4, 4), 4)
    layer.moe.forward = lambda x, context=None: 3 * x
    x = torch.randn(2, 5, 4)
    share = torch.softmax(layer.coefficient(x), -1)
    torch.testing.assert_close(layer(x), share[..., :1] * 3 * x + share[..., 1:] * layer.mlp(x))
    net = model()
    plain = copy.deepcopy(net)
    mixed(net)
    whole = [layer.mlp for layer in plain.model.layers]
    x = torch.randn(1, 3, 16)
    for layer, before in zip(net.model.layers, whole, strict=True):
        torch.testing.assert_close(layer.mlp(x), 0.5 * before(x))
    added = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == 2 * (2 * 16 + 2)


def test_coefficients_learn():
    net = mixed(model()).train()
    net(ids(), labels=ids()).loss.backward()
    assert all(layer.mlp.coefficient.weight.grad.abs().sum() > 0 for layer in net.model.layers)


def test_nothing_to_mix():
    with pytest.raises(OptionError, match="has no shared expert to mix: set shared_expert_intermediate_size"):
        mixed(model(shared_expert_intermediate_size=0))


def test_pyramids():
    assert pyramid(6, 32) == [32, 32, 32, 32, 64, 64]
    assert pyramid(3, 4, deep=0) == [4, 4, 4]
    counts = pyramid(2, 4, deep=1, factor=3)
    net = model(num_experts=counts)
    assert [layer.mlp.num_experts for layer in net.model.layers] == [4, 12]
    for deep, factor in ((4, 2), (-1, 2), (1, 0)):
        with pytest.raises(OptionError, match=f"{deep} deep layers of 3 with {factor} times"):
            pyramid(3, 4, deep, factor)


def test_students_keep_the_top_of_the_pyramid():
    config = MoekitConfig(**SIZES | {"num_hidden_layers": 4, "num_experts": pyramid(4, 4), "dense_layers": [0]})
    student = shallower(config, 3)
    assert (student.num_hidden_layers, student.num_experts, student.dense_layers) == (3, [4, 8, 8], [])
    assert config.num_experts == [4, 4, 8, 8]
    assert shallower(MoekitConfig(**SIZES), 3).num_experts == 4
    for layers in (0, 5):
        with pytest.raises(OptionError, match=f"a student of {layers} layers: give 1 to 4"):
            shallower(config, layers)


@pytest.mark.parametrize(("share", "wanted"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_distillation_ends_when_it_should(share, wanted):
    options, told = TrainOptions(steps=4, learning_rate=1e-3), []
    student, teacher = model(1), model(2)
    kept = copy.deepcopy(teacher.state_dict())
    batches = lambda step: {"input_ids": ids(seed=step)}  # noqa: E731
    record = Students(weight=0.5, share=share).train(student, teacher, batches, options, after_step=told.append)
    assert (len(record.parts.get("kl", [])), len(record.parts["lm"])) == (wanted, 4)
    assert told == [1, 2, 3, 4]
    assert all(torch.equal(t, kept[name]) for name, t in teacher.state_dict().items())


def test_the_kl_term_is_weighed():
    options = TrainOptions(steps=1, learning_rate=1e-3)
    batches = lambda step: {"input_ids": ids()}  # noqa: E731
    one, half = (Students(weight=w).train(model(1), model(2), batches, options).parts["kl"] for w in (1.0, 0.5))
    assert half[0] == pytest.approx(one[0] / 2)
    assert one[0] > 0


@pytest.mark.parametrize(("weight", "share"), [(-1.0, 0.5), (1.0, 1.5), (1.0, -0.1)])
def test_stages_that_cannot_be(weight, share):
    with pytest.raises(OptionError, match=f"weight={weight:g}, share={share:g}"):
        Students(weight=weight, share=share)


def figures(**changed):
    gaps = {f"{a} minus {b}": {"low": 0.1} for a, b in experiment.DECIDING}
    made = {"gap": gaps, "exchange": {"gap": 0.0, "rows": {"flat": 8, "coordinated": 4}}, "tables": {"gap": 0.0}}
    for path, value in changed.items():
        at = made
        *parts, last = path.split("/")
        for part in parts:
            at = at[part]
        at[last] = value
    return made


def test_the_rule():
    assert experiment.holds(figures())
    for a, b in experiment.DECIDING:
        assert not experiment.holds(figures(**{f"gap/{a} minus {b}": {"low": 0.0}}))
    for path, value in {
        "exchange/gap": 1e-5,
        "exchange/rows": {"flat": 8, "coordinated": 5},
        "tables/gap": 1e-9,
    }.items():
        assert not experiment.holds(figures(**{path: value})), path


def test_tables_equal_einsums():
    found = experiment.tables(24, 3, 4)
    assert found["gap"] < 1e-12


def test_contestants_are_equal_in_size():
    sizes = {}
    for name in experiment.ARMS:
        net = experiment.fresh(experiment.config(name), name in experiment.RESIDUAL, 1)
        ffn = [p for n, p in net.named_parameters() if "proj" in n and ".self_attn." not in n]
        sizes[name] = sum(p.numel() for p in ffn)
    assert sizes.pop("twice") == 2 * sizes["top-2"]
    assert len(set(sizes.values())) == 1


def test_it_runs_small(monkeypatch):
    monkeypatch.setattr(experiment, "STEPS", 2)
    monkeypatch.setattr(experiment, "TOKENS", 128)
    monkeypatch.setattr(experiment, "HIDDEN", 16)
    monkeypatch.setattr(experiment, "judged", lambda model, seed: float(len(model.model.layers)))
    losses, sizes = experiment.contest(1)
    assert losses == dict.fromkeys(experiment.ARMS, 4.0) | dict.fromkeys(experiment.STUDENTS, 3.0)
    assert sizes["alone"] == sizes["taught"] == sizes["staged"] < sizes["pyramid"]
