"""`moekit place`: which device keeps which expert."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli import _show
from moekit.cli._groups import grouped
from moekit.cli._options import Json, Machine, Model, Observed, Overwrite
from moekit.cli._work import observed
from moekit.errors import OptionError, OutputError

if TYPE_CHECKING:
    from moekit.checkpoint import Checkpoint
    from moekit.parallel._placement_file import PlacementFile
    from moekit.parallel.placement import Placed, Placement
    from moekit.profile import Profile


@grouped
def place(
    model: Model,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="The placement to write (JSON).")],
    devices: Annotated[int, typer.Option("--devices", metavar="P", min=1, help="Devices that share the experts.")],
    *,
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", min=1, help="Machines the devices are on.")] = 1,
    method: Annotated[
        str,
        typer.Option(
            "--with",
            metavar="METHOD[:KEY=VALUE,...]",
            help="exflow (few copies between devices), moetuner (even loads and links), balanced, contiguous, random.",
        ),
    ] = "exflow",
    export: Annotated[
        list[str],
        typer.Option("--export", metavar="SERVER", help="Also write what sglang, vllm or vllm-ascend reads."),
    ] = [],  # noqa: B006
    seen: Observed,
    machine: Machine,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Give every expert of every layer to a device, by what a profile saw, and tell what that costs: load, traffic, and
    how far it may be from the best there is. Figures are counted on the profiled text; no device is run.

    \b
    Examples:
      moekit place moekit:mini --profile mini.profile --devices 8 --nodes 2 --output place.json
      moekit place ./model --text chat.jsonl --devices 8 --output place.json --export sglang
    """
    from moekit.parallel._placement_export import EXPORTS
    from moekit.parallel.placement import placer
    from moekit.plan.options import nearest

    for form in export:
        if form not in EXPORTS:
            raise OptionError(f"unknown server '{form}' to export for; {nearest(form, EXPORTS)}")
    written = {form: output.with_name(f"{output.stem}.{form}.json") for form in export}
    for path in (output, *written.values()):
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists: choose another name or give --overwrite")
    chosen = placer(method)
    from moekit.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model)
    file, compared = _placed(checkpoint, model, chosen, (devices, nodes), observed(checkpoint, model, seen, machine))
    _write(file, output, written, overwrite)
    if as_json:
        _show.emit({"output": output, "exports": written, **file.as_dict(), "compared": compared})
        return
    _tell(file, compared)
    _show.say("", *(f"wrote {path}" for path in (output, *written.values())))


def _placed(
    checkpoint: "Checkpoint", model: str, chosen: Any, size: tuple[int, int], profile: "Profile"
) -> tuple["PlacementFile", dict[str, dict[str, float]]]:
    """The placement, and the figures of it and of the baselines by placer."""
    from moekit.parallel._placement_file import PlacementFile
    from moekit.parallel._traffic import Flow
    from moekit.parallel.placement import BASELINES, check_grid, placer

    flow = Flow.of_profile(profile)
    grid = check_grid(flow.num_experts, *size)
    with _show.progress(f"place {model}"):
        placed = chosen.place(flow, grid)
    others = {name: placer(name).place(flow, grid) for name in BASELINES if name != placed.how}
    compared = {name: _figures(one, profile, checkpoint) for name, one in {placed.how: placed, **others}.items()}
    layers = tuple((layer.name, layer.layer) for layer in profile.layers.values())
    predicted = {
        **compared[placed.how],
        "bounds": dict(placed.bound),
        "gaps": {name: placed.gap(name) for name in placed.bound if name in placed.value},
    }
    decoder = max(int(_config(checkpoint, "num_hidden_layers", 0)), max(number for _, number in layers) + 1)
    file = PlacementFile(placed.placement, checkpoint.fingerprint, model, placed.how, layers, decoder, predicted)
    return file, compared


def _figures(placed: "Placed", profile: "Profile", checkpoint: "Checkpoint") -> dict[str, float]:
    """What a placer knows of its placement, and copies per token and layer on the profile's trace, where it has one."""
    from moekit.parallel._traffic import movement, traced

    found, trace = dict(placed.value), traced(profile)
    if trace is not None:
        for dataflow in ("home", "follow"):
            moved = movement(placed.placement, trace, dataflow)
            found[f"copies, {dataflow}"] = moved.copies
            if placed.placement.grid.nodes > 1:
                found[f"copies across nodes, {dataflow}"] = moved.across
        width = checkpoint.moe_layers[0].shape.hidden_size * 2  # bytes of a hidden state in 16 bits
        found["bytes per token, home"] = found["copies, home"] * placed.placement.num_layers * width
    return found


def _config(checkpoint: "Checkpoint", name: str, default: Any) -> Any:
    config = checkpoint.config
    return config.get(name, config.get("text_config", {}).get(name, default))


def _write(file: "PlacementFile", output: Path, written: dict[str, Path], overwrite: bool) -> None:
    from moekit.parallel._placement_export import export
    from moekit.parallel._placement_file import write_json

    exported = {path: export(file, form) for form, path in written.items()}
    file.save(output, overwrite=overwrite)
    for path, data in exported.items():
        write_json(path, data, overwrite=overwrite)


def _tell(file: "PlacementFile", compared: dict[str, dict[str, float]]) -> None:
    names = [name for name in compared[file.how] if any(name in other for other in compared.values())]
    rows = [(name, *(found.get(name) for found in compared.values())) for name in names]
    placement: Placement = file.placement
    where = f"{placement.devices} devices" + (f" on {placement.grid.nodes} nodes" if placement.grid.nodes > 1 else "")
    title = f"{placement.num_layers} layers of {placement.num_experts} experts on {where}, counted on the profiled text"
    _show.table(("figure", *compared), rows, title)
    for name, gap in file.predicted["gaps"].items():
        bound = file.predicted["bounds"][name]
        _show.say(f"{name}: no placement is below {bound:.4g}; this one is within {gap:.1%} of the best there is")
