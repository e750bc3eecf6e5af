"""``import moekit``: cheap, known to transformers as soon as transformers is there, every public name real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moekit

FRESH = """
import sys
import moekit
assert "torch" not in sys.modules and "transformers" not in sys.modules, "import moekit must stay cheap"
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert ALL_EXPERTS_FUNCTIONS["moekit"] is moekit.kernels.experts.experts_forward
import transformers.modeling_utils
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "moekit" in AUTO_QUANTIZER_MAPPING
"""

LATE = """
import transformers.modeling_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
import moekit
assert "moekit" in ALL_EXPERTS_FUNCTIONS and "moekit" in AUTO_QUANTIZER_MAPPING
"""


@pytest.mark.parametrize("program", [FRESH, LATE], ids=["moekit first", "transformers first"])
def test_registers_whichever_is_imported_first(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names():
    for name in moekit.__all__:
        assert getattr(moekit, name) is not None
    assert set(moekit.__all__) <= set(dir(moekit))
    assert callable(moekit.blocks)
    assert callable(moekit.profile)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = moekit.nonsense


READ_ONLY = """
import torch
from moekit.formats.numba_cache import KEEPS
from moekit.kernels import warm_up
warm_up(torch.float32)
assert not KEEPS
"""


def test_kernels_run_where_nothing_can_be_kept_on_disk(tmp_path):
    """A copy of the package in which compiled functions have no place: neither beside it nor in the user's cache."""
    pytest.importorskip("numba")
    package = tmp_path / "moekit"
    shutil.copytree(Path(moekit.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "data"))
    for room in ("formats", "kernels"):
        (package / room / "__pycache__").write_text("no folder")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HOME": os.devnull, "XDG_CACHE_HOME": os.devnull}
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
