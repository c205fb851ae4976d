"""What tests of several folders share."""

from collections.abc import Iterator

import pytest

from tests.running import Forge


@pytest.fixture(scope="session")
def one_rank() -> None:
    """This process as the only rank of a process group, which it keeps until it ends."""
    from wtn_pretrain.parallel.launch import start_ranks

    assert start_ranks().world_size == 1


@pytest.fixture(scope="session")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    """Starts ranks quickly."""
    forge = Forge(tmp_path_factory.mktemp("forge"))
    yield forge
    forge.close()
