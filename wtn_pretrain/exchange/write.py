"""Exporting: write beside the target, compare with the original, and only then switch it in."""

import contextlib
import json
import math
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.card import Origin, model_card
from wtn_pretrain.exchange.config import ExportSection
from wtn_pretrain.exchange.files import digest
from wtn_pretrain.exchange.formats import FORMATS, Format, Job, holding, plain_onnx
from wtn_pretrain.exchange.onnx import FILE, of_runtime, open_onnx, operators, opset_of
from wtn_pretrain.exchange.parity import Call, parity, task_metric
from wtn_pretrain.exchange.probes import probes
from wtn_pretrain.files import make_durable, switch_folder, write_text
from wtn_pretrain.models.base import BlockNetwork
from wtn_pretrain.report.latency import measure_latency
from wtn_pretrain.tasks.base import Task

LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "safetensors", "numpy")


class MissedError(UserError):
    """Exports that miss what they are held to, and are not written; those of other formats are."""

    def __init__(self, message: str, written: dict[str, dict[str, Any]] | None = None) -> None:
        super().__init__(message)
        self.written = written or {}
        """What `export_network` would have returned, with `{"refused": reason}` for those."""


def export_network(
    network: BlockNetwork, task: Task, formats: Iterable[str], folder: Path, section: ExportSection, origin: Origin | None = None
) -> dict[str, dict[str, Any]]:
    """Writes `network` (on the CPU, fp32) into `folder/FORMAT` for every format, with its certificate `parity.json`.

    Returns:
        For every format its certificate, or `{"refused": reason}` where the format has no such architecture.

    Raises:
        MissedError: an export is further from the original than its tolerance, or does not run, and nothing of that format is left behind.
        UserError: in the place of an export stands what is none, or it cannot be written.
    """
    origin = origin or Origin()
    formats = list(formats)
    network = network.cpu().float().eval()
    written: dict[str, dict[str, Any]] = {}
    for name in formats:
        reason = FORMATS[name].why_not(network.config)
        if reason:
            written[name] = {"refused": f"{name} cannot hold this network: {reason}; these can: {', '.join(holding(network.config))}"}
        else:
            _require_replaceable(folder / name)
    missed: list[str] = []
    if len(written) < len(set(formats)):
        with _drafts(folder) as work:
            job = Job(network, task, probes(task, network.config), section, work)

            @cache
            def metric_before() -> float:
                # the same for all formats
                return task_metric(task, network, None, section.samples)[0]

            for name in formats:
                if name not in written:
                    try:
                        written[name] = _export(job, name, folder / name, origin, metric_before)
                    except MissedError as error:
                        missed.append(name)
                        written[name] = {"refused": str(error)}
    written = {name: written[name] for name in formats}
    if missed:
        others = [name for name in written if "refused" not in written[name]]
        beside = f"; written: {', '.join(others)}" if others else ""
        raise MissedError("export: " + "; ".join(written[name]["refused"] for name in missed) + beside, written)
    return written


@contextlib.contextmanager
def _drafts(folder: Path) -> Iterator[Path]:
    """A folder in `folder` that no other export works in, gone in the end."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix=".export-", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"export: {folder} cannot be written ({error.strerror}); free the place or choose another folder") from None
    with made as work:
        yield Path(work)


def _require_replaceable(target: Path) -> None:
    """Refuses to export over what no export has left."""
    try:
        taken = target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir())))
        if taken and not (target / "parity.json").is_file():
            raise UserError(
                f"export: {target} is there and holds no parity.json, so that it is no export; move it or choose another folder"
            )
    except OSError as error:
        raise UserError(f"export: {target} cannot be read ({error.strerror}); choose another folder") from None


def _export(job: Job, name: str, target: Path, origin: Origin, metric_before: Callable[[], float]) -> dict[str, Any]:
    form, draft = FORMATS[name], job.work / f"{name}.draft"
    try:
        form.write(job, draft)
        call = form.open(job, draft)
        job.task.save_preprocessing(draft)
        certificate = _certificate(job, name, form, draft, call, origin, metric_before())
        _require(certificate, name, job.section)
        write_text(draft / "parity.json", json.dumps(certificate, indent=2) + "\n")
        write_text(draft / "README.md", model_card(job.network, origin, job.section.license, certificate))
        _require_replaceable(target)
        make_durable(draft)
        switch_folder(draft, target)
    except OSError as error:
        raise UserError(f"export: {target} cannot be written ({error}); free the disk or choose another folder") from None
    except Exception as error:
        said = of_runtime(error)
        if said is None:
            raise
        opset = f"export.opset {job.section.opset}"
        raise MissedError(f"{name}: ONNX Runtime cannot run it at {opset} ({said}); nothing was written; set export.opset to 18") from None
    return certificate


def _certificate(job: Job, name: str, form: Format, draft: Path, call: Call, origin: Origin, metric_before: float) -> dict[str, Any]:
    """What was found about an export."""
    found = parity(job.network, call, job.probes)
    metric_after, counted = task_metric(job.task, job.network, call, job.section.samples)
    tolerance = None if form.tolerance is None else job.section.tolerance or form.tolerance
    files = [path for path in sorted(draft.rglob("*")) if path.is_file()]
    certificate: dict[str, Any] = {
        "format": name,
        "tolerance": tolerance,
        # absolute below 1, a share of the largest logit above: fp32 rounds that far
        "difference": found["max_difference"] / max(1.0, found["largest_logit"]),
        **found,
        "metric": job.task.metric.name,
        "metric_before": metric_before,
        "metric_after": metric_after,
        "metric_samples": counted,
        "opened_with": form.opened_with(),
        "bytes": sum(path.stat().st_size for path in files),
        "files": {str(path.relative_to(draft)): digest(path) for path in files},
        "network": {
            "stage": origin.stage,
            "seed": origin.seed,
            "step": origin.step,
            "sha256": origin.weights,
            "shape": job.network.config.model_dump(mode="json"),
        },
        "versions": {"python": platform.python_version(), **{library: _installed(library) for library in LIBRARIES}},
    }
    if name.startswith("onnx"):
        certificate |= {"opset": opset_of(draft), "operators": operators(draft)}
    if form.tolerance is None:
        certificate |= _beside_fp32(job, draft, call)
    return certificate


def _beside_fp32(job: Job, draft: Path, call: Call) -> dict[str, Any]:
    """Latency and size of an int8 export and of the same network in fp32, in one run."""
    place = plain_onnx(job)
    one = {key: value[:1] for key, value in max(job.probes, key=lambda probe: next(iter(probe.values())).shape[1]).items()}
    timed = {
        word: measure_latency(partial(run, one), repeats=30, warmup=5)["p50_ms"]
        for word, run in (("int8", call), ("fp32", open_onnx(place)))
    }
    sizes = {word: sum(path.stat().st_size for path in folder.glob(f"{FILE}*")) for word, folder in (("int8", draft), ("fp32", place))}
    return {"latency_ms": timed, "latency_shape": list(next(iter(one.values())).shape), "model_bytes": sizes}


def _require(certificate: dict[str, Any], name: str, section: ExportSection) -> None:
    """Refuses an export that misses what it is held to."""
    tolerance = certificate["tolerance"]
    if tolerance is not None:
        if not certificate["difference"] <= tolerance:
            raise MissedError(
                f"{name} logits differ from the original's by {certificate['max_difference']:.1e} (largest logit "
                f"{certificate['largest_logit']:.3g}), more than export.tolerance {tolerance:.0e}; nothing was written"
            )
        return
    if not math.isfinite(certificate["max_difference"]):
        raise MissedError(f"{name} gives logits that are not finite; nothing was written; leave {name} out")
    before, after = certificate["metric_before"], certificate["metric_after"]
    if not before - after <= section.int8_drop:
        raise MissedError(
            f"{name} loses {before - after:.2f} points of {certificate['metric']} ({before:.2f} to {after:.2f}), more than "
            f"export.int8_drop {section.int8_drop:g}; nothing was written; train with finetune.int8, or calibrate on more samples"
        )


def _installed(library: str) -> str:
    if library == "torch":
        return torch.__version__
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
