"""Records that go to DeepSpeed's monitors as well: Weights & Biases, Comet, CSV files, or a TensorBoard folder of their own.

They are asked for in the DeepSpeed file, in DeepSpeed's own sections. An engine does not get these: DeepSpeed would count what it writes
in samples and open a monitor for every engine of stage 2. The stage's `Monitor` opens them once, and writes what it records, by step.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from wtn_pretrain.errors import UserError

SECTIONS = {"wandb": "wandb", "comet": "comet_ml", "csv_monitor": None, "tensorboard": None}
"""DeepSpeed's section of a monitor -> the package that it needs beside what is installed with this one."""

_wanted: dict[str, Any] = {}


def take_monitors(tree: dict[str, Any], name: str) -> None:
    """Moves the monitors' sections out of `tree`, the DeepSpeed file `name`, for the next `open_monitors` of this process.

    Raises:
        UserError: a monitor's package is missing, or its section is not DeepSpeed's.
    """
    from deepspeed.monitor.config import get_monitor_config

    sections = {key: tree.pop(key) for key in SECTIONS if key in tree}
    for key, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f'{name}: {key} must hold an object, such as {{"enabled": true}}')
        package = SECTIONS[key]
        if section.get("enabled") and package and find_spec(package) is None:
            raise UserError(f"{name}: {key} is enabled and the package {package} is not installed; pip install {package}, or disable it")
    try:
        get_monitor_config(sections)
    except ValueError as error:
        problem = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        raise UserError(f"{name}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}; see DeepSpeed's monitor section") from None
    _wanted.clear()
    _wanted.update(sections)


class Passing:
    """DeepSpeed's monitors of one stage, on rank 0."""

    def __init__(self, master: Any) -> None:
        self._master = master

    def write(self, events: Sequence[tuple[str, float, int]]) -> None:
        """Hands on (name, value, step)."""
        self._master.write_events(list(events))

    def close(self) -> None:
        """Ends what has an end of its own: the next stage begins at step 1 again, which Weights & Biases takes from a new run alone."""
        if self._master.wandb_monitor is not None:
            import wandb  # type: ignore[import-not-found,unused-ignore]

            wandb.finish()
        if self._master.comet_monitor is not None:
            self._master.comet_monitor.experiment.end()
        if self._master.tb_monitor is not None:
            self._master.tb_monitor.summary_writer.close()


def open_monitors() -> Passing | None:
    """The monitors that the DeepSpeed file read last asks for; None where it asks for none, or this process is in no group."""
    import torch.distributed as dist

    # each is opened once, by the stage that comes next
    sections = {**_wanted}
    _wanted.clear()
    if not any(section.get("enabled") for section in sections.values()) or not dist.is_initialized():
        return None
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    return Passing(MonitorMaster(get_monitor_config(sections)))
