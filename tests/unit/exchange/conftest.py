"""What the data tests share: real data beside the repository, small files made on the spot."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """Path of real data under shared/data beside the repository; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"real data shared/data/{name} is not beside the repository")
        return path

    return find


@pytest.fixture
def write_idx() -> Callable[[Path, np.ndarray], Path]:
    """Writes a uint8 array as an IDX file, compressed where the name says so."""

    def write(path: Path, values: np.ndarray) -> Path:
        header = bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
        content = header + values.astype(np.uint8).tobytes()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return path

    return write
