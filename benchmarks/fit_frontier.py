"""Is `fit` ever worse than a single method at no more bytes? Run the experiment, keep its figures, draw them.

    python benchmarks/fit_frontier.py              about fifteen minutes of one core
    python benchmarks/fit_frontier.py --plot-only  from the figures kept

Writes ``benchmarks/fit_frontier.json`` and ``docs/fit_frontier.png``. The rule stands in the experiment's docstring.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

FIGURES = Path(__file__).with_suffix(".json")
PLOT = Path(__file__).parents[1] / "docs" / "fit_frontier.png"
SEEDS = (11, 12, 13, 14, 15)
SHOWN = {"fit": "fit", "rtn": "rounding only", "reap": "REAP", "easy-ep": "EASY-EP", "frequency": "frequency"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot-only", action="store_true", help="draw the figures kept, run nothing")
    if not parser.parse_args().plot_only:
        from moekit.lab.experiments import fit_frontier

        outcome = fit_frontier.run(SEEDS, None, lambda done, total: print(f"seed {done} of {total}", flush=True))
        kept = {"shown": outcome.shown, "seeds": SEEDS, "setting": outcome.setting, "figures": outcome.figures}
        FIGURES.write_text(json.dumps(kept, indent=1) + "\n")
        print("shown" if outcome.shown else "not shown")
    draw(json.loads(FIGURES.read_text())["figures"])


def draw(figures: dict[str, dict[str, dict[str, dict[str, float]]]]) -> None:
    """Loss against bytes removed: `fit`, and for each family of methods its best member at each size."""
    fig, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for prefix, label in SHOWN.items():
        points = []
        for ratio, figure in figures.items():
            of_family = [value for name, value in figure["kl"].items() if name.startswith(prefix)]
            if of_family:
                points.append((float(ratio), min(of_family, key=lambda value: value["mean"])))
        x = [ratio for ratio, _ in points]
        y = [value["mean"] for _, value in points]
        style = {"lw": 2.5, "zorder": 3} if prefix == "fit" else {"lw": 1.2, "ls": "--"}
        axes.plot(x, y, marker="o", label=label, **style)
        low, high = ([value[side] for _, value in points] for side in ("low", "high"))
        axes.fill_between(x, [max(v, 1e-7) for v in low], high, alpha=0.15)
    axes.set(yscale="log", xlabel="share of the bytes removed", xticks=[float(r) for r in figures])
    axes.set_ylabel("KL from the source, nats per token")
    axes.set_title("moekit:mini, unseen text: fit against the best of each method at no more bytes", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    fig.savefig(PLOT, dpi=140)


if __name__ == "__main__":
    main()
