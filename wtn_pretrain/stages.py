"""The stages of a run, each started again where it stopped: wide, narrow, finetune, and the scratch baseline."""

from pathlib import Path
from typing import Any

import torch

from wtn_pretrain.config import Section, dump_yaml
from wtn_pretrain.data.images import ImageData
from wtn_pretrain.data.text import TextData
from wtn_pretrain.device import device
from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.foreign import Foreign, forget_foreign, open_foreign
from wtn_pretrain.exchange.teacher import adapted, require_kin, require_same_inputs
from wtn_pretrain.folder import RunFolder
from wtn_pretrain.imitation.bridges import bridge_kinds
from wtn_pretrain.imitation.learner import learner_config
from wtn_pretrain.imitation.pairing import pair
from wtn_pretrain.kernels.select import activate
from wtn_pretrain.models.base import BlockConfig
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.models.store import load_network, load_shape, save_network
from wtn_pretrain.narrow import Narrow
from wtn_pretrain.parallel.launch import Place, require_same, wait_for_all
from wtn_pretrain.parallel.preemption import Notice
from wtn_pretrain.recipe import Recipe, check_writable
from wtn_pretrain.screen import say
from wtn_pretrain.tasks.base import Task, evaluate
from wtn_pretrain.tasks.classify import ClassifySection, ClassifyTask
from wtn_pretrain.tasks.mlm import MlmSection, MlmTask
from wtn_pretrain.training.config import TrainSection
from wtn_pretrain.training.engine import check_training
from wtn_pretrain.training.int8 import fake_quantise, without_ranges
from wtn_pretrain.training.loop import train


def open_task(recipe: Recipe, cache: Path) -> Task:
    """The task of a recipe, its data opened."""
    if isinstance(recipe.task, MlmSection) and isinstance(recipe.data, TextData) and isinstance(recipe.model, BertConfig):
        return MlmTask(recipe.task, recipe.data, recipe.model, cache)
    assert isinstance(recipe.task, ClassifySection)
    assert isinstance(recipe.data, ImageData)
    return ClassifyTask(recipe.task, recipe.data, cache)


class Stages:
    """One run: its folder, data and networks' shapes, and its stages."""

    def __init__(self, recipe: Recipe, place: Place, notice: Notice) -> None:
        self.recipe, self.place, self.notice = recipe, place, notice
        check_writable(recipe.place())
        self.folder = RunFolder(recipe.place())
        self.folder.check(dump_yaml(recipe))
        self.task = open_task(recipe, self.folder.path / "data")
        wide = self._wide_model()
        self.thin = self.task.complete(adapted(recipe.model, wide))
        if recipe.wide.teacher:
            wide = require_kin(self.thin, wide, recipe.wide.teacher)
            if not self.folder.result(self.folder.stage("wide")):
                require_same_inputs(self._teacher(), self.task, recipe.wide.teacher)
        self.wide_shape = self.task.complete(wide)
        self.pairing = pair(self.thin, self.wide_shape, unit=recipe.narrow.unit, depth_map=recipe.narrow.depth_map)
        # a teacher from elsewhere is not trained, whatever the recipe says of that
        trained = {"finetune": self.thin} if recipe.wide.teacher else {"wide": self.wide_shape, "finetune": self.thin}
        for name, shape in trained.items():
            section: TrainSection = getattr(recipe, name)
            if section.tensor_parallel > 1:
                lengths = [self.task.length, *(length for _, length in self.task.lengths)] if section.sequence_parallel else [None]
                for length in lengths:
                    reason = shape.why_not_divisible(section.tensor_parallel, length)
                    if reason:
                        raise UserError(f"{name}.tensor_parallel: {reason}")
            # what a later stage cannot do is said before the first one begins
            with torch.device("meta"):
                check_training(section, name, shape.build())
        learner_config(recipe.narrow, 1)
        with torch.device("meta"):
            bridge_kinds(self.thin.build(), self.wide_shape.build(), self.pairing, recipe.narrow.bridge)
        require_same(place, dump_yaml(recipe))
        choice = activate(recipe.run.kernels)
        if place.rank == 0:
            print(choice.describe(), flush=True)
            self.folder.claim(dump_yaml(recipe))

    def seed_folder(self, stage: str, seed: int | None) -> Path:
        """The folder of a stage: the first seed's stands in the run's own, further ones below `seed-N`."""
        return self.folder.stage(stage, None if seed == self.recipe.compare.seeds[0] else seed)

    def wide(self) -> dict[str, Any]:
        """Stage 1: the wide network, trained to convergence, or the teacher that takes its place."""
        if self.recipe.wide.teacher:
            return self._adopt()
        return self._train("wide", None, self.wide_shape, self.recipe.wide, self.recipe.run.seed)

    def scratch(self, seed: int) -> dict[str, Any]:
        """The baseline: the thin network, trained like the wide one, on as many samples as WIN's sees."""
        return self._train("scratch", seed, self.thin, self.recipe.scratch(), seed)

    def finetune(self, seed: int) -> dict[str, Any]:
        """Stage 3: the thin network that stage 2 warmed up, on the real objective."""
        start = self.seed_folder("narrow", seed)
        return self._train("finetune", seed, self.thin, self.recipe.finetune, seed, start=start)

    def narrow(self, seed: int) -> dict[str, Any]:
        """Stage 2: the thin network imitates the wide one, block by block; bridges are merged away at the end."""
        folder = self.seed_folder("narrow", seed)
        finished = self.folder.result(folder)
        if finished:
            return finished
        teacher = self.folder.stage("wide")
        if self.recipe.wide.teacher:
            self._adopt()
        if load_shape(teacher) != self.wide_shape:
            raise UserError(
                f"{teacher}: holds a network of another shape than this run's wide one; train it again under another --run.name"
            )
        self._begin(teacher)
        settings: dict[str, Section] = {"data": self.recipe.data, "task": self.recipe.task}
        stage = Narrow(
            self.recipe.narrow, self.task, self.thin, self.wide_shape, self.pairing, teacher, folder, self.place, settings, self.notice
        )
        # students that share a cache see the same batches
        data_seed = self.recipe.run.seed if self.recipe.narrow.cache else seed
        stage.go(seed, data_seed, lambda result: self.folder.finish(folder, result))
        return self.folder.result(folder) or {}

    def _begin(self, *networks: Path) -> None:
        """Keeps others from this run while a stage is at work on it, which starts from the networks of other stages."""
        if self.place.rank == 0:
            self.folder.lock()
            for stage in networks:
                self.folder.check_network(stage)
        wait_for_all(self.place)

    def _wide_model(self) -> BlockConfig:
        """The wide network's shape; once a teacher is in the run's folder, it is needed where it came from no more."""
        wide = self.folder.stage("wide")
        return load_shape(wide) if self.recipe.wide.teacher and self.folder.result(wide) else self.recipe.wide_model()

    def _teacher(self) -> Foreign:
        return open_foreign(self.recipe.wide.teacher, self.recipe.wide.teacher_pickle, heads=self.recipe.wide.teacher_heads)

    def _adopt(self) -> dict[str, Any]:
        """Puts the teacher from elsewhere, once, where stage 1 would leave its network; the first rank does."""
        folder, section = self.folder.stage("wide"), self.recipe.wide
        finished = self.folder.result(folder)
        if finished:
            return finished
        self._begin()
        if self.place.rank == 0:
            foreign = self._teacher()
            say(f"wide: {section.teacher}, {foreign.kind}, is the teacher; stage 1 and widen are not used")
            save_network(folder, self.wide_shape, foreign.state)
            score = evaluate(load_network(folder).to(device()), self.task)
            say(f"wide: the teacher's {self.task.metric.name} is {score['metric']:.2f} {self.task.metric.unit}")
            origin = {"teacher": section.teacher, "kind": foreign.kind, "sha256": foreign.hashes()}
            self.folder.finish(folder, {**score, "steps": 0, "seconds": 0.0, "flops": 0.0, **origin})
        forget_foreign()
        wait_for_all(self.place)
        return self.folder.result(folder) or {}

    def _train(
        self,
        name: str,
        seed: int | None,
        shape: BlockConfig,
        section: TrainSection,
        init: int,
        start: Path | None = None,
    ) -> dict[str, Any]:
        """`start`: the stage whose network this one starts from; None: from weights drawn with `init`."""
        folder = self.seed_folder(name, seed)
        finished = self.folder.result(folder)
        if finished:
            return finished
        self._begin(*([start] if start else []))
        torch.manual_seed(init)
        network = load_network(start) if start else shape.build()
        if getattr(section, "int8", False):
            fake_quantise(network)
        trained = train(network, self.task, section, stage=name, folder=folder, seed=init, place=self.place, notice=self.notice)
        forward = self.task.stage_flops(shape, section.steps)
        result = {
            **trained.score,
            "steps": section.steps,
            "seconds": trained.seconds,
            # a backward pass costs twice a forward pass
            "flops": 3 * forward * section.steps * section.batch_size,
        }
        if trained.state is not None:
            save_network(folder, shape, without_ranges(trained.state))
            if getattr(section, "int8", False):
                # what is left is plain: its own figures, beside those of the network as it was trained
                plain = evaluate(load_network(folder).to(device()), self.task)
                result |= {**plain, **{f"int8_{key}": value for key, value in trained.score.items()}}
            self.folder.finish(folder, result)
        # the next stage of any rank starts from what the first one has written
        wait_for_all(self.place)
        return result
