"""Numbers sent between workers come back within the bound of their code, in as many bytes as it says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.errors import OptionError
from moekit.parallel._codec import CODECS, FP4, codec

VALUES = [0.25, 0.5, 1, 2, 4, 8, 16]


def numbers(count, seed, spread):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=draw) * torch.exp(spread * torch.randn(count, generator=draw))


@given(st.integers(1, 700), st.integers(0, 10**6), st.floats(0, 6), st.integers(-30, 30))
@settings(max_examples=60)
def test_four_bits_stay_within_the_bound(count, seed, spread, power):
    x = numbers(count, seed, spread) * 2.0**power
    back = FP4().decode(FP4().encode(x), count)
    largest = torch.stack([part.abs().max() for part in x.split(FP4.BLOCK)]).repeat_interleave(FP4.BLOCK)[:count]
    assert ((back - x).abs() <= torch.maximum(x.abs() / 3, largest / 128) * (1 + 1e-6)).all()
    assert (back * x >= 0).all()


@given(st.sampled_from(sorted(CODECS)), st.integers(0, 300))
def test_bytes_are_as_told(name, count):
    code = codec(name).encode(numbers(count, 0, 1.0))
    assert code.dtype == torch.uint8
    assert len(code) == codec(name).nbytes(count)
    assert len(codec(name).decode(code, count)) == count


def test_the_fifteen_values_are_exact_at_any_scale():
    x = torch.tensor([0.0, *VALUES, *(-v for v in VALUES)])
    for scale in (1.0, 1e-6, 3.0, 7e5):
        assert torch.equal(FP4().decode(FP4().encode(x * scale), len(x)), x * (16 * scale / 16))


def test_a_third_is_reached_at_the_middle_of_two_powers():
    """The bound cannot be tighter."""
    x = torch.tensor([16.0, 1.5, 3.0])
    assert ((FP4().decode(FP4().encode(x), 3) - x).abs() / x)[1:].tolist() == pytest.approx([1 / 3, 1 / 3])


def test_blocks_do_not_share_a_scale():
    """One scale for all would lose the second block."""
    x = torch.cat([torch.full((128,), 1e6), torch.full((128,), 1e-6)])
    assert torch.allclose(FP4().decode(FP4().encode(x), 256), x, rtol=1e-6)


def test_small_numbers_become_zero_and_zeros_stay():
    x = torch.tensor([16.0, 0.1, -0.1, 0.0])
    assert FP4().decode(FP4().encode(x), 4).tolist() == [16.0, 0.0, 0.0, 0.0]
    assert FP4().decode(FP4().encode(torch.zeros(200)), 200).abs().sum() == 0


def test_plain_codes():
    x = numbers(99, 1, 2.0)
    assert torch.equal(codec("float32").decode(codec("float32").encode(x), 99), x)
    assert torch.equal(codec("bfloat16").decode(codec("bfloat16").encode(x), 99), x.bfloat16().float())


def test_errors():
    with pytest.raises(OptionError, match="'fp3' is unknown: choose one of float32, bfloat16, fp4"):
        codec("fp3")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(OptionError, match="not finite"):
            FP4().encode(torch.tensor([1.0, bad]))
