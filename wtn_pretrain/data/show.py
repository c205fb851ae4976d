"""What batches contain, for people: tokens as text with what is hidden marked, images on a contact sheet."""

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from wtn_pretrain.data.masking import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COLOURS = {"masked": 31, "random": 33, "kept": 32, "special": 90}
_STYLE = """<meta charset="utf-8"><style>
body { font: 15px/1.9 system-ui, sans-serif; max-width: 60em; margin: 2em auto } p { border-bottom: 1px solid #ddd; padding-bottom: 1em }
.special { color: #999 } .masked { background: #fcc } .random { background: #fe9 } .kept { background: #cfc } s { color: #a00 }
</style>"""
_LEGEND = {"masked": "hidden", "random": "replaced at random", "kept": "to be predicted, but shown"}
_LABEL, _GAP = 12, 2


class Shown(NamedTuple):
    """A token of a row."""

    text: str
    """What the network sees."""
    was: str
    """What it was: what the network is to say where `kind` is masked, random or kept."""
    kind: str
    """plain, special, masked, random or kept."""


def tokens_of(batch: Mapping[str, Tensor], row: int, tokenizer: "PreTrainedTokenizerBase") -> list[Shown]:
    """The tokens of one row of a batch of masked text, padding at its end left out."""
    ids = batch["input_ids"][row].tolist()
    filled = batch.get("attention_mask", batch.get("segments"))
    end = len(ids) if filled is None else int((filled[row] > 0).sum())
    targets = dict(zip(batch["positions"][row].tolist(), batch["targets"][row].tolist(), strict=True))
    special = set(tokenizer.all_special_ids)
    shown = []
    for place, (number, text) in enumerate(zip(ids[:end], tokenizer.convert_ids_to_tokens(ids[:end]), strict=True)):
        target = targets.get(place, IGNORED)
        if target == IGNORED:
            shown.append(Shown(text, text, "special" if number in special else "plain"))
            continue
        kind = "masked" if number == tokenizer.mask_token_id else "kept" if number == target else "random"
        shown.append(Shown(text, tokenizer.convert_ids_to_tokens([target])[0], kind))
    return shown


def as_terminal(row: Sequence[Shown], colour: bool = True) -> str:
    """One row as text: `[was]` where a token is hidden, `{seen<was}` where it is replaced, `(was)` where it only has to be predicted."""
    words: list[str] = []
    for token in row:
        marked = {"masked": f"[{token.was}]", "random": f"{{{token.text}<{token.was}}}", "kept": f"({token.was})"}.get(
            token.kind, token.text
        )
        plain = marked.replace("▁", " ").replace("Ġ", " ") if token.kind in ("plain", "special") else marked
        painted = f"\x1b[{_COLOURS[token.kind]}m{plain}\x1b[0m" if colour and token.kind in _COLOURS else plain
        glued = token.kind == "plain" and token.text.startswith("##") and words
        words.append(painted.replace("##", "", 1) if glued else (" " if words and not plain.startswith(" ") else "") + painted)
    return "".join(words).strip()


def as_html(rows: Sequence[Sequence[Shown]], heads: Sequence[str]) -> str:
    """Rows as a page; `heads`: what stands above each."""
    legend = " ".join(f'<span class="{kind}">{words}</span>' for kind, words in _LEGEND.items())
    parts = [f"<!doctype html><title>What a batch contains</title>{_STYLE}<div>{legend}</div>"]
    for row, head in zip(rows, heads, strict=True):
        words = []
        for token in row:
            seen, was = html.escape(token.text), html.escape(token.was)
            inside = {"masked": was, "random": f"<s>{seen}</s> {was}"}.get(token.kind, seen)
            glue = "" if token.text.startswith("##") and token.kind == "plain" else " "
            words.append(glue + (inside.removeprefix("##") if not glue else f'<span class="{token.kind}">{inside}</span>'))
        parts.append(f"<p><b>{html.escape(head)}</b><br>{''.join(words)}</p>")
    return "\n".join(parts) + "\n"


def contact_sheet(pixels: np.ndarray, captions: Sequence[str], columns: int = 8, least: int = 64) -> Image.Image:
    """Images side by side, each with a caption below.

    Args:
        pixels: uint8 [B, H, W, 1 or 3].
        columns: images beside each other.
        least: sides are enlarged by whole factors to at least so many pixels.
    """
    count, height, width, channels = pixels.shape
    factor = max(1, -(-least // max(height, width)))
    across, down = width * factor + _GAP, height * factor + _LABEL + _GAP
    columns = min(columns, count)
    sheet = Image.new("RGB", (columns * across, -(-count // columns) * down), "white")
    draw = ImageDraw.Draw(sheet)
    for number in range(count):
        tile = Image.fromarray(pixels[number, :, :, 0] if channels == 1 else pixels[number])
        left, top = number % columns * across, number // columns * down
        sheet.paste(tile.resize((width * factor, height * factor), Image.Resampling.NEAREST).convert("RGB"), (left, top))
        draw.text((left, top + height * factor), captions[number][: max(1, width * factor // 6)], fill="black")
    return sheet


def as_bytes(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised pixels [B, C, H, W] as they were: uint8 [B, H, W, C]."""
    values = pixels.permute(0, 2, 3, 1).float().numpy() * np.array(std, np.float32) + np.array(mean, np.float32)
    return np.clip(np.rint(255 * values), 0, 255).astype(np.uint8)
