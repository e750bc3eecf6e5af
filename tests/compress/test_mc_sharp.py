"""MC#: the same widths as MC-MoE, and heads that keep what is worth its price."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

import families
from moekit import lab
from moekit.checkpoint import Checkpoint
from moekit.compress import method
from moekit.compress._heads import fit_mask, prefix_errors, train_heads
from moekit.compress._sample import Sample, moe_output
from moekit.contract import Routing
from moekit.errors import OptionError
from moekit.formats import DenseBank
from moekit.kernels.rewrites import TopSlots
from moekit.plan import LiveLoss
from moekit.plan.rewriting import rewrite_of
from moekit.profile import profile as observe
from moekit.stream import LoadedModel
from moekit.train import TrainOptions, batches_of

NAME = "model.layers.0.mlp"


def test_widths_are_those_of_the_method_before(model, profile) -> None:
    ours, before = (method(f"{name}:bits=2").plan(profile, model).layers[NAME] for name in ("mc-sharp", "mc-moe"))
    assert ours.values == before.values
    assert ours.rewrite is not None
    assert method("mc-sharp:bits=2,price=0").plan(profile, model).layers[NAME].rewrite is None


def sample(tokens: int = 400) -> tuple[Sample, DenseBank]:
    """Two slots; the second matters only to tokens whose first input is positive."""
    g = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(4, 8, 6, generator=g), torch.randn(4, 6, 4, generator=g)
    x = torch.randn(tokens, 6, generator=g)
    expert = torch.tensor([[0, 1]]).expand(tokens, 2).clone()
    expert[x[:, 0] > 0] = torch.tensor([0, 2])
    down[1] = down[0]
    gate_up[1] = gate_up[0]
    weight = torch.tensor([[0.6, 0.4]]).expand(tokens, 2)
    return Sample(x, Routing(expert, weight), 4), DenseBank(gate_up, down)


def test_errors_of_prefixes_are_those_of_the_layer_itself() -> None:
    seen, bank = sample()
    found = prefix_errors(seen, bank, renormalise=True)
    whole = moe_output(seen, bank)
    _, index, weight = TopSlots(1)(seen.x_SH, seen.routing.expert, seen.routing.weight)
    one = moe_output(Sample(seen.x_SH, Routing(index, weight), 4), bank)
    energy = whole.square().sum(1).mean()
    torch.testing.assert_close(found[:, 0], (one - whole).square().sum(1) / energy, atol=1e-5, rtol=1e-4)
    assert float(found[:, 1].abs().max()) < 1e-10


def test_heads_learn_which_tokens_need_their_second_slot() -> None:
    seen, bank = sample()
    head = fit_mask(seen, bank, 0.02, renormalise=True)
    kept = (head(seen.x_SH, seen.routing.expert, seen.routing.weight)[1] >= 0).sum(1)
    cost = prefix_errors(seen, bank, renormalise=True) + 0.02 * torch.tensor([0.5, 1.0])
    lost = float(cost.gather(1, kept[:, None] - 1).mean())
    assert float(cost.amin(1).mean()) <= lost < 0.8 * float(cost.mean(0).min())
    shares = []
    for price in (1e-9, 0.05, 1e9):
        head = fit_mask(seen, bank, price, renormalise=True)
        shares.append(int((head(seen.x_SH, seen.routing.expert, seen.routing.weight)[1] >= 0).sum()))
    assert shares[0] > shares[1] > shares[2] == len(seen)
    assert not any(p.requires_grad or p.grad is not None for p in head.parameters())


def test_training_through_the_model_moves_heads_alone(tmp_path) -> None:
    built, _ = families.build("qwen3_moe")
    built.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(lab.mini()).save_pretrained(tmp_path / "model")
    source = Checkpoint.open(tmp_path / "model")
    runner, teacher = (LoadedModel.load(source, dtype=torch.float32) for _ in range(2))
    rows = [torch.arange(3 + i, 23 + i) for i in range(8)]
    seen = observe(runner, {"all": [row.numpy() for row in rows]}, held_out=0.0, sample=128, trace=0)
    plan = method("mc-sharp:bits=2.5,price=0.01").plan(seen, source)
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}

    def trained(price: float):
        options = TrainOptions(steps=3, learning_rate=0.3, seed=1)
        return train_heads(plan, runner, source, teacher.model, batches_of(rows, 4, 1), options, price=price)

    (dear, record), (cheap, _) = trained(100.0), trained(0.0)
    after = runner.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert all(name.endswith(("rewrite.weight", "rewrite.bias")) for name in record.trained)
    assert record.parts["kept"][-1] < record.parts["kept"][0]
    assert all(dear.layers[name].values == layer.values for name, layer in plan.layers.items())
    index, weight = torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.4]])

    def kept(one) -> int:
        heads = [rewrite_of(layer, 32) for layer in one.layers.values()]
        x = torch.randn(64, heads[0].weight.shape[1] - 2, generator=torch.Generator().manual_seed(0))
        return sum(int((head(x, index.expand(64, 2), weight.expand(64, 2))[1] >= 0).sum()) for head in heads)

    assert kept(dear) < kept(cheap)
    live = LiveLoss(runner, source, [row.numpy() for row in rows])
    assert live(dear) != live(cheap)
    live.restore()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mc-sharp:bits=3.5", "mc-sharp: bits=3.5 is the average of 1, 2 and 3 bits"),
        ("mc-sharp:price=-1", r"mc-sharp: price=-1.0 must be at least 0 \(0 keeps every slot\)"),
    ],
)
def test_what_is_refused(spec: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        method(spec)
