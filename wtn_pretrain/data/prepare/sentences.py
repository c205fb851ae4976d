"""Sentences of running text, by rules for languages that end them with . ! or ? (and the full-width forms of these)."""

import re

# the end of a sentence: its mark, closing quotes and brackets, white space, and what a sentence may begin with
_END = re.compile(r"(?<=[.!?…])([\"'”’»)\]]*)\s+(?=[\"'“‘«(\[]*[A-Z0-9À-ÖØ-Þ\u0370-\u03ff\u0400-\u042f])|(?<=[。！？])")
_LINES = re.compile(r"\s*\n\s*")
_ABBREVIATIONS = frozenset(
    (
        "al",
        "approx",
        "bros",
        "ca",
        "capt",
        "cf",
        "cmdr",
        "co",
        "col",
        "corp",
        "dept",
        "dr",
        "ed",
        "eds",
        "e.g",
        "est",
        "etc",
        "fig",
        "figs",
        "fr",
        "gen",
        "gov",
        "hon",
        "i.e",
        "inc",
        "jr",
        "lt",
        "ltd",
        "maj",
        "messrs",
        "mr",
        "mrs",
        "ms",
        "mt",
        "mts",
        "no",
        "nos",
        "op",
        "p",
        "pp",
        "prof",
        "rep",
        "rev",
        "sen",
        "sgt",
        "sr",
        "st",
        "u.k",
        "u.s",
        "univ",
        "v",
        "viz",
        "vol",
        "vols",
        "vs",
    )
)


def split_sentences(text: str) -> list[str]:
    """The sentences of `text` in order, none of them blank; the end of a line ends one.

    An initial ("J.") or a usual English abbreviation does not end a sentence. Joined by a space they are the text again, but for
    white space.
    """
    found = []
    for line in _LINES.split(text):
        start = 0
        for match in _END.finditer(line):
            before = line[start : match.start()]
            if before.endswith(".") and _abbreviated(before):
                continue
            sentence = (before + (match.group(1) or "")).strip()
            if sentence:
                found.append(sentence)
            start = match.end()
        if rest := line[start:].strip():
            found.append(rest)
    return found


def _abbreviated(before: str) -> bool:
    word = before[:-1].rsplit(None, 1)[-1].lstrip("\"'“‘«([") if before[:-1].strip() else ""
    # a letter alone is an initial
    return word.lower() in _ABBREVIATIONS or (len(word) == 1 and word.isalpha() and word != "I")
