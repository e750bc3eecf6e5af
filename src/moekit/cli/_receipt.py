"""A receipt as people read it."""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.cli import _show

if TYPE_CHECKING:
    from moekit.plan import Receipt


def as_dict(receipt: "Receipt", output: Path) -> dict[str, Any]:
    """The whole receipt, and where it lies."""
    return {"output": output, **json.loads(receipt.to_json())}


def tell(receipt: "Receipt", output: Path, as_json: bool) -> None:
    """The receipt for a program or for people."""
    if as_json:
        _show.emit(as_dict(receipt, output))
    else:
        show(receipt, output)


def show(receipt: "Receipt", output: Path) -> None:
    """The receipt in a dozen lines."""
    _show.table((str(output), ""), list(lines(receipt)))
    domains(receipt.divergence)
    _show.say("", f"wrote {output} with receipt.json, plan.json and README.md")
    if receipt.recovery:
        _show.say(receipt.recovery)


def lines(receipt: "Receipt") -> list[tuple[str, str]]:
    """(what, figure) pairs: size, fate of the experts, divergence, reload, cost of the run."""
    sizes, run = receipt.nbytes, receipt.run
    fates: Counter[str] = Counter()
    for layer in receipt.layers.values():
        fates.update(layer["summary"])
    found = [
        ("size", f"{_show.gigabytes(sizes['before'])} -> {_show.gigabytes(sizes['after'])}"),
        ("experts", ", ".join(f"{count} {fate}" for fate, count in sorted(fates.items()))),
        ("tensors", f"{receipt.source['tensors']} accounted for, {len(receipt.output)} written"),
        *divergence(receipt.divergence),
        ("reload", str(receipt.reload.get("how", ""))),
    ]
    for engine, verdict in receipt.loadable.items():
        found.append((f"names and shapes for {engine}", "ok" if verdict["ok"] else "; ".join(verdict["against"])))
    found.append(("time", f"{run['wall_seconds']:.1f} s, peak memory {_show.gigabytes(run['peak_memory_bytes'])}"))
    if run["resumed"]:
        found.append(("resumed", f"{len(run['resumed'])} units were finished by an earlier run"))
    return found


def divergence(measured: Any) -> list[tuple[str, str]]:
    """Held-out figures, source against output, with their 95 % intervals."""
    if not measured:
        return [("held-out text", "none given: nothing was measured")]
    kl = _show.interval(measured, "kl", ".3g")
    pairs = [("KL divergence", f"{kl} nats per token over {measured['tokens']} tokens")]
    pairs.append(("top-1 agreement", _show.interval(measured, "agreement", ".1%")))
    if measured.get("bits_per_byte_source") is not None:
        pairs.append(("bits per byte", _before_after(measured)))
    return pairs


def domains(measured: Any) -> None:
    """The same by domain, as a table; nothing where the text has only one."""
    found = (measured or {}).get("domains", {})
    if not found:
        return
    rows = [
        (
            name,
            str(one["tokens"]),
            _show.interval(one, "kl", ".3g"),
            _show.interval(one, "agreement", ".1%"),
            _before_after(one) if one["bits_per_byte_source"] is not None else "",
        )
        for name, one in found.items()
    ]
    _show.say("")
    _show.table(("held-out domain", "tokens", "KL, nats per token", "top-1 agreement", "bits per byte"), rows)


def _before_after(measured: Any) -> str:
    before, after = (_show.interval(measured, f"bits_per_byte_{of}", ".3f") for of in ("source", "output"))
    return f"{before} -> {after}"
