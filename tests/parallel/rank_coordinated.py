"""What the ranks do for test_deepspeed_moe."""

from __future__ import annotations

from moekit.lab.experiments._coordinating import EXPERTS, coordinated
from moekit.lab.experiments._spread import world
from moekit.parallel import Groups, Layout, ParallelError
from moekit.parallel.deepspeed_moe import Coordinated
from moekit.parallel.llep import LLEP


def with_plans(degree: int) -> dict[str, float]:
    return coordinated(degree, planner=LLEP(threshold=1, chunk=1))


def refused(case: str) -> str:
    here = world()
    groups = Groups.of(here, 2)
    layouts = {
        "ranks": Layout.contiguous(EXPERTS, here.size + 1),
        "slices": Layout(here.size, tuple(range(here.size)), slices=2),
        "few": Layout(here.size, (0, 2)),
    }
    try:
        Coordinated(groups, layouts[case])
    except ParallelError as error:
        return str(error)
    return ""
