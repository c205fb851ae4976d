"""DeepSpeed's engine from a training section: what is written in the run's configuration is filled in, contradictions are refused."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wtn_pretrain.errors import UserError
from wtn_pretrain.parallel.batchnorm import synchronise_batch_norm
from wtn_pretrain.training.config import OptimizerSection, TrainSection
from wtn_pretrain.training.optimizers import decay_groups, make_optimizer

ROOT = Path(__file__).resolve().parents[2]


def read_deepspeed_json(name: str, stage: str) -> dict[str, Any]:
    """A DeepSpeed file, by path from here or from the project's root."""
    path = next((place for place in (Path(name), ROOT / name) if place.is_file()), None)
    if path is None:
        raise UserError(f"{stage}.deepspeed: no file {name}; ds_configs/ holds one for each ZeRO stage")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{stage}.deepspeed: {name} is not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{stage}.deepspeed: {name} must hold an object")
    return tree


def deepspeed_config(section: TrainSection, stage: str, world_size: int, accumulation: int) -> dict[str, Any]:
    """The whole DeepSpeed configuration of a training stage.

    Raises:
        UserError: the file repeats a number of the run's configuration with another value, or combines what does not work.
    """
    tree = filled_config(
        section.deepspeed,
        stage,
        section.optimizer,
        {
            "train_batch_size": (f"{stage}.batch_size", section.batch_size),
            "train_micro_batch_size_per_gpu": (f"{stage}.micro_batch_size", section.batch_size // (accumulation * world_size)),
            "gradient_accumulation_steps": (f"{stage}.micro_batch_size", accumulation),
            # DeepSpeed clips at 1.0 unless told otherwise
            "gradient_clipping": (f"{stage}.clip", section.clip),
        },
    )
    if section.precision == "bf16":
        tree["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return tree


def filled_config(name: str, stage: str, optimizer: OptimizerSection, ours: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """The DeepSpeed file `name` with the numbers of the run's configuration: DeepSpeed's key -> (our key, value).

    Raises:
        UserError: the file repeats one of them with another value, or combines what does not work.
    """
    tree = read_deepspeed_json(name, stage)
    for key, (own, value) in ours.items():
        if tree.get(key, "auto") not in ("auto", value):
            raise UserError(f"{name}: {key} {tree[key]} contradicts {own}, which gives {value}; remove it from the file")
        tree[key] = value
    for key in ("optimizer", "scheduler", "bf16", "fp16", "torch_autocast", "amp"):
        if key in tree:
            raise UserError(f"{name}: {key} belongs in {stage}.{_HOME.get(key, 'precision')}; remove it from the file")
    zero = tree.setdefault("zero_optimization", {"stage": 0})
    level = zero.get("stage", 0)
    if optimizer.name in ("lamb", "lars") and level > 0:
        raise UserError(
            f"{stage}.optimizer.name: {optimizer.name} needs whole layers and {name} is ZeRO {level}, "
            "which partitions them; use ds_configs/zero0.json, or adamw or sgd"
        )
    tree.setdefault("zero_allow_untested_optimizer", True)
    if "offload_optimizer" in zero:
        # the optimizer is torch's: it steps where its state lies
        tree.setdefault("zero_force_ds_cpu_optimizer", False)
    tree.setdefault("steps_per_print", 10**9)
    tree.setdefault("wall_clock_breakdown", False)
    return tree


_HOME = {"optimizer": "optimizer", "scheduler": "schedule"}


def start_engine(module: nn.Module, section: TrainSection, stage: str, world_size: int, accumulation: int) -> Any:
    """`deepspeed.initialize` for `module`, with the section's optimizer. The learning rate is set by the caller, step by step."""
    import deepspeed

    config = deepspeed_config(section, stage, world_size, accumulation)
    if world_size > 1:
        synchronise_batch_norm(module)
    optimizer = make_optimizer(section.optimizer, decay_groups(module.parameters(), section.optimizer.weight_decay))
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def gathered_state(engine: Any, module: nn.Module) -> dict[str, torch.Tensor] | None:
    """The whole fp32 state of `module` on rank 0 (None elsewhere), whatever the ZeRO stage. Every rank must call it."""
    import deepspeed
    import deepspeed.comm as dist

    if engine.zero_optimization_stage() < 3:
        return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()} if dist.get_rank() == 0 else None
    state = {}
    # one module at a time: the whole network need not fit on one device
    for prefix, part in module.named_modules():
        own = dict(part.named_parameters(recurse=False))
        with deepspeed.zero.GatheredParameters(list(own.values())):
            if dist.get_rank() == 0:
                dot = f"{prefix}." if prefix else ""
                state.update({f"{dot}{name}": value.detach().cpu().clone() for name, value in own.items()})
                buffers = {name for name in part._buffers if name not in part._non_persistent_buffers_set}
                state.update(
                    {f"{dot}{name}": part._buffers[name].detach().cpu().clone() for name in buffers if part._buffers[name] is not None}
                )
    return state if dist.get_rank() == 0 else None
