"""The course of a training as a picture: loss, how uneven the experts' load was, and the load at the end."""

from pathlib import Path
from typing import Any

NAME = "training.png"


def draw(lines: list[dict[str, Any]], folder: Path) -> Path | None:
    """Write ``training.png`` into the folder; nothing where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    loss, uneven, load = figure.subplots(1, 3)
    loss.plot(steps, [line["cross_entropy"] for line in lines], linewidth=1)
    loss.set(title="cross-entropy", xlabel="step", ylabel="nats per token")
    choices = max(1, lines[-1]["choices"])
    for label, values in (
        ("MaxVio, mean over layers", [line["max_violation"] for line in lines]),
        ("coefficient of variation, mean over layers", [line["variation"] for line in lines]),
        ("share of dead experts", [line["dead"] / choices for line in lines]),
    ):
        uneven.plot(steps, values, linewidth=1, label=label)
    uneven.legend(fontsize="small")
    uneven.set(title="uneven load", xlabel="step")
    last = lines[-1]["load"]
    width = max(map(len, last), default=0)
    rows = [[count / max(1, sum(layer)) * len(layer) for count in layer] + [0] * (width - len(layer)) for layer in last]
    if rows:
        image = load.imshow(rows, aspect="auto", vmin=0, cmap="viridis")
        figure.colorbar(image, ax=load, label="load (1 is even)")
    load.set(title="last step", xlabel="expert", ylabel="layer")
    figure.savefig(folder / NAME, dpi=120)
    return folder / NAME
