"""A branch is the dense model of one expert; assembling takes each expert from its own branch and nothing else."""

import copy

import pytest
import rank_uni_moe
import torch
from rank_groups import model

from moekit.blocks import blocks
from moekit.errors import OptionError
from moekit.parallel.uni_moe import assemble, branch


def ids():
    return torch.randint(1, 31, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("normalised", [True, False])
def test_a_branch_is_the_model_of_copies_of_its_expert(normalised):
    net = model(3)
    net.config.norm_topk_prob = normalised
    for layer in net.model.layers:
        layer.mlp.gate.norm_topk_prob = normalised
    copies = copy.deepcopy(net)
    for block in blocks(copies):
        block.put(block.bank().select([1, 1, 1]))
    for layer in copies.model.layers:
        layer.mlp.gate.norm_topk_prob = True
    with branch(net, 1), torch.no_grad():
        inside = net(ids()).logits
    with torch.no_grad():
        torch.testing.assert_close(inside, copies(ids()).logits, rtol=0, atol=1e-6)
        assert not torch.allclose(inside, net(ids()).logits)


def test_only_its_expert_learns_in_a_branch():
    net = model(3).train()
    with branch(net, 2):
        net(ids(), labels=ids()).loss.backward()
    for block in blocks(net):
        for parameter in block.experts.parameters():
            assert [bool(g.abs().sum() > 0) for g in parameter.grad] == [False, False, True]


def test_assembled_experts_are_the_branches_own():
    start = model(3)
    branches = [copy.deepcopy(start) for _ in range(3)]
    with torch.no_grad():
        for number, one in enumerate(branches):
            for parameter in one.parameters():
                parameter += number + 1
    made = assemble(branches)
    for name, tensor in made.state_dict().items():
        theirs = [one.state_dict()[name] for one in branches]
        wanted = torch.stack([t[e] for e, t in enumerate(theirs)]) if ".experts." in name else theirs[0]
        assert torch.equal(tensor, wanted), name
    for expert, one in enumerate(branches):
        one.lm_head.weight = made.lm_head.weight
        with torch.no_grad(), branch(made, expert):
            inside = made.model.layers[0].mlp(torch.ones(1, 2, 16, dtype=torch.float64))
        with torch.no_grad(), branch(one, expert):
            alone = one.model.layers[0].mlp(torch.ones(1, 2, 16, dtype=torch.float64))
        torch.testing.assert_close(inside, alone)


def test_mistakes():
    with pytest.raises(OptionError, match="has no expert 3: choose one of 0 to 2"), branch(model(3), 3):
        pass
    with pytest.raises(OptionError, match="has 3 experts for 2 branches: one for each"):
        assemble([model(3), model(3)])
    wide = model(2)
    for block in blocks(wide):
        block.experts.down_proj = torch.nn.Parameter(block.experts.down_proj[..., :4])
        block.experts.gate_up_proj = torch.nn.Parameter(block.experts.gate_up_proj[:, :8])
    with pytest.raises(OptionError, match="differs in shape between branches"):
        assemble([model(2), wide])


@pytest.mark.parametrize("experts", [4, 6])
def test_ranks_bring_their_own_experts(four_ranks, experts):
    """Each expert travels once to every other rank, and nothing else does."""
    for found in four_ranks.ask(rank_uni_moe.gathers, experts):
        assert found["right"]
        assert found["kept"]
        assert found["sent"] == 3 * found["own"]


def test_too_few_experts(four_ranks):
    assert all("has 2 experts for 4 ranks: one each at least" in t for t in four_ranks.ask(rank_uni_moe.refused, 2))
