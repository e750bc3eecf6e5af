"""Which experts move when devices come or go: as few as can be, with equal shares for all.

Shapes by suffix: E experts, L MoE layers, D devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from moekit.errors import OptionError


def even(experts: int, devices: Sequence[int]) -> np.ndarray:
    """int [E]: the device of every expert, in equal contiguous shares. Raises OptionError for fewer experts."""
    _check(experts, devices)
    return np.asarray(devices)[np.arange(experts) * len(devices) // experts]


def rescaled(device_E: np.ndarray, devices: Sequence[int]) -> np.ndarray:
    """The device of every expert among ``devices``, in shares that differ by one at most; the fewest possible move.

    A maximum-weight matching of experts with places: every device has floor(E / D) places, one more that may stay
    empty, and an expert weighs 1 on the device that holds it.

    Raises:
        OptionError: no devices, one named twice, or more devices than experts.
    """
    _check(len(device_E), devices)
    floor, over = divmod(len(device_E), len(devices))
    owner = np.repeat(np.asarray(devices), floor + bool(over))
    spare = np.tile(np.arange(floor + bool(over)) == floor, len(devices))
    weight = (device_E[:, None] == owner).astype(float)
    # Rows of nobody fill the extra places that stay empty, and may stand nowhere else.
    nobody = np.where(spare, 0.0, -float(len(device_E)))
    weight = np.vstack([weight, np.tile(nobody, (len(owner) - len(device_E), 1))])
    rows, places = linear_sum_assignment(weight, maximize=True)
    found = np.empty(len(weight), np.int64)
    found[rows] = owner[places]
    return found[: len(device_E)]


def fewest_moves(held: Sequence[int], experts: int, devices: int) -> int:
    """The bound: ``held[i]`` experts lie on the i-th device that stays, of ``devices`` in all afterwards.

    Of each at most floor(E / D) can stay, one more on the E mod D devices that hold the extra ones.
    """
    floor, over = divmod(experts, devices)
    stay = sum(min(one, floor) for one in held) + min(over, sum(one > floor for one in held))
    return experts - stay


def _check(experts: int, devices: Sequence[int]) -> None:
    if not devices or len(set(devices)) != len(devices) or len(devices) > experts:
        raise OptionError(f"devices {list(devices)} for {experts} experts: expected different ones, 1 to {experts}")
