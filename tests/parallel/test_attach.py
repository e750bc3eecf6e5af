"""A stock model with its experts spread over two real ranks is the model of one process."""

import pytest
import rank_attach


@pytest.mark.parametrize("kind", ["native", "llep"])
def test_a_spread_model_is_the_model(two_ranks, kind):
    for found in two_ranks.ask(rank_attach.equals, kind):
        assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("twice", "model.layers.0.mlp.experts is spread over ranks already: call detach"),
        ("unknown", "no experts module 'model.layers.7.mlp.experts' here"),
        ("slices", "has 5 whole experts, its layout 10 units"),
        ("dense", "Linear has no experts module of transformers' shared contract"),
        ("norm", "has weights of its own behind its experts"),
    ],
)
def test_what_cannot_be_attached(two_ranks, case, message):
    for answer in two_ranks.ask(rank_attach.refused, case):
        assert message in answer
