"""Networks on disk: bitwise back, tied weights once, and nothing loaded that does not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wtn_pretrain.errors import UserError
from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.models.store import load_network, save_network

CONFIGS = [
    BertConfig(vocab_size=31, hidden_size=8, heads=2, layers=2, pair_head="sop"),
    ResNetConfig(block="basic", stem="cifar", channels=(4, 8), depths=(1, 2), stem_channels=4, image_channels=1, image_size=8, classes=3),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["bert", "resnet"])
def test_a_network_comes_back_bitwise(config, tmp_path: Path) -> None:
    network = config.build()
    save_network(tmp_path, config, {name: value.clone() for name, value in network.state_dict().items()})
    back = load_network(tmp_path)
    assert back.config == config
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in network.state_dict().items())


def test_tied_weights_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    save_network(tmp_path, CONFIGS[0], CONFIGS[0].build().state_dict())
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("stem.word.weight" in names) != ("head.decoder" in names)
    back = load_network(tmp_path)
    assert back.head.decoder is back.stem.word.weight


def test_what_does_not_fit_is_refused_with_its_names(tmp_path: Path) -> None:
    save_network(tmp_path, CONFIGS[1], CONFIGS[1].build().state_dict())
    path = tmp_path / "model.safetensors"
    good = load_file(path)
    for change, words in (
        ({name: value for name, value in good.items() if name != "stem.conv.weight"}, r"missing \['stem.conv.weight'\]"),
        ({**good, "extra": torch.zeros(1)}, r"unexpected \['extra'\]"),
        ({**good, "stem.conv.weight": torch.zeros(4, 1, 5, 5)}, r"wrong shape \['stem.conv.weight \[4, 1, 5, 5\] for \[4, 1, 3, 3\]'\]"),
    ):
        save_file(change, path)
        with pytest.raises(UserError, match=words):
            load_network(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="missing or damaged"):
        load_network(tmp_path)


def test_a_shape_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished network"):
        load_network(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_network(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({"family": "vit"}))
    with pytest.raises(UserError, match="unknown model family 'vit'; there are bert, resnet"):
        load_network(tmp_path)
