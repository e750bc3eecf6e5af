"""`moekit inspect`: what a checkpoint is, from its headers alone."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli import _show
from moekit.cli._options import Json, Model

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint, Summary


def inspect(
    model: Model,
    context: Annotated[int, typer.Option("--context", metavar="N", min=1, help="Tokens to size the cache for.")] = 4096,
    as_json: Json = False,
) -> None:
    """Show what a model is made of, what moekit can do with it and what that takes, without loading it.

    \b
    Examples:
      moekit inspect moekit:mini
      moekit inspect ./my-model --context 32768 --json
    """
    from moekit.checkpoint import Checkpoint

    checkpoint = Checkpoint.open_headers(model)
    summary = checkpoint.summary()
    can, cannot = _abilities(checkpoint)
    found = {
        "model": model,
        "path": checkpoint.path,
        "family": summary.model_type,
        "dtype": summary.dtype,
        "quantisation": summary.quantisation,
        "layers": len(summary.layers),
        "experts": sorted({layer.num_experts for layer in summary.layers}),
        "top_k": sorted({layer.top_k for layer in summary.layers}),
        "groups": sorted({layer.groups for layer in checkpoint.moe_layers if layer.groups}),
        "prediction_layers": sum(layer.extra for layer in summary.layers),
        "parameters": {"total": summary.total, "active": summary.active, "by_part": summary.parts},
        "bytes": {"total": summary.total_bytes, "by_part": summary.nbytes},
        "expert_bytes": {layer.name: layer.expert_bytes for layer in summary.layers},
        "memory": _memory(checkpoint, summary, context),
        "sizes": _sizes(checkpoint, summary),
        "can": can,
        "cannot": cannot,
        "fingerprint": checkpoint.fingerprint,
    }
    if as_json:
        _show.emit(found)
    else:
        _print(found, context)


def _memory(checkpoint: "Checkpoint", summary: "Summary", context: int) -> dict[str, int]:
    """Bytes to run the whole model with a cache of `context` tokens, and to profile it layer by layer."""
    from moekit.stream import smallest_cap

    cache = summary.kv_bytes(context)
    return {"whole": summary.total_bytes + cache, "cache": cache, "streamed": smallest_cap(checkpoint)}


def _sizes(checkpoint: "Checkpoint", summary: "Summary") -> dict[str, int]:
    """Bytes of weights after the plainest cuts: half of the experts, every expert in 8 or in 4 bits."""
    from moekit.formats import packed_nbytes

    experts = summary.nbytes["experts"]
    rest = summary.total_bytes - experts
    sizes = {"half of the experts": rest + experts // 2}
    for bits in (8, 4):
        packed = sum(
            layer.num_experts
            * packed_nbytes(
                layer.hidden_size, layer.intermediate_size, bits, gated=layer.shape.gated, bias=layer.shape.biased
            )
            for layer in checkpoint.moe_layers
            if not layer.extra
        )
        sizes[f"experts in {bits} bits"] = rest + packed
    return sizes


def _abilities(checkpoint: "Checkpoint") -> tuple[list[str], dict[str, str]]:
    """What works on this model, and what does not with the reason."""
    from moekit.compress import methods

    can = ["profile", f"compress with {', '.join(methods())}", "fit", "verify"]
    cannot = {}
    users = max(layer.users for layer in checkpoint.moe_layers)
    if users > 1:
        can = ["profile"]
        cannot["compress, fit"] = f"{users} routers choose from one bank of experts, and a plan is for one router"
    elif checkpoint.fixed_count:
        cannot["drop router rows"] = f"{checkpoint.fixed_count}: those of dropped experts stay, masked"
    if checkpoint.scheme.config:
        kind = checkpoint.scheme.config.get("quant_method", "quantised")
        cannot["keep the published packing of experts that change"] = f"{kind} weights are decoded before they change"
    if any(layer.groups for layer in checkpoint.moe_layers):
        cannot["keep any number of experts"] = "routing is limited to groups: the same number is kept in each"
    if any(layer.extra for layer in checkpoint.moe_layers):
        cannot["prune its prediction layers"] = "transformers runs no text through them: they are kept whole or dropped"
    return can, cannot


def _print(found: dict[str, Any], context: int) -> None:
    def spans(values: list[int]) -> str:
        return " or ".join(map(str, values))

    kind = f"{found['family']}, {found['dtype']}" + (f", {found['quantisation']}" if found["quantisation"] else "")
    count, memory = found["parameters"], found["memory"]
    lines = [
        ("family", kind),
        ("MoE layers", str(found["layers"])),
        ("experts per layer", f"{spans(found['experts'])}, top-{spans(found['top_k'])}"),
        ("parameters", f"{_show.parameters(count['total'])} total / {_show.parameters(count['active'])} active"),
        ("size on disk", _show.gigabytes(found["bytes"]["total"])),
    ]
    _show.table((found["model"], ""), lines)
    _show.say("")
    total = found["bytes"]["total"]
    rows = [(part, size) for part, size in found["bytes"]["by_part"].items() if size]
    _show.table(
        ("part", "bytes", "share", "parameters"),
        [(p, _show.gigabytes(s), f"{s / total:.0%}", _show.parameters(count["by_part"][p])) for p, s in rows],
    )
    _show.say("")
    needs = [
        (f"run it whole, {context} tokens of context", _show.gigabytes(memory["whole"])),
        ("profile or compress it layer by layer (--max-ram)", _show.gigabytes(memory["streamed"])),
        *((f"weights with {name}", _show.gigabytes(size)) for name, size in found["sizes"].items()),
    ]
    _show.table(("what it would need", "memory"), needs)
    _show.say("", *(f"can: {line}" for line in found["can"]))
    _show.say(*(f"cannot: {what}: {why}" for what, why in found["cannot"].items()))
