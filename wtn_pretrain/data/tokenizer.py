"""WordPiece tokenizers: trained on the fly, or loaded from a folder."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wtn_pretrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# transformers takes seconds to import, which --help and image runs need not wait for: hence the imports in functions

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The special tokens of a trained vocabulary; their ids are their positions here."""

_ALPHABET_LIMIT = 1000
_UNUSED = re.compile(r"\[unused ?\d+\]")


def train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool) -> "PreTrainedTokenizerBase":
    """A BERT tokenizer with at most `vocab_size` entries (fewer where the text has no more to give), [PAD]=0 [UNK]=1 [CLS]=2
    [SEP]=3 [MASK]=4. The same text gives the same ids; `save_pretrained` and `load_tokenizer` or AutoTokenizer keep them.

    `texts` is read twice; an iterator is therefore taken into memory. Raises a UserError where there is no text.
    """
    from tokenizers import Tokenizer, models, trainers
    from transformers import BertTokenizer

    if vocab_size < 4 * len(SPECIAL_TOKENS):
        raise UserError(f"vocab_size {vocab_size} is too small for a WordPiece vocabulary; use 256 or more")
    if isinstance(texts, Iterator):
        texts = list(texts)
    template = BertTokenizer(do_lower_case=lowercase).backend_tokenizer
    letters: Counter[str] = Counter()

    def counted() -> Iterator[str]:
        for text in texts:
            letters.update(template.normalizer.normalize_str(text))
            yield text

    def trained(source: Iterator[str], size: int, reserved: list[str], alphabet: list[str]) -> dict[str, int]:
        model = Tokenizer(models.WordPiece({}, unk_token="[UNK]"))
        model.normalizer, model.pre_tokenizer = template.normalizer, template.pre_tokenizer
        # the trainer takes no None for "no limit"
        settings: dict[str, Any] = {"limit_alphabet": len(alphabet)} if alphabet else {}
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=reserved, initial_alphabet=alphabet, show_progress=False, **settings
        )
        model.train_from_iterator(source, trainer)
        return model.get_vocab()

    # The trainer numbers the pieces ##x in the order of a hash map, and breaks ties by number: two runs differ. A first pass without
    # merges finds the pieces, and the second gets them in a fixed order.
    pieces = trained(counted(), 0, [], [])
    frequent = sorted((letter for letter in letters if not letter.isspace()), key=lambda letter: (-letters[letter], letter))
    if not frequent:
        raise UserError("the training text of the tokenizer is empty; give text")
    alphabet = sorted(frequent[: min(_ALPHABET_LIMIT, vocab_size // 4)])
    continued = [f"##{letter}" for letter in alphabet if f"##{letter}" in pieces]
    vocab = trained(iter(texts), vocab_size, [*SPECIAL_TOKENS, *continued], alphabet)
    return BertTokenizer(vocab=vocab, do_lower_case=lowercase)


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder written by `save_pretrained`, or of a BERT vocab.txt or its folder (cased if the vocabulary is).

    Raises a UserError where there is none or where it lacks a token that masked language modelling needs.
    """
    from transformers import AutoTokenizer, BertTokenizer

    path = Path(path)
    vocab = path if path.is_file() else path / "vocab.txt"
    if not path.exists():
        raise UserError(f"tokenizer {path}: no such folder; give one that save_pretrained or tools/train_tokenizer.py wrote")
    try:
        if path.is_dir() and (path / "tokenizer_config.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        elif vocab.is_file():
            words = vocab.read_text(encoding="utf-8").splitlines()
            missing = [token for token in SPECIAL_TOKENS if token not in words]
            if missing:  # the library would append them, beyond the rows of the embedding that goes with the vocabulary
                raise UserError(f"tokenizer {vocab}: its vocabulary of {len(words)} lacks {', '.join(missing)}; give a BERT vocabulary")
            cased = any(word != word.lower() for word in words if not word.startswith("["))
            tokenizer = BertTokenizer(vocab=str(vocab), do_lower_case=not cased)  # `vocab_file=` is accepted and ignored
        else:
            raise UserError(
                f"tokenizer {path}: neither tokenizer_config.json nor vocab.txt in it; give a folder that save_pretrained wrote"
            )
    except UserError:
        raise
    except Exception as error:  # the library raises all sorts on damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"tokenizer {path}: cannot be read ({reason}); write it again with save_pretrained") from None
    check_tokenizer(tokenizer, str(path))
    return tokenizer


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Refuses a tokenizer without the library's fast backend, or without one of the five special tokens."""
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {name}: has no fast (tokenizer.json) form; convert it and save it again")
    ids = {
        "[PAD]": tokenizer.pad_token_id,
        "[CLS]": tokenizer.cls_token_id,
        "[SEP]": tokenizer.sep_token_id,
        "[MASK]": tokenizer.mask_token_id,
    }
    ids["[UNK]"] = tokenizer.unk_token_id
    missing = [token for token, number in ids.items() if number is None or not 0 <= number < len(tokenizer)]
    if missing:
        raise UserError(f"tokenizer {name}: its vocabulary of {len(tokenizer)} lacks {', '.join(missing)}; give a BERT-style one")


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", vocab_size: int, name: str) -> None:
    """Refuses a tokenizer with more entries than `vocab_size`, the rows of the embedding of the model called `name`."""
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{name}: vocabulary of {vocab_size} against the tokenizer's {len(tokenizer)} entries; "
            "use the tokenizer that the model was made with, or a model with a larger vocab_size"
        )


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """128-bit hash, hexadecimal, of what decides which ids a text gets; whether it is cut or padded does not count."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    facts = {name: value for name, value in backend.items() if name not in ("version", "truncation", "padding")}
    facts["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Token ids of each text without special tokens, neither cut nor padded; runs on all cores."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def continuations(tokenizer: "PreTrainedTokenizerBase") -> np.ndarray:
    """Which ids continue a word: bool [len(tokenizer)]. Those with ##, or, where the vocabulary marks the beginnings of words instead
    (▁ of SentencePiece, Ġ of byte-level BPE), those without the mark that are no special tokens."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    for mark in ("▁", "Ġ"):
        if sum(token is not None and token.startswith(mark) for token in tokens) > 1:
            return np.array(
                [token is not None and not token.startswith(mark) and number not in special for number, token in enumerate(tokens)]
            )
    return np.array([token is not None and token.startswith("##") for token in tokens])


def unused_ids(tokenizer: "PreTrainedTokenizerBase") -> np.ndarray:
    """The ids of entries that only fill a vocabulary up, [unused0] and so on: int64."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return np.array([number for number, token in enumerate(tokens) if token is not None and _UNUSED.fullmatch(token)], np.int64)
