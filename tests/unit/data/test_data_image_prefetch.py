"""Batches on their way to the device."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from wtn_pretrain.data.images import ImageData, open_images
from wtn_pretrain.data.prefetch import on_device
from wtn_pretrain.data.stream import Batch, BatchStream
from wtn_pretrain.device import device
from wtn_pretrain.errors import UserError


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_arrive_in_order_and_unchanged(workers: int) -> None:
    stream = BatchStream(open_images(ImageData(mixup=0.2)).train, 16, micro_batch_size=8, seed=0, workers=workers)
    arrived = list(on_device(stream.iterate(3, 8)))
    assert len(arrived) == 5
    for step, batches in enumerate(arrived, start=3):
        for k, batch in enumerate(batches):
            assert all(value.device == device() for value in batch.values())
            assert batch["pixels"].is_contiguous(memory_format=torch.channels_last)
            assert all(torch.equal(batch[name].cpu(), value) for name, value in stream.micro_batch(step, k).items())


def test_an_error_comes_at_its_turn_and_an_early_end_is_clean() -> None:
    closed = []

    def steps() -> Iterator[list[Batch]]:
        try:
            for number in range(5):
                if number == 3:
                    raise UserError("sample 3 is corrupt; remove it")
                yield [{"pixels": torch.from_numpy(np.full(2, number))}]
        finally:
            closed.append(True)

    brought = on_device(steps())
    assert [int(next(brought)[0]["pixels"][0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="sample 3"):
        next(brought)
    half = on_device(steps())
    next(half)
    half.close()
    del half
    assert len(closed) == 2
