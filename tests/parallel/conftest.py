import pytest

from moekit.parallel import LocalRanks


@pytest.fixture(scope="session")
def two_ranks():
    with LocalRanks(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four_ranks():
    with LocalRanks(4) as ranks:
        yield ranks
