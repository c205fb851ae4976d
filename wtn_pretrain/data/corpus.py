"""Text as a stream of blocks: runs of paragraphs of one document, the units that are split into training and validation."""

import glob
import gzip
import hashlib
import lzma
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from wtn_pretrain.data.faults import Faults, Policy
from wtn_pretrain.data.tables import check_column, open_tables, training_table, validation_table
from wtn_pretrain.errors import UserError

_BLOCK_CHARACTERS = 4096
_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}


def text_faults(policy: Policy = "stop") -> Faults:
    """What becomes of text that cannot be read."""
    return Faults(policy, "data.faults: skip")


class Corpus(Protocol):
    """Documents that can be read again and again, in the same order."""

    def paragraphs(self) -> Iterator[str | None]:
        """The paragraphs in order; None ends a document."""
        ...

    def fingerprint(self) -> list[str]:
        """What changes when the text changes."""
        ...


@dataclass(frozen=True)
class PydocTopics:
    """The prose of the language reference inside Python's own `pydoc_data.topics`: one document a topic, no network."""

    def paragraphs(self) -> Iterator[str | None]:
        from pydoc_data.topics import topics

        for topic in sorted(topics):
            for paragraph in topics[topic].split("\n\n"):
                lines = [line for line in paragraph.splitlines() if line.strip("*=-^~ ")]  # drops the rules under headings
                if lines:
                    yield "\n".join(lines)
            yield None

    def fingerprint(self) -> list[str]:
        digest = hashlib.blake2b(digest_size=16)
        for paragraph in self.paragraphs():
            digest.update((paragraph or "\0").encode())
        return ["pydoc", digest.hexdigest()]


@dataclass(frozen=True)
class TextFiles:
    """UTF-8 files, plain, .xz or .gz. Lines `<doc ...>` and `</doc>` bound documents whose lines are paragraphs; elsewhere a file
    is a document and a blank line ends a paragraph."""

    files: tuple[Path, ...]
    faults: Faults = field(default_factory=text_faults, compare=False)
    """What the last reading could not read: lines, or the rest of a file."""

    def paragraphs(self) -> Iterator[str | None]:
        self.faults.forget()
        for file in self.files:
            empty, before = True, sum(self.faults.counts.values())
            for paragraph in _file_paragraphs(file, self.faults):
                empty = empty and paragraph is None
                yield paragraph
            if empty and sum(self.faults.counts.values()) == before:
                self.faults.report("empty file", str(file), "holds no text", "remove it or take it out of data.paths")
            yield None

    def fingerprint(self) -> list[str]:
        # names without folders: the same files elsewhere are the same text
        return [f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in self.files]


@dataclass(frozen=True)
class TableText:
    """A text column of a `datasets` table: one document a row, a blank line between paragraphs."""

    table: Any  # datasets.Dataset
    column: str
    origin: str
    faults: Faults = field(default_factory=text_faults, compare=False)
    """Rows without text in the last reading."""

    def paragraphs(self) -> Iterator[str | None]:
        self.faults.forget()
        empty = True
        row = 0
        for batch in self.table.select_columns([self.column]).iter(batch_size=1000):
            for text in batch[self.column]:
                if not isinstance(text, str):
                    what = f"row {row} of column {self.column} holds {type(text).__name__}, not text"
                    self.faults.report("no text", self.origin, what, "set data.column")
                for paragraph in text.split("\n\n") if isinstance(text, str) else ():
                    if paragraph.strip():
                        empty = False
                        yield paragraph
                yield None
                row += 1
        if empty:
            raise UserError(f"{self.origin}: column {self.column} holds no text; set data.column")

    def fingerprint(self) -> list[str]:
        return [self.origin, self.column, str(len(self.table)), self.table._fingerprint]


def find_text_files(paths: Iterable[str], exclude: Iterable[Path] = ()) -> tuple[Path, ...]:
    """The files that `paths` name: files, glob patterns, or folders with .txt, .txt.xz and .txt.gz below them; each once, in order."""
    found: dict[Path, None] = {}
    excluded = {path.resolve() for path in exclude}
    for name in paths:
        path = Path(name)
        if path.is_dir():
            inside = sorted(entry for pattern in ("*.txt", "*.txt.xz", "*.txt.gz") for entry in path.rglob(pattern))
            if not inside:
                raise UserError(f"{path}: no .txt, .txt.xz or .txt.gz files below it; set data.paths")
        elif path.exists():
            inside = [path]
        else:
            inside = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if Path(match).is_file()]
            if not inside:
                raise UserError(f"{path}: no such file or folder; set data.paths")
        found.update(dict.fromkeys(entry for entry in inside if entry.resolve() not in excluded))
    return tuple(found)


def open_text_tables(path: str, column: str, policy: Policy = "stop") -> tuple[TableText, TableText | None]:
    """Training text and, where the source has a split for it, validation text of a `datasets` source; `policy` for rows without text."""
    tables = open_tables(path)
    train, valid = training_table(tables, path), validation_table(tables)
    for table in (train, valid):
        if table is not None:
            check_column(table, column, "data.column", path)
    held_out = None if valid is None else TableText(valid, column, f"{path}, validation split", text_faults(policy))
    return TableText(train, column, path, text_faults(policy)), held_out


def blocks(corpus: Corpus, limit: int | None = None) -> Iterator[str]:
    """The text in order as runs of paragraphs of one document, of about 4,096 characters; at most `limit` bytes of UTF-8."""
    held: list[str] = []
    size = total = 0
    for paragraph in corpus.paragraphs():
        if paragraph is not None:
            total += len(paragraph.encode()) + 1
            if limit is not None and total > limit:
                break
            held.append(paragraph)
            size += len(paragraph)
        if held and (paragraph is None or size >= _BLOCK_CHARACTERS):
            yield "\n".join(held)
            held, size = [], 0
    if held:
        yield "\n".join(held)


def block_hash(block: str) -> int:
    """64-bit hash of a block's text: equal blocks share it, so no text stands on both sides of a split."""
    return int.from_bytes(hashlib.blake2b(block.encode(), digest_size=8).digest(), "little")


def validation_threshold(text: Iterable[str], fraction: float) -> int:
    """The hash up to which blocks are held out, so that these make up `fraction` of the characters, and one block at least.

    Raises a UserError where the text is a single block.
    """
    hashes, sizes = array("Q"), array("Q")
    for block in text:
        hashes.append(block_hash(block))
        sizes.append(len(block))
    unique, inverse = np.unique(np.array(hashes, np.uint64), return_inverse=True)
    if len(unique) < 2:
        raise UserError(
            f"the text is too short to hold out validation text: {len(hashes)} block(s) of about {_BLOCK_CHARACTERS} characters; give more"
        )
    lengths = np.bincount(inverse, weights=np.array(sizes, np.float64))
    needed = int(np.searchsorted(np.cumsum(lengths), fraction * lengths.sum()))
    return int(unique[min(needed, len(unique) - 2)])


def _file_paragraphs(file: Path, faults: Faults) -> Iterator[str | None]:
    held: list[str] = []
    inside = False
    for line in _lines(file, faults):
        text = line.strip()
        boundary = text.startswith("<doc ") or text == "</doc>"
        if held and (boundary or inside or not text):
            yield "\n".join(held)
            held = []
        if boundary:
            inside = text != "</doc>"
            yield None
        elif text:
            held.append(text)
    if held:
        yield "\n".join(held)


def _lines(file: Path, faults: Faults) -> Iterator[str]:
    position = 0
    try:
        with _OPENERS.get(file.suffix, open)(file, "rb") as stream:
            for line in stream:
                start, position = position, position + len(line)
                if b"\0" in line:
                    what = f"not a text file (zero byte at position {start + line.index(0)})"
                    faults.report("NUL byte", str(file), what, "take it out of data.paths")
                    continue
                try:
                    yield line.decode("utf-8-sig" if start == 0 else "utf-8")
                except UnicodeDecodeError as error:
                    what = f"not UTF-8 text (byte at position {start + error.start})"
                    faults.report("invalid UTF-8", str(file), what, "convert it or take it out of data.paths")
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        faults.report("unreadable file", str(file), f"cannot be read ({error})", "fetch the file again")
