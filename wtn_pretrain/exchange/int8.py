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
    import onnxruntime
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    batches = calibration(task, config, samples, BATCH)
    # sessions of the library's own; what goes wrong in them is raised as well
    onnxruntime.set_default_logger_severity(4)
    with quiet():
        ready, outside = _prepared(folder)
        reader: Any = _Reader(batches)
        quantize_static(
            str(ready),
            str(_made(folder)),
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
            use_external_data_format=outside,
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
    """Turns `model.onnx` into dynamic int8: matrices are int8, the range of what they multiply is taken as it comes.

    Word embeddings lie there twice, by rows for the look-up and by columns for the product of the head.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        # a weight that is turned when the network runs is none to the library: the head's product, the largest, would stay fp32
        ready, outside = _prepared(folder)
        quantize_dynamic(
            str(ready),
            str(_made(folder)),
            per_channel=True,
            weight_type=QuantType.QInt8,
            reduce_range=reduce_range,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            use_external_data_format=outside,
        )
    _replace(folder)


def _prepared(folder: Path) -> tuple[Path, bool]:
    """`model.onnx` with its constants folded, as the library wants it, and whether its weights lie beside the graph; protobuf may then not
    hold those of int8 either, nor the model that is calibrated on."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready, outside = folder / "ready.onnx", (folder / f"{FILE}.data").exists()
    quant_pre_process(str(folder / FILE), str(ready), skip_symbolic_shape=True, save_as_external_data=outside, all_tensors_to_one_file=True)
    return ready, outside


def _made(folder: Path) -> Path:
    """Where the int8 model is written first, under the name that it is to have: files of weights are found by it."""
    place = folder / "int8"
    place.mkdir()
    return place / FILE


def _replace(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    for path in (folder / "int8").iterdir():
        path.replace(folder / path.name)
    (folder / "int8").rmdir()
