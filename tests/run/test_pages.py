"""Rows hold memory only while they are kept, and dropping one never touches another."""

import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.run._pages import HUGE, Pages, page_charge

PAGE = mmap.PAGESIZE


def resident():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) * 1024


def test_memory_follows_the_rows_that_are_kept():
    pages = Pages([1 << 20] * 64)
    before = resident()
    for row in range(32):
        pages.keep(row)
        pages.view(row, 0, 1 << 20)[:] = bytes([row + 1]) * (1 << 20)
    grown = resident() - before
    assert 31 << 20 < grown < 34 << 20
    for row in range(32):
        pages.drop(row)
    assert resident() - before < 2 << 20


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 3 * PAGE), min_size=10, max_size=10),
    steps=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=30),
)
def test_rows_keep_their_bytes_whatever_happens_to_their_neighbours(sizes, steps):
    pages, kept = Pages(sizes), {}
    for number, (row, keep) in enumerate(steps):
        if keep and row not in kept:
            pages.keep(row)
            kept[row] = number % 255 + 1
            pages.view(row, 0, sizes[row])[:] = bytes([kept[row]]) * sizes[row]
        elif not keep and row in kept:
            pages.drop(row)
            del kept[row]
        parts = {r: pages.part(r, 0, (sizes[r],), torch.uint8) for r in kept}
        assert all(bool((parts[r] == value).all()) for r, value in kept.items())


@pytest.mark.parametrize("size", [HUGE, 3 * HUGE, HUGE + HUGE // 2, 2 * HUGE + PAGE, 4 * HUGE + 5000])
def test_huge_pages_hold_nothing_of_a_neighbour(size):
    pages, before = Pages([size] * 12), resident()
    for row in range(12):
        pages.keep(row)
        pages.part(row, 0, (size,), torch.uint8).fill_(row + 1)
        if row % 2:
            pages.drop(row)
    assert resident() - before < 6 * page_charge(size) + (1 << 20)
    tensor = pages.tensor((size,), torch.uint8)
    assert [int(tensor[row].min()) for row in range(0, 12, 2)] == [int(tensor[row].max()) for row in range(0, 12, 2)]
    assert [int(tensor[row].max()) for row in range(0, 12, 2)] == [1, 3, 5, 7, 9, 11]
    for row in range(0, 12, 2):
        pages.drop(row)
    assert resident() - before < 3 << 19


def test_a_dropped_row_of_whole_pages_reads_as_zero():
    pages = Pages([PAGE] * 3)
    for row in range(3):
        pages.keep(row)
        pages.view(row, 0, PAGE)[:] = b"x" * PAGE
    pages.drop(1)
    tensor = pages.tensor((PAGE,), torch.uint8)
    assert tensor[1].sum() == 0
    assert bool((tensor[0] == ord("x")).all())


def test_views_are_parts_of_rows():
    pages = Pages([24] * 4)
    pages.view(2, 8, 16)[:] = torch.tensor([1.5, -2.0]).numpy().tobytes()
    assert pages.tensor((6,), torch.float32)[2].tolist() == [0, 0, 1.5, -2.0, 0, 0]
    assert pages.part(2, 8, (2,), torch.float32).tolist() == [1.5, -2.0]


@pytest.mark.parametrize("row_bytes", [1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE])
def test_the_charge_covers_every_page_a_row_can_touch(row_bytes):
    touched = max(-(-(r + 1) * row_bytes // PAGE) - r * row_bytes // PAGE for r in range(PAGE))
    assert page_charge(row_bytes) >= touched * PAGE - (PAGE - 1)
    assert page_charge(row_bytes) >= row_bytes
