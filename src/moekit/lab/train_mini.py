"""Train the embedded models: `python -m moekit.lab.train_mini --output DIR [--kind dense]`.

Resumes from the checkpoint in DIR where there is one. Everything follows from the recipe and its seed, save the last
bits of floating-point sums, which depend on the machine and its number of threads.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from moekit.lab._batches import Batches
from moekit.lab._evaluate import evaluate
from moekit.lab._loss import SORTED_EXPERTS, sorted_experts
from moekit.lab._publish import publish
from moekit.lab._recipe import RECIPES, Recipe
from moekit.lab._replicas import Replicas

LOG = "training_log.jsonl"
LOG_EVERY, SAVE_EVERY, EVALUATE_EVERY = 20, 200, 500


def build(recipe: Recipe) -> PreTrainedModel:
    """Return the untrained model in float32."""
    ExpertsInterface.register(SORTED_EXPERTS, sorted_experts)
    torch.manual_seed(recipe.seed)
    extra = {"experts_implementation": SORTED_EXPERTS} if recipe.kind == "moe" else {}
    return AutoModelForCausalLM.from_config(recipe.config(), attn_implementation="sdpa", dtype=torch.float32, **extra)


def optimizer_of(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), eps=1e-10)


def save(folder: Path, step: int, seconds: float, model: PreTrainedModel, optimizer: torch.optim.AdamW) -> None:
    """Write weights and optimizer moments (safetensors) under a temporary name, then rename."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {
            f"weight/{name}": parameter.detach(),
            f"m/{name}": state["exp_avg"],
            f"v/{name}": state["exp_avg_sq"],
        }
    tensors["steps"] = torch.tensor(step)
    temporary = folder / "resume.tmp"
    save_file(tensors, temporary, metadata={"step": str(step), "seconds": str(seconds)})
    temporary.rename(folder / "resume.safetensors")


def resume(folder: Path, model: PreTrainedModel, optimizer: torch.optim.AdamW) -> int:
    """Load the last checkpoint, if any, and return the number of steps done."""
    path = folder / "resume.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    step = int(tensors["steps"])
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"weight/{name}"])
        moments = {"exp_avg": tensors[f"m/{name}"], "exp_avg_sq": tensors[f"v/{name}"]}
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step


def train(recipe: Recipe, folder: Path) -> PreTrainedModel:
    """Train to the end of the recipe, logging to the folder; returns the model in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build(recipe)
    optimizer = optimizer_of(model, recipe)
    done = resume(folder, model, optimizer)
    batches, replicas = Batches(recipe), Replicas(model)
    log = (folder / LOG).open("a", buffering=1)
    log.write(json.dumps({"start": done, "recipe": asdict(recipe)}) + "\n")
    began = time.perf_counter()
    for step in range(done, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        figures = replicas.backward(*batches.batch(step), recipe.phase_at(step).balance)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % LOG_EVERY == 0:
            line = {"step": step + 1, "seconds": time.perf_counter() - began, "lr": recipe.rate(step), **figures}
            log.write(json.dumps({k: round(v, 5) for k, v in line.items()} | {"norm": round(norm.item(), 3)}) + "\n")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == recipe.steps:
            save(folder, step + 1, time.perf_counter() - began, model, optimizer)
        if (step + 1) % EVALUATE_EVERY == 0:
            log.write(json.dumps({"step": step + 1, "test": evaluate(model, context=recipe.context)}) + "\n")
    log.close()
    return model


def main() -> None:
    """Train as asked on the command line and write the model folder to DIR/model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints, log and the model")
    parser.add_argument("--kind", choices=tuple(RECIPES), default="moe")
    parser.add_argument("--steps", type=int, default=None, help="override the recipe's number of steps")
    options = parser.parse_args()
    recipe = RECIPES[options.kind]
    if options.steps is not None:
        recipe = replace(recipe, steps=options.steps)
    model = train(recipe, options.output)
    publish(model, recipe, options.output / "model", log=options.output / LOG)


if __name__ == "__main__":
    main()
