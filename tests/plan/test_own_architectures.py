"""Models of every recipe are opened, profiled and compressed like any other, or it is said why not."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moekit import lab
from moekit.blocks import blocks
from moekit.checkpoint import Checkpoint
from moekit.cli._app import main
from moekit.compress import method
from moekit.errors import PlanError, UnsupportedModelError
from moekit.plan import apply, fit, make_plan, verify
from moekit.profile import profile
from moekit.train.recipe import Recipe, recipes

NO_STACK = {"mixture-of-mamba", "mofme-uar", "monet", "ultramem-v2"}
"""Their experts are no matrices of a bank: rows, keys, modulations, projections of a state space."""
OWN_LAYOUT = {"cdsp-moe", "shiftaddvit"}
"""Experts that are computed from weights which do not lie expert by expert."""
USERS = {"chain-of-experts": 2, "rexmoe": 3}
"""Routers over one bank of experts."""
FIXED = {"comet-gate": "permutation", "hecto": "one expert", "moe-plus-plus": "map.weight", "moge": "3 groups"}
"""What says that the number of experts must stay."""
TEXT = {
    "prose": [f"the quick brown fox number {n} jumps over a lazy dog, and then over another. " * 3 for n in range(5)]
}
READ = {"max_tokens": 300, "sequence_length": 64}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a random model of a recipe."""
    folder, tokenizer = tmp_path_factory.mktemp("recipes"), AutoTokenizer.from_pretrained(lab.mini())

    def save(key):
        if not (folder / key).exists():
            torch.manual_seed(0)
            Recipe.read(key).build().save_pretrained(folder / key)
            tokenizer.save_pretrained(folder / key)
        return folder / key

    return save


@pytest.mark.parametrize("key", sorted(set(recipes()) - NO_STACK))
def test_every_recipe_is_profiled_and_counted(key, saved):
    found = profile(saved(key), TEXT, **READ)
    model = AutoModelForCausalLM.from_pretrained(saved(key))
    seen = blocks(model, shared=True)
    assert list(found.layers) == [block.name for block in seen]
    assert all(layer.array("counts").sum() > 0 for layer in found.layers.values())
    checkpoint = Checkpoint.open(saved(key))
    if key in OWN_LAYOUT:
        with pytest.raises(UnsupportedModelError, match="does not lie expert by expert: such a model can be trained"):
            checkpoint.summary()
        return
    summary = checkpoint.summary()
    assert summary.total == sum(parameter.numel() for parameter in model.parameters())
    assert summary.active < summary.total or key in ("hecto", "smoe-dropout", "uni-moe-2")
    assert FIXED.get(key, "") in (checkpoint.fixed_count or "")
    assert bool(checkpoint.fixed_count) == (key in FIXED or key in USERS)
    assert {layer.users for layer in checkpoint.moe_layers} == {USERS.get(key, 1)}
    assert len(seen) == sum(layer.users for layer in checkpoint.moe_layers)


@pytest.mark.parametrize("key", sorted(NO_STACK))
def test_experts_of_another_kind_are_named_as_such(key, saved):
    for look in (lambda: profile(saved(key), TEXT, **READ), lambda: Checkpoint.open(saved(key)).summary()):
        with pytest.raises(UnsupportedModelError, match=r"no module holds|can be told apart|grows with the"):
            look()


@pytest.mark.parametrize("key", ["base", "comet-gate", "deepseek-moe", "hydra", "moge", "moe-plus-plus", "rmoe"])
def test_half_of_the_experts_is_dropped_and_proven(key, saved, tmp_path):
    checkpoint = Checkpoint.open(saved(key))
    plan = make_plan([method("random:keep=0.5")], checkpoint)
    receipt = apply(checkpoint, plan, tmp_path / "out")
    assert receipt.reload["imports"] == ["moekit"]
    verify(tmp_path / "out", checkpoint).require()
    small = Checkpoint.open(tmp_path / "out")
    assert small.summary().total < checkpoint.summary().total
    ids = torch.arange(24)[None]
    load = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=ids).expert_load
    for counts, layer in zip(load, plan.layers.values(), strict=True):
        assert (counts[: layer.num_experts] > 0).sum() <= len(layer.experts)


def test_rows_that_cannot_change_stay_where_they_are(saved, tmp_path):
    checkpoint = Checkpoint.open(saved("comet-gate"))
    plan = make_plan([method("random:keep=0.5")], checkpoint)
    with pytest.raises(PlanError, match=r"the number of router rows cannot change .*permutation.*use --format moekit"):
        apply(checkpoint, plan, tmp_path / "out", format="stock")
    merged = make_plan([method("uncurl:router=mean")], checkpoint, profile(checkpoint.path, TEXT, **READ))
    with pytest.raises(PlanError, match="has no row per expert on disk that could be blended or moved"):
        apply(checkpoint, merged, tmp_path / "out")


@pytest.mark.parametrize("key", sorted(USERS))
def test_experts_of_several_routers_are_not_compressed(key, saved):
    checkpoint = Checkpoint.open(saved(key))
    says = rf"{USERS[key]} routers choose from the experts of model.layers.0.mlp, and a plan is for one router"
    with pytest.raises(UnsupportedModelError, match=says):
        make_plan([method("random:keep=0.5")], checkpoint)
    with pytest.raises(UnsupportedModelError, match=says):
        fit(checkpoint, profile(checkpoint.path, TEXT, **READ), ratio=0.5)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("chain-of-experts", "cannot: compress, fit: 2 routers choose from one bank of experts"),
        ("comet-gate", "cannot: drop router rows: model.layers.0.mlp.gate.scorer.permutation"),
    ],
)
def test_inspect_says_what_cannot_be_done(key, says, saved, capsys):
    with pytest.raises(SystemExit) as left:
        main(["inspect", str(saved(key))])
    assert left.value.code in (0, None)
    assert says in capsys.readouterr().out
