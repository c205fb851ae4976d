"""Turn raw text into token files: python tools/preprocess_corpus.py --tokenizer FOLDER --out FOLDER PATH..."""

import sys

from wtn_pretrain.data.prepare.command import main, preprocess_command

if __name__ == "__main__":
    sys.exit(main(preprocess_command))
