"""The activation cache: what is read is what was written, by several ranks and for several students."""

import itertools
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.imitation.cache_samples import (
    KEY,
    LAYOUT,
    LONG,
    carry,
    check_all,
    files,
    fill,
    fill_slowly,
    fork,
    part,
    read_all,
    refusal,
    same,
    write_all,
)
from wtn_pretrain.data.images import ImageData
from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.cache import ActivationCache
from wtn_pretrain.imitation.cache_key import data_identity, network_identity
from wtn_pretrain.imitation.cache_layout import CacheLayout, Field, lay_out
from wtn_pretrain.imitation.read_ahead import Buffers, ahead
from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.models.base import Carry
from wtn_pretrain.models.store import save_network
from wtn_pretrain.tasks.classify import ClassifySection

# what is read is what was written


@st.composite
def layouts(draw: st.DrawFn) -> CacheLayout:
    def field() -> Field:
        shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
        computed = draw(st.sampled_from(["float32", "float64", "float16", "bfloat16"]))
        return Field(shape, tuple(draw(st.permutations(range(len(shape))))), computed, draw(st.sampled_from([computed, "bfloat16"])))

    hidden = {boundary: field() for boundary in range(draw(st.integers(1, 3)))}
    context = [
        Field((1, draw(st.integers(1, 4))), (0, 1), dtype, dtype) for dtype in draw(st.sampled_from(["", "bool", "bool int64"])).split()
    ]
    return CacheLayout(draw(st.integers(1, 4)), draw(st.integers(1, 7)), hidden, tuple(context))


@given(layouts(), st.data())
@settings(max_examples=60, deadline=None)
def test_rows_come_back_however_they_were_split(layout: CacheLayout, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        cache = ActivationCache(Path(place) / "cache", KEY, layout)
        predicted = cache.size
        assert cache.prepare() == 0 and not cache.complete()
        cuts = st.lists(st.integers(0, layout.rows), max_size=3).map(lambda inner: sorted({0, *inner, layout.rows}))
        # several replicas, whose batches come in any order
        batches = itertools.product(layout.hidden, range(layout.batches))
        pieces = [(*batch, *ends) for batch in batches for ends in itertools.pairwise(data.draw(cuts))]
        writers = [cache.writer(), cache.writer()]
        for number, (boundary, batch, first, last) in enumerate(data.draw(st.permutations(pieces))):
            writers[number % 2].write(boundary, batch, first, part(carry(layout, boundary, batch), first, last))
        for writer in writers:
            writer.close()
        cache.finish()
        assert cache.complete() and sum(files(cache.folder).values()) == predicted
        first = data.draw(st.integers(0, layout.rows - 1))
        last = data.draw(st.integers(first + 1, layout.rows))
        for batch, read in enumerate(read_all(cache, first, last - first)):
            for boundary, found in read.items():
                field, whole = layout.hidden[boundary], carry(layout, boundary, batch)
                expected = part(Carry(whole.hidden.to(field.dtype), whole.context), first, last)
                assert same(found, expected)
                assert found.hidden.permute(0, *(1 + axis for axis in field.order)).is_contiguous()
                restored = layout.restore(boundary, found, torch.device("cpu")).hidden
                assert restored.dtype == whole.hidden.dtype and torch.equal(restored, expected.hidden.to(restored.dtype))


BERT = BertConfig(vocab_size=29, hidden_size=16, heads=2, layers=3, max_positions=10)
RESNET = ResNetConfig(stem="cifar", stem_channels=4, channels=(8, 16), depths=(2, 1), image_channels=3, image_size=8, classes=3)


@pytest.mark.parametrize("stored", ["as computed", "bf16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [BERT, RESNET], ids=["bert", "resnet"])
def test_a_teacher_is_laid_out_before_it_runs(model: Any, precision: str, stored: str, tmp_path: Path) -> None:
    teacher, units = model.build().eval(), (0, 2, 3)
    inputs: dict[str, Tensor] = {"pixels": torch.randn(6, 3, 8, 8)}
    if model is BERT:
        inputs = {"input_ids": torch.randint(29, (6, 10)), "attention_mask": torch.ones(6, 10).long()}
    cache = ActivationCache(tmp_path / "cache", KEY, lay_out(model, units, inputs, 2, precision=precision, stored=stored))
    assert cache.prepare() == 0
    carries = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, precision == "bf16"), cache.writer() as writer:
        carries.append(teacher.stem(inputs))
        for first, last in itertools.pairwise(units):
            out = carries[-1]
            for block in teacher.blocks[first:last]:
                out = block(out)
            carries.append(out)
        for batch, boundary in itertools.product(range(2), range(3)):
            writer.write(boundary, batch, 0, carries[boundary])
    cache.finish()
    assert sum(files(cache.folder).values()) == cache.size
    for read in read_all(cache):
        for boundary, expected in enumerate(carries):
            found = read[boundary].hidden
            assert found.dtype == (torch.bfloat16 if stored == "bf16" else expected.hidden.dtype)
            assert torch.equal(found, expected.hidden.to(found.dtype))
            assert found.stride() == expected.hidden.stride()  # channels-last comes back as such
            assert all(map(torch.equal, read[boundary].context, expected.context))


def test_what_was_not_laid_out_is_not_cast(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache", KEY, LAYOUT)
    cache.prepare()
    with cache.writer() as writer:
        good = carry(LAYOUT, 0, 0)
        with pytest.raises(ValueError, match=r"bfloat16 \[8, 4, 4\] for a field of float32 \[8, 4, 4\]"):
            writer.write(0, 0, 0, Carry(good.hidden.bfloat16(), good.context))
        with pytest.raises(ValueError, match=r"a context of 0 tensors for one of 1"):
            writer.write(0, 0, 0, Carry(good.hidden))
        with pytest.raises(IndexError, match="batch 0, rows 3 to 8"):
            writer.write(0, 0, 3, good)
    with pytest.raises(IndexError, match="batch 4"):
        fill(tmp_path / "other").reader().read([0], 4)


# several students, several ranks


def test_students_share_what_is_written_once(tmp_path: Path) -> None:
    fill(tmp_path / "cache")
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "cache").iterdir()}
    first, second = (ActivationCache(tmp_path / "cache", KEY, LAYOUT) for _ in range(2))
    assert first.prepare() == second.prepare() == LAYOUT.batches
    # one goes through the batches twice, the other reads its share of the rows of one boundary, both at once
    twice = first.reader().stream([0, 1, 2], [*range(LAYOUT.batches)] * 2)
    share = second.reader().stream([2], range(LAYOUT.batches), 3, 2)
    for batch, (mine, theirs) in enumerate(zip(twice, share, strict=False)):
        assert all(same(mine[boundary], carry(LAYOUT, boundary, batch)) for boundary in mine)
        assert list(theirs) == [2] and same(theirs[2], part(carry(LAYOUT, 2, batch), 3, 5))
    assert len(list(twice)) == LAYOUT.batches - 1  # what is left of its second time; zip has taken one
    assert before == {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "cache").iterdir()}


def write_share(folder: Path, boundaries: list[int], first: int, last: int) -> None:
    cache = ActivationCache(folder, KEY, LONG)
    with cache.writer() as writer:
        for batch, boundary in itertools.product(range(LONG.batches), boundaries):
            writer.write(boundary, batch, first, part(carry(LONG, boundary, batch), first, last))


def test_ranks_fill_one_cache_together(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache", KEY, LONG)
    assert cache.prepare() == 0
    # a span of one boundary on one rank, and one of two boundaries on two ranks that split the rows unevenly
    shares = [([0], 0, 4), ([1, 2], 0, 3), ([1, 2], 3, 4)]
    ranks = [fork.Process(target=write_share, args=(cache.folder, *share)) for share in shares]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    cache.finish()
    check_all(cache)


def test_a_missing_row_keeps_the_cache_incomplete(tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache", KEY, LAYOUT)
    cache.prepare()
    with cache.writer() as writer:
        for batch, boundary in itertools.product(range(LAYOUT.batches), LAYOUT.hidden):
            rows = LAYOUT.rows - ((batch, boundary) == (2, 1))
            writer.write(boundary, batch, 0, part(carry(LAYOUT, boundary, batch), 0, rows))
    assert "boundary-001.data lacks rows of batch 2, which a rank has not written" in refusal(cache.finish)
    assert not cache.complete()
    assert "is not complete" in refusal(cache.reader)
    assert ActivationCache(tmp_path / "cache", KEY, LAYOUT).prepare() == 2


def test_of_two_runs_that_fill_at_once_one_is_refused(tmp_path: Path) -> None:
    here, there = fork.Pipe()
    runs = [fork.Process(target=fill_slowly, args=(tmp_path / "cache", 0.002, there)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    said = sorted(here.recv() for _ in range(3))
    assert said[0] == "began" and said[1] == "finished"
    assert said[2].startswith(f"narrow.cache: {tmp_path / 'cache'} is being filled by another run; wait until it has finished")
    check_all(ActivationCache(tmp_path / "cache", KEY, LONG))


def test_a_rank_that_outlives_its_run_keeps_others_out(tmp_path: Path) -> None:
    first, second = (ActivationCache(tmp_path / "cache", KEY, LAYOUT) for _ in range(2))
    first.prepare()
    straggler = first.writer()
    # what was written may not be durable before the writer is closed
    assert "being filled" in refusal(first.finish) and not first.complete()
    assert "being filled" in refusal(second.prepare)
    straggler.close()
    assert second.prepare() == 0
    write_all(second)
    second.finish()
    check_all(first)


# reading ahead


def test_the_thread_is_a_bounded_way_ahead_and_ends(tmp_path: Path) -> None:
    started: list[int] = []

    def load(number: int) -> int:
        started.append(number)
        if number == 7:
            raise UserError("seven")
        return number

    taken = []
    numbers = ahead(load, itertools.count(), depth=3)
    with pytest.raises(UserError, match="seven"):
        for number in numbers:
            taken.append(number)
            time.sleep(0.005)
            assert len(started) <= number + 4
    assert taken == list(range(7))
    half = ahead(load, itertools.count(20), depth=3)
    assert next(half) == 20
    del half
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_memory_is_used_again_once_nobody_holds_it(tmp_path: Path) -> None:
    reader = fill(tmp_path / "cache").reader()
    order = [*range(LAYOUT.batches)] * 10
    places = {read[0].hidden.data_ptr() for read in reader.stream([0], order)}
    assert len(places) <= 6
    # what is held, be it by a view or by a graph, is not written over
    scale = torch.ones(1, requires_grad=True)
    graphs = [(read[0].hidden[1:, 2] * scale).sum() for read in reader.stream([0], order)]
    for batch, graph in zip(order, graphs, strict=True):
        (gradient,) = torch.autograd.grad(graph, scale)
        assert torch.allclose(gradient, carry(LAYOUT, 0, batch).hidden[1:, 2].sum(), atol=1e-3)


def test_a_buffer_is_lent_to_one_at_a_time() -> None:
    buffers = Buffers()
    first = buffers.take(64)
    place, view = first.data_ptr(), first.view(torch.float32)[3:]
    second = buffers.take(64)
    assert second.data_ptr() != place
    del first
    assert buffers.take(64).data_ptr() not in (place, second.data_ptr())
    del view
    taken = [buffers.take(64) for _ in range(2)]
    assert place in {buffer.data_ptr() for buffer in taken}


# identities


class Samples:
    """A data set whose samples, augmented by their seeds, can be changed one at a time."""

    def __init__(self, count: int = 500, shift: float = 0.0, changed: bool = False) -> None:
        self.values = torch.arange(count * 3, dtype=torch.float32).view(count, 3) + changed
        self.shift = shift

    def __len__(self) -> int:
        return len(self.values)

    def fetch(self, indices: np.ndarray, seeds: np.ndarray | None) -> dict[str, Tensor]:
        assert seeds is not None
        jitter = torch.from_numpy((seeds % 1000).astype(np.float32))[:, None] * self.shift
        return {"pixels": self.values[torch.from_numpy(indices)] + jitter}


def test_data_is_told_apart_by_what_is_in_it() -> None:
    data, task = ImageData(source="digits"), ClassifySection()
    same_data = data_identity(Samples(), data=data, task=task)
    assert data_identity(Samples(), data=data, task=task) == same_data
    assert same_data["samples"] == 500 and same_data["data"]["source"] == "digits"
    others = [Samples(501), Samples(shift=1e-3), Samples(changed=True)]
    assert len({str(data_identity(other, data=data, task=task)) for other in others} | {str(same_data)}) == 4
    # what a batch was prepared by, and what the student's head is taught, do not reach the teacher
    assert data_identity(Samples(), data=ImageData(source="digits", workers=2), task=ClassifySection(label_smoothing=0.1)) == same_data
    assert data_identity(Samples(), data=ImageData(source="digits", shift=1), task=task) != same_data


def test_a_network_is_told_apart_by_its_weights_and_shape(tmp_path: Path) -> None:
    network = RESNET.build()
    save_network(tmp_path / "a", RESNET, network.state_dict())
    save_network(tmp_path / "b", RESNET, network.state_dict())
    assert network_identity(tmp_path / "a") == network_identity(tmp_path / "b")
    with torch.no_grad():
        network.head.classifier.bias[0] += 1e-6
    save_network(tmp_path / "b", RESNET, network.state_dict())
    one, other = network_identity(tmp_path / "a"), network_identity(tmp_path / "b")
    assert one["weights"] != other["weights"] and one["shape"] == other["shape"]
    (tmp_path / "b" / "model.json").write_text("{")
    with pytest.raises(UserError, match="model.json: not valid JSON"):
        network_identity(tmp_path / "b")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read \(No such file"):
        network_identity(tmp_path / "a")
