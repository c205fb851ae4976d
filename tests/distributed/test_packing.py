"""The method on rows of whole documents: all stages on one rank, imitation on several."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.imitating import SGD, Imitations, apart, losses_apart
from tests.running import BERT, Forge, equal_bits, losses, recipe, weights, write_recipe

pytestmark = pytest.mark.slow

PACKED = {"data.packing": "documents", "data.sequence_length": 32}
HYBRID = {**SGD, **PACKED, "narrow.schedule": "hybrid"}
ROUND_OFF = 5e-5
"""See `test_pipeline`."""


def test_all_stages(forge: Forge, tmp_path: Path) -> None:
    changes: dict[str, Any] = {**PACKED, "compare.scratch": False, "export.formats": ["hf"], "wide.deepspeed": "ds_configs/zero1.json"}
    started = forge.start("run.py", write_recipe(tmp_path / "recipe.yaml", recipe(BERT, changes)), ranks=2)
    started.succeed(240)
    assert "rows of 32 tokens" in started.stderr()
    run = tmp_path / "runs" / "bert"
    for stage in ("wide", "finetune"):
        found = losses(run / stage)
        assert len(found) == 20 and all(map(math.isfinite, found))
    assert losses(run / "wide")[-1] < losses(run / "wide")[0]
    done = json.loads((run / "narrow" / "done.json").read_text())
    assert max(done["imitation_error"]) < 1
    assert (run / "export" / "hf" / "model.safetensors").exists()


@pytest.mark.parametrize("changes", [{}, {"narrow.loss": "mobilebert", "narrow.optimizer.lr": 0.01}], ids=["energy", "MobileBERT's loss"])
def test_spans_are_bitwise_one_process(changes: dict[str, Any], imitations: Imitations) -> None:
    both = {**HYBRID, **changes}
    ran, alone = imitations.under("0-1,2-3", BERT, both), imitations.alone(BERT, both)
    assert equal_bits(ran.weights, alone.weights)
    assert losses_apart(ran, alone) == 0
    assert ran.done["imitation_error"] == alone.done["imitation_error"]
    totals = [step["loss"] for step in alone.records]
    assert min(totals) < 0.9 * totals[0], "nothing is learned, so that equality says nothing"
    # on other rows the student becomes another
    assert not equal_bits(alone.weights, imitations.alone(BERT, {**both, "data.packing": "padded"}).weights)


def test_replicas_are_one_process_up_to_round_off(imitations: Imitations) -> None:
    ran, alone = imitations.under("0-0,1-3x2", BERT, HYBRID), imitations.alone(BERT, HYBRID)
    assert losses_apart(ran, alone) <= ROUND_OFF
    assert apart(ran.weights, alone.weights)[0] <= ROUND_OFF


def test_stored_activations_keep_the_documents_apart(imitations: Imitations, tmp_path: Path) -> None:
    """bottom_up reads what it stored; a cache on disk read again gives the student that filled it."""
    # a cache sees the batches of run.seed, and without one they are the student's own
    bottom_up = {**SGD, **PACKED, "narrow.schedule": "bottom_up", "narrow.steps": 10, "compare.seeds": [BERT["run"]["seed"]]}
    config = imitations.config(BERT, {**bottom_up, "narrow.cache": str(tmp_path / "cache")})
    imitations.start(config, ranks=1).succeed()
    again = imitations.config(BERT, {**bottom_up, "narrow.cache": str(tmp_path / "cache")})
    imitations.start(again, ranks=1).succeed()
    filled, read = imitations.left(config), imitations.left(again)
    assert read.done["teacher_flops"] == 0
    assert equal_bits(filled.weights, read.weights)
    assert equal_bits(filled.weights, weights(imitations.alone(BERT, bottom_up).folder))
