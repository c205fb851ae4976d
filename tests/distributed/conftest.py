"""What tests of several ranks share."""

import pytest

from tests.distributed.imitating import Imitations
from tests.running import Forge


@pytest.fixture(scope="session")
def imitations(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Imitations:
    """Runs of stage 2."""
    return Imitations(forge, tmp_path_factory.mktemp("imitations"))
