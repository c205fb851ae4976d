"""The stages of a run, each started again where it stopped: wide, narrow, finetune, and the scratch baseline."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from wtn_pretrain.compress.merge import Bridged, merge_and_check
from wtn_pretrain.config import dump_yaml
from wtn_pretrain.data.images import ImageData
from wtn_pretrain.data.stream import BatchStream, batches
from wtn_pretrain.data.text import TextData
from wtn_pretrain.device import device, to_device
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import write_text
from wtn_pretrain.folder import RunFolder
from wtn_pretrain.imitation.bridges import bridge_kinds, make_bridges
from wtn_pretrain.imitation.engine import Imitator, Run
from wtn_pretrain.imitation.pairing import pair
from wtn_pretrain.imitation.schedules import phases
from wtn_pretrain.imitation.units import make_units, start_from_teacher
from wtn_pretrain.models.base import BlockConfig, BlockNetwork
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.models.store import load_network, load_shape, save_network
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.recipe import Recipe, check_writable
from wtn_pretrain.tasks.base import Task, evaluate
from wtn_pretrain.tasks.classify import ClassifySection, ClassifyTask
from wtn_pretrain.tasks.mlm import MlmSection, MlmTask
from wtn_pretrain.training.config import TrainSection
from wtn_pretrain.training.loop import train


def open_task(recipe: Recipe, cache: Path) -> Task:
    """The task of a recipe, its data opened."""
    if isinstance(recipe.task, MlmSection) and isinstance(recipe.data, TextData) and isinstance(recipe.model, BertConfig):
        return MlmTask(recipe.task, recipe.data, recipe.model, cache)
    assert isinstance(recipe.task, ClassifySection)
    assert isinstance(recipe.data, ImageData)
    return ClassifyTask(recipe.task, recipe.data)


class Stages:
    """One run: its folder, data and networks' shapes, and its stages."""

    def __init__(self, recipe: Recipe, place: Place) -> None:
        self.recipe, self.place = recipe, place
        check_writable(recipe.place())
        self.folder = RunFolder(recipe.place())
        self.folder.check(dump_yaml(recipe))
        self.task = open_task(recipe, self.folder.path / "data")
        self.thin = self.task.complete(recipe.model)
        self.wide_shape = self.task.complete(recipe.wide_model())
        self.pairing = pair(self.thin, self.wide_shape, unit=recipe.narrow.unit, depth_map=recipe.narrow.depth_map)
        with torch.device("meta"):
            # refused before the wide network is trained, not after
            bridge_kinds(self.thin.build(), self.wide_shape.build(), self.pairing, recipe.narrow.bridge)
        if place.rank == 0:
            self.folder.claim(dump_yaml(recipe))

    def seed_folder(self, stage: str, seed: int | None) -> Path:
        """The folder of a stage: the first seed's stands in the run's own, further ones below `seed-N`."""
        return self.folder.stage(stage, None if seed == self.recipe.compare.seeds[0] else seed)

    def require_one_process(self) -> None:
        """Refuses to go on if this run has several ranks."""
        if self.place.world_size > 1:
            raise UserError(
                f"narrow: imitation runs on one process, and this run has {self.place.world_size}; start scripts/train_wide.py and "
                "scripts/finetune.py on several ranks, and scripts/imitate.py with python"
            )

    def wide(self) -> dict[str, Any]:
        """Stage 1: the wide network, trained to convergence."""
        return self._train("wide", None, self.wide_shape, self.recipe.wide, self.recipe.run.seed)

    def scratch(self, seed: int) -> dict[str, Any]:
        """The baseline: the thin network, trained like the wide one, on as many samples as WIN's sees."""
        return self._train("scratch", seed, self.thin, self.recipe.scratch(), seed)

    def finetune(self, seed: int) -> dict[str, Any]:
        """Stage 3: the thin network that stage 2 warmed up, on the real objective."""
        start = self.seed_folder("narrow", seed)
        return self._train("finetune", seed, self.thin, self.recipe.finetune, seed, start=lambda: load_network(start))

    def narrow(self, seed: int) -> dict[str, Any]:
        """Stage 2: the thin network imitates the wide one, block by block; bridges are merged away at the end."""
        folder = self.seed_folder("narrow", seed)
        return self.folder.result(folder) or self._narrow(folder, seed)

    def _train(
        self,
        name: str,
        seed: int | None,
        shape: BlockConfig,
        section: TrainSection,
        init: int,
        start: Callable[[], BlockNetwork] | None = None,
    ) -> dict[str, Any]:
        folder = self.seed_folder(name, seed)
        finished = self.folder.result(folder)
        if finished:
            return finished
        torch.manual_seed(init)
        network = start() if start else shape.build()
        trained = train(network, self.task, section, stage=name, folder=folder, seed=init, place=self.place)
        forward = self.task.forward_flops(shape).total
        result = {
            **trained.score,
            "steps": section.steps,
            "seconds": trained.seconds,
            # a backward pass costs twice a forward pass
            "flops": 3 * forward * section.steps * section.batch_size,
        }
        if trained.state is not None:
            save_network(folder, shape, trained.state)
            self.folder.finish(folder, result)
        return result

    def _narrow(self, folder: Path, seed: int) -> dict[str, Any]:
        section = self.recipe.narrow
        self.require_one_process()
        wide = self._teacher().to(device()).requires_grad_(False)
        torch.manual_seed(seed)
        thin = self.thin.build().to(device())
        stream = BatchStream(self.task.train, section.batch_size, seed=seed, workers=self.task.workers)
        sample = (to_device(stream.micro_batch(step, 0)) for step in range(64))
        bridges = make_bridges(thin, wide, self.pairing, section.bridge, sample)
        entry = bridges.get(0)
        thin.start_stem_from(wide, entry.reduce().detach() if entry else None)
        counts = self.task.forward_flops(self.thin), self.task.forward_flops(self.wide_shape)
        units = make_units(thin, wide, self.pairing, bridges, section, counts)
        if section.init == "matching":
            for unit in units[1:]:
                start_from_teacher(unit)
        imitator = Imitator(units, section)
        plan = phases(section, self.pairing.units, learns_stem=entry is not None)
        Run(imitator, plan, stream, folder).go()
        top = bridges.get(len(thin.blocks))
        thin.start_head_from(wide, top.expand.detach() if top else None, top.reduce().detach() if top else None)
        errors = imitator.errors(batches(self.task.valid, section.batch_size), limit=8)
        merged, report = self._merge(Bridged(thin, bridges))
        score = evaluate(merged, self.task)
        if bridges:
            state = {
                f"{boundary}.{name}": value.detach().cpu()
                for boundary, bridge in bridges.items()
                for name, value in bridge.state_dict().items()
            }
            save_file(state, folder / "bridges.safetensors")
        write_text(folder / "merge.json", json.dumps(report, indent=2) + "\n")
        save_network(folder, self.thin, merged.state_dict())
        work = imitator.work
        return self.folder.finish(
            folder,
            {
                **score,
                "steps": section.steps,
                "seconds": work.seconds,
                "flops": work.teacher_flops + work.student_flops,
                "teacher_flops": work.teacher_flops,
                "imitation_error": errors,
            },
        )

    def _teacher(self) -> BlockNetwork:
        folder = self.folder.stage("wide")
        if load_shape(folder) != self.wide_shape:
            raise UserError(f"{folder}: holds a network of another shape than this run's wide one; train it again under another --run.name")
        return load_network(folder)

    def _merge(self, bridged: Bridged) -> tuple[BlockNetwork, dict[str, Any]]:
        """The merged network, and how far it is from the bridged one in fp32 and fp64 on real inputs."""
        inputs = to_device(next(batches(self.task.valid, 32)))
        head = self.task.positions(inputs)
        merged = merge_and_check(bridged, inputs, **head)
        double = copy.deepcopy(bridged).double()
        wide_inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        exact = merge_and_check(double, wide_inputs, **head)
        kinds = {
            boundary: "free" if bridge.free else "constrained" for boundary, bridge in ((int(n), b) for n, b in bridged.bridges.items())
        }
        report = {"bridges": kinds, "difference_fp32": merged.difference, "difference_fp64": exact.difference}
        return merged.network, report
