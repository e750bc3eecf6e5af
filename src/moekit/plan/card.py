"""The model card: README.md with front matter, written from the receipt alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moekit.plan.receipt import Receipt

_ROWS = (("bits per byte", "bits_per_byte"), ("nats per token", "nll"))


def model_card(receipt: Receipt, name: str) -> str:
    """Markdown; says what was done and what it cost, and nothing that the receipt does not say."""
    parts = [
        _front_matter(receipt),
        f"# {name}",
        _summary(receipt),
        _layers(receipt),
        _cost(receipt),
        _use(receipt, name),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(receipt: Receipt) -> str:
    tags = ["moekit", "mixture-of-experts", str(receipt.source["model_type"]), str(receipt.job["format"])]
    lines = [
        "---",
        f"base_model: {json.dumps(receipt.source['name'])}",
        "library_name: transformers",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
    return "\n".join(lines)


def _summary(receipt: Receipt) -> str:
    methods = ", ".join(f"`{method}`" for method in receipt.plan["methods"]) or "a plan made by hand"
    before, after = receipt.nbytes["before"], receipt.nbytes["after"]
    return (
        f"Made from `{receipt.source['name']}` by moekit {receipt.versions.get('moekit', '')} with {methods}: "
        f"{_gb(before)} became {_gb(after)} ({1 - after / before:.0%} less). "
        "`plan.json` says what became of every expert, `receipt.json` accounts for every tensor; "
        "`moekit verify . --against SOURCE` computes all of it again."
    )


def _layers(receipt: Receipt) -> str:
    lines = [
        "## Experts",
        "",
        "| layer | experts | stored | router rows | what became of them |",
        "|---|---|---|---|---|",
    ]
    for name, layer in receipt.layers.items():
        became = ", ".join(f"{count} {word}" for word, count in layer["summary"].items())
        lines.append(
            f"| {name} | {layer['experts_before']} | {layer['experts_stored']} | {layer['router_rows']} | {became} |"
        )
    for name, why in receipt.dropped.items():
        lines += ["", f"Left out: `{name}` ({why})."]
    return "\n".join(lines)


def _cost(receipt: Receipt) -> str:
    found = receipt.divergence
    if found is None:
        return "## Cost\n\nNot measured: no held-out text was given."
    lines = [
        "## Cost",
        "",
        f"On {found['tokens']} held-out tokens against the source:",
        "",
        "| | source | this model |",
        "|---|---|---|",
    ]
    for label, key in _ROWS:
        if found[f"{key}_source"] is not None:
            before, after = (_interval(found, f"{key}_{of}", ".4f") for of in ("source", "output"))
            lines.append(f"| {label} | {before} | {after} |")
    lines += [
        "",
        f"KL divergence {_interval(found, 'kl', '.5f')} nats per token, top-1 agreement "
        f"{_interval(found, 'agreement', '.2%')}; in brackets 95 % intervals.",
        "",
        receipt.recovery,
    ]
    return "\n".join([*lines, *_domains(found.get("domains", {}))])


def _domains(found: Mapping[str, Any]) -> list[str]:
    """A table with a row for each domain of the held-out text, where it has several."""
    if not found:
        return []
    lines = [
        "",
        "| domain | tokens | KL divergence | top-1 agreement | bits per byte, source | this model |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        known = one["bits_per_byte_source"] is not None
        bits = [_interval(one, f"bits_per_byte_{of}", ".4f") if known else "" for of in ("source", "output")]
        figures = [_interval(one, "kl", ".5f"), _interval(one, "agreement", ".2%"), *bits]
        lines.append(f"| {name} | {one['tokens']} | {' | '.join(figures)} |")
    return lines


def _interval(found: Mapping[str, Any], name: str, form: str) -> str:
    mean, low, high = (format(found[name + end], form) for end in ("", "_low", "_high"))
    return f"{mean} [{low}, {high}]"


def _use(receipt: Receipt, name: str) -> str:
    first = "import moekit  # registers the packed format\n" if receipt.job["format"] == "moekit" else ""
    engines = [_engine(label, receipt.loadable[key]) for key, label in (("vllm", "vLLM"), ("gguf", "GGUF converter"))]
    return (
        f"## Use\n\n```python\n{first}from transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")\n```\n\n'
        "Names and shapes held against what other engines look for (none was run):\n\n" + "\n".join(engines)
    )


def _engine(label: str, found: Mapping[str, Any]) -> str:
    detail = "; ".join([*found["against"], *found["notes"]])
    return f"- {label}: {'as expected' if found['ok'] else 'not loadable'}" + (f" ({detail})" if detail else "")


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
