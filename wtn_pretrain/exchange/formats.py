"""The formats of an export: whether one can hold a network, how it is written, and how it is opened again to be compared."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from wtn_pretrain.exchange.config import ExportSection
from wtn_pretrain.exchange.foreign import open_foreign
from wtn_pretrain.exchange.int8 import quantise, quantise_weights
from wtn_pretrain.exchange.onnx import Ordered, dynamic_shapes, fuse, open_onnx, traced_on, write_onnx
from wtn_pretrain.exchange.parity import Call
from wtn_pretrain.exchange.probes import Inputs
from wtn_pretrain.exchange.quiet import quiet
from wtn_pretrain.files import write_text
from wtn_pretrain.models.base import BlockConfig, BlockNetwork
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.models.hf import to_hf, why_not_hf
from wtn_pretrain.models.resnet import torchvision
from wtn_pretrain.models.resnet.config import ResNetConfig
from wtn_pretrain.tasks.base import Task


class Job(NamedTuple):
    """What is exported, and on what it is tried."""

    network: BlockNetwork
    task: Task
    probes: list[Inputs]
    section: ExportSection
    work: Path
    """A folder for what several formats are made from."""


class Format(NamedTuple):
    """One format."""

    why_not: Callable[[BlockConfig], str | None]
    """None where it can hold a network of this shape, else what it lacks."""
    write: Callable[[Job, Path], object]
    open: Callable[[Job, Path], Call]
    tolerance: float | None
    """Difference of logits that counts as the same; None: held to the task's metric instead."""
    opened_with: Callable[[], str] = lambda: ""
    """What `open` computes with, with its version."""


def write_hf(network: BlockNetwork, folder: Path, shard: str = "5GB", labels: tuple[str, ...] = ()) -> None:
    """A Hugging Face folder that loads with `AutoModelForMaskedLM` or `AutoModelForImageClassification` and no code of ours."""
    model = to_hf(network)
    if labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}
    with quiet():
        model.save_pretrained(folder, max_shard_size=shard)


def open_hf(network: BlockNetwork, folder: Path) -> Call:
    """The network in a Hugging Face folder, as a call from inputs to logits."""
    from transformers import AutoModelForImageClassification, AutoModelForMaskedLM

    images = network.config.family == "resnet"
    with quiet():
        model = (AutoModelForImageClassification if images else AutoModelForMaskedLM).from_pretrained(folder).eval()

    def call(inputs: Inputs) -> Tensor:
        return model(inputs["pixels"]).logits if images else model(**inputs).logits

    return call


def write_torch_export(network: BlockNetwork, folder: Path, probe: Inputs) -> None:
    """`model.pt2`, torch.export's graph, which `torch.export.load` opens without any code of ours."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = tuple(probe[name] for name in network.config.dynamic_axes)
    with quiet():
        program = torch.export.export(Ordered(network).eval(), arguments, dynamic_shapes=(dynamic_shapes(network, probe),))
        torch.export.save(program, folder / "model.pt2")


def open_torch_export(network: BlockNetwork, folder: Path) -> Call:
    """The graph in `model.pt2`, as a call from inputs to logits."""
    with quiet():
        module = torch.export.load(folder / "model.pt2").module()
    return lambda inputs: module(*(inputs[name] for name in network.config.dynamic_axes))


def why_not_torchvision(config: BlockConfig) -> str | None:
    """None where torchvision's ResNet class can be built in this shape, else what it lacks."""
    if not isinstance(config, ResNetConfig):
        return "it has networks for images only"
    return torchvision.why_not(config) or ("its ResNet takes 3 channels" if config.image_channels != 3 else None)


def why_not_timm(config: BlockConfig) -> str | None:
    """None where timm's ResNet class can be built in this shape, else what it lacks."""
    return torchvision.why_not(config) if isinstance(config, ResNetConfig) else "it has networks for images only"


def _arguments(config: ResNetConfig) -> dict[str, Any]:
    """What torchvision's ResNet class is called with."""
    return {
        "block": "Bottleneck" if config.block == "bottleneck" else "BasicBlock",
        "layers": list(config.depths),
        "num_classes": config.classes,
        "width_per_group": config.inner_channels[0],
    }


def _state(network: BlockNetwork) -> dict[str, Tensor]:
    """The network's tensors in torchvision's names."""
    assert isinstance(network.config, ResNetConfig)
    own = network.state_dict()
    return {theirs: own[ours].detach().cpu().contiguous() for theirs, ours in torchvision.names(network.config).items()}


def write_torchvision(network: BlockNetwork, folder: Path) -> None:
    """`model.safetensors` in torchvision's names, and `model.json`: what its ResNet class is called with."""
    assert isinstance(network.config, ResNetConfig)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_state(network), folder / "model.safetensors", {"format": "pt"})
    write_text(folder / "model.json", json.dumps(_arguments(network.config), indent=2) + "\n")


def open_torchvision(network: BlockNetwork, folder: Path) -> Call:
    """torchvision's own network of these weights where it is installed, else ours, read back from the file."""
    from safetensors.torch import load_file

    if _version("torchvision"):
        models = importlib.import_module("torchvision.models.resnet")
        told = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        model = models.ResNet(**{**told, "block": getattr(models, told["block"])})
        model.load_state_dict(load_file(folder / "model.safetensors"))
        model.eval()
        return lambda inputs: model(inputs["pixels"])
    return _read_back(network, folder / "model.safetensors")


def write_timm(job: Job, folder: Path) -> None:
    """A folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` opens."""
    config, splits, data = job.network.config, getattr(job.task, "splits", None), getattr(job.task, "data", None)
    assert isinstance(config, ResNetConfig)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_state(job.network), folder / "model.safetensors", {"format": "pt"})
    name, arguments = _timm_name(config)
    told: dict[str, Any] = {
        "architecture": name,
        "num_classes": config.classes,
        "num_features": config.channels[-1],
        "pretrained_cfg": {
            "input_size": [config.image_channels, config.image_size, config.image_size],
            "fixed_input_size": False,
            "first_conv": "conv1",
            "classifier": "fc",
            "num_classes": config.classes,
            **({"mean": list(splits.mean), "std": list(splits.std), "label_names": list(splits.classes)} if splits else {}),
            # left out, timm takes 0.875 and bicubic
            **({"crop_pct": data.crop_fraction, "interpolation": "bilinear", "crop_mode": "center"} if data else {}),
        },
    }
    if arguments:
        told["model_args"] = arguments
    write_text(folder / "config.json", json.dumps(told, indent=2) + "\n")


def _timm_name(config: ResNetConfig) -> tuple[str, dict[str, Any]]:
    """timm's name of the shape, and with what else it must be called."""
    blocks = "basic" if config.block == "basic" else "bottleneck"
    known: dict[tuple[str, tuple[int, ...]], str] = {
        ("basic", (2, 2, 2, 2)): "resnet18",
        ("basic", (3, 4, 6, 3)): "resnet34",
        ("bottleneck", (2, 2, 2, 2)): "resnet26",
        ("bottleneck", (3, 4, 6, 3)): "resnet50",
        ("bottleneck", (3, 4, 23, 3)): "resnet101",
        ("bottleneck", (3, 8, 36, 3)): "resnet152",
    }
    name = known.get((blocks, tuple(config.depths)))
    arguments: dict[str, Any] = {}
    if name is None:
        name, arguments = ("resnet18" if blocks == "basic" else "resnet50"), {"layers": list(config.depths)}
    base = config.inner_channels[0]
    if (name, base) in (("resnet50", 128), ("resnet101", 128)) and not arguments:
        return f"wide_{name}_2", {}
    return name, {**arguments, **({"base_width": base} if base != 64 else {})}


def open_timm(network: BlockNetwork, folder: Path) -> Call:
    """timm's own network of this folder where it is installed, else ours, read back from the file."""
    if _version("timm"):
        timm = importlib.import_module("timm")
        with quiet():
            model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return lambda inputs: model(inputs["pixels"])
    return _read_back(network, folder / "model.safetensors")


def _read_back(network: BlockNetwork, file: Path) -> Call:
    size = getattr(network.config, "image_size", 0)
    return open_foreign(file, image_size=size).network()


def _version(library: str) -> str:
    """The version of a library that may be there; empty if it is not, or does not work (torchvision built for another torch)."""
    try:
        return str(importlib.import_module(library).__version__)
    except Exception:
        return ""


def _with(library: str) -> Callable[[], str]:
    return lambda: f"{library} {_version(library)}" if _version(library) else f"wtn_pretrain ({library} is not installed here)"


def plain_onnx(job: Job) -> Path:
    """A folder with the network as standard ONNX, made once: tracing takes longer than all else."""
    place = job.work / "plain"
    if not place.exists():
        write_onnx(job.network, place, traced_on(job.probes), job.section.opset)
    return place


def _onnx(job: Job, folder: Path) -> None:
    shutil.copytree(plain_onnx(job), folder)


def _fused(job: Job, folder: Path) -> None:
    if isinstance(job.network.config, BertConfig):
        write_onnx(job.network, folder, traced_on(job.probes), job.section.opset, whole_attention=True)
    else:
        _onnx(job, folder)
    fuse(job.network, folder)


def _int8(job: Job, folder: Path) -> None:
    _onnx(job, folder)
    quantise(folder, job.task, job.network.config, job.section.calibration, job.section.reduce_range)


def _int8_dynamic(job: Job, folder: Path) -> None:
    _onnx(job, folder)
    quantise_weights(folder, job.section.reduce_range)


def _labels(task: Task) -> tuple[str, ...]:
    return getattr(getattr(task, "splits", None), "classes", ())


def _any(config: BlockConfig) -> str | None:
    return None


def _why_not_dynamic(config: BlockConfig) -> str | None:
    return "it quantises matrix products and this network is made of convolutions" if isinstance(config, ResNetConfig) else None


def _onnx_call(job: Job, folder: Path) -> Call:
    return open_onnx(folder)


_RUNTIME = _with("onnxruntime")
FORMATS: dict[str, Format] = {
    "hf": Format(
        why_not_hf,
        lambda job, folder: write_hf(job.network, folder, job.section.shard, _labels(job.task)),
        lambda job, folder: open_hf(job.network, folder),
        1e-5,
        _with("transformers"),
    ),
    "onnx": Format(_any, _onnx, _onnx_call, 1e-4, _RUNTIME),
    "onnx_fused": Format(_any, _fused, _onnx_call, 1e-4, _RUNTIME),
    "onnx_int8": Format(_any, _int8, _onnx_call, None, _RUNTIME),
    "onnx_int8_dynamic": Format(_why_not_dynamic, _int8_dynamic, _onnx_call, None, _RUNTIME),
    "torchvision": Format(
        why_not_torchvision,
        lambda job, folder: write_torchvision(job.network, folder),
        lambda job, folder: open_torchvision(job.network, folder),
        1e-5,
        _with("torchvision"),
    ),
    "timm": Format(why_not_timm, write_timm, lambda job, folder: open_timm(job.network, folder), 1e-5, _with("timm")),
    "torch_export": Format(
        _any,
        lambda job, folder: write_torch_export(job.network, folder, traced_on(job.probes)),
        lambda job, folder: open_torch_export(job.network, folder),
        1e-5,
        _with("torch"),
    ),
}


def holding(config: BlockConfig) -> list[str]:
    """The formats that can hold a network of this shape."""
    return [name for name, form in FORMATS.items() if form.why_not(config) is None]
