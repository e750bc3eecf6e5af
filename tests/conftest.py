"""For the tests of every room: nothing is timed, transformers is quiet, and what has no seed is drawn the same."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers.utils import logging

# How long an example takes says how busy the machine is, not whether it holds.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def quiet():
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)
