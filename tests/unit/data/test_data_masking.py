from typing import Any

import numpy as np
import pytest
import torch

from wtn_pretrain.data.hashing import hash_keys
from wtn_pretrain.data.masking import MaskedText, Masker
from wtn_pretrain.data.packing import PackedText, lay_out
from wtn_pretrain.data.stream import BatchStream, batches
from wtn_pretrain.data.text import TextSet
from wtn_pretrain.errors import UserError

PAD, UNK, CLS, SEP, MASK = range(5)
WORDS = [f"w{i}" for i in range(20)]
PIECES = [f"##p{i}" for i in range(10)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import BertTokenizer

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *PIECES]
    return BertTokenizer(vocab={name: number for number, name in enumerate(names)})


def rows_of(body: np.ndarray) -> np.ndarray:
    return np.pad(np.pad(body, ((0, 0), (1, 0)), constant_values=CLS), ((0, 0), (0, 1)), constant_values=SEP)


def seeds_of(count: int) -> np.ndarray:
    return hash_keys(42, np.arange(count))


def within(count: float, trials: int, probability: float, sigmas: float = 3) -> bool:
    return abs(count - trials * probability) <= sigmas * np.sqrt(trials * probability * (1 - probability))


def test_counts_shares_and_places_are_berts(tokenizer: Any) -> None:
    rows = rows_of(np.random.default_rng(0).integers(5, 35, (4000, 62)))
    masked, positions, targets = Masker(tokenizer)(rows, seeds_of(4000))
    assert positions.shape == targets.shape == (4000, 9) and {masked.dtype, positions.dtype, targets.dtype} == {np.dtype(np.int64)}
    assert (np.diff(positions, axis=1) > 0).all() and positions.min() >= 1 and positions.max() <= 62
    assert (targets == np.take_along_axis(rows, positions, 1)).all()
    now = np.take_along_axis(masked, positions, 1)
    total = positions.size
    kept_or_drawn_alike = 0.1 + 0.1 / 30  # a random token is the old one once in 30
    assert within((now == MASK).sum(), total, 0.8)
    assert within((now == targets).sum(), total, kept_or_drawn_alike)
    drawn = now[(now != MASK) & (now != targets)]
    assert drawn.min() >= 5 and within(len(drawn), total, 0.9 - 0.8 - 0.1 / 30)
    assert all(within(count, len(drawn), 1 / 30, 4) for count in np.bincount(drawn, minlength=35)[5:])
    places = np.bincount(positions.ravel(), minlength=64)[1:63]
    assert all(within(count, 4000, 9 / 62, 4) for count in places)
    untouched = np.ones_like(rows, bool)
    np.put_along_axis(untouched, positions, False, 1)
    assert (masked == rows)[untouched].all()


@pytest.mark.parametrize("whole_word", [False, True])
def test_special_tokens_are_never_chosen_or_drawn(tokenizer: Any, whole_word: bool) -> None:
    random = np.random.default_rng(1)
    rows = rows_of(random.integers(0, 35, (500, 30)))
    before = rows.copy()
    masked, _, targets = Masker(tokenizer, probability=0.6, whole_word=whole_word)(rows, seeds_of(500))
    assert (rows == before).all()
    special = rows < 5
    assert (masked[special] == rows[special]).all()
    assert (targets[targets != -100] >= 5).all()
    changed = masked[(masked != rows)]
    assert ((changed == MASK) | (changed >= 5)).all()


def test_rows_with_too_few_words_leave_slots_unused(tokenizer: Any) -> None:
    rows = np.array([[CLS, 7, SEP, PAD, PAD, PAD, PAD, PAD], [CLS, SEP, PAD, PAD, PAD, PAD, PAD, PAD], [CLS, 5, 6, 7, 8, 9, 10, SEP]])
    for whole_word in (False, True):
        _, positions, targets = Masker(tokenizer, probability=0.5, whole_word=whole_word)(rows, seeds_of(3))
        assert targets[0].tolist() == [7, -100, -100] and targets[1].tolist() == [-100] * 3 and (targets[2] > 0).all()
        assert positions[0].tolist() == [1, 7, 7]


def test_masks_follow_the_seed_and_not_the_batch(tokenizer: Any) -> None:
    rows = rows_of(np.random.default_rng(2).integers(5, 35, (40, 30)))
    for whole_word in (False, True):
        masker = Masker(tokenizer, whole_word=whole_word)
        together = masker(rows, seeds_of(40))
        alone = [masker(rows[i : i + 1], seeds_of(40)[i : i + 1]) for i in range(40)]
        for part in range(3):
            assert (together[part] == np.concatenate([one[part] for one in alone])).all()
        assert not (masker(rows, hash_keys(43, np.arange(40)))[1] == together[1]).all()


def test_whole_words_stand_or_fall_together(tokenizer: Any) -> None:
    # w0 ##p0 ##p1 | w1 | w2 ##p2 | w3 ##p3 ##p4 ##p5 | w4 | w5
    body = np.array([5, 25, 26, 6, 7, 27, 8, 28, 29, 30, 9, 10])
    words = [{1, 2, 3}, {4}, {5, 6}, {7, 8, 9, 10}, {11}, {12}]
    rows = rows_of(np.tile(body, (2000, 1)))
    masker = Masker(tokenizer, probability=0.4, whole_word=True)
    _, positions, targets = masker(rows, seeds_of(2000))
    assert masker.slots(14) == 5
    chosen_words = np.zeros(6, int)
    for place, target in zip(positions, targets, strict=True):
        used = {int(p) for p, t in zip(place, target, strict=True) if t != -100}
        chosen = [word for word in words if word & used]
        assert set().union(*chosen) == used  # no word in part
        chosen_words += [word <= used for word in words]
        # nothing that is left out would have fitted: the words are tried until none does
        assert all(len(word) > 5 - len(used) for word in words if not word <= used)
    assert (chosen_words > 300).all()


def test_a_continuation_at_the_start_of_a_row_is_a_word(tokenizer: Any) -> None:
    rows = rows_of(np.tile([25, 26, 5, 27, 6, 7, 8, 9], (300, 1)))
    _, positions, targets = Masker(tokenizer, probability=0.25, whole_word=True)(rows, seeds_of(300))
    found = {tuple(place[target != -100].tolist()) for place, target in zip(positions, targets, strict=True)}
    assert (1, 2) in found and (3, 4) in found and not any((1 in pair) != (2 in pair) for pair in found)


def test_ids_of_another_vocabulary_are_refused(tokenizer: Any) -> None:
    for wrong in (35, -1):
        with pytest.raises(UserError, match=f"token id {wrong} is outside the tokenizer's vocabulary of 35; "):
            Masker(tokenizer)(np.array([[CLS, wrong, 6, SEP]]), seeds_of(1))
    with pytest.raises(UserError, match=r"masking probability 1\.5"):
        Masker(tokenizer, probability=1.5)


@pytest.mark.parametrize("pair", [None, "sop", "nsp"])
def test_masked_text_batches(tokenizer: Any, pair: Any) -> None:
    tokens = np.random.default_rng(3).integers(5, 35, 62 * 40 + 5).astype(np.uint16)
    text = TextSet(tokens, 64, CLS, SEP).with_pairs(pair)
    dataset = MaskedText(text, Masker(tokenizer))
    assert len(dataset) == 40
    batch = BatchStream(dataset, 16, seed=0).micro_batch(0, 0)
    assert set(batch) == {"input_ids", "positions", "targets"} | ({"token_type_ids", "pair_label"} if pair else set())
    assert batch["input_ids"].shape == (16, 64) and batch["positions"].shape == (16, 9) and (batch["targets"] >= 5).all()
    assert all(value.dtype == torch.int64 for value in batch.values())
    plain = dataset.fetch(np.arange(4), None)
    assert torch.equal(plain["input_ids"], text.fetch(np.arange(4), None)["input_ids"]) and (plain["targets"] == -100).all()
    first, second = ([batch["targets"] for batch in batches(dataset, size)] for size in (40, 7))
    assert torch.equal(torch.cat(first), torch.cat(second))


@pytest.mark.parametrize("whole_word", [False, True])
def test_rows_with_less_text_hide_their_share_of_it(tokenizer: Any, whole_word: bool) -> None:
    rows = rows_of(np.random.default_rng(4).integers(5, 35, (3000, 62)))
    words = np.random.default_rng(5).integers(1, 63, 3000)
    rows[np.arange(64) > words[:, None]] = PAD
    masker = Masker(tokenizer, whole_word=whole_word)
    budgets = masker.budgets(words)
    assert (budgets == [max(1, round(0.15 * count)) for count in words.tolist()]).all()
    masked, positions, targets = masker(rows, seeds_of(3000), words)
    used = (targets != -100).sum(1)
    assert (used <= budgets).all() and ((used == budgets).all() or whole_word)
    assert (masked[rows == PAD] == PAD).all() and (targets[targets != -100] >= 5).all()
    if not whole_word:
        shares = np.bincount(words, used, 63)[20:] / np.maximum(np.bincount(words, words, 63)[20:], 1)
        assert shares.min() > 0.12 and shares.max() < 0.18
        # the places are spread over the text as those of full rows are
        place = (positions / words[:, None])[(targets != -100) & (words > 20)[:, None]]
        assert abs(place.mean() - 0.5) < 0.02
    full = masker(rows, seeds_of(3000), np.full(3000, 62))
    assert all((one == other).all() for one, other in zip(full, masker(rows, seeds_of(3000)), strict=True))


@pytest.mark.parametrize("packing", ["documents", "padded"])
def test_masked_rows_of_documents(tokenizer: Any, packing: Any) -> None:
    bounds = np.concatenate([[0], np.cumsum(np.random.default_rng(6).integers(1, 90, 120))]).astype(np.int64)
    tokens = np.random.default_rng(7).integers(5, 35, bounds[-1]).astype(np.uint16)
    text = PackedText(tokens, lay_out(bounds, 64, packing), 64, CLS, SEP, PAD, packing)
    masker = Masker(tokenizer)
    dataset = MaskedText(text, masker)
    batch = BatchStream(dataset, len(text), seed=0, shuffle=False).micro_batch(0, 0)
    kinds = "segments" if packing == "documents" else "attention_mask"
    assert set(batch) == {"input_ids", "positions", "targets", kinds}
    assert batch["positions"].shape == (len(text), 9)
    plain = text.fetch(np.arange(len(text)), None)
    used = batch["targets"] != -100
    assert (used.sum(1).numpy() == np.minimum(masker.budgets(text.layout.words()), 9)).all()
    assert torch.equal(plain["input_ids"].gather(1, batch["positions"])[used], batch["targets"][used])
    assert (batch[kinds].gather(1, batch["positions"])[used] > 0).all()
    assert torch.equal(batch[kinds], plain[kinds])
    untouched = torch.ones_like(batch["input_ids"], dtype=torch.bool).scatter(1, batch["positions"], False)
    assert torch.equal(batch["input_ids"][untouched], plain["input_ids"][untouched])
