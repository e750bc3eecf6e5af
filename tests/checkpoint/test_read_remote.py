"""A model known by its headers only: fetched from a local server by range requests, weights never."""

import http.server
import threading
from pathlib import Path

import pytest

from checkpoint import miniatures
from moekit.checkpoint import Checkpoint
from moekit.errors import CheckpointError


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves `root/OWNER/NAME/FILE` at `/OWNER/NAME/resolve/main/FILE`, with ranges; counts what it sends."""

    root: Path
    sent: dict[str, int]
    tokens: list[str | None]
    ranges = True
    redirect = False

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.tokens.append(self.headers.get("Authorization"))
        if self.redirect and not self.path.startswith("/cdn"):
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/cdn{self.path}")
            self.end_headers()
            return
        owner, name, _, _, file = self.path.removeprefix("/cdn").strip("/").split("/")
        path = self.root / owner / name / file
        if not path.is_file():
            self.send_error(404)
            return
        data, total = path.read_bytes(), path.stat().st_size
        asked = self.headers.get("Range")
        if asked and self.ranges:
            start, _, end = asked.removeprefix("bytes=").partition("-")
            data = data[int(start) : int(end) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(data) - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.sent[file] = self.sent.get(file, 0) + len(data)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    handler = type("OneHub", (Hub,), {"root": tmp_path / "hub", "sent": {}, "tokens": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("shard", [None, "60KB"])
def test_headers_tell_the_same_as_the_files(hub, shard):
    folder = miniatures.plain(hub.root / "some" / "model", shard=shard, hidden_size=64, moe_intermediate_size=64)
    local, remote = Checkpoint.open(folder), Checkpoint.open_headers("some/model")
    assert remote.is_remote
    assert not local.is_remote
    assert remote.fingerprint == local.fingerprint
    assert remote.summary() == local.summary()
    assert [layer.name for layer in remote.moe_layers] == [layer.name for layer in local.moe_layers]
    assert hub.tokens == [None] * len(hub.tokens)


def test_weights_are_not_fetched(hub):
    folder = miniatures.plain(hub.root / "some" / "model", hidden_size=128, moe_intermediate_size=128)
    remote = Checkpoint.open_headers("some/model")
    assert sum(hub.sent.values()) < 0.1 * (folder / "model.safetensors").stat().st_size
    for call in (lambda: remote.read("lm_head.weight"), lambda: remote.bank("model.layers.0.mlp"), remote.scan_finite):
        with pytest.raises(CheckpointError, match=r"some/model is known by its headers only, .* download it first"):
            call()


def test_long_headers_take_a_second_request(hub, monkeypatch):
    monkeypatch.setattr("moekit.checkpoint.remote.FIRST", 64)
    folder = miniatures.plain(hub.root / "some" / "model")
    assert Checkpoint.open_headers("some/model").fingerprint == Checkpoint.open(folder).fingerprint


def test_the_token_stays_with_its_host(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.redirect = True
    miniatures.plain(hub.root / "some" / "model")
    Checkpoint.open_headers("some/model")
    assert hub.tokens == ["Bearer secret", None] * (len(hub.tokens) // 2)


def test_what_is_on_this_machine_is_not_fetched(hub, tmp_path):
    miniatures.plain(tmp_path / "here")
    assert not Checkpoint.open_headers(tmp_path / "here").is_remote
    miniatures.plain(tmp_path / "owner" / "name")
    assert not Checkpoint.open_headers("owner/name").is_remote
    assert hub.sent == {}


def test_a_cached_model_opens_without_the_network(hub, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "models--some--model"
    miniatures.plain(cache / "snapshots" / "abc123")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    opened = Checkpoint.open("some/model")
    assert opened.path == cache / "snapshots" / "abc123"
    assert opened.bank("model.layers.0.mlp").num_experts == 8
    assert not Checkpoint.open_headers("some/model").is_remote
    assert hub.tokens == []


def test_a_cache_without_weights_does_not_hide_the_hub(hub, tmp_path, monkeypatch):
    folder = miniatures.plain(hub.root / "some" / "model")
    snapshot = tmp_path / "cache" / "models--some--model" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((folder / "config.json").read_bytes())
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert Checkpoint.open_headers("some/model").is_remote
    with pytest.raises(CheckpointError, match="has no weights"):
        Checkpoint.open("some/model")


def test_what_can_go_wrong(hub, monkeypatch):
    def refused(message, ref="some/model"):
        with pytest.raises(CheckpointError, match=message) as caught:
            Checkpoint.open_headers(ref)
        assert "\n" not in str(caught.value)

    refused("some/model is no model on http://127.0.0.1:.*, or needs a token")
    folder = miniatures.plain(hub.root / "some" / "model")
    hub.ranges = False
    refused("headers need range requests")
    hub.ranges = True
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")
    refused("has no safetensors weights")
    (folder / "config.json").write_text("<html>")
    refused("its config.json is not a JSON object")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused("not on this machine and http://127.0.0.1:9 cannot be reached")
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    refused("expected an http.s. address")
    refused("does not exist", ref="no/hub/id")
