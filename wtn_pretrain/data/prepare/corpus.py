"""Raw text to token files: all cores, bounded memory, and after a kill from where the last record stands."""

import json
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from wtn_pretrain.data.faults import Faults, Policy
from wtn_pretrain.data.prepare.duplicates import MinHash, Seen
from wtn_pretrain.data.prepare.part import PartWriter
from wtn_pretrain.data.prepare.sources import Reading, Source, documents, find_sources
from wtn_pretrain.data.prepare.worker import Prepared, Preparer, Work, begin, peak_memory, prepare
from wtn_pretrain.data.token_files import id_dtype
from wtn_pretrain.data.tokenizer import load_tokenizer, tokenizer_hash
from wtn_pretrain.errors import UserError
from wtn_pretrain.files import sync_folder, write_text
from wtn_pretrain.lock import LOCK, Lock
from wtn_pretrain.version import __version__

CARD = "card.json"
"""What a prepared corpus says of itself."""
PARTS = ("train", "valid")

_FORMAT = 1
_JOURNAL = "journal.json"
_BATCH_CHARACTERS = 1 << 19
_BATCH_DOCUMENTS = 2048
_COMMIT_SECONDS = 15.0


@dataclass(frozen=True)
class Preparation:
    """What is made of what."""

    paths: tuple[str, ...]
    """See `wtn_pretrain.data.prepare.sources.find_sources`."""
    out: Path
    tokenizer: str
    """See `wtn_pretrain.data.tokenizer.load_tokenizer`."""
    reading: Reading = field(default_factory=Reading)
    sentences: bool = False
    """Keep the bounds of sentences, for pairs of segments."""
    exact: bool = False
    """Drop documents whose text was there before."""
    near: float | None = None
    """Drop documents of about this Jaccard similarity and more with one before."""
    valid_fraction: float = 0.05
    """Documents held out, by their hash; 0: none."""
    licence: str | None = None
    """Of the text: stands in the card. None: as it stands there, "unknown" at first."""
    faults: Policy = "stop"
    workers: int = 1
    """Processes beside this one; 0: none."""
    commit_seconds: float = _COMMIT_SECONDS
    """What a kill costs at most."""


class _Cursor(NamedTuple):
    source: int
    documents: int


class _Batch(NamedTuple):
    texts: list[str]
    source: int
    read: int  # documents of the source, up to there
    cursor: _Cursor  # behind its last document
    faults: dict[str, Any]  # up to there
    consumed: int


def prepare_corpus(plan: Preparation, told: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Makes `plan.out` and returns its card; goes on where an earlier call was broken off, and returns at once where all is done.

    Args:
        told: called now and then with the bytes read and the bytes there are (0: unknown).

    Raises:
        UserError: what is wrong with the input, or a folder that holds something else.
    """
    if not 0 <= plan.valid_fraction < 1:
        raise UserError(f"--valid-fraction {plan.valid_fraction}: is not from 0 up to, but not including, 1")
    sources = find_sources(plan.paths, without=plan.out)
    tokenizer = load_tokenizer(plan.tokenizer)
    settings = {
        "reading": asdict(plan.reading),
        "sentences": plan.sentences,
        "exact_duplicates": plan.exact,
        "near_duplicates": plan.near,
        "valid_fraction": plan.valid_fraction,
    }
    identity = {"format": _FORMAT, "sources": [s.identity() for s in sources], "tokenizer": tokenizer_hash(tokenizer), **settings}
    key = xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())
    if (done := _finished(plan, key)) is not None:
        return done
    if plan.out.exists() and (not plan.out.is_dir() or any(plan.out.iterdir())):
        raise UserError(f"{plan.out}: holds something else, or a corpus made with other settings; remove it or choose another --out")
    dtype = id_dtype(len(tokenizer))
    work = Work(tokenizer.backend_tokenizer.to_str(), dtype.str, plan.sentences, plan.near)
    began = time.monotonic()
    making: _Making | None = None
    try:
        making = _Making(plan, sources, key, dtype)
        if (done := _finished(plan, key)) is not None:
            # another process put it there between the look above and this one's lock
            making.leave()
            return done
        if making.finished is None:
            making.go(work, told)
            tokenizer.save_pretrained(str(making.folder / "tokenizer"))
            parts = making.finish()
            card = {
                "format": _FORMAT,
                "key": key,
                "made": datetime.now(UTC).isoformat(timespec="seconds"),
                "version": __version__,
                "licence": plan.licence or "unknown",
                "tokenizer": {"hash": tokenizer_hash(tokenizer), "vocab_size": len(tokenizer), "from": plan.tokenizer},
                "settings": settings,
                "sources": [{"name": s.name, "bytes": s.size, "documents": n} for s, n in zip(sources, making.read, strict=True)],
                "parts": parts,
                **making.counts(),
                "skipped": making.faults.state(),
                "seconds": round(making.seconds + time.monotonic() - began, 1),
                "peak_memory": making.peak,
            }
            _write_card(making.folder, card)
        making.switch_in()
    except OSError as error:
        raise UserError(f"{plan.out}: cannot be written ({error.strerror or error}); free the place or choose another --out") from None
    finally:
        if making is not None:
            making.let_go()
    card_there = _finished(plan, key)
    assert card_there is not None
    return card_there


def _finished(plan: Preparation, key: str) -> dict[str, Any] | None:
    """The card of the corpus that is to be made, if it is there; another licence of the text is noted in it."""
    card = _read(plan.out / CARD)
    if card is None or card.get("key") != key:
        return None
    if plan.licence is not None and card.get("licence") != plan.licence:
        card["licence"] = plan.licence
        _write_card(plan.out, card)
    return card


def _write_card(folder: Path, card: dict[str, Any]) -> None:
    write_text(folder / CARD, json.dumps(card, indent=1, ensure_ascii=False) + "\n")


class _Making:
    """A corpus that is being made, in a folder beside the one that it will be."""

    def __init__(self, plan: Preparation, sources: list[Source], key: str, dtype: np.dtype) -> None:
        self.plan, self.sources, self.key = plan, sources, key
        self.folder = plan.out.with_name(f".{plan.out.name}.part")
        self.faults = Faults(plan.faults)
        self.read = [0] * len(sources)
        self.cursor = _Cursor(0, 0)
        self.dropped = {"exact": 0, "near": 0}
        self.characters = 0
        self.seconds, self.peak = 0.0, 0
        self._faults_there: dict[str, Any] | None = None
        self._exact, self._near = Seen(), Seen()
        self._bands = MinHash(plan.near).bands if plan.near is not None else 0
        self._began = self._committed = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.folder, "works here; wait for it, or choose another --out")
        self.finished = _read(self.folder / CARD)
        journal = _read(self.folder / _JOURNAL)
        if journal is not None and journal["cursor"] == [0, 0]:
            journal = None  # it had not come to anything
        if any(left is not None and left.get("key") != key for left in (self.finished, journal)):
            self._lock.let_go()
            raise UserError(
                f"{self.folder}: holds what is left of making a corpus with other settings or files; give those, or remove the folder"
            )
        if self.finished is None:
            self._open(journal, dtype)

    def _open(self, journal: dict[str, Any] | None, dtype: np.dtype) -> None:
        sizes = journal["sizes"] if journal else {}
        self._parts = {name: PartWriter(self.folder, name, dtype, sizes.get(name)) for name in PARTS}
        self._seen_file = (self.folder / "seen").open("ab")
        if journal is None:
            self._seen_file.truncate(0)
            return
        self.cursor, self.read, self.dropped = _Cursor(*journal["cursor"]), journal["read"], journal["dropped"]
        self.characters, self.seconds, self.peak = journal["characters"], journal["seconds"], journal["peak"]
        self.faults.restore(journal["faults"])
        self._faults_there = journal["faults"]
        self._seen_file.truncate(journal["seen"])
        width = int(self.plan.exact) + self._bands
        if width:
            rows = np.memmap(self.folder / "seen", "<u8", mode="r") if journal["seen"] else np.zeros(0, "<u8")
            for first in range(0, len(rows), width << 16):
                some = rows[first : first + (width << 16)].reshape(-1, width)
                self._exact.add(some[:, : int(self.plan.exact)])
                self._near.add(some[:, int(self.plan.exact) :])

    def go(self, work: Work, told: Callable[[int, int], None] | None) -> None:
        """Reads, prepares and writes to the end."""
        total = sum(source.size for source in self.sources) if all(source.size for source in self.sources) else 0
        with ExitStack() as stack:
            submit = self._submitter(work, stack)
            waiting: deque[tuple[_Batch, Callable[[], Prepared]]] = deque()
            reading, problem = self._batches(), None
            while True:
                try:
                    batch = next(reading, None)
                except UserError as error:  # what was read before it counts
                    batch, problem = None, error
                if batch is not None:
                    waiting.append((batch, submit(batch.texts)))
                while waiting and (batch is None or len(waiting) > 2 * self.plan.workers):
                    ready, result = waiting.popleft()
                    self._append(ready, _answer(result))
                    if told is not None:
                        told(ready.consumed, total)
                if batch is None:
                    break
            if problem is not None:
                self._commit()
                raise problem
        # faults behind the last document
        self._commit(self.faults.state())

    def finish(self) -> dict[str, dict[str, int]]:
        """Writes the indices; what the parts hold."""
        self._seen_file.close()
        found = {name: part.finish() for name, part in self._parts.items()}
        if not found["train"]["documents"]:
            raise UserError(
                f"{self.sources[0].name}{' and others' * (len(self.sources) > 1)}: no documents to train on of the {sum(self.read)} read; "
                "give more text, or where a file holds several documents say what ends them with --boundary blank or line"
            )
        return found

    def switch_in(self) -> None:
        """Puts the finished folder in its place."""
        for name in (*(f"{part}.{kind}" for part in PARTS for kind in ("lengths", "counts")), "seen", _JOURNAL):
            (self.folder / name).unlink(missing_ok=True)
        sync_folder(self.folder)
        # the lock goes along, so that nobody can take hold of the folder meanwhile
        os.replace(self.folder, self.plan.out)
        (self.plan.out / LOCK).unlink(missing_ok=True)
        sync_folder(self.plan.out.parent)

    def leave(self) -> None:
        """Removes the folder, which this process has just made and which holds nothing."""
        self.let_go()
        shutil.rmtree(self.folder)

    def let_go(self) -> None:
        """Lets others at the folder."""
        self._lock.let_go()

    def counts(self) -> dict[str, Any]:
        return {"documents_read": sum(self.read), "characters": self.characters, "duplicates": self.dropped}

    def _submitter(self, work: Work, stack: ExitStack) -> Callable[[list[str]], Callable[[], Prepared]]:
        if not self.plan.workers:
            preparer = Preparer(work)
            return lambda texts: lambda: preparer(texts)
        # forked from a process with threads, children may hang; these import little and start in a third of a second
        context = multiprocessing.get_context("spawn")
        pool = stack.enter_context(ProcessPoolExecutor(self.plan.workers, context, begin, (work,)))
        stack.callback(pool.shutdown, cancel_futures=True)

        def submit(texts: list[str]) -> Callable[[], Prepared]:
            future: Future[Prepared] = pool.submit(prepare, texts)
            return future.result

        return submit

    def _batches(self) -> Iterator[_Batch]:
        before = sum(source.size for source in self.sources[: self.cursor.source])
        for number in range(self.cursor.source, len(self.sources)):
            source, skipped = self.sources[number], self.cursor.documents if number == self.cursor.source else 0
            # what is passed over was reported already
            faults = Faults("skip") if skipped else self.faults
            texts: list[str] = []
            size, count, consumed = 0, 0, before
            for document in documents(source, self.plan.reading, faults):
                count += 1
                if count <= skipped:
                    if count == skipped:
                        faults.policy, faults.counts, faults.examples = self.faults.policy, self.faults.counts, self.faults.examples
                    continue
                texts.append(document.text)
                size += len(document.text)
                consumed = before + document.consumed
                if size >= _BATCH_CHARACTERS or len(texts) >= _BATCH_DOCUMENTS:
                    yield _Batch(texts, number, count, _Cursor(number, count), self.faults.state(), consumed)
                    texts, size = [], 0
            before += source.size
            yield _Batch(texts, number, count, _Cursor(number + 1, 0), self.faults.state(), before)

    def _append(self, batch: _Batch, prepared: Prepared) -> None:
        self.read[batch.source] = batch.read
        self.cursor, self._faults_there = batch.cursor, batch.faults
        self.characters += prepared.characters
        keep = np.ones(len(prepared.counts), bool)
        if self.plan.exact:
            keep = self._exact.first_seen(prepared.hashes[:, None])
            self.dropped["exact"] += int((~keep).sum())
        if self.plan.near is not None:
            alone = self._near.first_seen(prepared.bands[keep])
            self.dropped["near"] += int((~alone).sum())
            keep[np.flatnonzero(keep)[~alone]] = False
        if self.plan.exact or self._bands:
            columns = [prepared.hashes[:, None]] * self.plan.exact + [prepared.bands]
            np.concatenate(columns, axis=1)[keep].astype("<u8").tofile(self._seen_file)
        held_out = prepared.hashes < np.uint64(min(int(self.plan.valid_fraction * 2**64), 2**64 - 1))
        sequence_document = np.repeat(np.arange(len(keep)), prepared.counts)
        id_sequence = np.repeat(np.arange(len(prepared.lengths)), prepared.lengths)
        for name, chosen in zip(PARTS, (keep & ~held_out, keep & held_out), strict=True):
            sequences = chosen[sequence_document]
            ids = prepared.ids if chosen.all() else prepared.ids[sequences[id_sequence]]
            self._parts[name].append(ids, prepared.lengths[sequences], prepared.counts[chosen])
        self.peak = max(self.peak, peak_memory() + self.plan.workers * prepared.peak)
        if time.monotonic() - self._committed >= self.plan.commit_seconds:
            self._commit()

    def _commit(self, faults: dict[str, Any] | None = None) -> None:
        self._seen_file.flush()
        os.fsync(self._seen_file.fileno())
        now = time.monotonic()
        journal = {
            "key": self.key,
            "cursor": self.cursor,
            "read": self.read,
            "dropped": self.dropped,
            "characters": self.characters,
            "faults": faults or self._faults_there or self.faults.state(),
            "sizes": {name: part.sizes() for name, part in self._parts.items()},
            "seen": (self.folder / "seen").stat().st_size,
            "seconds": self.seconds + now - self._began,
            "peak": self.peak,
        }
        write_text(self.folder / _JOURNAL, json.dumps(journal))
        self._committed = now


def _answer(result: Callable[[], Prepared]) -> Prepared:
    try:
        return result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, most likely for want of memory; run the same command with fewer --workers") from None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
