"""The network as ONNX: in operators of the standard, or with those that ONNX Runtime has for whole layers."""

import contextlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.parity import Call
from wtn_pretrain.exchange.probes import Inputs
from wtn_pretrain.exchange.quiet import quiet
from wtn_pretrain.models.base import BlockNetwork, parameter_count
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.models.bert.model import BertBlock

FILE = "model.onnx"
ONE_FILE = 1.9e9
"""Bytes of weights from which they lie beside the graph: protobuf ends at 2 GiB."""


class Ordered(nn.Module):
    """The network with its inputs in order instead of by name, as the exporters want them."""

    def __init__(self, network: BlockNetwork) -> None:
        super().__init__()
        self.network = network
        self.names = tuple(network.config.dynamic_axes)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(dict(zip(self.names, inputs, strict=True)))


def dynamic_shapes(network: BlockNetwork, probe: Inputs) -> tuple[dict[int, Any], ...]:
    """The free axes of every input, for torch.export; an axis of the same label has the same size everywhere."""
    axes = network.config.dynamic_axes
    sizes: dict[str, Any] = {}
    for name in axes:
        for axis, label in axes[name].items():
            longest = {"max": network.config.max_positions} if label == "sequence" else {}  # type: ignore[attr-defined]
            sizes.setdefault(label, torch.export.Dim(label, **longest) if probe[name].shape[axis] > 1 else torch.export.Dim.AUTO)
    return tuple({axis: sizes[label] for axis, label in axes[name].items()} for name in axes)


def traced_on(probes: list[Inputs]) -> Inputs:
    """The probe to trace on: the smallest whose free axes are all at least 2, as torch.export asks."""
    fit = [probe for probe in probes if all(min(value.shape[:2]) > 1 or (value.dim() == 4 and len(value) > 1) for value in probe.values())]
    return min(fit or probes[-1:], key=lambda probe: sum(value.numel() for value in probe.values()))


def write_onnx(network: BlockNetwork, folder: Path, probe: Inputs, opset: int = 18, whole_attention: bool = False) -> None:
    """`model.onnx`, with the batch (and sequence) free; traced on `probe`, whose free axes must be at least 2.

    Args:
        whole_attention: as a single operator of ONNX Runtime, which alone then runs the model.

    Raises:
        UserError: the operators of `opset` cannot express the network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outside = 4 * parameter_count(network) > ONE_FILE
    try:
        with quiet(), _attention_whole(network) if whole_attention else contextlib.nullcontext():
            torch.onnx.export(
                Ordered(network).eval(),
                tuple(probe[name] for name in network.config.dynamic_axes),
                folder / FILE,
                input_names=list(network.config.dynamic_axes),
                output_names=["logits"],
                dynamic_shapes=(dynamic_shapes(network, probe),),
                opset_version=opset,
                dynamo=True,
                external_data=outside,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(f"export.opset {opset}: the exporter fails ({_line(error)}); set export.opset to 18") from None
    except ValueError as error:
        raise UserError(f"export.opset: {opset} is not one that the exporter knows ({_line(error)}); set it to 18") from None
    _strip(folder / FILE)
    written = opset_of(folder)
    if written != opset:
        raise UserError(
            f"export.opset: the operators of {opset} cannot express this network, those of {written} can; set export.opset to {written}"
        )


def _strip(file: Path) -> None:
    """Takes out what the exporter notes about each node: lines and names of the code that was traced, more bytes than a small network's
    weights."""
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, *model.functions):
        del part.metadata_props[:]
        part.doc_string = ""
    del model.metadata_props[:]
    onnx.save(model, str(file))


def opset_of(folder: Path) -> int:
    """The version of the standard's operators that the model in `folder` uses."""
    import onnx

    graph = onnx.load(str(folder / FILE), load_external_data=False)
    return next(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))


def operators(folder: Path) -> dict[str, int]:
    """How often each operator stands in the model in `folder`."""
    import onnx

    counts: dict[str, int] = {}
    for node in onnx.load(str(folder / FILE), load_external_data=False).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def open_onnx(folder: Path, threads: int = 0) -> Call:
    """The network in `model.onnx` run by ONNX Runtime on the CPU, as a call from inputs to logits."""
    session = session_of(folder / FILE, threads)

    def call(inputs: Inputs) -> Tensor:
        (logits,) = session.run(["logits"], {name: np.ascontiguousarray(value) for name, value in inputs.items()})
        return torch.from_numpy(logits)

    return call


def session_of(file: Path, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU with so many threads (0: its own choice)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # what goes wrong is raised as well
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _attention_whole(network: BlockNetwork) -> Iterator[None]:
    """Traces attention as ONNX Runtime's one operator for it; its fusion does not find it in what the exporter takes it apart into."""
    blocks = [block for block in network.blocks if isinstance(block, BertBlock)]
    for block in blocks:
        block._attend = types.MethodType(_one_operator, block)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block._attend


def _one_operator(block: BertBlock, x: Tensor, mask: Tensor, taps: object) -> Tensor:
    q, k, v = block.query(x), block.key(x), block.value(x)
    attended = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        [q, k, v, None, mask[:, 0, 0].to(torch.int32)],
        {"num_heads": block.heads, "scale": block.head_size**-0.5},
        dtype=q.dtype,
        shape=q.shape,
        version=1,
    )
    return block.attention_output(attended)


def fuse(network: BlockNetwork, folder: Path) -> None:
    """ONNX Runtime's own fusions, written down: LayerNorm with its skip and GELU with its bias, or convolution with norm and ReLU."""
    config, file = network.config, folder / FILE
    outside = 4 * parameter_count(network) > ONE_FILE
    with quiet():
        if isinstance(config, BertConfig):
            from onnxruntime.transformers import optimizer

            settings = {"num_heads": config.heads, "hidden_size": config.hidden_size, "opt_level": 0}
            found = optimizer.optimize_model(str(file), model_type="bert", **settings)
            for path in folder.glob(f"{FILE}*"):
                path.unlink()
            found.save_model_to_file(str(file), use_external_data_format=outside)
            return
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # the level above chooses layouts for this very machine
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        if outside:
            # else what is not fused would go on pointing to the weights of before
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{FILE}.data")
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        part = folder / "optimised"
        part.mkdir()
        options.optimized_model_filepath = str(part / FILE)
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for path in folder.glob(f"{FILE}*"):
            path.unlink()
        for path in part.iterdir():
            path.replace(folder / path.name)
        part.rmdir()


def of_runtime(error: Exception) -> str | None:
    """What ONNX Runtime says that it cannot do, in a line; None: the error is not one of its own."""
    if not type(error).__module__.startswith("onnxruntime"):
        return None
    return _line(error).rpartition("] : ")[2][:100]


def _line(error: Exception) -> str:
    return next((line.strip()[:160] for line in str(error).splitlines() if line.strip()), type(error).__name__)
