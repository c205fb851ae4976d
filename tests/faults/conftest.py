"""What tests of faults share."""

from collections.abc import Iterator

import pytest

from tests.faults.broken import build, compiler, shimmed
from tests.faults.layouts import Runs
from tests.running import Forge


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs of layouts whose ranks have the shim, where it can be compiled."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "forge").mkdir()
    forge = Forge(folder / "forge", shimmed(build(folder)) if compiler() else None)
    yield Runs(forge, folder)
    forge.close()
