"""Experts on many devices, and training across slow links.

Parts: `dispatch` (layouts and plans), `exchange` (rows between ranks), `engine` (carries out any plan), `_groups`
(ranks that share experts, ranks that store the same), `_coordinated` (an engine under tensor parallelism), `placement`
and `_solver*`, `outer` and `_outer*` (training across slow links), `_capacity`, `_aggregate`, `_group_balance`,
`_sandwich`. They are pure or collective and know no paper; a file named by a paper's key makes plans or models of them.

A stock model, in a script started by ``torchrun --nproc-per-node 4``, every rank with batches of its own::

    torch.distributed.init_process_group("gloo")
    world = World.join()
    attach(model, world, planner=LLEP(chunk=64))  # or degree=2: every two ranks hold all experts
    model(**batch).loss.backward()
    reduce_replicated(model, world)
"""

from moekit.parallel._attach import attach, detach, reduce_replicated
from moekit.parallel._chunks import Move, gather_chunks
from moekit.parallel._errors import ParallelError
from moekit.parallel._groups import Groups
from moekit.parallel._links import Grid, Traffic
from moekit.parallel._ranks import LocalRanks
from moekit.parallel._shards import reshard, shard, unshard
from moekit.parallel._world import World
from moekit.parallel.dispatch import DispatchPlan, Layout, Piece, Planner, native
from moekit.parallel.engine import Engine
from moekit.parallel.exchange import all_to_all, flat, two_level

__all__ = [
    "DispatchPlan",
    "Engine",
    "Grid",
    "Groups",
    "Layout",
    "LocalRanks",
    "Move",
    "ParallelError",
    "Piece",
    "Planner",
    "Traffic",
    "World",
    "all_to_all",
    "attach",
    "detach",
    "flat",
    "gather_chunks",
    "native",
    "reduce_replicated",
    "reshard",
    "shard",
    "two_level",
    "unshard",
]
