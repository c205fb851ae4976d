"""Stage 1 on data x tensor ranks, by the script that users start, against one process.

What differs is the order of fp32 sums: 1e-7 of a loss at first, and after 20 steps of AdamW at most 1e-5.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.imitating import apart
from tests.running import BERT, Forge, losses, recipe, weights, write_recipe

pytestmark = pytest.mark.slow

ROUND_OFF = 1e-5
DROPOUT = {"model.dropout": 0.2, "model.attention_dropout": 0.2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    # ranks, changes
    "2 tensor": (2, {"wide.tensor_parallel": 2}),
    "2 tensor x 2 data": (4, {"wide.tensor_parallel": 2}),
    "4 tensor, positions divided": (4, {"wide.tensor_parallel": 4, "wide.sequence_parallel": True}),
    "2 tensor x 2 data, positions divided, accumulated": (
        4,
        {"wide.tensor_parallel": 2, "wide.sequence_parallel": True, "wide.micro_batch_size": 4},
    ),
    "4 tensor x 2 data, ZeRO 1": (8, {"wide.tensor_parallel": 4, "wide.deepspeed": "ds_configs/zero1.json"}),
    "4 tensor x 2 data, ZeRO 2": (8, {"wide.tensor_parallel": 4, "wide.deepspeed": "ds_configs/zero2.json"}),
    "2 tensor, activations computed anew": (2, {"wide.tensor_parallel": 2, "wide.checkpoint_activations": True}),
    "2 tensor x 2 data, ZeRO 1": (4, {"wide.tensor_parallel": 2, "wide.deepspeed": "ds_configs/zero1.json"}),
    "2 tensor x 2 data, ZeRO 2, positions divided": (
        4,
        {"wide.tensor_parallel": 2, "wide.sequence_parallel": True, "wide.deepspeed": "ds_configs/zero2.json"},
    ),
    "2 tensor x 2 data, ZeRO 2, offloaded": (4, {"wide.tensor_parallel": 2, "wide.deepspeed": "ds_configs/zero2_offload.json"}),
}


def trained(forge: Forge, folder: Path, ranks: int, changes: dict[str, Any]) -> Path:
    """The folder of stage 1."""
    folder.mkdir()
    tree = recipe(BERT, changes)
    forge.start("train_wide.py", write_recipe(folder / "recipe.yaml", tree), ranks=ranks).succeed()
    return folder / "runs" / "bert" / "wide"


@pytest.fixture(scope="module")
def alone(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process."""
    return trained(forge, tmp_path_factory.mktemp("alone") / "run", 1, {})


def same(mine: Path, theirs: Path) -> None:
    pairs = list(zip(losses(mine), losses(theirs), strict=True))
    loss = max(abs(one / other - 1) for one, other in pairs)
    # a key's bias changes no output: its gradient is round-off, along which AdamW takes whole steps
    weight, name = apart(weights(mine), weights(theirs), but="key.bias")
    print(f"losses {loss:.1e}, weights {weight:.1e} ({name})")
    assert len(pairs) == 20 and pairs[-1][0] < 0.97 * pairs[0][0]
    assert loss < ROUND_OFF
    assert weight < 1e-3, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_divided_network_trains_as_the_whole_one(layout: str, alone: Path, forge: Forge, tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[layout]
    same(trained(forge, tmp_path / "run", ranks, changes), alone)


@pytest.mark.parametrize("precision", ["bf16", "bf16_weights"])
@pytest.mark.parametrize("positions", ["whole", "parts"])
def test_a_divided_network_in_bf16_stays_near_fp32(precision: str, positions: str, alone: Path, forge: Forge, tmp_path: Path) -> None:
    divided = {"wide.tensor_parallel": 2, "wide.sequence_parallel": positions == "parts", "wide.deepspeed": "ds_configs/zero1.json"}
    curve = losses(trained(forge, tmp_path / "run", 2, {**divided, "wide.precision": precision}))
    found = max(abs(one / other - 1) for one, other in zip(curve, losses(alone), strict=True))
    print(f"{precision}, {positions} positions: {found:.1e}")
    # 8 bits of mantissa, sums over the ranks among what is rounded: not equal, and not far
    assert 0 < found < 0.02


LAMB = {"wide.optimizer.name": "lamb", "wide.optimizer.lr": 0.1}


@pytest.mark.parametrize("changes", [LAMB, {"data.packing": "documents"}], ids=["LAMB", "packed"])
def test_under_zero_1(changes: dict[str, Any], forge: Forge, tmp_path: Path) -> None:
    divided = {"wide.tensor_parallel": 2, "wide.deepspeed": "ds_configs/zero1.json"}
    same(trained(forge, tmp_path / "divided", 4, {**changes, **divided}), trained(forge, tmp_path / "alone", 1, changes))


@pytest.mark.parametrize(("ranks", "positions", "zero"), [(2, "whole", 0), (4, "parts", 0), (2, "whole", 1), (2, "parts", 2)])
def test_dropout_with_the_same_masks(ranks: int, positions: str, zero: int, forge: Forge, tmp_path: Path) -> None:
    changes = {
        **DROPOUT,
        "wide.tensor_parallel": ranks,
        "wide.sequence_parallel": positions == "parts",
        "wide.deepspeed": f"ds_configs/zero{zero}.json",
    }
    ran = trained(forge, tmp_path / "divided", ranks, changes)
    (tmp_path / "alone").mkdir()
    config = write_recipe(tmp_path / "alone" / "recipe.yaml", recipe(BERT, DROPOUT))
    program = Path(__file__).with_name("masks_alike.py")
    forge.program(program, str(ranks), positions, "--config", str(config), cwd=config.parent).succeed()
    same(ran, config.parent / "runs" / "bert" / "wide")


REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "ranks": (3, {"wide.tensor_parallel": 2}, "wide.tensor_parallel: 2 does not divide 3 ranks"),
    "heads": (3, {"wide.tensor_parallel": 3}, "3 ranks do not divide model.heads 4"),
    "vocabulary": (
        2,
        {"wide.tensor_parallel": 2, "model.vocab_size": 301},
        "do not divide model.vocab_size 301; use a divisor, or vocab_size 302",
    ),
    "ZeRO 3": (2, {"wide.tensor_parallel": 2, "wide.deepspeed": "ds_configs/zero3.json"}, "wide.tensor_parallel: .* ZeRO 3"),
    "positions alone": (2, {"wide.sequence_parallel": True}, "wide: sequence_parallel divides positions"),
    "odd sequences": (
        2,
        {"wide.tensor_parallel": 2, "wide.sequence_parallel": True, "data.sequence_length": 23},
        "2 ranks do not divide sequences of 23 tokens",
    ),
    "odd short sequences": (
        2,
        {"wide.tensor_parallel": 2, "wide.sequence_parallel": True, "data.lengths": [[0.5, 15]]},
        "2 ranks do not divide sequences of 15 tokens",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_divided_is_refused_once(name: str, forge: Forge, tmp_path: Path) -> None:
    ranks, changes, words = REFUSED[name]
    started = forge.start("train_wide.py", write_recipe(tmp_path / "recipe.yaml", recipe(BERT, changes)), ranks=ranks)
    assert set(started.codes()) == {2}, started.stderr()[-3000:]
    (line,) = [line for line in started.errors() if line.startswith("error:")]
    assert re.search(words, line), line
