"""Train a WordPiece, BPE or SentencePiece unigram tokenizer: python tools/train_tokenizer.py --out FOLDER PATH..."""

import sys

from wtn_pretrain.arguments import command
from wtn_pretrain.data.prepare.command import train_tokenizer_command

if __name__ == "__main__":
    sys.exit(command(lambda: train_tokenizer_command(sys.argv[1:]), interrupted="interrupted; nothing was written"))
