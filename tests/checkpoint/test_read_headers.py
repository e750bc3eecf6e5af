"""Safetensors headers and byte ranges: what is accepted, what is refused, and that reads are exact."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moekit.checkpoint.headers import DTYPES, parse_header, read_header
from moekit.checkpoint.reader import Reader
from moekit.errors import CheckpointError


def file_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parse(data):
    return parse_header(lambda start, count: data[start : start + count], len(data), "x.safetensors")


def entry(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no whole safetensors file: 0 bytes"),
        (b"1234", "no whole safetensors file"),
        (struct.pack("<Q", 10**12) + b"{}", "its header claims 1000000000000"),
        (struct.pack("<Q", 50) + b"{}", "its header claims 50"),
        (file_bytes(b"{nonsense"), "header is not JSON"),
        (file_bytes(b"[1, 2]"), "header is not JSON"),
        (file_bytes({"a": {"dtype": "U8"}}), "entry for a is malformed"),
        (file_bytes({"a": entry(0, 4, [-4])}, b"1234"), "entry for a is malformed"),
        (file_bytes({"a": entry(0, 4, [4.0])}, b"1234"), "entry for a is malformed"),
        (file_bytes({"a": entry(0, 4, dtype="Q7")}, b"1234"), "a has dtype Q7, which moekit cannot read"),
        (file_bytes({"a": entry(0, 4, [5])}, b"1234"), r"a \(U8 \[5\]\) is given 4 bytes"),
        (file_bytes({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "b overlaps the tensor before it"),
        (file_bytes({"a": entry(0, 2), "b": entry(4, 6)}, b"123456"), "b leaves a gap before it"),
        (file_bytes({"a": entry(0, 4)}, b"123"), "is truncated: its header promises"),
        (file_bytes({"a": entry(0, 4)}, b"12345"), "1 bytes after the last tensor"),
    ],
)
def test_corrupt_files_are_refused_in_one_line(data, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        parse(data)
    assert "\n" not in str(caught.value)
    assert "x.safetensors" in str(caught.value)


def test_metadata_and_empty_tensors_are_fine():
    infos = parse(file_bytes({"__metadata__": {"a": "b"}, "e": entry(0, 0, [0, 3]), "t": entry(0, 4)}, b"1234"))
    assert set(infos) == {"e", "t"}
    assert infos["e"].numel == 0


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.safetensors is missing"):
        read_header(tmp_path / "a.safetensors")


@given(cut=st.integers(1, 400))
@settings(max_examples=40)
def test_every_truncation_is_noticed(cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "a.safetensors"
    save_file({"a": torch.arange(40), "b": torch.ones(3, 5)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: max(len(data) - cut, 0)])
    with pytest.raises(CheckpointError):
        read_header(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        if name != "C64":
            raw = torch.randint(0, 2 if name == "BOOL" else 256, (6 * 5 * dtype.itemsize,), generator=generator)
            tensors[name] = raw.to(torch.uint8).view(dtype).view(6, 5)
    tensors["scalar"] = torch.tensor(3.0)
    save_file(tensors, folder / "a.safetensors")
    return folder, tensors


def same(a, b):
    return (
        a.dtype == b.dtype and a.shape == b.shape and a.flatten().view(torch.uint8).equal(b.flatten().view(torch.uint8))
    )


def test_every_dtype_reads_bit_for_bit(files):
    folder, tensors = files
    reader = Reader(folder, read_header(folder / "a.safetensors"))
    for name, tensor in tensors.items():
        assert same(reader.read(name).reshape(-1), tensor.reshape(-1).contiguous())
        assert reader.read(name).shape == tensor.shape
    assert reader.counted_bytes == 2 * sum(tensor.nbytes for tensor in tensors.values())


@given(data=st.data())
@settings(max_examples=60)
def test_rows_equal_a_slice_and_read_nothing_else(files, data):
    folder, tensors = files
    name = data.draw(st.sampled_from([name for name in tensors if name != "scalar"]))
    start = data.draw(st.integers(0, 6))
    stop = data.draw(st.integers(start, 6))
    reader = Reader(folder, read_header(folder / "a.safetensors"))
    rows = reader.rows(name, start, stop)
    assert same(rows, tensors[name][start:stop].contiguous())
    assert reader.counted_bytes == rows.nbytes


def test_what_is_read_can_be_written_to(files):
    folder, _ = files
    reader = Reader(folder, read_header(folder / "a.safetensors"))
    first = reader.read("F32")
    first.zero_()
    assert not torch.equal(reader.read("F32"), first)


def test_reader_refuses_what_is_not_there(files, tmp_path):
    folder, _ = files
    infos = read_header(folder / "a.safetensors")
    reader = Reader(folder, infos)
    with pytest.raises(CheckpointError, match="has no tensor nothing"):
        reader.read("nothing")
    with pytest.raises(CheckpointError, match="F32 has 6 rows, rows 2 to 9 were asked for"):
        reader.rows("F32", 2, 9)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        Reader(tmp_path, infos).read("F32")


def test_a_file_that_shrinks_while_in_use(files, tmp_path):
    folder, _ = files
    infos = read_header(folder / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(np.zeros(100, np.uint8).tobytes())
    last = max(infos.values(), key=lambda info: info.offset)
    with pytest.raises(CheckpointError, match=f"ends before {last.name} does"):
        Reader(tmp_path, infos).read(last.name)
