"""What tests of several folders share."""

from collections.abc import Iterator

import pytest

from tests.running import Forge

LONG = ("e2e", "distributed", "faults", "cluster")
"""Folders of tests that take long, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that no worker is left with one at the end."""
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.parent.name, len(LONG)))


def _with_kernels_as_before() -> Iterator[None]:
    from wtn_pretrain.kernels.live import active, using

    with using(active()):
        yield


@pytest.fixture(autouse=True, scope="module")
def kernels_of_a_module() -> Iterator[None]:
    """Stages that a test makes choose kernels for the whole process; those that follow must not find them."""
    yield from _with_kernels_as_before()


@pytest.fixture(autouse=True)
def kernels_of_a_test(kernels_of_a_module: None) -> Iterator[None]:
    yield from _with_kernels_as_before()


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
