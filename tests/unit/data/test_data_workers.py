"""Workers that load data outlive the signals that batch systems send to every process of a job, and no parent."""

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from wtn_pretrain.data.stream import BatchStream


class Slow:
    """Samples that take a while, and say which process fetched them."""

    def __len__(self) -> int:
        return 64

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> dict[str, torch.Tensor]:
        time.sleep(0.05)
        return {"index": torch.from_numpy(indices), "process": torch.full((len(indices),), os.getpid())}


def test_workers_heed_their_parent_alone() -> None:
    whole = BatchStream(Slow(), 8, seed=1)
    stream = BatchStream(Slow(), 8, seed=1, workers=2)
    told: set[int] = set()
    for step, batch in enumerate(stream.iterate(0, 24)):
        assert batch[0]["index"].tolist() == whole.sample_ids(step)[0].tolist()
        workers = set(batch[0]["process"].tolist())
        assert os.getpid() not in workers
        for worker in workers - told:
            # from another process than the parent, as slurmstepd does
            for name in ("TERM", "USR1"):
                subprocess.run(["kill", f"-{name}", str(worker)], check=True)
        told |= workers
    assert len(told) == 2
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in told) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{worker}").exists() for worker in told)
    # and its parent can end one, wherever it is stuck
    fetching = stream.iterate(0, 24)
    worker = int(next(fetching)[0]["process"][0])
    os.kill(worker, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}/status").exists() and "State:\tZ" not in Path(f"/proc/{worker}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # torch says that a worker is gone, and ends the others
    del fetching
