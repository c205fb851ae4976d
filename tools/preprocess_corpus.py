"""Turn raw text into token files: python tools/preprocess_corpus.py --tokenizer FOLDER --out FOLDER PATH..."""

import sys

from wtn_pretrain.arguments import command
from wtn_pretrain.data.prepare.command import preprocess_command

if __name__ == "__main__":
    sys.exit(command(lambda: preprocess_command(sys.argv[1:]), interrupted="interrupted; the same command goes on from here"))
