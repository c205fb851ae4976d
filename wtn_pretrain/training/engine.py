"""DeepSpeed's engine from a training section: what is written in the run's configuration is filled in, contradictions are refused."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wtn_pretrain.checkpoint.files import on_host
from wtn_pretrain.device import allow_tf32, device, hardware, supports_fp16
from wtn_pretrain.errors import UserError
from wtn_pretrain.models.base import BlockNetwork, channels_last
from wtn_pretrain.parallel.batchnorm import synchronise_batch_norm
from wtn_pretrain.parallel.tensor import whole as whole_of
from wtn_pretrain.screen import say
from wtn_pretrain.training.activations import checkpoint_blocks
from wtn_pretrain.training.compilation import compile_blocks
from wtn_pretrain.training.config import OptimizerSection, TrainSection
from wtn_pretrain.training.nvme import OwnFolder
from wtn_pretrain.training.offload import check_buffers, check_offload, offloads, require_compiler
from wtn_pretrain.training.optimizers import STATES, decay_groups, follow_layers, make_optimizer
from wtn_pretrain.training.partitioned import partition
from wtn_pretrain.training.passing import take_monitors

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
        follows_layers=True,
    )
    return _completed(tree, section, stage)


def check_training(section: TrainSection, stage: str, network: BlockNetwork) -> None:
    """Refuses what `start_engine` would refuse on any number of ranks. `network`: of the right shape, it may be without data.

    Raises:
        UserError: names the key, what is wrong and the remedy.
    """
    tree = filled_config(section.deepspeed, stage, section.optimizer, {}, follows_layers=True)
    _check_network(_completed(tree, section, stage), section, stage, network)


def _completed(tree: dict[str, Any], section: TrainSection, stage: str) -> dict[str, Any]:
    """`tree` with what the section says of precision."""
    level = tree["zero_optimization"].get("stage", 0)
    if level == 3 and section.tensor_parallel > 1:
        raise UserError(
            f"{stage}.tensor_parallel: {section.deepspeed} is ZeRO 3, which would divide layers that are divided already; "
            "use ds_configs/zero2.json, or tensor_parallel 1"
        )
    if level == 3:
        for key, wanted in (("compile", section.compile), ("ema", section.ema)):
            if wanted:
                raise UserError(
                    f"{stage}.{key}: needs whole layers, and {section.deepspeed} is ZeRO 3; use ds_configs/zero2.json, or turn it off"
                )
    if section.precision == "bf16":
        tree["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif section.precision == "bf16_weights":
        if level == 0:
            raise UserError(
                f"{stage}.precision: bf16_weights would add up gradients in bf16 under ZeRO 0, which {section.deepspeed} is; "
                "use ds_configs/zero1.json or above, or precision bf16"
            )
        tree["bf16"] = {"enabled": True}
        tree.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    elif section.precision == "fp16":
        if not supports_fp16():
            raise UserError(f"{stage}.precision: fp16 is not supported on this device ({hardware()}); use bf16 or fp32")
        if level == 0:
            # DeepSpeed 0.19.8 divides gradients there by a scale that it has never multiplied the loss with
            raise UserError(f"{stage}.precision: fp16 needs ZeRO 1 or above for its loss scaling; use ds_configs/zero1.json, or bf16")
        # loss_scale 0: found by trying, from 2 ** 16 on
        tree["fp16"] = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2, **tree.get("fp16", {})}
        tree["fp16"]["enabled"] = True
    return tree


def filled_config(
    name: str, stage: str, optimizer: OptimizerSection, ours: dict[str, tuple[str, Any]], follows_layers: bool = False
) -> dict[str, Any]:
    """The DeepSpeed file `name` with the numbers of the run's configuration: DeepSpeed's key -> (our key, value).

    Args:
        follows_layers: the engine is started by `start_engine`, or `follow_layers` is called for it.

    Raises:
        UserError: the file repeats one of them with another value, or combines what does not work.
    """
    tree = read_deepspeed_json(name, stage)
    for key, (own, value) in ours.items():
        if tree.get(key, "auto") not in ("auto", value):
            raise UserError(f"{name}: {key} {tree[key]} contradicts {own}, which gives {value}; remove it from the file")
        tree[key] = value
    for key in ("optimizer", "scheduler", "bf16", "fp16", "torch_autocast", "amp"):
        # how losses are scaled is DeepSpeed's own, whether they are is not
        if key in tree and (key != "fp16" or "enabled" in tree[key]):
            raise UserError(f"{name}: {key} belongs in {stage}.{_HOME.get(key, 'precision')}; remove it from the file")
    take_monitors(tree, name)
    zero = tree.setdefault("zero_optimization", {"stage": 0})
    check_offload(zero, name)
    _check_optimizer(optimizer, f"{stage}.optimizer", zero, name, follows_layers)
    tree.setdefault("zero_allow_untested_optimizer", True)
    if offloads(zero):
        # the optimizer is torch's unless DeepSpeed's is asked for: it steps where its state lies
        tree.setdefault("zero_force_ds_cpu_optimizer", False)
    tree.setdefault("steps_per_print", 10**9)
    tree.setdefault("wall_clock_breakdown", False)
    return tree


_HOME = {"optimizer": "optimizer", "scheduler": "schedule"}


def _check_optimizer(optimizer: OptimizerSection, key: str, zero: dict[str, Any], name: str, follows_layers: bool) -> None:
    level = zero.get("stage", 0)
    if optimizer.name in ("lamb", "lars") and level > 0 and not follows_layers:
        raise UserError(
            f"{key}.name: {optimizer.name} needs whole layers and {name} is ZeRO {level}, "
            "which partitions them; use ds_configs/zero0.json, or adamw or sgd"
        )
    if optimizer.name != "adamw" and zero.get("offload_optimizer", {}).get("ratio", 1) != 1:
        raise UserError(
            f"{name}: with an offload_optimizer.ratio DeepSpeed steps the rest with AdamW, and {key}.name is {optimizer.name}; set it to 1"
        )
    if optimizer.cpu_kernel == "deepspeed":
        if optimizer.name != "adamw" or not follows_layers:
            raise UserError(f"{key}.cpu_kernel: DeepSpeed's is an adamw of the stages wide, finetune and scratch; use torch")
        if not offloads(zero):
            raise UserError(
                f"{key}.cpu_kernel: DeepSpeed's steps an offloaded optimizer, and {name} does not offload it; "
                "use ds_configs/zero2_offload.json, or torch"
            )
        require_compiler(f"{key}.cpu_kernel: DeepSpeed's")


def start_engine(module: nn.Module, section: TrainSection, stage: str, world_size: int, accumulation: int, mpu: Any = None) -> Any:
    """`deepspeed.initialize` for `module`, which has a `network` of blocks, with the section's optimizer.

    `module`, in host memory, is moved to this rank's device, under ZeRO 3 part by part. The learning rate is set by the
    caller, step by step. `mpu`: where this rank stands among data and tensor ranks.
    """
    import deepspeed

    config = deepspeed_config(section, stage, world_size, accumulation)
    zero = config["zero_optimization"]
    network = module.network
    assert isinstance(network, BlockNetwork)
    _check_network(config, section, stage, network)
    allow_tf32(section.tf32)
    level = zero.get("stage", 0)
    if level < 3:
        module.to(device())
    if world_size > 1 and section.batch_norms == "all":
        synchronise_batch_norm(module)
    if section.compile:
        say(f"{stage}: compiling the blocks, so the first step takes a minute or more")
        compile_blocks(network)
    if section.checkpoint_activations:
        checkpoint_blocks(network, int(section.checkpoint_activations), reentrant=level == 3)
    if section.optimizer.cpu_kernel == "deepspeed":
        say(f"{stage}: DeepSpeed's CPUAdam steps the offloaded optimizer; its first use compiles for two minutes")
    groups = decay_groups(module.parameters(), section.optimizer.weight_decay)
    optimizer = make_optimizer(section.optimizer, groups, offloaded=offloads(zero))
    folder = OwnFolder(zero)
    if level == 3:
        # the optimizer has sorted parameters by their shapes, which they lose
        partition(module, config)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, mpu=mpu)
    if level == 0:
        # not before, since DeepSpeed sends weights as bytes; above, they lie in its flat buffers
        channels_last(network)
    average_only_with_others(engine, world_size)
    folder.go_with(engine)
    follow_layers(engine, optimizer)
    return engine


def _check_network(config: dict[str, Any], section: TrainSection, stage: str, network: BlockNetwork) -> None:
    if section.precision in ("bf16_weights", "fp16") and any(buffer.is_floating_point() for buffer in network.buffers()):
        raise UserError(
            f"{stage}.precision: {section.precision} would round the statistics of a {network.config.family}'s batch norms; use bf16"
        )
    if section.batch_norms == "rank" and not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        raise UserError(f"{stage}.batch_norms: a {network.config.family} has none; leave the key out")
    check_buffers(config["zero_optimization"], STATES[section.optimizer.name], section.deepspeed)


def average_only_with_others(engine: Any, ranks: int) -> None:
    """Spares an engine whose gradients nobody else has the averaging: DeepSpeed would copy every one into buckets and back."""
    if ranks == 1 and engine.zero_optimization_stage() == 0:
        engine.enable_backward_allreduce = False


def gradient_norm(engine: Any) -> float | Tensor | None:
    """The norm of the gradients of all ranks' samples, before clipping; to be asked after the last backward pass and before the step.

    None where DeepSpeed computes it as it steps: `engine.get_global_grad_norm()` gives it then.
    """
    if engine.zero_optimization_stage() > 0 or engine.fp16_enabled() or engine.bfloat16_enabled():
        return None
    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    groups = [getattr(parameter, "tensor_parallel_group", None) for parameter in parameters]
    shared, divided = (
        [parameter.grad for parameter, group in zip(parameters, groups, strict=True) if (group is not None) is wanted]
        for wanted in (False, True)
    )
    square = torch.nn.utils.get_total_norm(shared).square()
    if divided:
        parts = torch.nn.utils.get_total_norm(divided).square()
        torch.distributed.all_reduce(parts, group=next(group for group in groups if group is not None))
        square = square + parts
    return square.sqrt()


def gathered_state(engine: Any, module: nn.Module) -> dict[str, Tensor] | None:
    """The whole fp32 state of `module` on rank 0 (None elsewhere), whatever ZeRO stage and precision. Every rank must call it."""
    import deepspeed
    import deepspeed.comm as dist

    keep = dist.get_rank() == 0
    names = {parameter: name for name, parameter in module.named_parameters()}
    state = dict(module.state_dict(keep_vars=True))
    found: dict[str, Tensor] = {}
    # one parameter at a time: the whole network need not fit on one device
    for name, value in state.items():
        if not isinstance(value, nn.Parameter):
            whole = value
        elif names[value] != name:
            # tied: gathered once
            continue
        elif value.dtype != torch.float32:
            whole = whole_of(value, _master(value))
        elif engine.zero_optimization_stage() == 3:
            with deepspeed.zero.GatheredParameters([value]):
                whole = value.detach().clone()
        else:
            whole = whole_of(value)
        if keep:
            whole = whole.detach()
            found[name] = on_host(whole.float() if whole.is_floating_point() else whole)
    # who saves them wants tied weights apart
    return {name: found[name] if name in found else found[names[value]].clone() for name, value in state.items()} if keep else None


def _master(parameter: nn.Parameter) -> Tensor:
    """The fp32 weights of which a network's `parameter` is a rounded copy."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(parameter)
    assert whole is not None
    return whole
