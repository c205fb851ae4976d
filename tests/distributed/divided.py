"""A BERT over tensor-parallel ranks against the whole network in the same process: losses, logits and gradients of every parameter.

Writes the largest relative differences of all ranks' findings into FOLDER/rank-N.json.

    divided.py FOLDER --norm post|pre --dropout P [--sequence] [--data N]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wtn_pretrain.kernels.attention import attend
from wtn_pretrain.kernels.dropout import dropout as dropped
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.models.bert.model import BertBlock, BertNetwork
from wtn_pretrain.parallel.grid import Grid
from wtn_pretrain.parallel.launch import start_ranks, stop_ranks
from wtn_pretrain.parallel.tensor import whole

STEPS = 3


class SameMasks:
    """Draws in one process what the ranks of a tensor group draw, each with its own seed, for what they have a part of."""

    def __init__(self, count: int) -> None:
        self.count = count

    def seeds(self) -> list[int]:
        seed = int(torch.randint(2**62, ()))
        return [seed + index for index in range(self.count)]

    def attend(self, block: BertBlock, x: Tensor, mask: Tensor | None) -> Tensor:
        shape = (*x.shape[:2], block.heads, block.head_size)
        parts = [layer(x).view(shape).transpose(1, 2).chunk(self.count, 1) for layer in (block.query, block.key, block.value)]
        mixed = []
        for seed, q, k, v in zip(self.seeds(), *parts, strict=True):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                mixed.append(attend(q, k, v, mask, block.attention_dropout.p))
        return block.attention_output(torch.cat(mixed, 1).transpose(1, 2).flatten(2))

    def drop(self, dropout: nn.Dropout, x: Tensor) -> Tensor:
        parts = []
        for seed, part in zip(self.seeds(), x.chunk(self.count, 1), strict=True):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                parts.append(dropped(part, dropout.p))
        return torch.cat(parts, 1)


def draw_alike(network: BertNetwork, count: int, sequence: bool) -> None:
    """Makes the dropout of a whole network that of a divided one."""
    masks = SameMasks(count)

    def attend(block: BertBlock) -> Any:
        return lambda x, mask, taps: masks.attend(block, x, mask)

    def drop(dropout: nn.Dropout) -> Any:
        return lambda x: masks.drop(dropout, x)

    def join(block: BertBlock) -> Any:
        def joined(x: Tensor, added: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
            total = x + masks.drop(block.dropout, added)
            return norm(total), total

        return joined

    for module in network.modules():
        if isinstance(module, BertBlock):
            module._attend = attend(module)  # type: ignore[method-assign]
            if sequence:
                module._join = join(module)  # type: ignore[method-assign]
        if sequence and isinstance(module, nn.Dropout) and not any(module is block.attention_dropout for block in network.blocks):
            module.forward = drop(module)  # type: ignore[method-assign]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--norm", required=True)
    arguments.add_argument("--dropout", type=float, required=True)
    arguments.add_argument("--sequence", action="store_true")
    options = arguments.parse_args()
    place = start_ranks()
    grid = Grid(place, place.world_size)
    assert grid.tensor_group is not None
    config = BertConfig(
        vocab_size=96,
        hidden_size=32,
        layers=2,
        heads=4,
        intermediate_size=64,
        max_positions=16,
        norm=options.norm,
        dropout=options.dropout,
        attention_dropout=options.dropout,
        initializer_range=0.2,
        pair_head="sop",
    )
    torch.manual_seed(0)
    alone = config.build()
    torch.manual_seed(0)
    divided = config.build()
    divided.divide(grid.tensor_group, options.sequence)
    assert isinstance(alone, BertNetwork) and isinstance(divided, BertNetwork)
    if options.dropout:
        draw_alike(alone, place.world_size, options.sequence)
    found = {"loss": 0.0, "gradient": 0.0, "logits": 0.0}
    networks = (alone, divided)
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in networks]
    share = sum(value.numel() for value in divided.parameters()) / sum(value.numel() for value in alone.parameters())
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(96, (4, 16), generator=generator)
        targets = torch.randint(96, (4, 3), generator=generator)
        targets[0, 1:] = -100
        positions = torch.randint(16, (4, 3), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        losses = []
        for network in networks:
            torch.manual_seed(100 + step)
            network.train()
            carry = network.features({"input_ids": ids, "attention_mask": mask})
            total, count = network.head.losses(carry, positions, targets)
            losses.append(total / count + F.cross_entropy(network.head.pair_logits(carry), ids[:, 0] % 2))
            losses[-1].backward()
        found["loss"] = max(found["loss"], abs(float(losses[1] / losses[0]) - 1))
        theirs = dict(alone.named_parameters())
        assert theirs.keys() == dict(divided.named_parameters()).keys()
        # the gradient of a key's bias is zero but for round-off: measured against that of all
        largest = max(float(value.grad.abs().max()) for value in theirs.values() if value.grad is not None)
        for name, parameter in divided.named_parameters():
            expected = theirs[name].grad
            assert parameter.grad is not None and expected is not None, name
            mine = whole(parameter, parameter.grad)
            assert mine.shape == expected.shape, name
            found["gradient"] = max(found["gradient"], float((mine - expected).abs().max()) / largest)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            alone.eval(), divided.eval()
            if not options.dropout:
                ours, other = divided({"input_ids": ids}), alone({"input_ids": ids})
                assert ours.shape == other.shape
                found["logits"] = max(found["logits"], float((ours - other).abs().max() / other.abs().max()))
    (options.folder / f"rank-{place.rank}.json").write_text(json.dumps({**found, "share": share}))
    stop_ranks()


if __name__ == "__main__":
    main()
