"""The receipt: what became of every tensor and every expert of the source, and what it cost.

``receipt.json``. Everything but the ``run`` section is the same for every run of the same job; ``run`` holds what is
not: times, memory, the layers that an interrupted run had already finished.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.errors import OutputError
from moekit.plan.codec import dump

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.checkpoint.shards import Written
    from moekit.plan.document import Plan
    from moekit.plan.produce import Production
    from moekit.plan.target import LayerTarget

NAME = "receipt.json"
FORMAT, VERSION = "moekit-receipt", 1
RECOVERY = (
    "These figures are without training afterwards: moekit recover OUTPUT --against {source} --text FILE --output NEW "
    "distils back what was lost, and reports its own figures apart, in recovery.json."
)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """See the module's text; every field is JSON.

    ``layers``: by MoE layer, what became of each expert. ``tensors``: by source tensor, its fate. ``output``: by
    output tensor, dtype, shape, bytes and SHA-256. ``nbytes``: before and after, in all and of the routed experts.
    ``recovery``: how to train back what was lost, which no figure here has part in.
    """

    source: Mapping[str, Any]
    plan: Mapping[str, Any]
    job: Mapping[str, Any]
    nbytes: Mapping[str, int]
    layers: Mapping[str, Any]
    tensors: Mapping[str, Any]
    dropped: Mapping[str, str]
    output: Mapping[str, Any]
    reload: Mapping[str, Any]
    loadable: Mapping[str, Any]
    divergence: Mapping[str, Any] | None
    versions: Mapping[str, str]
    run: Mapping[str, Any]
    recovery: str = ""

    def to_json(self) -> str:
        return dump({"format": FORMAT, "version": VERSION, **asdict(self)}, flat_from=3) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Receipt:
        """Read a receipt, from its file or the folder it lies in. OutputError if it is none."""
        path = Path(path)
        path = path / NAME if path.is_dir() else path
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT or found["version"] != VERSION:
                raise KeyError
            told = [field.name for field in fields(cls) if field.default is MISSING or field.name in found]
            return cls(**{name: found[name] for name in told})
        except OSError as error:
            raise OutputError(f"cannot read the receipt {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise OutputError(f"{path} is no receipt of version {VERSION} written by moekit") from None


def layer_account(target: LayerTarget, why: str) -> dict[str, Any]:
    """What became of each source expert of one layer, in one word and in full."""
    into: dict[int, list[Any]] = {expert: [] for expert in range(target.layer.num_experts)}
    for index, stored in enumerate(target.experts):
        for source, coefficient in stored.parts if stored else ():
            assert stored is not None
            alone = len(stored.parts) == 1 and coefficient == 1.0
            entry: dict[str, Any] = {"stored": index} if alone else {"stored": index, "coefficient": coefficient}
            into[source].append(entry if stored.bits == 16 else entry | {"bits": stored.bits})
    called = {slot for slot in target.slots if slot >= 0}
    experts = [
        {"expert": expert, "became": _word(target, uses, called), **({"into": uses} if uses else {})}
        for expert, uses in into.items()
    ]
    words = [str(expert["became"]) for expert in experts]
    return {
        "why": why,
        "experts_before": target.layer.num_experts,
        "experts_stored": sum(expert is not None for expert in target.experts),
        "router_rows": len(target.rows),
        "masked_rows": sum(slot < 0 for slot in target.slots),
        "summary": {word: words.count(word) for word in sorted(set(words))},
        "experts": experts,
    }


def _word(target: LayerTarget, uses: list[Any], called: set[int]) -> str:
    if not uses:
        return "dropped"
    if not any(use["stored"] in called for use in uses):
        return "masked"
    if any("coefficient" in use for use in uses):
        return "merged"
    return "quantised" if any("bits" in use for use in uses) else "kept"


def accounts(
    checkpoint: Checkpoint, plan: Plan, production: Production, written: Mapping[str, Written]
) -> dict[str, Any]:
    """The sections that only source, plan and written bytes decide."""
    target = production.target
    experts = {
        name for layer in checkpoint.moe_layers for t in layer.expert_tensors for name in t.stored.tensors.values()
    }
    return {
        "source": {
            "name": checkpoint.path.name,
            "model_type": checkpoint.model_type,
            "fingerprint": checkpoint.fingerprint,
            "tensors": len(checkpoint.tensors),
            "headers": _headers(checkpoint),
        },
        "plan": {"fingerprint": plan.fingerprint, "methods": list(plan.methods), "profile": plan.profile},
        "nbytes": {
            "before": sum(info.nbytes for info in checkpoint.tensors.values()),
            "after": sum(tensor.nbytes for tensor in written.values()),
            "experts_before": sum(checkpoint.tensors[name].nbytes for name in experts),
            "experts_after": sum(written[name].nbytes for name in production.expert_names),
        },
        "layers": {
            name: layer_account(layer, plan.layer(name, layer.layer.num_experts).why)
            for name, layer in target.layers.items()
        },
        "tensors": {
            name: {"became": fate.became, "into": list(fate.into), **({"why": fate.why} if fate.why else {})}
            for name, fate in sorted(production.fates.items())
        },
        "dropped": dict(target.dropped),
        "recovery": RECOVERY.format(source=checkpoint.path.name),
        "output": {name: {**t._asdict(), "shape": list(t.shape)} for name, t in sorted(written.items())},
    }


def _headers(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of each source file's safetensors header."""
    found = {}
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        with (checkpoint.path / file).open("rb") as stream:
            length = stream.read(8)
            found[file] = hashlib.sha256(length + stream.read(int.from_bytes(length, "little"))).hexdigest()
    return found


def versions() -> dict[str, str]:
    """What made it; the interpreter and every library whose numbers or file formats it rests on."""
    found = {"python": platform.python_version()}
    for package in ("moekit", "torch", "transformers", "safetensors", "compressed-tensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
