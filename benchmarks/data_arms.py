"""What data.py measures."""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import xxhash
from common import parser, positive, run, table
from PIL import Image

from wtn_pretrain.data.augment import crop_draws, random_box
from wtn_pretrain.data.faults import Faults
from wtn_pretrain.data.images import ImageData, open_images
from wtn_pretrain.data.masking import MaskedText, Masker
from wtn_pretrain.data.prepare.corpus import Preparation, prepare_corpus
from wtn_pretrain.data.prepare.sources import Reading, documents, find_sources
from wtn_pretrain.data.prepare.vocabulary import train_tokenizer
from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.data.text import TextData, open_text
from wtn_pretrain.data.token_corpus import open_rows
from wtn_pretrain.data.token_files import CHUNK, files_of, open_token_file, write_index

LENGTH, BATCH = 128, 256
SIDE, IMAGES = 224, 64


def words(generator: np.random.Generator, count: int) -> list[str]:
    """Words that do not exist, of 1 to 4 syllables."""
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
    made = {"".join(generator.choice(syllables, generator.integers(1, 5))) for _ in range(2 * count)}
    return sorted(made)[:count]


def made_up(size: int, seed: int = 0) -> Iterator[str]:
    """Documents of about `size` bytes together, all different."""
    generator = np.random.default_rng(seed)
    known = np.array(words(generator, 20_000))
    chances = 1 / np.arange(1, len(known) + 1)
    pool = known[generator.choice(len(known), 1 << 20, p=chances / chances.sum())]
    written = number = 0
    while written < size:
        length = int(np.exp(generator.uniform(np.log(20), np.log(2000))))
        first = int(generator.integers(0, len(pool) - length))
        text = f"Number {number}. " + " ".join(pool[first : first + length]) + "."
        written += len(text)
        number += 1
        yield text


def write_lines(path: Path, texts: Iterator[str], limit: int) -> int:
    """JSON lines of at most `limit` characters or so; how many characters there are."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text)
            if written >= limit:
                break
    return written


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def preprocessing(folder: Path, source: Path, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways from JSON lines to ids."""
    import datasets

    datasets.disable_progress_bars()
    characters = sum(len(json.loads(line)["text"]) for line in source.open(encoding="utf-8"))
    ours: list[float] = []
    loading: list[float] = []
    mapping: list[float] = []
    for repeat in range(options.repeats):
        out, cache = folder / f"ours-{repeat}", folder / f"theirs-{repeat}"
        plan = Preparation((str(source),), out, str(folder / "tokenizer"), workers=options.workers)
        ours.append(timed(lambda plan=plan: prepare_corpus(plan)))  # type: ignore[misc]
        began = time.perf_counter()
        loaded = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(cache))
        loading.append(time.perf_counter() - began)

        def tokens(batch: dict[str, list[str]]) -> Any:
            return tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)

        began = time.perf_counter()
        # in this process where there is one worker, so that none has to be started
        processes = options.workers if options.workers > 1 else None
        found = loaded.map(tokens, batched=True, num_proc=processes, remove_columns=["text"])
        mapping.append(time.perf_counter() - began)
        theirs = sum(map(len, found["input_ids"])) if repeat == 0 else 0
        if repeat == 0:
            card = json.loads((out / "card.json").read_text())
            mine = sum(part["tokens"] for part in card["parts"].values())
            assert mine == theirs, f"{mine} tokens here, {theirs} there"
        del found, loaded
        shutil.rmtree(cache)
        if repeat < options.repeats - 1:
            shutil.rmtree(out)
        else:
            out.rename(folder / "corpus")
    return {
        "characters": characters,
        "tokens": mine,
        "ours_seconds": ours,
        "load_seconds": loading,
        "map_seconds": mapping,
        "ratio": median(theirs / mine for theirs, mine in zip(mapping, ours, strict=True)),
        "from_file": median((read + theirs) / mine for read, theirs, mine in zip(loading, mapping, ours, strict=True)),
        "peak_memory": card["peak_memory"],
    }


def masking(folder: Path, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways from ids to masked batches."""
    import datasets
    from transformers import DataCollatorForLanguageModeling

    data = TextData(source="corpus", paths=(str(folder / "corpus"),), sequence_length=LENGTH)
    text = open_text(data, folder / "cache").train
    count = min(len(text) // BATCH, options.batches)
    if not count:
        raise SystemExit(f"data.py: {len(text)} rows are fewer than a batch of {BATCH}; give more --megabytes")
    rows = text.fetch(np.arange(count * BATCH), None)["input_ids"]
    special = torch.zeros_like(rows)
    special[:, [0, -1]] = 1
    table_of_rows = datasets.Dataset.from_dict({"input_ids": rows.tolist(), "special_tokens_mask": special.tolist()})
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    arms: dict[str, Callable[[], Any]] = {
        "Hugging Face": lambda: torch.utils.data.DataLoader(table_of_rows, BATCH, shuffle=True, collate_fn=collate),  # type: ignore[arg-type]
    }
    for name, settings in (("ours", {}), ("ours, whole words", {"whole_word": True}), ("ours, spans", {"span": 10})):
        masked = MaskedText(text, Masker(tokenizer, **settings))  # type: ignore[arg-type]
        arms[name] = lambda masked=masked: BatchStream(masked, BATCH, seed=0).iterate(0, count)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(options.repeats + 1):
        for name, arm in arms.items():
            took = timed(lambda arm=arm: [None for _ in arm()])  # type: ignore[misc]
            if repeat:  # the first pass reads the files
                seconds[name].append(took)
    ratios = [theirs / ours for theirs, ours in zip(seconds["Hugging Face"], seconds["ours"], strict=True)]
    tokens = count * BATCH * LENGTH
    return {"ratio": median(ratios), "tokens_per_second": {name: tokens / median(some) for name, some in seconds.items()}}


class PlainFolder(torch.utils.data.Dataset):
    """A folder of classes as one would write it in an afternoon: random crops, flipped and normalised."""

    def __init__(self, root: Path) -> None:
        self.files = sorted(root.rglob("*.jpg"))
        self.classes = sorted({file.parent.name for file in self.files})

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file = self.files[index]
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        draws = crop_draws(np.array([torch.randint(1 << 62, ()).item()], np.uint64))[0]
        image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=random_box(*image.size, draws))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return (pixels - mean[:, None, None]) / std[:, None, None], self.classes.index(file.parent.name)


def images(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways from JPEGs to batches."""
    root, generator = folder / "images", np.random.default_rng(0)
    down, across = np.mgrid[0:375, 0:500]
    for number in range(options.images):
        place = root / "train" / f"class-{number % 4}"
        place.mkdir(parents=True, exist_ok=True)
        waves = [128 + 70 * np.sin(down / (9 + number % 40) + channel) * np.cos(across / (30 - channel)) for channel in range(3)]
        pixels = np.clip(np.stack(waves, -1) + generator.normal(0, 8, (375, 500, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.jpg", quality=90)
    batch = min(IMAGES, options.images)
    data = ImageData(source="folder", path=str(root), size=SIDE, channels=3, random_resized_crop=True, flip=True, valid_fraction=0.01)
    ours = BatchStream(open_images(data).train, batch, seed=0, workers=options.workers)
    plain = torch.utils.data.DataLoader(
        PlainFolder(root / "train"), batch, shuffle=True, num_workers=options.workers, persistent_workers=True
    )

    def forever() -> Iterator[Any]:
        while True:
            yield from plain

    def rate(batches: Iterator[Any]) -> float:
        for _ in range(options.workers + 1):  # the start of workers is paid for once a run
            next(batches)
        count = options.image_batches * options.workers
        return count * batch / timed(lambda: [next(batches) for _ in range(count)])

    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(options.repeats):
        rates["ours"].append(rate(ours.iterate(0, 1 << 30)))
        rates["plain"].append(rate(forever()))
    ratio = median(mine / other for mine, other in zip(rates["ours"], rates["plain"], strict=True))
    return {"ratio": ratio, "images_per_second": {name: median(some) for name, some in rates.items()}}


def sparse(folder: Path, size: int) -> tuple[Path, int]:
    """A token file of about `size` bytes of zeros, and how many they are."""
    prefix = folder / "large"
    bin_file, index, sums = files_of(prefix)
    each = 5000
    count = max(1, size // (2 * each))
    with bin_file.open("wb") as file:
        file.truncate(2 * each * count)
    with index.open("wb") as stream:
        write_index(stream, np.dtype("<u2"), np.full(count, each, np.int32), np.ones(count, np.int32))
    # zeros have one checksum
    found = [xxhash.xxh3_64_intdigest(bytes(CHUNK))] * -(-bin_file.stat().st_size // CHUNK)
    with index.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            found.append(xxhash.xxh3_64_intdigest(chunk))
    np.array(found, "<u8").tofile(sums)
    return prefix, 2 * each * count


def opening(folder: Path, size: int) -> dict[str, Any]:
    """Opens a sparse token file of `size` bytes."""
    prefix, written = sparse(folder, size)
    before = _resident()
    began = time.perf_counter()
    file_of_tokens = open_token_file(prefix)
    opened = time.perf_counter() - began
    file_of_tokens.tokens[np.arange(0, LENGTH)]
    found = {"bytes": written, "seconds": opened, "with_a_row": time.perf_counter() - began, "memory": _resident() - before}
    for made in files_of(prefix):
        made.unlink()
    return found


def opening_packed(folder: Path, size: int, tokenizer: Any) -> dict[str, Any]:
    """Opens one in rows of whole documents, twice: the first start finds which they are, the second reads it."""
    prefix, written = sparse(folder, size)
    found: dict[str, Any] = {"bytes": written}
    for name in ("first", "again"):
        before, began = _resident(), time.perf_counter()
        rows = open_rows(open_token_file(prefix), tokenizer, LENGTH, "documents", folder / "laid-out")
        found[f"{name}_seconds"] = time.perf_counter() - began
        rows.fetch(np.arange(1), None)
        found |= {f"{name}_memory": _resident() - before, "rows": len(rows)}
        del rows
    for made in files_of(prefix):
        made.unlink()
    shutil.rmtree(folder / "laid-out")
    return found


def large_corpus(folder: Path, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Preprocesses a made-up corpus of `size` bytes."""
    source = folder / "large.jsonl"
    write_lines(source, made_up(size, seed=1), size)
    out = folder / "large-corpus"
    began = time.perf_counter()
    card = prepare_corpus(Preparation((str(source),), out, str(folder / "tokenizer"), workers=options.workers))
    found = {
        "bytes": source.stat().st_size,
        "tokens": sum(part["tokens"] for part in card["parts"].values()),
        "seconds": time.perf_counter() - began,
        "peak_memory": card["peak_memory"],
    }
    source.unlink()
    shutil.rmtree(out)
    return found


def _resident() -> int:
    status = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of the benchmark."""
    ci = options.preset == "ci"
    options.repeats = options.repeats or (1 if ci else 5)
    options.batches, options.images, options.image_batches = (4, 12, 1) if ci else (200, 256, 4)
    size = int(1e6 * (options.megabytes or (1 if ci else 50)))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the cores here, of theirs too; ours see to it themselves
    with tempfile.TemporaryDirectory(prefix="data-", dir=options.folder) as made:
        folder = Path(made)
        source = folder / "text.jsonl"
        if options.text:
            reading, faults = Reading(), Faults()
            texts: Iterator[str] = (document.text for found in find_sources(options.text) for document in documents(found, reading, faults))
        else:
            texts = made_up(size)
        write_lines(source, texts, size)
        some = [json.loads(line)["text"] for line, _ in zip(source.open(encoding="utf-8"), range(400 if ci else 4000), strict=False)]
        tokenizer = train_tokenizer("wordpiece", some, 512 if ci else 16_000)
        tokenizer.save_pretrained(str(folder / "tokenizer"))
        large = 1e9 * (options.open_gb or (0.1 if ci else 10))
        found: dict[str, Any] = {
            "workers": options.workers,
            "repeats": options.repeats,
            "preprocessing": preprocessing(folder, source, tokenizer, options),
            "masking": masking(folder, tokenizer, options),
            "images": images(folder, options),
            "opening": [opening(folder, int(size)) for size in (1e7, large)],
            "opening_packed": [opening_packed(folder, int(size), tokenizer) for size in (1e7, min(1e9, large))],
        }
        if options.corpus_gb:
            found["corpus"] = large_corpus(folder, int(1e9 * options.corpus_gb), options)
    keys = {
        "preprocess_ratio": found["preprocessing"]["ratio"],
        "preprocess_ratio_from_file": found["preprocessing"]["from_file"],
        "masking_ratio": found["masking"]["ratio"],
        "image_ratio": found["images"]["ratio"],
        "open_seconds": found["opening"][-1]["seconds"],
        "open_packed_seconds": found["opening_packed"][-1]["again_seconds"],
    }
    return {**keys, **found}


def show(figures: dict[str, Any]) -> str:
    """The table."""
    made, masked, pictures = figures["preprocessing"], figures["masking"], figures["images"]
    size = made["characters"] / 1e6
    rows = [
        ["preprocess: ours, all of it", f"{size / median(made['ours_seconds']):.2f} MB/s", ""],
        ["preprocess: datasets.map", f"{size / median(made['map_seconds']):.2f} MB/s", f"{made['ratio']:.2f}"],
        ["preprocess: with load_dataset", "", f"{made['from_file']:.2f}"],
    ]
    for name, rate in masked["tokens_per_second"].items():
        rows.append([f"mask: {name}", f"{rate / 1e6:.2f} M tokens/s", f"{masked['ratio']:.1f}" if name == "Hugging Face" else ""])
    for name, rate in pictures["images_per_second"].items():
        rows.append([f"images: {name}", f"{rate:.1f} a second", f"{pictures['ratio']:.2f}" if name == "plain" else ""])
    for opened in figures["opening"]:
        rows.append(
            [f"open {opened['bytes'] / 1e9:.2f} GB", f"{1e3 * opened['seconds']:.2f} ms, {opened['memory'] / 2**20:.1f} MiB more", ""]
        )
    for opened in figures["opening_packed"]:
        again, first = (f"{1e3 * opened[f'{name}_seconds']:.2f} ms" for name in ("again", "first"))
        what = f"{again}, {opened['again_memory'] / 2**20:.1f} MiB more; the first time {first}"
        rows.append([f"open {opened['bytes'] / 1e9:.2f} GB packed", what, ""])
    if "corpus" in figures:
        made_large = figures["corpus"]
        what = f"{made_large['bytes'] / made_large['seconds'] / 1e6:.2f} MB/s, {made_large['peak_memory'] / 2**20:.0f} MiB at most"
        rows.append([f"corpus of {made_large['bytes'] / 1e9:.2f} GB", what, ""])
    keys = ("preprocess_ratio", "masking_ratio", "image_ratio", "open_seconds", "open_packed_seconds")
    said = [f"{key} {figures[key]:.4g}" for key in keys]
    return "\n".join(
        [f"{figures['workers']} workers, median of {figures['repeats']}", "", table(["", "rate", "ours over it"], rows), "", *said]
    )


def main(doc: str) -> int:
    """The command, described by `doc`."""
    arguments = parser(doc)
    arguments.add_argument("--text", nargs="+", metavar="FILE", help="real text instead of made-up text, as preprocess_corpus.py takes it")
    arguments.add_argument("--megabytes", type=float, metavar="X", help="text to preprocess (default 50; ci 1)")
    arguments.add_argument("--repeats", type=positive, metavar="N", help="runs of every arm (default 5; ci 1)")
    arguments.add_argument("--workers", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a core)")
    arguments.add_argument("--open-gb", type=float, metavar="X", help="size of the token file to open (default 10; ci 0.1)")
    arguments.add_argument("--corpus-gb", type=float, metavar="X", help="preprocess a made-up corpus of this size besides (default: none)")
    arguments.add_argument("--folder", metavar="FOLDER", help="where files are made (default: the system's temporary folder)")
    return run(measure, arguments, show)
