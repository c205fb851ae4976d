"""Runs as the real Monitor records them, with curves of the shape that training gives."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wtn_pretrain.report.summary import Arm, Metric, Summary, Training, WinArm, gain, write_summary
from wtn_pretrain.training.monitor import Monitor

BLOCKS, STEPS, IMITATION = 12, 2000, 800


def record_training(folder: Path, stage: str, *, start: float, floor: float, decay: float, seed: int, rank: int = 0) -> None:
    noise = np.random.default_rng(seed)
    with Monitor(folder, stage, STEPS, log_every=20, rank=rank, tensorboard=False) as monitor:
        for step in range(1, STEPS + 1):
            loss = floor + (start - floor) * np.exp(-step / decay)
            monitor.step(step, {"loss": loss * noise.lognormal(0, 0.08), "learning_rate": 1e-3 * (1 - step / STEPS)}, samples=32)
            if step % 200 == 0:
                monitor.evaluated(step, {"loss": loss * 1.08, "accuracy": 100 * np.exp(-loss / 9) + noise.normal(0, 0.25)})


def record_imitation(folder: Path, seed: int) -> None:
    noise = np.random.default_rng(seed)
    with Monitor(folder, "narrow", IMITATION, log_every=10, tensorboard=False) as monitor:
        for step in range(1, IMITATION + 1):
            fed = "teacher-fed" if step <= 500 else "student-fed"
            depth = np.arange(1, BLOCKS + 1)
            errors = 0.004 * depth + 0.9 * np.exp(-step / (40 + 9 * depth))
            errors = errors * (1 if step <= 500 else 1 + depth / 6 * np.exp(-(step - 500) / 120)) * noise.lognormal(0, 0.04, BLOCKS)
            monitor.step(step, {"units": list(errors), "phase": fed}, samples=32)


def make_summary(model: str, name: str, scratch: list[float], win: list[float]) -> Summary:
    cost = Training(steps=STEPS, flops=3.4e14, seconds=1830.0)
    arms = {
        "thin_scratch": Arm(**Arm.statistics(scratch), parameters=3_410_000, flops=4.1e8, latency_ms=3.91, training=cost),
        "thin_win": WinArm(
            **Arm.statistics(win), parameters=3_410_000, flops=4.1e8, latency_ms=3.88, training=cost, imitation_error=[0.01] * BLOCKS
        ),
    }
    return Summary(
        model=model,
        name=name,
        metric=Metric("masked accuracy", "%", True),
        date="2026-01-31",
        commit="0123456789abcdef",
        hardware="2 CPU cores",
        wide=Arm(**Arm.statistics([84.1]), parameters=27_900_000, flops=3.3e9, latency_ms=21.4, training=Training(STEPS, 2.8e15, 9120.0)),
        gain=gain(arms["thin_win"], arms["thin_scratch"]),
        export={
            "written": ["Hugging Face folder", "ONNX"],
            "refused": {"int8": "no calibration data"},
            "onnx": {"max difference": 2.1e-6, "checked": True},
        },
        **arms,  # type: ignore[arg-type]
    )


def record_run(folder: Path, summary: Summary | None, seeds: int = 3) -> Path:
    record_training(folder / "wide", "wide", start=9.5, floor=1.4, decay=330, seed=0)
    for seed in range(seeds):
        part = folder if seed == 0 else folder / f"seed-{seed}"
        record_imitation(part / "narrow", seed)
        record_training(part / "finetune", "finetune", start=4.0, floor=1.6, decay=300, seed=10 + seed)
        record_training(part / "scratch", "finetune", start=9.6, floor=1.9, decay=460, seed=20 + seed)
    (folder / "config.yaml").write_text("run:\n  name: demo <b>&\nimitation:\n  schedule: hybrid\n")
    if summary is not None:
        write_summary(folder / "summary.json", summary)
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three seeds; tests do not change it, except for its report."""
    summary = make_summary("bert", "bert-thin", [81.0, 80.4, 81.3], [82.9, 83.2, 82.7])
    return record_run(tmp_path_factory.mktemp("runs") / "bert-thin", summary)


@pytest.fixture
def summarise() -> Callable[..., Summary]:
    return make_summary
