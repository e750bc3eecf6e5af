"""Whose weights always add up to the same, whatever precision the model ran in."""

from __future__ import annotations

import pytest
import torch

from moekit.compress._sample import Sample
from moekit.compress._skip import renormalises
from moekit.contract import Routing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_rounding_is_no_difference_and_a_choice_is(dtype: torch.dtype, scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    top = torch.randn(2000, 16, generator=draw).softmax(1).topk(8)
    whole = (top.values / top.values.sum(1, keepdim=True)).to(dtype) * scale
    part = top.values.to(dtype) * scale
    x = torch.zeros(2000, 4)
    assert renormalises(Sample(x, Routing(top.indices, whole.float()), 16))
    assert not renormalises(Sample(x, Routing(top.indices, part.float()), 16))
