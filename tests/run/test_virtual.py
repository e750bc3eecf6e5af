"""Rows of a virtual tensor hold memory only while they are kept, and processes can share it."""

import mmap
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.errors import BudgetError, OptionError
from moekit.run import _virtual
from moekit.run._virtual import Frames, Reserved, VirtualRows

PAGE = mmap.PAGESIZE


def pages_of(rows, size, page):
    return {p for row in rows for p in range(row * size // page, -(-(row + 1) * size // page))}


def test_memory_follows_the_rows_that_are_kept_and_not_the_addresses():
    frames = Frames()
    rows = VirtualRows(frames, 4000, (PAGE // 4 * 25,), torch.float32)  # 400 MB of addresses
    for row in (0, 7, 3999):
        rows.keep(row)
        rows.tensor[row] = row + 1.0
    assert frames.physical_bytes == 3 * 25 * PAGE
    assert rows.tensor[3998].sum() == 0
    assert frames.physical_bytes == 3 * 25 * PAGE, "reading what is not there must not bring it"
    rows.drop(7)
    assert frames.physical_bytes == 2 * 25 * PAGE
    assert bool((rows.tensor[3999] == 4000).all())


@settings(max_examples=40)
@given(
    size=st.sampled_from([100, PAGE // 2, PAGE, PAGE + 100, 3 * PAGE - 4]),
    scale=st.sampled_from([1, 2]),
    steps=st.lists(st.integers(0, 9), max_size=40),
)
def test_shared_pages_live_as_long_as_one_row_on_them(size, scale, steps):
    frames, kept = Frames(page=scale * PAGE), {}
    rows = VirtualRows(frames, 10, (size // 4,), torch.int32)
    for number, row in enumerate(steps, 1):
        if row in kept:
            rows.drop(row)
            del kept[row]
        else:
            rows.keep(row)
            rows.tensor[row] = kept[row] = number
        assert all(bool((rows.tensor[r] == value).all()) for r, value in kept.items())
        assert frames.physical_bytes == len(pages_of(kept, size, scale * PAGE)) * scale * PAGE
    for row in list(kept):
        rows.drop(row)
    assert frames.physical_bytes == 0


def test_frames_that_were_given_back_are_taken_again():
    frames = Frames()
    first, second, third = frames.take(2), frames.take(3), frames.take(1)
    assert (first, second, third) == (0, 2, 5)
    frames.give(first, 2)
    frames.give(second, 3)
    assert frames.take(4) == 0
    assert frames.take(1) == 4
    assert frames.take(1) == 6
    assert frames.physical_bytes == 7 * PAGE


def test_another_process_sees_the_same_memory():
    frames = Frames()
    rows = VirtualRows(frames, 4, (PAGE // 4,), torch.float32)
    for row in (1, 3):
        rows.keep(row)
        rows.tensor[row] = row + 0.5
    write = "import os, sys; os.pwrite(int(sys.argv[1]), b'\\0\\0\\x80\\x3f', 4096 * int(sys.argv[2]))"
    frame = str(int(rows._frame[3]) * PAGE // 4096)
    subprocess.run([sys.executable, "-S", "-c", write, str(frames.fd), frame], pass_fds=[frames.fd], check=True)
    assert rows.tensor[3, :2].tolist() == [1.0, 3.5]
    assert rows.tensor[1, :2].tolist() == [1.5, 1.5]


def test_one_frame_can_lie_at_two_addresses_in_any_order():
    frames = Frames()
    first = frames.take(2)
    os.pwrite(frames.fd, b"a" * PAGE + b"b" * PAGE, first * PAGE)
    straight, turned = Reserved(2 * PAGE), Reserved(2 * PAGE)
    straight.map(0, 2 * PAGE, frames.fd, 0)
    turned.map(0, PAGE, frames.fd, PAGE)
    turned.map(PAGE, PAGE, frames.fd, 0)
    assert bytes(turned.buffer) == b"b" * PAGE + b"a" * PAGE
    straight.tensor(torch.uint8, (2, PAGE))[0] = ord("c")
    assert turned.tensor(torch.uint8, (2, PAGE))[1, 0] == ord("c")
    assert frames.physical_bytes == 2 * PAGE
    turned.unmap(0, PAGE)
    assert turned.tensor(torch.uint8, (2, PAGE))[:, 0].tolist() == [0, ord("c")]


def test_a_tensor_outlives_what_made_it():
    frames = Frames()
    tensor = VirtualRows(frames, 2, (PAGE,), torch.uint8).tensor
    assert tensor.sum() == 0


def test_errors(monkeypatch):
    with pytest.raises(OptionError, match=f"pages of 5000 bytes: expected a multiple of this machine's {PAGE}"):
        Frames(page=5000)
    frames = Frames()
    rows = VirtualRows(frames, 2, (PAGE,), torch.uint8)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_virtual.os, "posix_fallocate", full)
        with pytest.raises(BudgetError, match=f"no memory for {PAGE} bytes more of experts: No space left"):
            rows.keep(0)
    rows.keep(0)
    assert frames.physical_bytes == PAGE
    with pytest.raises(BudgetError, match="cannot map 1 bytes of experts: Bad file descriptor"):
        Reserved(PAGE).map(0, 1, -1, 0)
    monkeypatch.delattr(_virtual.os, "memfd_create")
    with pytest.raises(OptionError, match="need Linux"):
        Frames()
