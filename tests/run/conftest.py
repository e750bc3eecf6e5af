"""The published layouts in miniature are the checkpoint room's; its folder is not on the path from here."""

import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

sys.path.append(str(Path(__file__).resolve().parent.parent / "checkpoint"))


@pytest.fixture(autouse=True)
def quiet():
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)
