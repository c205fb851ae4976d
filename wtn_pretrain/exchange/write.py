"""Exporting: write beside the target, compare with the original, and only then switch it in."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.formats import OPSET, open_hf, open_onnx, write_hf, write_onnx
from wtn_pretrain.exchange.parity import parity
from wtn_pretrain.files import write_text
from wtn_pretrain.models.base import BlockNetwork
from wtn_pretrain.models.hf import why_not_hf
from wtn_pretrain.tasks.base import Task


def export(network: BlockNetwork, task: Task, formats: Iterable[str], folder: Path, tolerance: float) -> dict[str, dict[str, Any]]:
    """Writes `network` (on the CPU, fp32) into `folder/FORMAT` for every format, with its certificate `parity.json`.

    Returns:
        For every format its certificate, or `{"refused": reason}` where the format has no such architecture.

    Raises:
        UserError: logits differ by more than `tolerance`; nothing of that format is left behind.
    """
    return {name: _export(network.cpu().eval(), task, name, folder / name, tolerance) for name in formats}


def _export(network: BlockNetwork, task: Task, name: str, target: Path, tolerance: float) -> dict[str, Any]:
    if name == "hf":
        reason = why_not_hf(network.config)
        if reason:
            return {"refused": f"Hugging Face cannot hold this network: {reason}"}
    probes = task.probes()
    draft = target.with_name(target.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        if name == "hf":
            write_hf(network, draft)
            call = open_hf(network, draft)
        else:
            write_onnx(network, draft, probes[-1])
            call = open_onnx(draft)
        task.save_preprocessing(draft)
        certificate = {"format": name, "torch": torch.__version__, "tolerance": tolerance, **parity(network, call, probes)}
        if name == "onnx":
            certificate["opset"] = OPSET
        if certificate["max_difference"] > tolerance:
            raise UserError(
                f"export: {name} logits differ from the original's by {certificate['max_difference']:.1e}, more than export.tolerance "
                f"{tolerance:.0e}; nothing was written"
            )
        write_text(draft / "parity.json", json.dumps(certificate, indent=2) + "\n")
        _switch(draft, target)
    except OSError as error:
        raise UserError(f"export: {target} cannot be written ({error}); free the disk or choose another folder") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return certificate


def _switch(draft: Path, target: Path) -> None:
    """Puts `draft` in the place of `target`."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(draft, target)
    shutil.rmtree(old, ignore_errors=True)
