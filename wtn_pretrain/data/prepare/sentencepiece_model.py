"""SentencePiece models, unigram or BPE, as fast tokenizers with BERT's special tokens.

transformers' own conversion depends on the tokenizer class that a model is said to belong to; a wrong one is not noticed. Here all
that matters is read from the model file itself.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wtn_pretrain.data.tokenizer import SPECIAL_TOKENS
from wtn_pretrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# kinds of pieces and of models in sentencepiece_model.proto
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
# what models call the parts of BERT's special tokens, the first that a model has is taken
_NAMES = {
    "[PAD]": ("[PAD]", "<pad>"),
    "[UNK]": ("[UNK]", "<unk>"),
    "[CLS]": ("[CLS]", "<s>", "<bos>"),
    "[SEP]": ("[SEP]", "</s>", "<eos>"),
    "[MASK]": ("[MASK]", "<mask>"),
}


def read_sentencepiece(path: Path, multiple: int = 64) -> "PreTrainedTokenizerBase":
    """The tokenizer of a SentencePiece `.model` made elsewhere: its ids as they are, special tokens that it lacks behind them, and then
    [unusedN] up to a multiple. Raises a UserError where the file is none, or of a kind that has no fast form."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a SentencePiece .model file") from None
    return as_tokenizer(content, str(path), multiple=multiple)


def as_tokenizer(content: bytes, name: str, *, multiple: int) -> "PreTrainedTokenizerBase":
    """As `read_sentencepiece`, of the bytes of a file."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(content)
        kinds = [piece.type for piece in proto.pieces]
    except Exception:  # protobuf's own errors
        kinds = []
    if _UNKNOWN not in kinds:
        raise UserError(f"{name}: not a SentencePiece model; give the .model file that its trainer wrote")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown = kinds.index(_UNKNOWN)
    fallback = _BYTE in kinds
    names = {token: next((word for word in words if any(word == piece for piece, _ in pieces)), token) for token, words in _NAMES.items()}
    names["[UNK]"] = pieces[unknown][0]
    present = {piece for piece, _ in pieces}
    pieces += [(word, 0.0) for word in names.values() if word not in present]
    least = min(score for _, score in pieces)
    # spaces become ▁ before pieces are looked up, so that no text matches these
    pieces += [(f"[unused {number}]", least) for number in range(-len(pieces) % multiple)]
    model: Any
    if proto.trainer_spec.model_type == _UNIGRAM:
        model = models.Unigram(pieces, unk_id=unknown, byte_fallback=fallback)
    elif proto.trainer_spec.model_type == _BPE:
        vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
        normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
        model = models.BPE(vocab, _merges(normal), unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=fallback)
    else:
        raise UserError(f"{name}: a SentencePiece model of words or characters, which has no fast form; train unigram or bpe")
    tokenizer = Tokenizer(model)
    spec = proto.normalizer_spec
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if spec.add_dummy_prefix else "never"
    # splitting at spaces keeps long texts fast; a model that learned pieces over several words needs the whole text
    over_words = any("▁" in piece[1:] for piece, kind in ((piece.piece, piece.type) for piece in proto.pieces) if kind == _NORMAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=not over_words)
    metaspace = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace]) if fallback else metaspace
    users = [AddedToken(piece.piece, normalized=False, special=False) for piece in proto.pieces if piece.type == _USER]
    tokenizer.add_tokens(users)
    return with_special_tokens(tokenizer, names)


def with_special_tokens(tokenizer: Any, names: dict[str, str] | None = None) -> "PreTrainedTokenizerBase":
    """A tokenizer of the `tokenizers` library under transformers' interface, its special tokens set and put around texts as BERT does.

    `names`: what the vocabulary calls each of `SPECIAL_TOKENS`; None: the same.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    names = names or {token: token for token in SPECIAL_TOKENS}
    cls, sep = names["[CLS]"], names["[SEP]"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(word, tokenizer.token_to_id(word)) for word in (cls, sep)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=names["[PAD]"],
        unk_token=names["[UNK]"],
        cls_token=cls,
        sep_token=sep,
        mask_token=names["[MASK]"],
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _merges(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """The merges of a BPE model in order: SentencePiece keeps them only as the pieces that they make, the better the earlier."""
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    ranks = {piece: number for number, piece in enumerate(pieces)}
    for piece, score in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-score, ranks[left], ranks[right], (left, right)))
    return [merge for *_, merge in sorted(found)]
