"""The server says what the model says, in the protocol's words, and tells each client what is wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
from starlette.testclient import TestClient

from moekit.checkpoint import Checkpoint
from moekit.run import load, paging, prompt_ids
from moekit.run.desk import BusyError, Desk, Request
from moekit.run.server import app

TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def desk():
    checkpoint = Checkpoint.open("moekit:mini")
    model, tokenizer = load(checkpoint, context=128), checkpoint.tokenizer()
    served = paging(model)
    served.store.resize(served.expert_bytes // 4)
    tokenizer.chat_template = TEMPLATE
    return Desk(model, tokenizer, waiting=1)


@pytest.fixture(scope="module")
def client(desk):
    with TestClient(app(desk, "mini")) as client:
        yield client


def expected(desk, prompt, new_tokens, **options):
    ids = prompt_ids(desk.tokenizer, prompt, chat=False)
    made = desk.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options
    )
    return desk.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def events(response):
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]


def test_models_and_health(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/v1/models").json()["data"][0]["id"] == "mini"


def test_a_completion_is_the_models_own(client, desk):
    body = {"prompt": "def f(x):", "max_tokens": 12, "temperature": 0}
    found = client.post("/v1/completions", json=body).json()
    assert found["choices"][0]["text"] == expected(desk, "def f(x):", 12)
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 12
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + 12


def test_streamed_pieces_make_the_same_text(client, desk):
    body = {"prompt": "def f(x):", "max_tokens": 12, "temperature": 0, "stream": True}
    told = events(client.post("/v1/completions", json=body))
    assert told[-1] == "[DONE]"
    parts = [json.loads(event)["choices"][0] for event in told[:-1]]
    assert "".join(part["text"] for part in parts) == expected(desk, "def f(x):", 12)
    assert [part["finish_reason"] for part in parts][-1] == "length"


def test_chat_uses_the_template(client, desk):
    messages = [{"role": "user", "content": "1 + 1"}]
    body = {"messages": messages, "max_tokens": 6, "temperature": 0}
    found = client.post("/v1/chat/completions", json=body).json()
    assert found["choices"][0]["message"] == {"role": "assistant", "content": expected(desk, "1 + 1\n", 6)}
    told = events(client.post("/v1/chat/completions", json={**body, "stream": True}))
    text = "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in told[:-1])
    assert text == expected(desk, "1 + 1\n", 6)


def test_stops_end_the_answer_and_are_left_out(client, desk):
    whole = expected(desk, "def f(x):", 30)
    stop = whole[9:12]
    body = {"prompt": "def f(x):", "max_tokens": 30, "temperature": 0, "stop": [stop]}
    found = client.post("/v1/completions", json=body).json()
    assert found["choices"][0]["text"] == whole[: whole.index(stop)]
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] < 30


def test_drawn_answers_are_seeded(client):
    body = {"prompt": "x", "max_tokens": 12, "seed": 5, "top_p": 0.9}
    one, two = (client.post("/v1/completions", json=body).json()["choices"][0]["text"] for _ in range(2))
    assert one == two


@pytest.mark.parametrize(
    ("body", "naming"),
    [
        ({"max_tokens": 3}, "prompt must be one string"),
        ({"prompt": ["a", "b"]}, "prompt must be one string"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens must be a whole number of at least 1"),
        ({"prompt": "x", "temperature": "hot"}, "temperature must be a number"),
        ({"prompt": "x", "max_tokens": 999}, "larger --context"),
        ({"prompt": "x", "n": 3}, "n is not supported"),
    ],
)
def test_bad_requests(client, body, naming):
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert naming in response.json()["error"]["message"]


def test_bad_bodies(client):
    for content, naming in ((b"{", "not JSON"), (b"[]", "JSON object")):
        response = client.post("/v1/completions", content=content)
        assert (response.status_code, naming in response.json()["error"]["message"]) == (400, True)
    for messages in (None, [], [{"role": "user"}]):
        response = client.post("/v1/chat/completions", json={"messages": messages})
        assert response.status_code == 400


def test_a_disk_that_fails_is_told_and_the_next_is_served(client, desk, monkeypatch):
    store = paging(desk.model).store
    for tier in store.layers:
        monkeypatch.setattr(tier, "fill", lambda _: (_ for _ in ()).throw(RuntimeError("the disk failed")))
    body = {"prompt": "something else", "max_tokens": 4}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 500
    assert "the disk failed" in response.json()["error"]["message"]
    monkeypatch.undo()
    assert client.post("/v1/completions", json=body).status_code == 200


class Heard:
    """A request's callbacks, and what they were told."""

    def __init__(self, desk, new_tokens=4, **options):
        self.text, self.ended, self.over = "", None, threading.Event()
        self.first = threading.Event()
        ids = prompt_ids(desk.tokenizer, "def", chat=False)
        self.request = Request(
            ids=ids, new_tokens=new_tokens, say=self.say, done=self.done, failed=self.failed, **options
        )

    def say(self, text):
        self.text += text
        self.first.set()

    def done(self, reason, cost):
        self.ended, self.cost = reason, cost
        self.over.set()

    def failed(self, error):
        self.ended = error
        self.over.set()


def test_a_full_line_refuses_and_a_client_that_leaves_is_not_waited_for(desk):
    long, waiting = Heard(desk, 100), Heard(desk)
    desk.ask(long.request)
    assert long.first.wait(60)
    desk.ask(waiting.request)
    with pytest.raises(BusyError, match="too many requests"):
        desk.ask(Heard(desk).request)
    long.request.left.set()
    assert waiting.over.wait(60)
    assert long.cost.new_tokens < 100
    assert waiting.ended == "length"


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def test_sigterm_during_a_reply_finishes_it(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "moekit.cli", "serve", "moekit:mini", "--port", str(port), "--context", "300"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        url, body = f"http://127.0.0.1:{port}", {"prompt": "def", "max_tokens": 60, "temperature": 0, "stream": True}
        deadline = time.monotonic() + 300
        while True:
            try:
                httpx.get(f"{url}/health", timeout=5)
                break
            except httpx.TransportError:
                assert server.poll() is None
                assert time.monotonic() < deadline
        told = []
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
            for line in response.iter_lines():
                if line and not told:
                    server.send_signal(signal.SIGTERM)
                told += [line] if line else []
        assert told[-1] == "data: [DONE]"
        assert len(told) > 10
        assert server.wait(60) in (0, -signal.SIGTERM)
    finally:
        server.kill()
