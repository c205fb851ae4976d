"""A stage in which something goes wrong that is planted: planted.py [--plant JSON] --config FILE ...

JSON is an object; batches and steps count from 0:
  stage: wide (if nothing is said) or narrow, of which only samples can be planted;
  samples: indices of images whose pixels are no numbers;
  gradients: [step, rank] pairs at which the gradient of one parameter is no number on that rank alone;
  spikes: batches (numbers in the data order) whose loss is 100 larger;
  left_out: steps that are not taken at all, and
  jumps: [step, batches] pairs: from that step on, so many batches are passed over: what a run is held against that has come to it itself.
"""

import json
import os
import sys
from typing import Any

import numpy as np
import torch

from wtn_pretrain.cli import main
from wtn_pretrain.data.images import ImageSet
from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.tasks.base import TaskModule
from wtn_pretrain.training import loop


class Plants:
    """What is planted, and where the run stands."""

    def __init__(
        self, stage: str = "wide", samples: Any = (), gradients: Any = (), spikes: Any = (), left_out: Any = (), jumps: Any = ()
    ) -> None:
        self.stage = stage
        self.samples, self.spikes, self.left_out, self.jumps = set(samples), set(spikes), set(left_out), list(jumps)
        self.gradients = {tuple(pair) for pair in gradients}
        self.rank = int(os.environ["RANK"])
        self.step = self.batch = -1

    def plant(self) -> None:
        fetch, micro_batch, forward = ImageSet.fetch, BatchStream.micro_batch, TaskModule.forward
        start_engine, take_step = loop.start_engine, loop._Training._step

        def fetched(images: ImageSet, indices: np.ndarray, seeds: Any) -> Any:
            batch = fetch(images, indices, seeds)
            # the validation set has indices of its own
            if images.augment is not None:
                batch["pixels"][torch.tensor(np.isin(indices, list(self.samples)))] = torch.nan
            return batch

        def cut(stream: BatchStream, step: int, k: int) -> Any:
            self.batch = step + sum(count for first, count in self.jumps if step >= first)
            return micro_batch(stream, self.batch, k)

        def lost(module: TaskModule, batch: Any, measure: bool = False, terms: Any = None) -> Any:
            found = forward(module, batch, measure, terms)
            return found if measure or self.batch not in self.spikes else {**found, "loss": found["loss"] + 100}

        def engine(module: Any, *arguments: Any, **settings: Any) -> Any:
            # one that tensor-parallel ranks have parts of, if there is one
            divided = [one for one in module.parameters() if hasattr(one, "tensor_parallel_group")]
            (divided or list(module.parameters()))[-1].register_hook(
                lambda gradient: gradient * torch.nan if (self.step, self.rank) in self.gradients else gradient
            )
            return start_engine(module, *arguments, **settings)

        def step(training: Any, step: int, *arguments: Any) -> Any:
            self.step = step
            if step in self.left_out:
                return {"loss": torch.tensor(torch.nan)}, {}, False
            return take_step(training, step, *arguments)

        ImageSet.fetch, BatchStream.micro_batch, TaskModule.forward = fetched, cut, lost  # type: ignore[method-assign, assignment]
        loop.start_engine, loop._Training._step = engine, step  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    arguments = sys.argv[1:]
    planted = {}
    if arguments[0] == "--plant":
        planted, arguments = json.loads(arguments[1]), arguments[2:]
    plants = Plants(**planted)
    plants.plant()
    main(
        lambda stages: stages.wide() if plants.stage == "wide" else [stages.narrow(seed) for seed in stages.recipe.compare.seeds],
        __doc__,
        arguments,
    )
