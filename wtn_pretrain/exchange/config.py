"""The keys of the exports."""

from typing import Literal

from pydantic import Field

from wtn_pretrain.config import Section

Format = Literal["hf", "onnx", "onnx_fused", "onnx_int8", "onnx_int8_dynamic", "torchvision", "timm", "torch_export"]


class ExportSection(Section):
    """What is written at the end."""

    formats: tuple[Format, ...] = ("hf", "onnx")
    """Formats of the thin network (docs/export.md). One that cannot hold it is refused by name, not in silence."""
    tolerance: float | None = Field(None, gt=0)
    """Largest difference of logits (fp32), absolute or as a share of the largest logit if that is above 1, at which an export counts as
    written; null: 1e-4 for onnx and onnx_fused, 1e-5 for the others. int8 is held to `int8_drop` instead."""
    int8_drop: float = Field(1.0, ge=0)
    """Points of the task's metric that an int8 export may lose."""
    opset: int = Field(18, ge=1)
    """ONNX operator set."""
    reduce_range: bool = False
    """int8 weights of 7 bits, for x86 CPUs without VNNI, whose sums of two products saturate at 16 bits."""
    calibration: int = Field(256, ge=1)
    """Training samples on which the ranges of int8 activations are measured."""
    samples: int = Field(2000, ge=0)
    """Validation samples on which the metric is taken before and after; 0: all."""
    shard: str = Field("5GB", pattern=r"^\d+(\.\d+)? ?[KMGT]B$")
    """Largest file of weights in a Hugging Face folder, in KB, MB, GB or TB; larger networks are cut into several."""
    license: str = ""
    """Licence that the model card states; the data's and the teacher's licences decide which may stand there."""
