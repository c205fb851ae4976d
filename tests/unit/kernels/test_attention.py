"""Attention, packed rows above all, against the formula in fp64."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from tests.unit.kernels.comparing import MASKS, SEGMENTS, TOLERANCE, attended, drawn
from wtn_pretrain.kernels.attention import attend, documents, same_document


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mask", MASKS)
def test_against_fp64(mask: str, dtype: str) -> None:
    errors = attended(dtype, mask)
    assert len(errors) == 4 and max(errors.values()) <= TOLERANCE[dtype], errors


def test_documents_are_the_runs_of_a_batch_as_one_row() -> None:
    found = documents(SEGMENTS)
    assert found.offsets.tolist() == [0, 2, 5, 6, 7, 14, 21]
    assert found.offsets.dtype is torch.int32 and found.longest == 7
    # rows that end and begin with one number are still two documents
    assert documents(torch.tensor([[1, 1], [1, 1]])).offsets.tolist() == [0, 2, 4]


def test_documents_are_remembered_until_the_segments_change() -> None:
    segments = SEGMENTS.clone()
    first = documents(segments)
    assert documents(segments) is first
    segments[0] = 1
    assert documents(segments).offsets.tolist() == [0, 7, 14, 21]
    with torch.inference_mode():
        assert documents(SEGMENTS.clone()).longest == 7


def test_layers_of_a_batch_share_one_mask_until_the_segments_change() -> None:
    given = [drawn(3, 2, 7, 8, seed=seed).float() for seed in range(3)]
    segments, masks = SEGMENTS.clone(), []
    plain = F.scaled_dot_product_attention

    def noted(*tensors: torch.Tensor, attn_mask: torch.Tensor, dropout_p: float) -> torch.Tensor:
        masks.append(attn_mask)
        return plain(*tensors, attn_mask=attn_mask, dropout_p=dropout_p)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", noted)
        attend(*given, segments), attend(*given, segments)
        segments[0] = 1
        attend(*given, segments)
    assert masks[0] is masks[1] and masks[2] is not masks[0]
    assert masks[2][0].all() and not masks[0][0].all()


def test_one_document_after_the_other_is_what_the_mask_says() -> None:
    """The contract of kernels of variable length, by a loop over documents."""
    query, key, value = (drawn(3, 2, 7, 8, seed=seed) for seed in range(3))
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    offsets = documents(SEGMENTS).offsets.tolist()
    parts = []
    for begin, end in pairwise(offsets):
        q, k, v = (x[begin:end].transpose(0, 1) for x in rows)
        parts.append(((q @ k.mT * 8**-0.5).softmax(-1) @ v).transpose(0, 1))
    alone = torch.cat(parts).view(3, 7, 2, 8).transpose(1, 2)
    torch.testing.assert_close(attend(query, key, value, SEGMENTS), alone)


def test_what_other_documents_hold_does_not_matter() -> None:
    given = [drawn(3, 2, 7, 8, seed=seed).float() for seed in range(3)]
    other = [x.clone() for x in given]
    for x in other[1:]:
        x[0, :, 2:5] = 1e4  # the second document of the first row
    seen = (SEGMENTS != 2)[:, None, :, None].expand(3, 2, 7, 8)
    assert torch.equal(attend(*given, SEGMENTS)[seen], attend(*other, SEGMENTS)[seen])
    assert same_document(SEGMENTS).shape == (3, 1, 7, 7)


def test_dropout_of_weights_leaves_the_mean() -> None:
    torch.manual_seed(0)
    query, key, value = (drawn(64, 2, 16, 8, seed=seed).float() for seed in range(3))
    segments = torch.ones(64, 16, dtype=torch.int64)
    dropped = torch.stack([attend(query, key, value, segments, dropout=0.2) for _ in range(50)]).mean(0)
    plain = attend(query, key, value, segments)
    assert not torch.equal(attend(query, key, value, segments, dropout=0.2), plain)
    # the mean of 50 draws: their spread is 0.5 of a weighted mean of 16 values, over 7
    assert (dropped - plain).square().mean().sqrt() < 0.15 * plain.square().mean().sqrt() + 0.05
