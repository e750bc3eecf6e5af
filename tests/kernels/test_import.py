"""``import moekit``: cheap, known to transformers as soon as transformers is there, every public name real."""

from __future__ import annotations

import subprocess
import sys

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
