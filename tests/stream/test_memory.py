"""Amounts of memory, the operating system's figures, and caps that are refused or kept."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekit.errors import BudgetError, OptionError
from moekit.stream import cap, gigabytes, memory, parse_bytes, peak_rss, rss


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3GB", 3 * 10**9),
        ("3.5 GiB", 3758096384),
        ("800M", 8 * 10**8),
        (4096, 4096),
        ("1e9", 10**9),
        ("2gib", 2 * 2**30),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0", "3XB", "3 i", "GB"])
def test_what_is_no_size_is_refused_in_one_line(text):
    with pytest.raises(OptionError, match="is no amount of memory: give bytes or a size such as 3GB") as caught:
        parse_bytes(text)
    assert "\n" not in str(caught.value)


@given(st.integers(10**6, 10**13))
def test_a_named_size_can_be_typed_back(size):
    assert size <= parse_bytes(memory.gigabytes_up(size)) < size + 10**6


def test_figures_are_the_kernels_own():
    before = peak_rss()
    block = torch.ones(40 * 2**20, dtype=torch.uint8)
    assert peak_rss() >= rss() >= block.numel()
    del block
    memory.trim()
    assert peak_rss() >= before


def test_sizes_are_shown_with_one_decimal():
    assert gigabytes(13_840_000_000) == "13.8 GB"
    assert gigabytes(52_000_000) == "52 MB"


def test_no_cap_never_refuses():
    cap(None).require(10**15, "anything")
    assert cap(None).room() is None


def test_a_cap_below_what_is_needed_names_the_smallest_that_works():
    limit = cap("10MB")
    with pytest.raises(BudgetError, match=r"cap of 10 MB is too small: the largest layer needs 5 MB") as caught:
        limit.require(5 * 10**6, "the largest layer")
    named = str(caught.value).rsplit(" ", 1)[1]
    cap(named).require(5 * 10**6, "the largest layer")


def test_a_cap_passes_through_unchanged():
    limit = cap("3GB")
    assert cap(limit) is limit
    assert abs(limit.room() + rss() + memory.SLACK - 3e9) < 1e8


SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
from moekit.checkpoint import Checkpoint
from moekit.errors import BudgetError
from moekit.stream import StreamedModel, memory, peak_rss, rss
from moekit.kernels import warm_up
warm_up(torch.bfloat16, torch.float32)
checkpoint = Checkpoint.open(sys.argv[1])
batches = [{"input_ids": torch.arange(256).view(2, 128) % 96 + n} for n in range(3)]
total = sum(info.nbytes for info in checkpoint.tensors.values())
begun = rss()
refused = named = None
try:
    StreamedModel(checkpoint, max_ram=begun + 20 * 10**6)
except BudgetError as error:
    refused, named = str(error), str(error).rsplit(" ", 1)[1]
cap = memory.parse_bytes(named) + 24 * 10**6
model = StreamedModel(checkpoint, max_ram=cap)
sums = [float(logits.double().sum()) for logits in model.forward(batches)]
print(json.dumps({"begun": begun, "cap": cap, "peak": peak_rss(), "total": total, "refused": refused, "sums": sums}))
"""


def test_a_checkpoint_larger_than_the_cap_runs_within_it(tmp_path):
    """In a process of its own: the promise is about everything the process ever held."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=32, num_attention_heads=4,
        num_key_value_heads=4, head_dim=64, num_experts=32, num_experts_per_tok=2, vocab_size=128,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    save_random(model, tmp_path)
    script = textwrap.dedent(SCRIPT)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["total"] > 1.5 * (found["cap"] - found["begun"]), (
        "the checkpoint is not large enough to prove anything"
    )
    assert found["peak"] <= found["cap"]
    assert "the largest layer needs" in found["refused"]
    assert len(set(found["sums"])) == 3


def save_random(model, folder):
    """Layer by layer, so that this test never holds the model either."""
    from safetensors.torch import save_file

    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3MoeForCausalLM"]}))
    index: dict[str, str] = {}
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in model.state_dict().items():
        where = name.split(".")[2] if ".layers." in name else "rest"
        groups.setdefault(where, {})[name] = tuple(tensor.shape)
    for where, shapes in groups.items():
        file = f"model-{where}.safetensors"
        random = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
        tensors = {stored: piece for name, value in random.items() for stored, piece in as_stored(name, value)}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def as_stored(name, value):
    """The family keeps each expert's matrices apart on disk."""
    owner, _, part = name.rpartition(".")
    if part == "gate_up_proj":
        for expert, matrix in enumerate(value):
            for which, half in zip(("gate", "up"), matrix.chunk(2), strict=True):
                yield f"{owner}.{expert}.{which}_proj.weight", half.contiguous()
    elif part == "down_proj" and value.dim() == 3:
        for expert, matrix in enumerate(value):
            yield f"{owner}.{expert}.down_proj.weight", matrix.contiguous()
    else:
        yield name, value
