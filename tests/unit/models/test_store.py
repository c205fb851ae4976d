"""Networks on disk: bitwise back, tied weights once, and nothing loaded that does not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wtn_pretrain.errors import UserError
from wtn_pretrain.models import BertConfig, ResNetConfig
from wtn_pretrain.models.store import load_network, load_part, save_network

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


@pytest.mark.parametrize("config", CONFIGS, ids=["bert", "resnet"])
def test_a_part_is_loaded_and_the_rest_has_shapes_alone(config, tmp_path: Path) -> None:
    network = config.build()
    # running statistics are no parameters and come from the file too
    state = {name: torch.randn_like(value) if value.is_floating_point() else value + 3 for name, value in network.state_dict().items()}
    state = {name: state["stem.word.weight"] if name == "head.decoder" else value for name, value in state.items()}
    save_network(tmp_path, config, state)
    whole = {name: value.shape for name, value in state.items()}
    for parts in (["stem"], ["blocks.1"], ["stem", "blocks.0", "blocks.1"], ["head"], []):
        part = load_part(tmp_path, parts)
        assert not part.training and part.config == config
        assert {name: value.shape for name, value in part.state_dict().items()} == whole
        for name, value in part.state_dict().items():
            inside = any(name.startswith(f"{one}.") for one in parts)
            # what is tied to a part that was not asked for stays away with it
            assert value.is_meta == (not inside or (name == "head.decoder" and "stem" not in parts)), name
            if not value.is_meta:
                assert value.device.type == "cpu" and torch.equal(value, state[name]), name


def test_a_part_computes_what_the_whole_does(tmp_path: Path) -> None:
    for config in CONFIGS:
        network = config.build().eval()
        save_network(tmp_path, config, network.state_dict())
        carry = network.stem(config.example_inputs(3, "cpu"))
        part = load_part(tmp_path, ["blocks.0"])
        with torch.no_grad():
            assert torch.equal(part.blocks[0](carry).hidden, network.blocks[0](carry).hidden)
            with pytest.raises(RuntimeError, match="meta"):
                float(part.blocks[1](carry).hidden.sum())


def test_a_part_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_network(tmp_path, CONFIGS[1], CONFIGS[1].build().state_dict())
    path = tmp_path / "model.safetensors"
    good = load_file(path)
    save_file({name: value for name, value in good.items() if name != "blocks.1.convs.0.weight"}, path)
    with pytest.raises(UserError, match=r"holds no blocks\.1\.convs\.0\.weight"):
        load_part(tmp_path, ["blocks.1"])
    load_part(tmp_path, ["blocks.0"])
    save_file({**good, "stem.conv.weight": torch.zeros(4, 1, 5, 5)}, path)
    with pytest.raises(UserError, match=r"stem\.conv\.weight has shape \[4, 1, 5, 5\] for \[4, 1, 3, 3\]"):
        load_part(tmp_path, ["stem"])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="missing or damaged"):
        load_part(tmp_path, ["stem"])
    path.unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        load_part(tmp_path, ["stem"])
