"""The processes that tests of this folder share."""

import pytest
from several import Ranks


@pytest.fixture(scope="session")
def ranks():
    """Runs functions in several processes; starts nothing before the first call."""
    found = Ranks()
    yield found
    found.stop()
