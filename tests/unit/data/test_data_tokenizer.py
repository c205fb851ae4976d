import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from wtn_pretrain.data.corpus import PydocTopics, blocks
from wtn_pretrain.data.tokenizer import SPECIAL_TOKENS, check_vocabulary, continuations, encode, load_tokenizer, train_wordpiece
from wtn_pretrain.errors import UserError

TEXTS = list(blocks(PydocTopics(), 150_000))
ODD = [
    "",
    "Größe naïve CAFÉ",
    "中文 mixed",
    "tab\there\nnewline",
    "[MASK] and [SEP] in text",
    "x" * 300,
    "zero\u200bwidth 3.14159 don't!",
    "🙂 ☃",
]


@pytest.mark.parametrize("lowercase", [True, False])
def test_round_trip_gives_identical_ids(tmp_path: Path, lowercase: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_wordpiece(TEXTS, 600, lowercase)
    tokenizer.save_pretrained(str(tmp_path))
    sentences = [sentence for text in TEXTS for sentence in text.split(". ")][:300] + ODD
    expected = tokenizer(sentences).input_ids
    for loaded in (AutoTokenizer.from_pretrained(str(tmp_path)), load_tokenizer(tmp_path)):
        assert loaded(sentences).input_ids == expected
        loaded.save_pretrained(str(tmp_path / "again"))
        assert load_tokenizer(tmp_path / "again")(sentences).input_ids == expected
        assert loaded("Python", "list").token_type_ids == tokenizer("Python", "list").token_type_ids
    assert encode(tokenizer, sentences) == [ids[1:-1] for ids in expected]
    assert (tokenizer("PYTHON").input_ids == tokenizer("python").input_ids) is lowercase
    assert sum(ids.count(tokenizer.unk_token_id) for ids in expected[:300]) == 0


def test_vocabulary_layout() -> None:
    tokenizer = train_wordpiece(iter(TEXTS), 500, True)
    assert tokenizer.convert_ids_to_tokens(list(range(5))) == list(SPECIAL_TOKENS)
    assert len(tokenizer) == 500
    assert [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id] == [
        0,
        1,
        2,
        3,
        4,
    ]
    marks = continuations(tokenizer)
    assert 50 < marks.sum() < 450 and not marks[:5].any()


def test_vocabulary_never_exceeds_what_was_asked() -> None:
    crowded = " ".join(chr(code) + chr(code + 1) for code in range(0x0430, 0x0E00, 2))  # more letters than entries
    assert len(train_wordpiece([crowded], 128, False)) <= 128
    assert len(train_wordpiece(["one two three"], 1024, True)) < 100


def test_training_is_the_same_in_every_process(tmp_path: Path) -> None:
    script = (
        "import json; from wtn_pretrain.data.corpus import *; from wtn_pretrain.data.tokenizer import *;"
        "print(json.dumps(train_wordpiece(list(blocks(PydocTopics(), 150_000)), 600, True).get_vocab()))"
    )
    # the hash map that orders pieces inside the library differs from process to process
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout.splitlines()[-1]) == train_wordpiece(TEXTS, 600, True).get_vocab()


def test_bert_vocabulary_gives_the_published_ids(shared: Callable[[str], Path]) -> None:
    fixtures = shared("fixtures")
    inputs = (fixtures / "wordpiece-vectors" / "bert-base-uncased.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = [
        [int(word) for word in line.split()] for line in (fixtures / "wordpiece-vectors" / "bert-base-uncased.out").read_text().splitlines()
    ]
    uncased = load_tokenizer(fixtures / "bert-vocab" / "bert_base_uncased_vocab.txt")
    assert encode(uncased, inputs)[: len(expected)] == expected
    cased = load_tokenizer(fixtures / "bert-vocab" / "bert_base_cased_vocab.txt")
    assert cased.tokenize("Hello hello") == ["Hello", "hello"]


def test_bad_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent: no such folder; give one that save_pretrained"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match=r"neither tokenizer_config.json nor vocab.txt in it"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\na\nb\n")
    with pytest.raises(UserError, match=r"vocab\.txt: its vocabulary of 5 lacks \[SEP\], \[MASK\]; give"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{broken")
    with pytest.raises(UserError, match=r"cannot be read \(.+\); write it again"):
        load_tokenizer(tmp_path)
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=train_wordpiece(TEXTS, 300, True).backend_tokenizer, pad_token="[PAD]").save_pretrained(
        str(tmp_path / "bare")
    )
    with pytest.raises(UserError, match=r"bare: its vocabulary of 300 lacks \[CLS\], \[SEP\], \[MASK\], \[UNK\]; give a BERT-style one"):
        load_tokenizer(tmp_path / "bare")
    for texts in ([], ["", " \n"]):
        with pytest.raises(UserError, match="training text of the tokenizer is empty"):
            train_wordpiece(texts, 300, True)
    with pytest.raises(UserError, match="vocab_size 10 is too small"):
        train_wordpiece(TEXTS, 10, True)


def test_a_vocabulary_larger_than_the_model_is_refused() -> None:
    tokenizer = train_wordpiece(TEXTS, 300, True)
    check_vocabulary(tokenizer, 304, "teacher")
    with pytest.raises(UserError, match=r"^teacher: vocabulary of 256 against the tokenizer's 300 entries; "):
        check_vocabulary(tokenizer, 256, "teacher")
