"""Fitting models as they are published: quantised layouts, group-limited routing, prediction layers."""

from __future__ import annotations

import pytest

from checkpoint import miniatures
from moekit.checkpoint import Checkpoint
from moekit.plan import fit
from moekit.plan.sizes import plan_nbytes
from moekit.profile import profile

LAYOUTS = {"fp8": 0.1, "mxfp4": 0.3, "compressed-tensors": 0.1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_fit(layout: str, tmp_path) -> None:
    source = Checkpoint.open(miniatures.write(layout, tmp_path / layout))
    seen = profile(source, {"text": ["the quick brown fox jumps over the lazy dog " * 20]}, sequence_length=32)
    whole = fit(source, seen, size=10**9)
    assert whole.plan.untouched or whole.predicted == 0
    found = fit(source, seen, ratio=LAYOUTS[layout])
    assert found.nbytes <= found.budget.nbytes
    assert found.nbytes == plan_nbytes(found.plan, source)
    found.plan.check(source)
    assert any("of" in one.name for one in found.candidates)
