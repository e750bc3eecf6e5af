import pytest

from moekit.parallel import LocalRanks


@pytest.fixture(scope="session")
def two_ranks():
    with LocalRanks(2, patience=300) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four_ranks():
    with LocalRanks(4, patience=300) as ranks:
        yield ranks
