"""Batch norms of ranks that hold 3, 5, ... images, against batch norms in double precision on one: normed.py FOLDER"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from wtn_pretrain.parallel.batchnorm import RunningStatistics, synchronise_batch_norm
from wtn_pretrain.parallel.launch import start_ranks, stop_ranks


def main(folder: Path) -> None:
    place = start_ranks()
    counts = [3 + 2 * rank for rank in range(place.world_size)]
    first = sum(counts[: place.rank])
    torch.manual_seed(0)
    images, gradient = 3 * torch.randn(sum(counts), 6, 5, 4) + 2, torch.randn(sum(counts), 6, 5, 4)
    whole = nn.BatchNorm2d(6).double()
    nn.init.uniform_(whole.weight)
    nn.init.uniform_(whole.bias)
    start = {name: value.float() if value.is_floating_point() else value for name, value in whole.state_dict().items()}
    start = {name: value.clone() for name, value in start.items()}
    inputs = images.double().requires_grad_()
    expected = whole(inputs)
    expected.backward(gradient.double())
    found: dict[str, float] = {}

    def compare(name: str, mine: torch.Tensor, theirs: torch.Tensor | None) -> None:
        assert theirs is not None
        found[name] = max(found.get(name, 0.0), float((mine - theirs).abs().max() / theirs.abs().max()))

    for layout in (torch.contiguous_format, torch.channels_last):
        network = nn.Sequential(nn.BatchNorm2d(6))
        norm = network[0]
        norm.load_state_dict(start)
        synchronise_batch_norm(network)
        part = slice(first, first + counts[place.rank])
        mine = images[part].contiguous(memory_format=layout).requires_grad_()
        output = network(mine)
        output.backward(gradient[part].contiguous(memory_format=layout))
        assert mine.grad is not None and inputs.grad is not None
        assert output.stride() == mine.grad.stride() == mine.stride()
        compare("output", output, expected[part])
        compare("input", mine.grad, inputs.grad[part])
        for name, parameter in norm.named_parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            compare(name, parameter.grad, whole.get_parameter(name).grad)
        for name in ("running_mean", "running_var"):
            compare(name, norm.get_buffer(name), whole.get_buffer(name))
        assert int(norm.num_batches_tracked) == 1
    # each rank by itself, twice, and their statistics averaged each time
    norm = nn.BatchNorm2d(6)
    norm.load_state_dict(start)
    alone = [whole.double() for whole in (nn.BatchNorm2d(6) for _ in counts)]
    statistics = RunningStatistics(nn.Sequential(norm), None)
    for _ in range(2):
        norm(images[part])
        statistics.average()
        for other, images_of_rank in zip(alone, images.double().split(counts), strict=True):
            other(images_of_rank)
        for name in ("running_mean", "running_var"):
            expected = torch.stack([other.get_buffer(name) for other in alone]).mean(0)
            compare(f"average of {name}", norm.get_buffer(name), expected)
            for other in alone:
                other.get_buffer(name).copy_(expected)
    (folder / f"rank-{place.rank}.json").write_text(json.dumps(found))
    stop_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
