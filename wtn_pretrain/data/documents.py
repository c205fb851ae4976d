"""Which document a block of text belongs to, so that the bounds of documents outlive the cutting and holding out of blocks."""

from collections.abc import Callable, Iterable, Iterator

from wtn_pretrain.data.corpus import Corpus, blocks


class _Numbered:
    """A corpus that knows which document the last paragraph that it gave belongs to."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self.document = 0

    def paragraphs(self) -> Iterator[str | None]:
        number = 0
        for paragraph in self._corpus.paragraphs():
            if paragraph is None:
                number += 1
            else:
                self.document = number
            yield paragraph

    def fingerprint(self) -> list[str]:
        return self._corpus.fingerprint()


def numbered_blocks(corpus: Corpus, limit: int | None = None) -> Iterator[tuple[int, str]]:
    """`wtn_pretrain.data.corpus.blocks`, each with the number of its document."""
    numbered = _Numbered(corpus)
    for block in blocks(numbered, limit):
        yield numbered.document, block


def kept_runs(numbered: Iterable[tuple[int, str]], keep: Callable[[str], bool]) -> Iterator[tuple[bool, str]]:
    """The blocks to keep, each with whether a run of text begins with it: blocks of one document with none left out between them."""
    before: int | None = None
    for document, block in numbered:
        if keep(block):
            yield document != before, block
            before = document
        else:
            before = None
