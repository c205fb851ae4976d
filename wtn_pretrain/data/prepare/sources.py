"""Documents of raw text, one after the other in bounded memory: text files, JSON lines, Parquet, compressed or not, `datasets` names."""

import glob
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from wtn_pretrain.data.faults import Faults
from wtn_pretrain.data.prepare.streams import COMPRESSED, UNREADABLE, ExpansionError, Stream, expands_too_far, open_stream
from wtn_pretrain.errors import UserError

Boundary = Literal["auto", "blank", "line", "file"]
Kind = Literal["text", "jsonl", "parquet", "datasets"]

_KINDS: dict[str, Kind] = {".txt": "text", ".text": "text", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_DATASETS = "datasets:"
# what says that a folder holds what these tools wrote: no text, though its JSON files look like it
_MADE = ("card.json", "tokenizer_config.json")
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 64, 1 << 24


class Document(NamedTuple):
    """A document and where it stands."""

    text: str
    where: str
    consumed: int
    """Bytes of the source on disk that were read to get here; 0 where that is not known."""


@dataclass(frozen=True)
class Source:
    """A file, or a split of a `datasets` name."""

    name: str
    kind: Kind
    size: int
    """Bytes on disk; 0 where that is not known."""

    def identity(self) -> list[str | int]:
        """What changes when the source does."""
        stamp = Path(self.name).stat().st_mtime_ns if self.kind != "datasets" else 0
        return [self.name, self.kind, self.size, stamp]


@dataclass(frozen=True)
class Reading:
    """How documents are read."""

    column: str = "text"
    """Field of the text in JSON lines, Parquet and `datasets`."""
    boundary: Boundary = "auto"
    """What ends a document in a text file. auto: `<doc ...>` and `</doc>` lines where there are any, else the end of the file; blank: a
    blank line; line: every line; file: the end of the file."""
    max_document: int = 64 << 20
    """Bytes (characters, where a library reads) that a document may have: what bounds the memory."""
    split: str = "train"
    """Split of a `datasets` name."""


def find_sources(paths: Iterable[str], *, without: Path | None = None) -> list[Source]:
    """The sources that `paths` name, each once, in order: files (.txt, .jsonl, .parquet, also with .gz, .xz, .bz2 or .zst), glob
    patterns, folders with such files below them, and `datasets:NAME[:CONFIGURATION]`.

    Of folders, hidden files and folders, prepared corpora and tokenizers are left out, and so is what lies in `without`.
    Raises a UserError for what is missing or of no known kind.
    """
    found: dict[str, Source] = {}
    out = without.resolve() if without is not None else None
    for name in paths:
        if name.startswith(_DATASETS):
            found[name] = Source(name, "datasets", 0)
            continue
        path = Path(name)
        if path.is_dir():
            inside = sorted(_below(path, out))
            if not inside:
                raise UserError(f"{path}: no {', '.join(_KINDS)} files below it; name the folder of the text")
        elif path.is_file():
            inside = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
            inside = [match for match in matches if match.is_file() and not (out and match.resolve().is_relative_to(out))]
            if not inside:
                raise UserError(f"{name}: no such file or folder; {_DATASETS}NAME takes a name of the datasets library")
        for entry in inside:
            # a file that is named outright is text, whatever its suffix
            found[str(entry)] = Source(str(entry), _kind(entry) or "text", entry.stat().st_size)
    if not found:
        raise UserError("no paths of text were given; name files, folders or datasets:NAME")
    return list(found.values())


def _below(folder: Path, without: Path | None) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        here = Path(place)
        if here.resolve() == without or any(name in files for name in _MADE):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (here / name for name in files if not name.startswith(".") and _kind(here / name) is not None)


def documents(source: Source, reading: Reading, faults: Faults) -> Iterator[Document]:
    """The documents of a source in order, without those that are blank. What cannot be read is reported to `faults`."""
    if source.kind == "datasets":
        yield from _dataset_documents(source, reading, faults)
        return
    if source.size == 0:
        faults.report("empty file", source.name, "the file is empty")
        return
    if source.kind == "parquet":
        yield from _parquet_documents(source, reading, faults)
        return
    with open_stream(Path(source.name)) as stream:
        read = _text_documents if source.kind == "text" else _json_documents
        before, any_text = sum(faults.counts.values()), False
        try:
            for document in read(stream, reading, faults):
                any_text = True
                yield document
        except ExpansionError as error:
            faults.report("decompression bomb", f"{source.name}, byte {stream.position}", str(error))
        except UNREADABLE as error:
            faults.report("unreadable file", f"{source.name}, byte {stream.position}", f"cannot be read on ({error})")
        else:
            if not any_text and sum(faults.counts.values()) == before:
                faults.report("empty file", source.name, "the file holds no text")


def _kind(path: Path) -> Kind | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes = suffixes[:-1]
    return _KINDS.get(suffixes[-1].lower()) if suffixes else None


def _text_documents(stream: Stream, reading: Reading, faults: Faults) -> Iterator[Document]:
    held: list[bytes] = []
    start = size = 0
    too_long = False
    for position, line, whole in stream.lines(reading.max_document + 1):
        marker = reading.boundary == "auto" and line.startswith((b"<doc ", b"<doc>", b"</doc>"))
        ends = marker or (reading.boundary == "blank" and not line.strip())
        if ends:
            if not too_long:
                yield from _decoded(held, start, stream, faults)
            held, size, too_long = [], 0, False
            continue
        if not held:
            start = position
        if not too_long:
            held.append(line)
            size += len(line)
            if size > reading.max_document or not whole:
                more = "" if reading.boundary == "line" else "; --boundary blank or line says what else ends one"
                _too_long(f"{stream.path}, byte {start}", reading.max_document, faults, more)
                # not one byte more is kept, however long it goes on
                held, too_long = [b""], True
        if reading.boundary == "line":
            if not too_long:
                yield from _decoded(held, start, stream, faults)
            held, size, too_long = [], 0, False
    if held and not too_long:
        yield from _decoded(held, start, stream, faults)


def _json_documents(stream: Stream, reading: Reading, faults: Faults) -> Iterator[Document]:
    # escapes make a line longer than its text, up to six bytes a character
    for number, (position, line, whole) in enumerate(stream.lines(6 * reading.max_document), start=1):
        where = f"{stream.path}, line {number}"
        if not whole:
            _too_long(where, reading.max_document, faults)
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig" if position == 0 else "utf-8"))
        except UnicodeDecodeError as error:
            faults.report("invalid UTF-8", f"{stream.path}, byte {position + error.start}", "not UTF-8 text")
            continue
        except (ValueError, RecursionError) as error:
            faults.report("invalid JSON", where, f"not JSON ({error})")
            continue
        text = record.get(reading.column) if isinstance(record, dict) else None
        yield from _checked(text, where, reading, faults, stream.consumed())


def _parquet_documents(source: Source, reading: Reading, faults: Faults) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(source.name) as table:
            if reading.column not in table.schema_arrow.names:
                raise UserError(f"{source.name}: no column {reading.column}, only {', '.join(table.schema_arrow.names)}; set --column")
            kind = table.schema_arrow.field(reading.column).type
        texts = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
        # a text that is there many times is held once: the file's own dictionaries are kept
        with pyarrow.parquet.ParquetFile(source.name, read_dictionary=[reading.column] if texts else None) as table:
            rows = max(1, table.metadata.num_rows)
            for number in range(table.num_row_groups):
                group = table.metadata.row_group(number)
                packed, size = _column_sizes(group, reading.column)
                if expands_too_far(packed, size):
                    what = f"{packed} bytes of {reading.column} hold {size}, as a decompression bomb does"
                    faults.report("decompression bomb", f"{source.name}, row {row}", what)
                    row += group.num_rows
                    continue
                together = max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE * group.num_rows // max(1, size)))
                for batch in table.iter_batches(together, row_groups=[number], columns=[reading.column], use_threads=False):
                    for text in _cells(batch.column(0), reading.max_document):
                        where = f"{source.name}, row {row}"
                        row += 1
                        if text is _LONG:
                            _too_long(where, reading.max_document, faults)
                        else:
                            yield from _checked(text, where, reading, faults, source.size * row // rows)
    except UnicodeDecodeError as error:
        faults.report("invalid UTF-8", f"{source.name}, after row {row}", f"not UTF-8 text ({error.reason})")
    except (pyarrow.ArrowException, OSError) as error:
        faults.report("unreadable file", f"{source.name}, row {row}", f"cannot be read on ({str(error).splitlines()[0]})")


_LONG = object()


def _cells(column: Any, most: int) -> Iterator[Any]:
    """The values of an arrow column, one at a time; `_LONG` for a text that cannot be shorter than `most` characters."""
    import pyarrow
    import pyarrow.compute

    values, places = column, range(len(column))
    if pyarrow.types.is_dictionary(column.type):
        values, places = column.dictionary, column.indices.to_pylist()
    if not (pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)):
        yield from column.to_pylist()
        return
    # of bytes, of which a character has four at most
    sizes = pyarrow.compute.binary_length(values).to_pylist()
    for place in places:
        size = None if place is None else sizes[place]
        yield None if size is None else _LONG if size > 4 * most else values[place].as_py()


def _column_sizes(group: Any, column: str) -> tuple[int, int]:
    """Bytes of a column of a row group as they lie in the file, and unpacked."""
    packed = size = 0
    for number in range(group.num_columns):
        chunk = group.column(number)
        if chunk.path_in_schema.split(".")[0] == column:
            packed, size = packed + chunk.total_compressed_size, size + chunk.total_uncompressed_size
    return packed, size


def _dataset_documents(source: Source, reading: Reading, faults: Faults) -> Iterator[Document]:
    import datasets

    name, _, configuration = source.name.removeprefix(_DATASETS).partition(":")
    try:
        if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
            found: Any = datasets.load_from_disk(name)
            table = found[reading.split] if isinstance(found, dict) else found
        else:
            table = datasets.load_dataset(name, configuration or None, split=reading.split, streaming=True)
        rows = iter(table)
    except Exception as error:  # the library, its file systems and its builders raise all sorts
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"{source.name}: `datasets` cannot open it ({type(error).__name__}: {reason}); check name and --split") from None
    row = 0
    while True:
        try:
            record = next(rows, None)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            faults.report("unreadable file", f"{source.name}, row {row}", f"cannot be read on ({type(error).__name__}: {reason})")
            return
        if record is None:
            return
        if reading.column not in record:
            raise UserError(f"{source.name}: no column {reading.column}, only {', '.join(record)}; set --column")
        yield from _checked(record[reading.column], f"{source.name}, row {row}", reading, faults, 0)
        row += 1


def _decoded(held: list[bytes], start: int, stream: Stream, faults: Faults) -> Iterator[Document]:
    raw = b"".join(held)
    where = f"{stream.path}, byte"
    if b"\0" in raw:
        faults.report("NUL byte", f"{where} {start + raw.index(0)}", "a zero byte, so this is no text")
        return
    try:
        text = raw.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        faults.report("invalid UTF-8", f"{where} {start + error.start}", "not UTF-8 text")
        return
    if text.strip():
        yield Document(text.strip(), f"{where} {start}", stream.consumed())


def _checked(text: Any, where: str, reading: Reading, faults: Faults, consumed: int) -> Iterator[Document]:
    if not isinstance(text, str):
        what = "is missing" if text is None else f"holds {type(text).__name__}, not text"
        faults.report("no text", where, f"{reading.column} {what}")
    elif len(text) > reading.max_document:
        _too_long(where, reading.max_document, faults)
    elif "\0" in text:
        faults.report("NUL byte", where, "a zero character, so this is no text")
    elif not _encodable(text):
        faults.report("invalid UTF-8", where, "half of a surrogate pair")
    elif text.strip():
        yield Document(text.strip(), where, consumed)


def _too_long(where: str, limit: int, faults: Faults, more: str = "") -> None:
    faults.report("document too long", where, f"a document of more than {limit} bytes (--max-document{more})")


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
