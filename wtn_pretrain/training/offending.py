"""Names the samples of steps that went wrong, for whoever looks for the reason in the data."""

import json
from collections.abc import Sequence
from pathlib import Path

from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.files import write_text


def name_samples(
    folder: Path, stage: str, step: int, why: str, batches: Sequence[tuple[int, int]], stream: BatchStream, write: bool = True
) -> Path:
    """Writes `batches-stepN.json` beside the metrics in `folder`: what all ranks together were given.

    Of each batch stand there the step that took it, its number in the data order, and its samples: indices in the training set (where
    rows grow with the steps, in that of their length), and the seeds from which follows what is random in them.

    Args:
        step: at which it was noticed, from 1.
        why: what went wrong.
        batches: steps (from 1) and the numbers of the batches (from 0) that they took.
        write: where several ranks say the same, whether this is the one that writes.

    Returns:
        Where they stand.

    Raises:
        UserError: the place cannot be written.
    """
    path = folder / f"batches-step{step}.json"
    if not write:
        return path
    named = []
    for taken, batch in batches:
        indices, seeds = stream.sample_ids(batch)
        named.append({"step": taken, "batch": batch, "indices": indices.tolist(), "seeds": seeds.tolist()})
    write_text(path, json.dumps({"stage": stage, "step": step, "why": why, "batches": named}) + "\n")
    return path
