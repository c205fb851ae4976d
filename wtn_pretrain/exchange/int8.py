"""int8 (Jacob et al. 2018): ranges of activations measured on the run's data, scales of weights per output channel."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wtn_pretrain.exchange.onnx import FILE
from wtn_pretrain.exchange.probes import Inputs, calibration
from wtn_pretrain.exchange.quiet import quiet
from wtn_pretrain.models.base import BlockConfig
from wtn_pretrain.tasks.base import Task

BATCH = 16
"""Samples that are calibrated on at once."""


class _Reader:
    """Batches of training samples for ONNX Runtime's calibration."""

    def __init__(self, batches: list[Inputs]) -> None:
        self._waiting: Iterator[Inputs] = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        inputs = next(self._waiting, None)
        return None if inputs is None else {name: np.ascontiguousarray(value) for name, value in inputs.items()}


def quantise(folder: Path, task: Task, config: BlockConfig, samples: int, reduce_range: bool = False) -> None:
    """Turns `model.onnx` into static int8: quantise and dequantise nodes (QDQ) around products with weights, convolutions and their sums.

    Weights are signed and symmetric, a scale an output channel; activations have the range that `samples` training samples show. The norm
    is folded into the convolution before, and a ReLU into the range of what stands before it. What is rounded is what training for int8
    rounds (`wtn_pretrain.training.int8`): logits and what is not in that list stay fp32.

    Args:
        reduce_range: weights of 7 bits, whose products fit the 16-bit sums of x86 CPUs without VNNI.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = calibration(task, config, samples, BATCH)
    with quiet():
        ready = folder / "ready.onnx"
        outside = (folder / f"{FILE}.data").exists()
        quant_pre_process(str(folder / FILE), str(ready), skip_symbolic_shape=True, save_as_external_data=outside)
        reader: Any = _Reader(batches)
        quantize_static(
            str(ready),
            str(folder / "int8.onnx"),
            reader,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            op_types_to_quantize=["Conv", "Relu", "Gemm", "MatMul", "Add", "MaxPool", "GlobalAveragePool", "ReduceMean"]
            if config.family == "resnet"
            else ["MatMul", "Gemm"],
            nodes_to_exclude=_of_activations(ready),
            calibrate_method=CalibrationMethod.MinMax,
            reduce_range=reduce_range,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )
    _replace(folder)


def _of_activations(file: Path) -> list[str]:
    """The names of the products in which no weight takes part: attention's, whose softmax is fp32 anyway."""
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    constant = {value.name for value in graph.initializer}
    for node in graph.node:
        # what is made of constants alone, such as a transposed weight
        if constant.issuperset(node.input):
            constant.update(node.output)
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.name and not constant & set(node.input)]


def quantise_weights(folder: Path, reduce_range: bool = False) -> None:
    """Turns `model.onnx` into dynamic int8: matrices are int8, the range of what they multiply is taken as it comes."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(
            str(folder / FILE),
            str(folder / "int8.onnx"),
            per_channel=True,
            weight_type=QuantType.QInt8,
            reduce_range=reduce_range,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        )
    _replace(folder)


def _replace(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "int8.onnx":
            path.unlink()
    (folder / "int8.onnx").replace(folder / FILE)
