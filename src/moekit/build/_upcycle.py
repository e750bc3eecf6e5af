"""Putting a dense model into a stock Mixture-of-Experts model: the surroundings copied, experts made of its layers.

Shapes by suffix: E experts, I intermediate size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekit.bank import ExpertWeights
from moekit.blocks import MoEBlock, blocks
from moekit.build._dense import DenseFFN, dense_layers
from moekit.checkpoint.upcycle import MoEForm, sibling_config
from moekit.errors import UnsupportedModelError
from moekit.formats import DenseBank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MakeExperts = Callable[[DenseFFN], Sequence[ExpertWeights]]
EQUAL = 1e-4
"""Largest difference of logits, relative to their largest, at which two models count as computing the same."""


def upcycle(
    dense: PreTrainedModel, form: MoEForm, make: MakeExperts, *, seed: int = 0, router_std: float = 0.02
) -> PreTrainedModel:
    """The stock model of the form, with the dense model's weights and the experts that ``make`` makes of each layer.

    Router rows are drawn from N(0, router_std^2); selection biases are zero; a shared expert is the layer itself.
    Raises :class:`UnsupportedModelError` where no stock family can be it.
    """
    from transformers import AutoModelForCausalLM

    config = sibling_config(dense.config, form)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    model.load_state_dict(dense.state_dict(), strict=False)
    model.to(dense.device)
    of_layer = {ffn.layer: ffn for ffn in dense_layers(dense)}
    generator = torch.Generator().manual_seed(seed)
    for block in blocks(model):
        ffn = of_layer[block.layer]
        block.put(DenseBank.stack(list(make(ffn)), block.bank().activation))
        _set_router(block, generator, router_std)
        for shared in block.shared:
            shared.load_state_dict(ffn.module.state_dict())
    return model.train(dense.training)


@torch.no_grad()
def _set_router(block: MoEBlock, generator: torch.Generator, std: float) -> None:
    for parameter in block.router_module.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        else:
            parameter.zero_()
    for buffer in block.router_module.buffers():
        buffer.zero_()


def copies(count: int) -> MakeExperts:
    """Every expert is the whole layer."""
    return lambda ffn: [ffn.weights] * count


def silent_copies(count: int) -> MakeExperts:
    """Every expert is the layer without its second matrix: it adds nothing."""
    return lambda ffn: [ffn.weights._replace(down=torch.zeros_like(ffn.weights.down))] * count


@torch.no_grad()
def difference(one: PreTrainedModel, other: PreTrainedModel, rows: Tensor) -> float:
    """The largest difference of logits on token rows [B, S], relative to the largest logit."""
    modes = one.training, other.training
    a, b = (model.eval()(input_ids=rows.to(model.device), use_cache=False).logits.float() for model in (one, other))
    one.train(modes[0]), other.train(modes[1])
    return float((a - b).abs().max() / a.abs().max())


def check_equal(dense: PreTrainedModel, model: PreTrainedModel, rows: Tensor) -> float:
    """The difference of two models that should compute the same.

    Raises:
        UnsupportedModelError: they do not: the families differ in more than their parameters.
    """
    found = difference(dense, model, rows)
    if not found <= EQUAL:
        raise UnsupportedModelError(
            f"{type(model).__name__} with the weights of {type(dense).__name__} computes something else (logits differ "
            f"by {found:.2g} of the largest): it cannot hold this model"
        )
    return found


def probe_rows(model: PreTrainedModel, seed: int = 0) -> Tensor:
    """Two random rows of token ids to compare models on."""
    size = int(model.config.get_text_config().vocab_size)
    return torch.randint(0, size, (2, 16), generator=torch.Generator().manual_seed(seed))
