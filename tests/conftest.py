"""For the tests of every room: transformers says nothing, and what is drawn without a seed is drawn the same."""

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(autouse=True)
def quiet():
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)
