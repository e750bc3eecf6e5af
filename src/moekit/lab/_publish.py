"""Turn trained weights into the published folder: stock files in bfloat16, the log, a model card with figures."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from moekit import lab
from moekit.lab._evaluate import Figures, evaluate
from moekit.lab._recipe import Recipe
from moekit.lab._tokens import BOS_ID, EOS_ID, PAD_ID, byte_tokenizer

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---
# {title}

{about}

Trained for {steps} steps of {tokens_per_step} bytes ({megabytes:.1f} MB) by `python -m moekit.lab.train_mini{flag}`
on the texts and tasks of `moekit.lab`; the recipe and the course of the loss are in `training_log.jsonl`.
Tokens are bytes. It continues Python, English documentation, C headers and licences after a fashion, and answers
seven exact tasks, one per line (`add: 23+45=` is continued by `68` and a newline). It is a test subject, not a tool.

## Figures

On test splits never trained on; weights as published (bfloat16), computed in float32, context {context} bytes,
{bytes_per_domain} bytes per domain. Texts depend on the Python version and the installed packages.

| domain | bits per byte | exact match | chance |
| --- | --- | --- | --- |
{rows}

Task prompts are random letters, numbers and words: bits per
byte of tasks are bounded from below by that. Exact match is of {examples} prompts per task, greedy, newline included.
{experts}"""

_EXPERTS = """
## Experts

Per layer, over all domains with equal weight (load 1 is an even share):

| layer | I(domain; expert), bits | preference | largest load | smallest load |
| --- | --- | --- | --- | --- |
{rows}

Preference: how many times more often an expert is chosen in its favourite domain than over all, mean over experts.

The largest possible mutual information is {limit:.2f} bits (the logarithm of the number of domains, {domains}).
"""


def _model_rows(figures: Figures) -> str:
    exact = figures["exact_match"]
    rows = []
    for domain, bits in figures["bits_per_byte"].items():
        score = f"{exact[domain]:.1%} | {lab.task(domain).chance:.2%}" if domain in exact else " | "
        rows.append(f"| {domain} | {bits:.3f} | {score} |")
    return "\n".join(rows)


def _expert_section(figures: Figures) -> str:
    if "experts" not in figures:
        return ""
    experts = figures["experts"]
    keys = ("mutual_information_bits", "preference", "max_load", "min_load")
    columns = zip(*(experts[key] for key in keys), strict=True)
    rows = "\n".join(
        f"| {i} | {mi:.3f} | {liked:.2f} | {high:.2f} | {low:.3f} |" for i, (mi, liked, high, low) in enumerate(columns)
    )
    domains = len(lab.DOMAINS)
    return _EXPERTS.format(rows=rows, limit=torch.tensor(float(domains)).log2().item(), domains=domains)


def model_card(recipe: Recipe, figures: Figures, *, total: int, context: int, max_bytes: int, examples: int) -> str:
    """Return the model card: what it is, how it was made, what it scores."""
    if recipe.kind == "moe":
        title, flag = "moekit mini", ""
        about = (
            f"A Mixture-of-Experts language model of {total / 1e6:.1f} million parameters: {recipe.num_layers} layers, "
            f"{recipe.num_experts} experts, top-{recipe.top_k}."
        )
    else:
        title, flag = "moekit dense", " --kind dense"
        about = (
            f"The dense sibling of moekit mini: {total / 1e6:.1f} million parameters, {recipe.num_layers} layers, "
            "each MLP as wide as the experts that are active together."
        )
    return _CARD.format(
        tags="moe, moekit" if recipe.kind == "moe" else "moekit",
        title=title,
        about=about,
        flag=flag,
        steps=recipe.steps,
        tokens_per_step=recipe.tokens_per_step,
        megabytes=recipe.steps * recipe.tokens_per_step / 1e6,
        context=context,
        bytes_per_domain=f"{max_bytes:,}",
        examples=examples,
        rows=_model_rows(figures),
        experts=_expert_section(figures),
    )


def publish(
    model: PreTrainedModel, recipe: Recipe, folder: Path, *, log: Path, max_bytes: int = 65_536, examples: int = 500
) -> Figures:
    """Write the model folder and return the figures of what a stock load of it gives."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=False).save_pretrained(
        folder
    )
    byte_tokenizer(recipe.long_context).save_pretrained(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    context = recipe.context
    figures = evaluate(stock, context=context, max_bytes=max_bytes, examples=examples)
    total = sum(parameter.numel() for parameter in stock.parameters())
    card = model_card(recipe, figures, total=total, context=context, max_bytes=max_bytes, examples=examples)
    (folder / "README.md").write_text(card)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    shutil.copyfile(log, folder / "training_log.jsonl")
    return figures
