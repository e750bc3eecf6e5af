"""prepare, restore and explain: what is packed, what it costs, what comes back, and every refusal."""

from __future__ import annotations

import pytest
import torch
from expert_modules import Flags, batch, make
from torch import nn

import moekit
from moekit.errors import OptionError, UnsupportedModelError
from moekit.kernels import fused, panels, prepacked
from moekit.kernels import prepare as prepare_verb
from moekit.kernels._layer import Layer
from moekit.kernels.reference import reference


@pytest.fixture(params=["compiled", "by torch"])
def compiled(request, monkeypatch) -> bool:
    """With compiled kernels, and as if Numba were not installed."""
    if request.param == "by torch":
        monkeypatch.setattr(fused, "lacking", lambda: "Numba is not installed")
    elif fused.lacking():
        pytest.skip(fused.lacking())
    elif not panels.has_int8():
        pytest.skip("this CPU has no VNNI")
    return request.param == "compiled"


LARGE = {"experts": 2, "hidden": 512, "inner": 512}
FLAGS = [Flags(), Flags(bias=True, transposed=True), Flags(gated=False), Flags(norm=True)]
reordered = pytest.mark.skipif(not prepacked.has_reorder(), reason="this build of torch has no oneDNN packing")


@reordered
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 40])
def test_lossless_and_restored_bit_for_bit(compiled, flags, tokens):
    module = make(flags, **LARGE)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    x, index, weights = batch(tokens, 2, 1, 512)
    with torch.no_grad():
        expected = reference(Layer.of_module(module), x, index, weights)
        report = moekit.prepare(module)
        assert report.packed == [""]
        assert not report.shared
        torch.testing.assert_close(module(x, index, weights), expected, rtol=1e-4, atol=1e-3)
    assert module.down_proj is None
    assert report.bytes_before == sum(p.nbytes for p in before.values()) - report_outside(module)
    assert report.bytes_after == report.bytes_before
    moekit.restore(module)
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def report_outside(module) -> int:
    """Bytes of the norm, which is no part of the stacked experts."""
    return sum(p.nbytes for m in module.children() for p in m.parameters())


@pytest.mark.skipif(not prepacked.has_int8(), reason="this build of torch has no FBGEMM int8")
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_close_and_quarters_the_bytes(compiled, flags, dtype):
    module = make(flags, dtype, **LARGE)
    x, index, weights = batch(50, 2, 2, 512, dtype)
    with torch.no_grad():
        expected = module(x, index, weights).float()
        report = moekit.prepare(module, bits=8)
        error = (module(x, index, weights).float() - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.05
    assert report.bytes_after < 1.1 * report.bytes_before / dtype.itemsize
    with pytest.raises(OptionError, match="dropped for int8"):
        moekit.restore(module)


@reordered
def test_dropped_weights_refuse_to_be_saved_or_trained(compiled):
    module, (x, index, weights) = make(**LARGE), batch(3, 2, 1, 512)
    moekit.prepare(module)
    with pytest.raises(OptionError, match="before saving"):
        module.state_dict()
    with pytest.raises(OptionError, match="no backward"):
        module(x.requires_grad_(), index, weights)
    with pytest.raises(OptionError, match="got an input on meta"):
        module(x.detach().to("meta"), index.to("meta"), weights.to("meta"))


@reordered
def test_kept_weights_still_train_and_save(compiled):
    module, (x, index, weights) = make(**LARGE), batch(3, 2, 1, 512)
    report = moekit.prepare(module, keep=True)
    assert report.bytes_after == 2 * report.bytes_before
    module(x.requires_grad_(), index, weights).sum().backward()
    assert module.down_proj.grad is not None
    assert "down_proj" in module.state_dict()
    moekit.restore(module)
    assert "plain" in moekit.explain(module)


def test_small_experts_share_their_plain_copy(monkeypatch):
    monkeypatch.setattr(fused, "lacking", lambda: "Numba is not installed")
    module = make()
    weight = module.down_proj
    report = moekit.prepare(module)
    assert "too small" in report.shared[""]
    assert report.bytes_after == report.bytes_before
    assert module.down_proj is weight
    assert "0 experts modules packed" in str(report)
    assert "1 left on the plain copy (shared)" in str(report)


def test_half_precision_is_shared_where_the_cpu_has_no_units(monkeypatch):
    monkeypatch.setattr(prepare_verb_module(), "has_units", lambda dtype: False)
    monkeypatch.setattr(fused, "lacking", lambda: "Numba is not installed")
    report = moekit.prepare(make(dtype=torch.bfloat16, **LARGE))
    assert "no bfloat16 units" in report.shared[""]


def prepare_verb_module():
    import sys

    return sys.modules[prepare_verb.__module__]


@reordered
def test_prepares_once():
    module = make(**LARGE)
    moekit.prepare(module)
    assert moekit.prepare(module).shared == {"": "already prepared"}


def test_refusals():
    with pytest.raises(OptionError, match="bits=3 cannot be prepared"):
        moekit.prepare(make(), bits=3)
    with pytest.raises(UnsupportedModelError, match="holds no experts module"):
        moekit.prepare(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="holds no experts module"):
        moekit.explain(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("flags", "training", "kernel"),
    [(Flags(), False, "plain"), (Flags(), True, "function"), (Flags(norm=True), True, "autograd")],
)
def test_explain_names_one_kernel_and_a_reason_for_every_other(flags, training, kernel):
    text = moekit.explain(make(flags), tokens=40, training=training)
    first, *lines = text.splitlines()
    assert first.split(": ")[1].startswith(kernel)
    others = [line for line in lines if line.startswith("  not ")]
    assert len(others) == 6
    assert all(line.startswith("  not ") and len(line.split(": ", 1)[1]) > 10 for line in others)


@reordered
def test_explain_follows_prepare_and_tells_when_it_is_not_in_use(compiled):
    model = nn.ModuleList([make(**LARGE), make(**LARGE)])
    model[0].config._experts_implementation = "eager"
    assert 'runs experts_implementation="eager"' in moekit.explain(model)
    assert "about 1.0 rows per active expert" in moekit.explain(model[1], tokens=1)
    moekit.prepare(model)
    text = moekit.explain(model)
    assert f"0 and 1 more: {'panels' if compiled else 'reordered'}" in text
    assert "not plain: prepare() packed these experts" in text
    assert "it has no backward" in moekit.explain(model, training=True)


def test_explain_says_how_the_kernel_is_computed(compiled):
    """Compiled, and what it cost; or what is missing for that."""
    module = make(**LARGE)
    way = "fused: a few calls compiled by Numba" if compiled else "not fused: Numba is not installed"
    assert way in moekit.explain(module)
    if compiled:
        with torch.no_grad():
            module(*batch(3, 2, 1, 512))
        assert "s in this process" in moekit.explain(module)
    moekit.prepare(module, bits=8)
    assert way in moekit.explain(module)


def test_a_layout_for_every_half_precision(compiled):
    """Panels keep the dtype: no bytes are added, and restoring gives every bit back."""
    if not compiled:
        pytest.skip("by torch operations such weights stay plain")
    for dtype in (torch.bfloat16, torch.float16):
        module, arguments = make(Flags(bias=True, transposed=True), dtype, **LARGE), batch(20, 2, 2, 512, dtype)
        before = module.down_proj.clone()
        with torch.no_grad():
            expected = module(*arguments).float()
            report = moekit.prepare(module)
            assert report.bytes_after == report.bytes_before
            torch.testing.assert_close(module(*arguments).float(), expected, rtol=2e-2, atol=2e-2)
        moekit.restore(module)
        assert torch.equal(module.down_proj, before)


def test_int8_passes_nan_on(compiled):
    if not compiled:
        pytest.skip("FBGEMM rounds NaN to a number")
    module, (x, index, weights) = make(**LARGE), batch(3, 2, 1, 512)
    x[1, 7] = torch.nan
    moekit.prepare(module, bits=8)
    with torch.no_grad():
        out = module(x, index, weights)
    assert out[1].isnan().any()
    assert not out[[0, 2]].isnan().any()
