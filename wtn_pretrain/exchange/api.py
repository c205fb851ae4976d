"""Export and load from Python."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.command import STAGES, export_from
from wtn_pretrain.exchange.foreign import forget_foreign, open_foreign
from wtn_pretrain.folder import RunFolder
from wtn_pretrain.models.base import BlockNetwork
from wtn_pretrain.models.store import load_network


def load(path: str | Path, *, stage: str | None = None, pickles: bool = False, image_size: int = 0, heads: int = 0) -> BlockNetwork:
    """The network at `path`, on the CPU, in eval mode; every tensor comes from there, or the load is refused.

    Args:
        path: a run, a stage of one, or a network from elsewhere: a Hugging Face or timm folder, a state dict in torchvision's names, a
            Megatron BERT checkpoint.
        stage: of a run: wide, narrow, finetune or scratch; None takes the furthest that has finished.
        pickles: whether files that are pickles may be read; tensors alone are taken from them.
        image_size: side of the images of a ResNet whose format does not tell it.
        heads: of attention, of a Megatron checkpoint that was saved without its arguments.

    Raises:
        UserError: one line that says what is there and what is wrong with it.
    """
    place = Path(path)
    if (place / "config.yaml").exists() and not (place / "model.json").exists():
        if stage is not None and stage not in STAGES:
            raise UserError(f"stage {stage!r}: there are {', '.join(STAGES)}")
        done = [name for name in ("finetune", "narrow", "wide", "scratch") if RunFolder.result(place / name)]
        if stage is None and not done:
            raise UserError(f"{place}: no stage of this run has finished; run scripts/run.py first")
        found = place / (stage or done[0])
        RunFolder.check_network(found)
        return load_network(found)
    if stage is not None:
        raise UserError(f"stage {stage!r}: {place} is not the folder of a run, which alone has stages; leave it out")
    network = open_foreign(place, pickles, image_size, heads).network()
    forget_foreign()
    return network


def export(
    run: str | Path,
    to: str | Sequence[str] | None = None,
    *,
    stage: str = "finetune",
    seed: int | None = None,
    checkpoint: str | Path | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """Exports a network of a run, as tools/export.py does.

    Args:
        run: its folder.
        to: one or more of hf, onnx, onnx_fused, onnx_int8, onnx_int8_dynamic, torchvision, timm, torch_export; None takes the recipe's.
        stage: whose network.
        seed: of the comparison; None takes its first.
        checkpoint: a folder stepN of a training stage, instead of what the stage left at its end.
        out: the folder to write into; None takes the run's `export`.
        settings: keys of the recipe's section `export`, such as `opset=20`.

    Returns:
        For every format its certificate, or `{"refused": reason}`.

    Raises:
        UserError: there is no such network, or an export misses its tolerance; nothing of it is then left behind.
    """
    formats = [to] if isinstance(to, str) else to
    # as JSON, for YAML would read words and colons of plain text in ways of its own
    assignments = [f"export.{key}={json.dumps(value)}" for key, value in settings.items()]
    return export_from(
        Path(run),
        formats,
        stage=stage,
        seed=seed,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        out=None if out is None else Path(out),
        assignments=assignments,
    )
