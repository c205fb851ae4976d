"""Networks from elsewhere, recognised by what lies in the file or folder, and read with every key checked."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from wtn_pretrain.config import read_yaml
from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.files import digest, read, read_folder, read_state
from wtn_pretrain.folder import RunFolder
from wtn_pretrain.models.base import BlockConfig, BlockNetwork
from wtn_pretrain.models.bert import megatron
from wtn_pretrain.models.conversion import convert
from wtn_pretrain.models.hf import from_hf_state
from wtn_pretrain.models.resnet import torchvision
from wtn_pretrain.models.store import load_network, load_state

KINDS = (
    "a run of wtn_pretrain or one of its stages, a Hugging Face folder (bert, megatron-bert, resnet), a timm folder, a state dict in "
    "torchvision's names, or a Megatron BERT checkpoint"
)
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
"""Files of Hugging Face folders by which a network is known to come with its words."""
_TIMM = {f"{wide}resnet{depth}{factor}" for wide, factor in (("", ""), ("wide_", "_2")) for depth in (18, 26, 34, 50, 101, 152, 200)}


class Foreign(NamedTuple):
    """A network that was read, and what lay beside it."""

    kind: str
    """What it was, in words."""
    config: BlockConfig
    state: dict[str, Tensor]
    """Every tensor by our name, tied ones once."""
    files: tuple[Path, ...]
    """What the weights were read from."""
    tokenizer: Path | None = None
    """A folder with its tokenizer."""
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and standard deviation by which its images were normalised."""
    labels: tuple[str, ...] | None = None
    """Names of its classes, in the order of its logits."""

    def network(self) -> BlockNetwork:
        """On the CPU, in eval mode."""
        network = self.config.build()
        load_state(network, self.state, self.kind)
        return network.eval()

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files of the weights, by name."""
        return {file.name: digest(file) for file in self.files}


def open_foreign(path: str | Path, pickles: bool = False, image_size: int = 0, heads: int = 0) -> Foreign:
    """The network at `path`: one of `KINDS`.

    Args:
        pickles: whether files that are pickles may be read (tensors alone are taken from them).
        image_size: side of the images, for a ResNet whose format does not tell.
        heads: of attention, for a Megatron checkpoint without its arguments.

    Raises:
        UserError: it is none of these, is not supported, or its keys are not exactly those of the network that it claims to be.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"{place}: no such file or folder; give {KINDS}")
    # a file's name tells what it is, and that of the blob behind a link in a hub's cache does not
    found = _read(place.absolute() if place.is_file() else place.resolve(), pickles, heads, _stamp(place))
    if image_size and getattr(found.config, "image_size", None) == 0:
        found = found._replace(config=found.config.model_copy(update={"image_size": image_size}))
    return found


def forget_foreign() -> None:
    """Gives up the memory of the network that was read last."""
    _read.cache_clear()


# a recipe's shape is asked for more than once, and pickles show theirs only when they are read
@lru_cache(maxsize=1)
def _read(place: Path, pickles: bool, heads: int, stamp: tuple[tuple[str, int, int], ...]) -> Foreign:
    if place.is_file():
        return _state_dict(place, pickles, heads)
    if (place / "model.json").exists():
        return _torchvision(place) if _is_torchvision(place) else _ours(place)
    if (place / "config.yaml").exists():
        return _ours(place / "wide")
    if (place / "config.json").exists():
        return _folder(place, pickles)
    shards = sorted(place.glob("**/mp_rank_*/model_optim_rng.pt"))
    if shards:
        return _megatron(place, shards, pickles, heads)
    raise UserError(f"{place}: holds nothing that is known here; give {KINDS}")


def _stamp(place: Path) -> tuple[tuple[str, int, int], ...]:
    """What tells whether files have changed since they were read."""
    files = [place] if place.is_file() else sorted(path for path in place.glob("*") if path.is_file())
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def _ours(stage: Path) -> Foreign:
    RunFolder.check_network(stage)
    network = load_network(stage)
    state = {name: value.detach() for name, value in network.state_dict().items()}
    found = Foreign("a stage of wtn_pretrain", network.config, state, (stage / "model.safetensors",))
    # further seeds' stages stand a folder deeper
    run = next((folder for folder in list(stage.parents)[:2] if (folder / "config.yaml").is_file()), None)
    if run is None:
        return found
    tokenizer = run / "data" / "tokenizer"
    data = read_yaml(run / "config.yaml").get("data")
    mean, std = (data.get(key) for key in ("mean", "std")) if isinstance(data, dict) else (None, None)
    pixels = (tuple(mean), tuple(std)) if mean and std else None
    return found._replace(tokenizer=tokenizer if tokenizer.is_dir() else None, pixels=pixels)


def _folder(folder: Path, pickles: bool) -> Foreign:
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: cannot be read ({error}); fetch the folder again") from None
    if not isinstance(told, dict):
        raise UserError(f"{folder / 'config.json'}: holds no settings; fetch the folder again")
    if "architecture" in told and "model_type" not in told:
        return _timm(folder, told, pickles)
    from transformers import CONFIG_MAPPING

    kind = told.get("model_type")
    if kind not in ("bert", "megatron-bert", "resnet"):
        raise UserError(f"{folder}: model_type {kind!r} is not supported; supported are bert, megatron-bert and resnet")
    state, files = read_folder(folder, pickles)
    try:
        hf = CONFIG_MAPPING[kind](**told)
    except Exception as error:  # the library checks types and values in ways of its own
        raise UserError(f"{folder / 'config.json'}: is not valid for a {kind} ({' '.join(str(error).split())[:200]})") from None
    config, ours = from_hf_state(hf, state, str(folder))
    tokenizer = folder if any((folder / name).exists() for name in VOCABULARIES) else None
    pixels = _pixels(folder / "preprocessor_config.json")
    return Foreign("a Hugging Face folder", config, ours, tuple(files), tokenizer, pixels, _labels(hf, told))


def _labels(hf: Any, told: dict[str, Any]) -> tuple[str, ...] | None:
    """The classes' names, where the folder gives them."""
    return tuple(str(hf.id2label[number]) for number in sorted(hf.id2label)) if told.get("id2label") else None


def _is_torchvision(folder: Path) -> bool:
    """Whether `model.json` says what torchvision's ResNet class is called with, as our export to torchvision does."""
    try:
        told = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and "family" not in told and told.keys() >= {"block", "layers"}


def _torchvision(folder: Path) -> Foreign:
    file = folder / "model.safetensors"
    pixels = _pixels(folder / "preprocessor_config.json")
    return _resnet("an export to torchvision", read_state(file, pickles=False), [file], str(folder))._replace(pixels=pixels)


def _pixels(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    if not path.exists():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        mean, std = told.get("image_mean"), told.get("image_std")
        return (tuple(map(float, mean)), tuple(map(float, std))) if mean and std and told.get("do_normalize", True) else None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch the folder again") from None


def _timm(folder: Path, told: dict[str, Any], pickles: bool) -> Foreign:
    name = str(told["architecture"])
    # these show in the weights, which say the shape
    odd = set(told.get("model_args") or {}) - {"layers", "base_width", "num_classes", "in_chans"}
    if name not in _TIMM or odd:
        what = f"architecture {name!r}" + (f" with model_args {told['model_args']}" if odd else "")
        raise UserError(f"{folder}: {what} is not supported; timm's resnet and wide_resnet of torchvision's form are")
    state, files = read_folder(folder, pickles)
    pretrained = told.get("pretrained_cfg") or {}
    mean, std = pretrained.get("mean"), pretrained.get("std")
    pixels = (tuple(mean), tuple(std)) if mean and std else None
    named = told.get("label_names") or pretrained.get("label_names")
    labels = tuple(map(str, named)) if isinstance(named, list) else None
    return _resnet("a timm folder", state, files, str(folder))._replace(pixels=pixels, labels=labels)


def _state_dict(file: Path, pickles: bool, heads: int) -> Foreign:
    if file.suffix != ".safetensors":
        whole = read(file, pickles)
        if megatron.recognises(whole):
            return _from_megatron(whole, file, heads)
    state = read_state(file, pickles)
    if torchvision.recognises(state):
        return _resnet("a state dict in torchvision's names", state, [file], str(file))
    if any(name.startswith(("bert.", "resnet.")) for name in state):
        raise UserError(f"{file}: is the weights of a Hugging Face model without its shape; give the folder with its config.json")
    raise UserError(f"{file}: its keys ({', '.join(list(state)[:3])}, ...) are of no network that is known here; give {KINDS}")


def _resnet(kind: str, state: dict[str, Tensor], files: list[Path], source: str) -> Foreign:
    config = torchvision.shape(state, source)
    return Foreign(kind, config, convert(state, torchvision.names(config), config, source), tuple(files))


def _megatron(place: Path, shards: list[Path], pickles: bool, heads: int) -> Foreign:
    latest = place / "latest_checkpointed_iteration.txt"
    if latest.exists():
        number = latest.read_text(encoding="utf-8").strip()
        folder = place / (f"iter_{int(number):07d}" if number.isdecimal() else number)
        shards = [shard for shard in shards if folder in shard.parents]
    if len(shards) != 1:
        raise UserError(f"{place}: holds {len(shards)} files of a Megatron checkpoint; give one that Megatron's tools have merged")
    whole = read(shards[0], pickles)
    if not megatron.recognises(whole):
        raise UserError(f"{shards[0]}: holds no model.language_model, as Megatron's BERT did; convert it to Hugging Face's form")
    return _from_megatron(whole, shards[0], heads)


def _from_megatron(whole: dict[str, Any], file: Path, heads: int) -> Foreign:
    config = megatron.shape(whole, str(file), heads)
    state = convert(megatron.divided(whole, config, str(file)), megatron.names(config), config, str(file))
    return Foreign("a Megatron checkpoint", config, state, (file,))
