"""Training of tokenizers: WordPiece, byte-level BPE and SentencePiece unigram, with BERT's special tokens and a padded size."""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from wtn_pretrain.data.faults import Faults
from wtn_pretrain.data.prepare.sentencepiece_model import as_tokenizer, with_special_tokens
from wtn_pretrain.data.prepare.sources import Reading, Source, documents
from wtn_pretrain.data.tokenizer import SPECIAL_TOKENS, train_wordpiece
from wtn_pretrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Algorithm = Literal["wordpiece", "bpe", "unigram"]

_PARAGRAPH = 4096


@dataclass(frozen=True)
class SourceText:
    """The text of sources in pieces of some thousand characters at most; it can be read again and again."""

    sources: tuple[Source, ...]
    reading: Reading
    faults: Faults
    limit: int | None = None
    """Characters to take at most; spread over the sources in proportion to their sizes on disk."""
    told: Callable[[int, int], None] | None = None
    """Called now and then with the bytes read, anew each time that the text is, and the bytes there are (0: unknown)."""

    def __iter__(self) -> Iterator[str]:
        # they count once, however often the text is read
        self.faults.forget()
        whole = sum(source.size for source in self.sources)
        total = whole if self.limit is None and all(source.size for source in self.sources) else 0
        before = 0
        for source in self.sources:
            left = None
            if self.limit is not None:
                left = int(self.limit * (source.size / whole if whole else 1 / len(self.sources))) + 1
            for document in documents(source, self.reading, self.faults):
                if self.told is not None:
                    self.told(before + document.consumed, total)
                text = document.text if left is None else document.text[:left]
                for line in text.splitlines():
                    for first in range(0, len(line), _PARAGRAPH):
                        if piece := line[first : first + _PARAGRAPH].strip():
                            yield piece
                if left is not None and (left := left - len(text)) <= 0:
                    break
            before += source.size


def train_tokenizer(
    algorithm: Algorithm, texts: Iterable[str], vocab_size: int, *, lowercase: bool = True, multiple: int = 64
) -> "PreTrainedTokenizerBase":
    """A fast tokenizer with [PAD]=0 [UNK]=1 [CLS]=2 [SEP]=3 [MASK]=4. The same text gives the same ids.

    `vocab_size` is rounded up to a multiple of `multiple`, as tensor cores like it; where the text gives fewer entries, and to fill
    up, there are entries [unused0], [unused1], ..., which no text ever gets, up to the nearest multiple.

    Args:
        texts: read twice for WordPiece; an iterator is therefore taken into memory.
        lowercase: lower case, and for WordPiece no accents, as BERT's uncased vocabularies.

    Raises:
        UserError: there is no text, or the size is too small for the characters that it has.
    """
    if multiple < 1:
        raise UserError(f"--multiple {multiple}: is not at least 1; 64 or 128 suits tensor cores, 1 pads nothing")
    size = -(-vocab_size // multiple) * multiple
    if algorithm == "wordpiece":
        return _padded_wordpiece(train_wordpiece(texts, size, lowercase), lowercase, multiple)
    if algorithm == "bpe":
        return _train_bpe(texts, size, lowercase, multiple)
    return _train_unigram(texts, size, lowercase, multiple)


def unused(count: int, multiple: int) -> list[str]:
    """The entries that fill a vocabulary of `count` up to a multiple."""
    return [f"[unused{number}]" for number in range(-count % multiple)]


def _padded_wordpiece(tokenizer: "PreTrainedTokenizerBase", lowercase: bool, multiple: int) -> "PreTrainedTokenizerBase":
    from transformers import BertTokenizer

    vocab = dict(tokenizer.get_vocab())
    vocab |= {entry: len(vocab) + number for number, entry in enumerate(unused(len(vocab), multiple))}
    return BertTokenizer(vocab=vocab, do_lower_case=lowercase)


def _train_bpe(texts: Iterable[str], size: int, lowercase: bool, multiple: int) -> "PreTrainedTokenizerBase":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(SPECIAL_TOKENS) + len(alphabet)
    if size < least:
        raise UserError(f"--vocab-size {size}: byte-level BPE needs {least} entries for its bytes alone; give more")
    model = Tokenizer(models.BPE(unk_token="[UNK]"))
    model.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()] if lowercase else [normalizers.NFC()])
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    # the space before the first word is not the text's
    model.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(content=" ", left=1, right=0)])
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=sorted(alphabet), show_progress=False
    )
    counted = _Counted(texts)
    model.train_from_iterator(iter(counted), trainer)
    counted.require()
    tree = json.loads(model.to_str())
    vocab = tree["model"]["vocab"]
    vocab |= {entry: len(vocab) + number for number, entry in enumerate(unused(len(vocab), multiple))}
    return with_special_tokens(Tokenizer.from_str(json.dumps(tree)))


def _train_unigram(texts: Iterable[str], size: int, lowercase: bool, multiple: int) -> "PreTrainedTokenizerBase":
    import sentencepiece

    pad, unk, cls, sep, mask = SPECIAL_TOKENS
    counted, model = _Counted(texts), io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(counted),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc_cf" if lowercase else "nmt_nfkc",
            max_sentence_length=8 * _PARAGRAPH,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=pad,
            unk_piece=unk,
            bos_piece=cls,
            eos_piece=sep,
            control_symbols=[mask],
            num_threads=1,  # sums of several threads differ in their last bits
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        counted.require()
        raise UserError(
            f"--vocab-size {size}: SentencePiece cannot train ({str(error).splitlines()[-1]}); give more text or another size"
        ) from None
    counted.require()
    return as_tokenizer(model.getvalue(), "the trained model", multiple=multiple)


class _Counted:
    """Texts that tell whether there were any."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self._any = texts, False

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self._any = self._any or bool(text.strip())
            yield text

    def require(self) -> None:
        if not self._any:
            raise UserError("the training text of the tokenizer is empty; give text")
