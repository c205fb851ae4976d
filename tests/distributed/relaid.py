"""One training that moves from layout to layout through its checkpoints, and what is found after each move.

    relaid.py FOLDER [--optimizer NAME] [--precision NAME] [--ema] [--large] LAYOUT ...

A layout is z0, z1, z2 or z3, with t2 for two tensor-parallel ranks: z1t2; with o where the CPU steps the optimizer, k where DeepSpeed's
kernel does, and n where the optimizer lies on disk, which needs a large network: z2o, z2k, z3n.
Continues what another start, on any number of ranks, has left in FOLDER. Writes FOLDER/moves-N.json, N ranks: a record a layout.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.parallel.grid import Grid
from wtn_pretrain.parallel.launch import Place, start_ranks, stop_ranks
from wtn_pretrain.training.checkpoint.checkpoints import Checkpoints
from wtn_pretrain.training.checkpoint.manifest import Parts, read_manifest
from wtn_pretrain.training.checkpoint.masters import Held
from wtn_pretrain.training.config import OptimizerSection, TrainSection
from wtn_pretrain.training.ema import Average
from wtn_pretrain.training.engine import start_engine

SAMPLES = 12
STEPS = 3
"""Under each layout, before the checkpoint."""
RATES = {"adamw": 1e-2, "sgd": 0.1, "lamb": 1e-2, "lars": 10.0}


def deepspeed_file(zero: int, offload: str, options: argparse.Namespace) -> dict[str, Any]:
    """DeepSpeed's file for a ZeRO stage: nothing offloaded, the optimizer to the CPU (`o`, `k`), or to disk (`n`)."""
    section: dict[str, Any] = {"stage": zero}
    if offload == "n":
        (options.folder / "disk").mkdir(exist_ok=True)
        place = {"device": "nvme", "nvme_path": str(options.folder / "disk")}
        section |= {"offload_optimizer": place, "offload_param": {"device": "cpu"}}
    elif offload:
        section["offload_optimizer"] = {"device": "cpu"}
    return {"zero_optimization": section}


class Losses(nn.Module):
    """A network with a loss of its own as forward."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, step: int, index: int, count: int) -> Tensor:
        """The loss of this rank's share of the samples of a step."""
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(96, (SAMPLES, 16), generator=generator).chunk(count)[index]
        positions = torch.randint(16, (SAMPLES, 3), generator=generator).chunk(count)[index]
        total, number = self.network.head.losses(self.network.features({"input_ids": ids}), positions, ids.gather(1, positions))
        return total / number


class Run:
    """The training under one layout."""

    def __init__(self, options: argparse.Namespace, layout: str, place: Place) -> None:
        match = re.fullmatch(r"z(\d)(?:t(\d))?([no]?)(k?)", layout)
        assert match
        self.zero, self.grid = int(match[1]), Grid(place, int(match[2] or 1))
        settings = options.folder / f"{layout}-{place.rank}.json"
        settings.write_text(json.dumps(deepspeed_file(self.zero, match[3] or match[4], options)))
        # another start for each: what is not restored shows
        torch.manual_seed(sum(map(ord, layout)) + place.world_size)
        # a rank swaps nothing that is smaller than 1 MiB: half of all matrices is more
        hidden, intermediate = (128, 4096) if options.large else (32, 72)
        config = BertConfig(
            vocab_size=96,
            hidden_size=hidden,
            layers=2,
            heads=4,
            intermediate_size=intermediate,
            max_positions=16,
            dropout=0.0,
            attention_dropout=0.0,
            initializer_range=0.2,
        )
        network = config.build()
        if self.grid.tensor_group is not None:
            network.divide(self.grid.tensor_group, False)
        section = TrainSection(
            steps=100,
            batch_size=SAMPLES,
            precision=options.precision,
            optimizer=OptimizerSection(
                name=options.optimizer, lr=RATES[options.optimizer], weight_decay=0.1, cpu_kernel="deepspeed" if match[4] else "torch"
            ),
            deepspeed=str(settings),
        )
        self.rate = RATES[options.optimizer]
        # given one, DeepSpeed takes all ranks for tensor-parallel ones as it clips at ZeRO 0; it wants one ever after it had one
        divided = self.grid if any("t" in other for other in options.layouts) else None
        self.engine = start_engine(Losses(network), section, "wide", self.grid.data_count, 1, divided)
        self.average = Average(network, 0.9) if options.ema else None
        beside = {"average": self.average} if self.average else {}
        identity = {"stage": "wide", "optimizer": options.optimizer}
        self.checkpoints = Checkpoints(options.folder / "checkpoints", self.engine, network, place, identity=identity, beside=beside)
        self.parameters = dict(network.named_parameters())
        self.engine.train()

    def step(self, number: int) -> float:
        """Takes a step; the loss of all samples before it."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.rate
        loss = self.engine(number, self.grid.data_index, self.grid.data_count)
        self.engine.backward(loss)
        self.engine.step()
        if self.average:
            self.average.update()
        shared = loss.detach().float().clone()
        dist.all_reduce(shared)
        return float(shared) / dist.get_world_size()

    def as_stored(self, folder: Path) -> bool:
        """Whether parameters and states are bit for bit what stands in a checkpoint."""
        manifest, parts = read_manifest(folder), Parts(folder)
        same = True
        for name, held in self.held().items():
            kept = manifest.parameters[name]
            stored = [parts.read(kept.part, key) for key in kept.keys(name)]
            same &= list(kept.states) == held.states and kept.updates == held.updates
            same &= all(torch.equal(one.view(torch.int32), other.view(torch.int32)) for one, other in zip(held.values, stored, strict=True))
        if self.average and not self.grid.tensor_group:
            for key, value in self.average.state_dict().items():
                same &= torch.equal(value, parts.read(manifest.others[f"average/{key}"].part, f"average/{key}"))
        return same

    def held(self) -> dict[str, Held]:
        """Parameters and states, whole."""
        return dict(self.checkpoints._masters.read(self.parameters))

    def on_disk(self) -> int:
        """How many of the tensors that are stepped are not in memory now."""
        return sum(not value.numel() for value in getattr(self.engine.optimizer, "fp32_partitioned_groups_flat", []))

    def as_deepspeed_says(self) -> bool:
        """Whether what is read is what DeepSpeed's own accessors give."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        same = True
        for name, held in self.held().items():
            parameter = self.parameters[name]
            values = [safe_get_full_fp32_param(parameter), *(safe_get_full_optimizer_state(parameter, key) for key in held.states)]
            same &= all(torch.equal(one, other) for one, other in zip(held.values, values, strict=True))
        return same


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("layouts", nargs="+")
    arguments.add_argument("--optimizer", default="adamw")
    arguments.add_argument("--precision", default="fp32")
    arguments.add_argument("--ema", action="store_true")
    arguments.add_argument("--large", action="store_true")
    options = arguments.parse_args()
    place = start_ranks()
    told = options.folder / "next.json"
    moves = []
    for layout in options.layouts:
        run = Run(options, layout, place)
        done, seconds = run.checkpoints.resume()
        record: dict[str, Any] = {"layout": layout, "step": done, "seconds": seconds}
        if done:
            record["as_stored"] = run.as_stored(options.folder / "checkpoints" / f"step{done}")
            record["expected"] = json.loads(told.read_text())
        # the second is of weights that the states have moved
        record["losses"] = [run.step(number) for number in range(done, done + STEPS)][:2]
        # of a first start under ZeRO 1 and 2 DeepSpeed's accessors do not know the states
        if done and run.zero and not run.grid.tensor_group:
            record["as_deepspeed_says"] = run.as_deepspeed_says()
        run.checkpoints.save(done + STEPS, seconds + 1.0)
        run.checkpoints.close()
        record["states"] = next(iter(run.held().values())).states
        record["on_disk"] = run.on_disk()
        following = [run.step(done + STEPS + number) for number in range(2)]
        # nobody starts again before all have written
        dist.barrier()
        if place.rank == 0:
            told.write_text(json.dumps(following))
        dist.barrier()
        run.engine.destroy()
        moves.append(record)
    if place.rank == 0:
        (options.folder / f"moves-{place.world_size}.json").write_text(json.dumps(moves))
    stop_ranks()


if __name__ == "__main__":
    main()
