"""What the ranks do for test_hecate: another sharding between two steps."""

from __future__ import annotations

from typing import Any

import torch

from moekit.lab.experiments._spread import world
from moekit.parallel import Layout, ParallelError, reshard


def moves_house() -> dict[str, Any]:
    """Rows named by their unit, before and after units 0 and 4 move; bytes; what another number of experts is told."""
    here, old, new = world(), Layout(4, (0, 0, 1, 2, 3)), Layout(4, (3, 0, 1, 2, 0))
    units = torch.tensor(old.own(here.rank), dtype=torch.float64)
    here.traffic.clear()
    single, triple = reshard(here, old, new, [units, units.unsqueeze(1).expand(-1, 2).contiguous()])
    wanted = [float(unit) for unit in new.own(here.rank)]
    right = single.tolist() == wanted and triple.tolist() == [[w, w] for w in wanted]
    try:
        reshard(here, old, Layout(4, (0, 1)), [units])
    except ParallelError as error:
        return {"right": right, "sent": here.traffic.total("resharding").nbytes, "refused": str(error)}
    return {"right": right, "sent": 0, "refused": ""}
