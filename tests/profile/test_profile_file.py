"""The file: the same bytes every time, everything back, and clear words for anything else."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moekit.errors import OutputError, ProfileError
from moekit.profile import Profile


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data, 8 + length


def rewritten(path, change):
    """The file with its moekit header changed, and nothing else."""
    header, data, start = header_of(path)
    inner = json.loads(header["__metadata__"]["moekit"])
    change(inner)
    header["__metadata__"]["moekit"] = json.dumps(inner, sort_keys=True)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[start:])


def test_everything_comes_back(observed, tmp_path):
    path = tmp_path / "a.profile"
    observed.save(path)
    back = Profile.load(path)
    assert back.fingerprint == observed.fingerprint
    assert list(back.layers) == list(observed.layers)
    for name, layer in observed.layers.items():
        other = back.layers[name]
        assert (other.layer, other.num_experts, other.top_k) == (layer.layer, layer.num_experts, layer.top_k)
        assert all(np.array_equal(other.array(key), array) for key, array in layer.arrays.items())
    for domain, pieces in observed.held_out.items():
        assert all(np.array_equal(a, b) for a, b in zip(pieces, back.held_out[domain], strict=True))
    assert dict(back.options) == dict(observed.options)
    assert np.array_equal(back.trace["position"], observed.trace["position"])


def test_the_safetensors_library_reads_every_array(observed, tmp_path):
    observed.save(tmp_path / "a")
    arrays = load_file(tmp_path / "a")
    for name, layer in observed.layers.items():
        for key, array in layer.arrays.items():
            found = arrays.pop(f"layers/{name}/{key}")
            assert found.dtype == array.dtype
            assert np.array_equal(found, array)
    assert all(name.startswith(("trace/", "held_out/")) for name in arrays)
    _, data, start = header_of(tmp_path / "a")
    held = [array for layer in observed.layers.values() for array in layer.arrays.values()]
    assert start % 8 == 0
    assert len(data) - start == sum(array.nbytes for array in [*held, *arrays.values()])


def test_saving_copies_no_array(observed, tmp_path, monkeypatch):
    """Samples are large: what is written are views of what is held."""
    from moekit.profile import _file

    written = []
    monkeypatch.setattr(_file, "write_whole", lambda target, chunks: written.extend(chunks))
    observed.save(tmp_path / "a")
    held = [layer.hidden for layer in observed.layers.values()]
    views = [np.frombuffer(chunk, np.uint8) for chunk in written if isinstance(chunk, memoryview) and len(chunk)]
    assert all(any(np.shares_memory(array, view) for view in views) for array in held)


def test_the_same_profile_is_the_same_bytes(observed, tmp_path):
    observed.save(tmp_path / "a")
    Profile.load(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_fingerprint_follows_the_figures(observed):
    name, layer = next(iter(observed.layers.items()))
    counts = layer.counts.copy()
    counts[0, 0, 0, 0] += 1
    changed = replace(layer, arrays={**layer.arrays, "counts": counts})
    assert replace(observed, layers={**observed.layers, name: changed}).fingerprint != observed.fingerprint


def test_nothing_is_overwritten_unasked(observed, tmp_path):
    path = tmp_path / "a.profile"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already: name another file, or pass --overwrite"):
        observed.save(path)
    assert path.read_text() == "mine"
    observed.save(path, overwrite=True)
    assert Profile.load(path).fingerprint == observed.fingerprint


def test_a_place_that_cannot_be_written_leaves_nothing(observed, tmp_path):
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        observed.save(tmp_path / "none" / "a.profile")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(observed, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moekit.profile._file.os.fsync", full)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        observed.save(tmp_path / "a.profile")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_profile(observed, tmp_path):
    path = tmp_path / "a"
    with pytest.raises(ProfileError, match="is no profile: there is no such file"):
        Profile.load(path)
    path.write_bytes(b"")
    with pytest.raises(ProfileError, match="is no readable profile"):
        Profile.load(path)
    path.write_text("plain text that is long enough to be read as a header length")
    with pytest.raises(ProfileError, match="is no readable profile"):
        Profile.load(path)
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(ProfileError, match="is no profile: it is another safetensors file"):
        Profile.load(path)


def test_cut_short_or_damaged(observed, tmp_path):
    path = tmp_path / "a"
    observed.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ProfileError, match="is no readable profile") as caught:
        Profile.load(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(ProfileError, match="is corrupt: its data do not match its own digest"):
        Profile.load(path)


def test_another_version(observed, tmp_path):
    path = tmp_path / "a"
    observed.save(path)
    rewritten(path, lambda header: header.update(version=99))
    with pytest.raises(ProfileError, match="has profile version 99, this moekit reads 2: profile again"):
        Profile.load(path)


@pytest.mark.parametrize("key", ["domains", "layers", "source", "options", "model"])
def test_a_header_with_a_hole(observed, tmp_path, key):
    path = tmp_path / "a"
    observed.save(path)
    rewritten(path, lambda header: header.pop(key))
    with pytest.raises(ProfileError, match="is corrupt"):
        Profile.load(path)


def test_of_another_model(observed):
    with pytest.raises(ProfileError, match=r"the profile is of another model .* profile this checkpoint"):
        observed.check_source("f" * 64)
    observed.check_source(observed.source)
