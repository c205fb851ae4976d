"""The whole method: all stages for all seeds, export, and the comparison with training from scratch."""

from collections.abc import Sequence
from datetime import date
from typing import Any

import torch

from wtn_pretrain.data.stream import batches
from wtn_pretrain.device import device, hardware
from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.command import brief, commit, describe, standing
from wtn_pretrain.exchange.files import digest
from wtn_pretrain.exchange.write import MissedError, export_network
from wtn_pretrain.models.base import BlockConfig, parameter_count
from wtn_pretrain.models.store import load_network
from wtn_pretrain.planning.fit import require_fit
from wtn_pretrain.report.html import write_report
from wtn_pretrain.report.latency import measure_latency
from wtn_pretrain.report.summary import Arm, Metric, Summary, Training, WinArm, gain, write_summary
from wtn_pretrain.report.table import table
from wtn_pretrain.screen import say
from wtn_pretrain.stages import Stages
from wtn_pretrain.tasks.base import evaluate


def run_method(stages: Stages) -> Summary | None:
    """Wide, then for every seed narrow, finetune and scratch; export of the first seed's network; summary and report.

    All ranks train; what follows is the first one's business, and the others return None.
    """
    recipe = stages.recipe
    # what the last stage cannot do with these ranks is said before the first one begins
    counts = stages.task.forward_flops(stages.thin), stages.task.forward_flops(stages.wide_shape)
    require_fit(recipe, stages.thin, stages.wide_shape, stages.pairing, counts, stages.task.length, stages.place.world_size)
    wide = stages.wide()
    narrow, finetune, scratch = [], [], []
    for seed in recipe.compare.seeds:
        narrow.append(stages.narrow(seed))
        finetune.append(stages.finetune(seed))
        if recipe.compare.scratch:
            scratch.append(stages.scratch(seed))
    if stages.place.rank:
        return None
    say("exporting " + ", ".join(recipe.export.formats))
    start = stages.seed_folder("finetune", recipe.compare.seeds[0])
    stages.folder.check_network(start)
    thin = load_network(start)
    origin = describe(recipe, stages.folder.path, "finetune", stages.task, {"model.safetensors": digest(start / "model.safetensors")})
    missed: MissedError | None = None
    try:
        written = export_network(thin, stages.task, recipe.export.formats, stages.folder.path / "export", recipe.export, origin)
    except MissedError as error:
        # what the training has come to is told all the same
        written, missed = error.written, error
    thin_shape, wide_shape = _shape(stages, stages.thin), _shape(stages, stages.wide_shape)
    win = WinArm(
        **Arm.statistics([result["metric"] for result in finetune]),
        **thin_shape,
        training=_cost([*narrow, *finetune], len(recipe.compare.seeds)),
        imitation_error=[sum(errors) / len(narrow) for errors in zip(*(result["imitation_error"] for result in narrow), strict=True)],
    )
    baseline = None
    if scratch:
        values = Arm.statistics([result["metric"] for result in scratch])
        baseline = Arm(**values, **thin_shape, training=_cost(scratch, len(scratch)))
    metric = stages.task.metric
    summary = Summary(
        model=recipe.model.family,
        name=recipe.run.name,
        metric=Metric(metric.name, metric.unit, metric.higher_is_better),
        date=date.today().isoformat(),
        commit=commit(),
        hardware=hardware(),
        wide=Arm(**Arm.statistics([wide["metric"]]), **wide_shape, training=_cost([wide], 1)),
        thin_scratch=baseline,
        thin_win=win,
        gain=gain(win, baseline) if baseline else None,
        export={name: brief(result) for name, result in written.items()},
    )
    write_summary(stages.folder.path / "summary.json", summary)
    report = write_report(stages.folder.path)
    print(table([summary]))
    print("\n".join(standing(name, result) for name, result in written.items()))
    print(f"report: {report}")
    if missed is not None:
        raise missed
    return summary


def evaluate_run(stages: Stages) -> None:
    """Prints the validation figures of every finished network of a run."""
    metric = stages.task.metric
    found = 0
    for seed in stages.recipe.compare.seeds:
        for stage in ("wide", "narrow", "finetune", "scratch"):
            if stage == "wide" and seed != stages.recipe.compare.seeds[0]:
                continue
            folder = stages.seed_folder(stage, None if stage == "wide" else seed)
            if stages.folder.result(folder):
                stages.folder.check_network(folder)
                score = evaluate(load_network(folder).to(device()), stages.task)
                print(
                    f"{folder.relative_to(stages.folder.path)}: {metric.name} {score['metric']:.2f} {metric.unit}, loss {score['loss']:.4f}"
                )
                found += 1
    if not found:
        raise UserError(f"{stages.folder.path}: no stage has finished; run scripts/run.py first")


def _shape(stages: Stages, config: BlockConfig) -> dict[str, Any]:
    network = config.build().eval()
    probe = next(batches(stages.task.valid, 1))

    def call() -> None:
        with torch.inference_mode():
            network(probe, **stages.task.positions(probe))

    latency = measure_latency(call, repeats=50, warmup=5)
    return {"parameters": parameter_count(network), "flops": stages.task.forward_flops(config).total, "latency_ms": latency["p50_ms"]}


def _cost(results: Sequence[dict[str, Any]], seeds: int) -> Training:
    """What one seed cost, on average."""
    total = {key: sum(result[key] for result in results) / seeds for key in ("steps", "flops", "seconds")}
    return Training(steps=round(total["steps"]), flops=total["flops"], seconds=total["seconds"])
