"""What a training set holds and in which order, in a few letters: whether a run that continues still learns from the same one."""

import numpy as np
import xxhash

from wtn_pretrain.data.stream import Dataset

PROBES = 64
"""Rows that stand for all of them."""


def rows_digest(dataset: Dataset) -> str:
    """A hash of how many rows there are, and of rows spread over all of them as they are before anything random is done to them."""
    indices = np.unique(np.linspace(0, len(dataset) - 1, PROBES).astype(np.int64))
    digest = xxhash.xxh3_128(str(len(dataset)).encode())
    for name, values in sorted(dataset.fetch(indices, None).items()):
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(np.ascontiguousarray(values.numpy()).data)
    return digest.hexdigest()


def labels_digest(labels: np.ndarray) -> str:
    """A hash of the labels, int64 [N], in their order. Pixels are left out: what decodes them rounds from version to version."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(labels).data)
