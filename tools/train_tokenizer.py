"""Train a WordPiece, BPE or SentencePiece unigram tokenizer: python tools/train_tokenizer.py --out FOLDER PATH..."""

import sys

from wtn_pretrain.data.prepare.command import main, train_tokenizer_command

if __name__ == "__main__":
    sys.exit(main(train_tokenizer_command))
