"""The commands of tools/train_tokenizer.py and tools/preprocess_corpus.py."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wtn_pretrain.arguments import Parser, amount, count
from wtn_pretrain.data.faults import Faults
from wtn_pretrain.data.prepare.corpus import PARTS, Preparation, prepare_corpus
from wtn_pretrain.data.prepare.sources import Reading, find_sources
from wtn_pretrain.errors import UserError

_UNIGRAM_MB = 200
_TRAINING = ("--algorithm", "--vocab-size", "--cased", "--limit-mb")
_TOKENIZER_FILES = frozenset(
    (
        "added_tokens.json",
        "chat_template.jinja",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    )
)
"""What transformers writes of a tokenizer."""


def train_tokenizer_command(arguments: Sequence[str]) -> str:
    """Trains or converts a tokenizer and saves it; what it says at the end."""
    parser = _parser(
        "Train a tokenizer on text and save it as a folder that AutoTokenizer and data.tokenizer take.",
        "python tools/train_tokenizer.py --out tok --algorithm wordpiece --vocab-size 30522 corpus/*.jsonl.zst\n"
        "python tools/train_tokenizer.py --out tok --from-sentencepiece spiece.model",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--algorithm", choices=("wordpiece", "bpe", "unigram"), help="default wordpiece")
    parser.add_argument("--vocab-size", type=count, metavar="N", help="entries; rounded up to --multiple (default 30522)")
    parser.add_argument("--multiple", type=count, default=64, metavar="N", help="pad the vocabulary to a multiple of N (default 64)")
    parser.add_argument("--cased", action="store_true", help="keep case and accents")
    parser.add_argument(
        "--limit-mb",
        type=amount,
        metavar="X",
        help="millions of characters to train on, spread over the files "
        f"(default: all; unigram, which holds them in memory and trains in one thread: {_UNIGRAM_MB})",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--from-sentencepiece", type=Path, metavar="FILE", help="convert this .model instead of training")
    options = parser.parse_args(arguments)
    from wtn_pretrain.data.prepare.sentencepiece_model import read_sentencepiece
    from wtn_pretrain.data.prepare.vocabulary import SourceText, train_tokenizer
    from wtn_pretrain.data.token_store import save_tokenizer
    from wtn_pretrain.data.tokenizer import load_tokenizer, tokenizer_hash

    _free(options.out)
    faults, notes = Faults(options.faults), []
    if options.from_sentencepiece is not None:
        without = (("PATH", options.paths), *((name, getattr(options, name[2:].replace("-", "_"))) for name in _TRAINING))
        if idle := next((name for name, value in without if value not in (None, False, [])), None):
            raise UserError(f"{idle}: says how to train, and --from-sentencepiece converts what is trained; leave one of them out")
        tokenizer = read_sentencepiece(options.from_sentencepiece, options.multiple)
    else:
        algorithm: Any = options.algorithm or "wordpiece"
        megabytes = options.limit_mb
        sources = tuple(find_sources(options.paths, without=options.out))
        if algorithm == "unigram" and megabytes is None:
            megabytes = _UNIGRAM_MB
            if sum(source.size for source in sources) > 1e6 * megabytes:
                notes.append(f"  trained on {megabytes} million characters spread over the files; --limit-mb takes more")
        limit = None if megabytes is None else max(1, int(megabytes * 1e6))
        with _Bar(options.quiet, "read") as bar:
            text = SourceText(sources, _reading(options), faults, limit, bar)
            size = options.vocab_size or 30522
            tokenizer = train_tokenizer(algorithm, text, size, lowercase=not options.cased, multiple=options.multiple)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, options.out)
    # what was written is what training will read
    saved = load_tokenizer(options.out)
    return "\n".join([f"{options.out}: {len(saved)} entries, hash {tokenizer_hash(saved)}", *notes, *_skipped(faults.state())])


def preprocess_command(arguments: Sequence[str]) -> str:
    """Prepares a corpus, or checks one; what it says at the end."""
    parser = _parser(
        "Turn raw text into token files (Megatron's .bin and .idx, with checksums) that data.source corpus reads.\n"
        "Run the same command again to go on where it was broken off.",
        "python tools/preprocess_corpus.py --tokenizer tok --out corpus wiki/*.txt.xz books.jsonl.zst\n"
        "python tools/preprocess_corpus.py --tokenizer tok --out corpus --deduplicate --near-duplicates 0.8 datasets:NAME:CONFIG\n"
        "python tools/preprocess_corpus.py --check corpus",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder to write")
    parser.add_argument("--tokenizer", metavar="PATH", help="folder of a saved tokenizer, or a BERT vocab.txt")
    parser.add_argument("--sentences", action="store_true", help="keep the bounds of sentences, for sentence pairs")
    parser.add_argument("--deduplicate", action="store_true", help="drop documents that were there before")
    parser.add_argument(
        "--near-duplicates", type=float, metavar="S", help="drop documents that are S alike (Jaccard, by MinHash), such as 0.8"
    )
    parser.add_argument(
        "--valid-fraction", type=float, default=0.05, metavar="F", help="part held out, by hash of the document (default 0.05)"
    )
    parser.add_argument("--licence", metavar="TEXT", help="licence of the text, for the card; given again it is changed there")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help="processes that tokenise (default: one a core)")
    parser.add_argument("--record-seconds", type=amount, default=15, metavar="S", help="how much a kill costs at most (default 15)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="read a prepared corpus whole and compare all checksums")
    options = parser.parse_args(arguments)
    if options.check is not None:
        return _check(options.check)
    if options.out is None or options.tokenizer is None:
        raise UserError("--out and --tokenizer are needed; see --help")
    if options.workers < 0:
        raise UserError(f"--workers {options.workers}: is negative; give 0 for none beside this process, or more")
    plan = Preparation(
        tuple(options.paths),
        options.out,
        options.tokenizer,
        _reading(options),
        options.sentences,
        options.deduplicate,
        options.near_duplicates,
        options.valid_fraction,
        options.licence,
        options.faults,
        options.workers,
        options.record_seconds,
    )
    with _Bar(options.quiet, "preprocess") as bar:
        card = prepare_corpus(plan, bar)
    return describe(options.out, card)


def describe(out: Path, card: dict[str, Any]) -> str:
    """A card in a few lines."""
    lines = [f"{out}: {card['documents_read']} documents read, {card['characters']} characters"]
    lines += [f"  {name}: {part['documents']} documents, {part['tokens']} tokens" for name, part in card["parts"].items()]
    if card["settings"]["valid_fraction"] and not card["parts"]["valid"]["documents"]:
        lines.append(
            f"  warning: no document is held out, as there are {card['parts']['train']['documents']}; where a file holds several, "
            "--boundary blank or line says what ends them; or set data.valid_paths when training"
        )
    if any(card["duplicates"].values()):
        lines.append("  duplicates dropped: {exact} exact, {near} near".format(**card["duplicates"]))
    lines.append(f"  {card['seconds']} s, at most {card['peak_memory'] / 2**20:.0f} MiB in all processes")
    return "\n".join([*lines, *_skipped(card["skipped"])])


def _check(folder: Path) -> str:
    from wtn_pretrain.data.token_corpus import read_card
    from wtn_pretrain.data.token_files import open_token_file

    card = read_card(folder)
    for part in PARTS:
        found = open_token_file(folder / part)
        found.check()
        told = {"documents": found.documents, "sequences": found.sequences, "tokens": len(found.tokens)}
        if told != card["parts"][part]:
            raise UserError(f"{folder / part}: holds {told}, its card says {card['parts'][part]}; prepare the corpus anew")
    return f"{folder}: all checksums agree"


def _parser(description: str, examples: str) -> Parser:
    parser = Parser(description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="files, globs or folders of .txt, .jsonl, .parquet (.gz .xz .bz2 .zst), or datasets:NAME[:CONFIG]",
    )
    parser.add_argument(
        "--column", default="text", metavar="NAME", help="field of the text in JSON lines, Parquet and datasets (default text)"
    )
    parser.add_argument("--split", default="train", metavar="NAME", help="split of a datasets name (default train)")
    parser.add_argument(
        "--boundary",
        choices=("auto", "blank", "line", "file"),
        default="auto",
        help="what ends a document in a text file (auto: <doc> lines, else the file)",
    )
    parser.add_argument("--max-document", type=amount, default=64, metavar="MB", help="megabytes that a document may have (default 64)")
    parser.add_argument(
        "--faults", choices=("stop", "skip"), default="stop", help="stop at what cannot be read, or skip and count it (default stop)"
    )
    return parser


def _reading(options: argparse.Namespace) -> Reading:
    if not 0 < options.max_document < 1 << 14:
        raise UserError(f"--max-document {options.max_document}: is not between 0 and {1 << 14} megabytes")
    return Reading(options.column, options.boundary, int(options.max_document * 1e6), options.split)


def _free(out: Path) -> None:
    """Refuses a folder of which anything but a tokenizer would be lost: it is replaced as a whole."""
    if not out.exists():
        return
    held = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else [out.name]
    other = next((name for name in held if name not in _TOKENIZER_FILES), None)
    if other is not None or (held and "tokenizer_config.json" not in held):
        raise UserError(f"{out}: holds {other or held[0]}, which is no tokenizer and would be lost; choose another --out")


def _skipped(state: dict[str, Any]) -> list[str]:
    lines = []
    for kind, times in state["counts"].items():
        lines.append(f"  skipped: {kind}, {times} times, such as {state['examples'][kind][0]}")
    return lines


class _Bar:
    """A progress bar in bytes of input."""

    def __init__(self, quiet: bool, what: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(unit="B", unit_scale=True, disable=quiet, desc=what)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, consumed: int, total: int) -> None:
        self._bar.total = total or None
        self._bar.update(consumed - self._bar.n)
