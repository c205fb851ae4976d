"""Rows of several documents against the same documents one a row: the same network, loss, gradients and imitation.

In fp64 the two differ by the order of sums alone, 1e-12 of the largest element; in fp32 by 1e-6, and the tolerance leaves room. A
key bias has a gradient of zero in exact arithmetic, so a gradient is measured by the largest element of all gradients of its layer's kind.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wtn_pretrain.imitation.config import MobileBertLoss
from wtn_pretrain.imitation.losses import energy_mse, mobilebert
from wtn_pretrain.kernels.attention import same_document
from wtn_pretrain.models import BertConfig
from wtn_pretrain.models.bert.model import BertNetwork, restarting

WORDS, LENGTH, SLOTS = 37, 20, 4
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Rows(NamedTuple):
    """The same documents and masked tokens, several a row and one a row."""

    packed: dict[str, Tensor]
    padded: dict[str, Tensor]
    where: list[tuple[int, int, int, int]]
    """Of each document: its row, first token and end in the packed rows, and its row in the padded ones."""


def rows_of(lengths: list[list[int]], seed: int = 0) -> Rows:
    """Documents of so many tokens in each row, random words, `SLOTS` random positions to predict in each packed row."""
    random = np.random.default_rng(seed)
    documents = sum(map(len, lengths))
    ids, segments = np.zeros((len(lengths), LENGTH), np.int64), np.zeros((len(lengths), LENGTH), np.int64)
    alone, kept = np.zeros((documents, LENGTH), np.int64), np.zeros((documents, LENGTH), np.int64)
    positions, targets = np.full((len(lengths), SLOTS), LENGTH - 1), np.full((len(lengths), SLOTS), -100)
    their_positions, their_targets = np.full((documents, SLOTS), LENGTH - 1), np.full((documents, SLOTS), -100)
    where: list[tuple[int, int, int, int]] = []
    for row, sizes in enumerate(lengths):
        begin = 0
        for number, size in enumerate(sizes, start=1):
            words = random.integers(5, WORDS, size)
            ids[row, begin : begin + size], segments[row, begin : begin + size] = words, number
            alone[len(where), :size], kept[len(where), :size] = words, 1
            where.append((row, begin, begin + size, len(where)))
            begin += size
        for slot, place in enumerate(sorted(random.permutation(begin)[:SLOTS])):
            positions[row, slot], targets[row, slot] = place, random.integers(5, WORDS)
            document = next(one for one in where if one[0] == row and one[1] <= place < one[2])
            free = int((their_targets[document[3]] != -100).sum())
            their_positions[document[3], free], their_targets[document[3], free] = place - document[1], targets[row, slot]
    packed = {"input_ids": ids, "segments": segments, "positions": positions, "targets": targets}
    padded = {"input_ids": alone, "attention_mask": kept, "positions": their_positions, "targets": their_targets}
    return Rows(*({name: torch.from_numpy(value) for name, value in batch.items()} for batch in (packed, padded)), where)


def network_of(norm: str, dtype: torch.dtype, **changes: object) -> BertNetwork:
    torch.manual_seed(1)
    shape = {"vocab_size": WORDS, "hidden_size": 16, "layers": 2, "heads": 2, "max_positions": LENGTH, "initializer_range": 0.3}
    config = BertConfig.model_validate({**shape, "norm": norm, "dropout": 0, "attention_dropout": 0, **changes})
    network = config.build().to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def loss_and_gradients(network: BertNetwork, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    network.zero_grad()
    logits = network(batch, positions=batch["positions"])
    loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None}


def compare(network: BertNetwork, rows: Rows) -> float:
    """The largest difference of a gradient, relative to the largest element of the gradients of its kind."""
    loss, gradients = loss_and_gradients(network, rows.packed)
    expected, theirs = loss_and_gradients(network, rows.padded)
    dtype = next(network.parameters()).dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(loss.double(), expected.double(), rtol=tolerance, atol=0)
    assert gradients.keys() == theirs.keys()
    apart, largest = 0.0, max(float(value.abs().max()) for value in theirs.values())
    for name, gradient in gradients.items():
        kind = name.rsplit(".", 1)[0]
        scale = max(float(value.abs().max()) for other, value in theirs.items() if other.rsplit(".", 1)[0] == kind)
        # nothing to attend to but itself, and a query has no gradient at all
        apart = max(apart, float((gradient - theirs[name]).abs().max()) / max(scale, 1e-3 * largest))
    assert apart <= tolerance, apart
    return apart


FIXED = [[20], [3, 3, 3, 3, 3, 3], [1, 12, 5], [8, 8], [7], [2, 18], [19, 1]]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_packed_and_padded_documents_give_one_loss_and_one_gradient(norm: str, dtype: torch.dtype) -> None:
    print(f"{norm} {dtype}: gradients {compare(network_of(norm, dtype), rows_of(FIXED)):.1e} apart")


@st.composite
def fillings(draw: st.DrawFn) -> list[list[int]]:
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        sizes: list[int] = [draw(st.integers(1, LENGTH))]
        while sum(sizes) < LENGTH and draw(st.booleans()):
            sizes.append(draw(st.integers(1, LENGTH - sum(sizes))))
        rows.append(sizes)
    return rows


@settings(max_examples=25, deadline=None)
@given(fillings(), st.sampled_from(["post", "pre"]), st.integers(0, 9))
def test_any_lengths(lengths: list[list[int]], norm: str, seed: int) -> None:
    compare(network_of(norm, torch.float64), rows_of(lengths, seed))


def test_a_document_does_not_see_its_neighbours() -> None:
    network, rows = network_of("post", torch.float64).eval(), rows_of([[8, 12]])
    changed = {**rows.packed, "input_ids": rows.packed["input_ids"].clone()}
    changed["input_ids"][0, 8:] = 6
    with torch.no_grad():
        one, other = network(rows.packed), network(changed)
        blind = network({"input_ids": rows.packed["input_ids"]}), network({"input_ids": changed["input_ids"]})
    assert torch.equal(one[0, :8], other[0, :8])
    assert not torch.equal(blind[0][0, :8], blind[1][0, :8]), "without segments it does"


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_one_document_a_row_is_a_plain_row(norm: str) -> None:
    network, rows = network_of(norm, torch.float64), rows_of([[LENGTH]] * 3)
    plain = {name: value for name, value in rows.packed.items() if name != "segments"}
    (loss, gradients), (expected, theirs) = loss_and_gradients(network, rows.packed), loss_and_gradients(network, plain)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert all(torch.allclose(gradients[name], theirs[name], rtol=0, atol=1e-12) for name in theirs)


def test_positions_and_what_is_seen() -> None:
    segments = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0], [1] * 8])
    assert restarting(torch.arange(8), segments).tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], list(range(8))]
    seen = same_document(segments)
    assert seen.shape == (2, 1, 8, 8) and seen.any(-1).all(), "no row of scores is empty"
    assert torch.block_diag(*(torch.ones(n, n) for n in (3, 1, 2, 2))).bool().equal(seen[0, 0])
    carry = network_of("pre", torch.float32).stem({"input_ids": torch.zeros_like(segments), "segments": segments})
    assert all(len(tensor) == 2 for tensor in carry.context), "what ranks split by rows has a row for each"
    counted = BertNetwork.counted(carry)
    assert counted is not None and counted.dtype is torch.bool and counted.tolist() == (segments > 0).tolist()


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_imitation_of_packed_documents_is_that_of_padded_ones(norm: str) -> None:
    """Both losses of a block, MobileBERT's with its attention maps: sum and normaliser."""
    teacher, student = network_of(norm, torch.float64, head_size=16), network_of(norm, torch.float64)
    rows = rows_of(FIXED)
    found = []
    for batch in (rows.packed, rows.padded):
        carries, taps = [], []
        for network in (student, teacher):
            kept: dict[str, Tensor] = {}
            carries.append(network.blocks[0](network.stem(batch), kept))
            taps.append(kept)
        mask = BertNetwork.counted(carries[1])
        hidden = [carry.hidden for carry in carries]
        weights = MobileBertLoss(attention=1.0)
        losses = (energy_mse(hidden[0], hidden[1], mask), mobilebert(hidden[0], hidden[1], taps[0], taps[1], weights, mask))
        found.append([loss.value() for loss in losses])
    assert all(value.isfinite() for value in found[0])
    # the losses are computed in fp32
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)
