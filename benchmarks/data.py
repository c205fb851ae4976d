"""How fast data is prepared and read, against Hugging Face and plain torch in the same run.

    python benchmarks/data.py [--text FILE ...] [--megabytes X] [--repeats N] [--workers N] [--open-gb X] [--corpus-gb X] [--folder FOLDER]
                              [--preset ci|full] [--json FILE]

Preprocessing: JSON lines to token ids on disk. Theirs: `datasets.load_dataset` and `map(batched, num_proc)` with the same fast
  tokenizer, no special tokens and no masks asked for. Ours: `tools/preprocess_corpus.py`'s work, splitting, hashing, index and checksums
  included. `preprocess_ratio` is the time of their `map` alone over our whole time; with their reading of the file it is
  `preprocess_ratio_from_file`.
Masking: rows of 128 tokens in batches of 256, in one process. Theirs: a `DataLoader` over a `datasets` table of rows with
  `DataCollatorForLanguageModeling`, special tokens marked beforehand as run_mlm.py does. Ours: `BatchStream` over the token file.
  `masking_ratio` is their time over ours.
Images: 224-pixel random crops, flipped, normalised, of a folder of JPEGs, in `--workers` processes. Plain: `DataLoader` over a dataset
  that opens, crops, flips and converts each with Pillow and numpy. `image_ratio` is our rate over theirs.
Opening: a token file of `--open-gb` (sparse) is opened and one row of it read: `open_seconds`, and by how much memory grew. The same, of
  1 GB at most, in rows of whole documents whose layout an earlier start has left: `open_packed_seconds`; and how long that start took.
`--corpus-gb` preprocesses a made-up corpus of that size besides, and records the peak memory of all processes together.

Without --text, the text is made up: words of Zipf's frequencies, in documents of 20 to 2,000. Arms take turns, ratios are medians over
repeats of pairs that ran one after the other. Everything is written to a temporary folder (below --folder) and removed.
"""

import sys

if __name__ == "__main__":
    # not above: worker processes import this file when they start, and torch takes seconds
    from data_arms import main

    sys.exit(main(__doc__ or ""))
