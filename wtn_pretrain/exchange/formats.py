"""Writing a network as a Hugging Face folder or as ONNX."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from wtn_pretrain.exchange.parity import Inputs
from wtn_pretrain.models.base import BlockNetwork, parameter_count
from wtn_pretrain.models.hf import to_hf

OPSET = 18


def write_hf(network: BlockNetwork, folder: Path) -> None:
    """A Hugging Face folder that loads with `AutoModelForMaskedLM` or `AutoModelForImageClassification` and no code of ours."""
    model = to_hf(network)
    with _quiet():
        model.save_pretrained(folder)


def open_hf(network: BlockNetwork, folder: Path) -> Callable[[Inputs], Tensor]:
    """The network in a Hugging Face folder, as a call from inputs to logits."""
    from transformers import AutoModelForImageClassification, AutoModelForMaskedLM

    images = network.config.family == "resnet"
    with _quiet():
        model = (AutoModelForImageClassification if images else AutoModelForMaskedLM).from_pretrained(folder).eval()

    def call(inputs: Inputs) -> Tensor:
        return model(inputs["pixels"]).logits if images else model(**inputs).logits

    return call


class _Ordered(nn.Module):
    """The network with its inputs in order instead of by name, as the exporter wants them."""

    def __init__(self, network: BlockNetwork) -> None:
        super().__init__()
        self.network = network
        self.names = tuple(network.config.dynamic_axes)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(dict(zip(self.names, inputs, strict=True)))


def write_onnx(network: BlockNetwork, folder: Path, probe: Inputs) -> None:
    """`model.onnx`, with the batch (and sequence) free; traced on `probe`, whose free axes must be at least 2."""
    axes = network.config.dynamic_axes
    sizes: dict[str, torch.export.Dim] = {}
    for name in axes:
        for axis, label in axes[name].items():
            longest = {"max": network.config.max_positions} if label == "sequence" else {}  # type: ignore[attr-defined]
            sizes.setdefault(label, torch.export.Dim(label, **longest) if probe[name].shape[axis] > 1 else torch.export.Dim.AUTO)
    shapes = tuple({axis: sizes[label] for axis, label in axes[name].items()} for name in axes)
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet():
        torch.onnx.export(
            _Ordered(network).eval(),
            tuple(probe[name] for name in axes),
            folder / "model.onnx",
            input_names=list(axes),
            output_names=["logits"],
            dynamic_shapes=(shapes,),
            opset_version=OPSET,
            dynamo=True,
            # one file unless it would pass protobuf's 2 GiB
            external_data=4 * parameter_count(network) > 1.9e9,
            verbose=False,
        )


def open_onnx(folder: Path) -> Callable[[Inputs], Tensor]:
    """The network in `model.onnx` run by ONNX Runtime on the CPU, as a call from inputs to logits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])

    def call(inputs: Inputs) -> Tensor:
        (logits,) = session.run(["logits"], {name: np.ascontiguousarray(value) for name, value in inputs.items()})
        return torch.from_numpy(logits)

    return call


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """Exporters draw bars, report their progress on standard output and warn of their own deprecations."""
    for name in ("torch.onnx", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
