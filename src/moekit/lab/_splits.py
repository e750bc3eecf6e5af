"""Which split a thing belongs to: a hash of its name, so that no list has to be kept and splits never overlap."""

import hashlib
from typing import Literal

from moekit.errors import OptionError

Split = Literal["train", "calibration", "test"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "test")
CALIBRATION_SHARE, TEST_SHARE = 0.1, 0.1


def split_of(name: str) -> Split:
    """Return the split of a file or a prompt: 80 % train, 10 % calibration, 10 % test, by the hash of its name."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    position = int.from_bytes(digest) / 2**64
    if position < TEST_SHARE:
        return "test"
    return "calibration" if position < TEST_SHARE + CALIBRATION_SHARE else "train"


def check_split(split: str) -> None:
    """Raise OptionError unless `split` is one of the three."""
    if split not in SPLITS:
        raise OptionError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
