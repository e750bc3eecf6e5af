"""Generating from a fraction of the memory a model needs: experts are paged one by one from the model's own files.

The parts, from the files up:

- `_pages`, `_virtual` are places in memory; `_layers`, `_banks` and `_planes` bring one block's experts there and are
  each a `_tier`; `_tiers` picks which. `store` has the one budget, the one policy and the threads that read.
- `policy` (`_policies*`) says who makes room, `predict` (`_predictors*`) what comes next. Both are pure: `replay`
  drives them with a trace, `_ahead` while a model runs. `schedule` and `_weighted_bound` are on paper only.
- `paging` opens a model (`_room`: what must stay free for a forward pass; `_device`: experts computed elsewhere than in
  memory); `_stand_in` and `rules` read less than all.
- `answer` asks it once, `desk` keeps who asks in line, `server` is the desk over HTTP. `tune` measures how to page,
  `defaults` keeps the choice, `weigh` says how large a model may be.
- `_scaling*` are experts served by processes that come and go, `_adapters*` experts that replace others for some
  sequences, `_batches` who is best computed together, `_expert_*` training with expert states on disk.

A file named by a paper's key puts these together as the paper does.
"""

from moekit.run._expert_states import Adam, ExpertStates
from moekit.run._expert_training import OnDisk, train_on_disk
from moekit.run.answer import Cost, answer, prompt_ids
from moekit.run.paging import Paging, load, paging
from moekit.run.policy import CachePolicy, policies, policy
from moekit.run.predict import Predictor, Signal
from moekit.run.store import Counters, ExpertStore

__all__ = [
    "Adam",
    "CachePolicy",
    "Cost",
    "Counters",
    "ExpertStates",
    "ExpertStore",
    "OnDisk",
    "Paging",
    "Predictor",
    "Signal",
    "answer",
    "load",
    "paging",
    "policies",
    "policy",
    "prompt_ids",
    "train_on_disk",
]
