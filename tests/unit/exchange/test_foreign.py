"""Networks from elsewhere: every bit arrives, every key is checked, and what is not known for sure is refused."""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import wtn_pretrain
from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.foreign import open_foreign
from wtn_pretrain.exchange.formats import write_torchvision
from wtn_pretrain.models import BertConfig, BlockNetwork, ResNetConfig
from wtn_pretrain.models.base import parameter_count
from wtn_pretrain.models.bert import megatron
from wtn_pretrain.models.hf import to_hf
from wtn_pretrain.models.resnet import torchvision
from wtn_pretrain.models.store import save_network

BERT = BertConfig(vocab_size=61, hidden_size=24, layers=2, heads=3, max_positions=20, pair_head="nsp")
RESNET = ResNetConfig(depths=(1, 2), channels=(16, 32), stem_channels=8, image_channels=3, classes=5)
CIFAR = ResNetConfig(
    block="basic", stem="cifar", shortcut="padding", depths=(1, 1), channels=(4, 9), stem_channels=4, image_channels=3, classes=3
)
HF = {
    "bert": BERT,
    "bert without the pair head": BERT.model_copy(update={"pair_head": "none"}),
    "megatron-bert": BERT.model_copy(update={"norm": "pre", "layer_norm_eps": 1e-5}),
    "resnet": RESNET,
    "resnet of basic blocks": ResNetConfig(block="basic", depths=(1, 1), channels=(8, 16), stem_channels=8, image_channels=1, classes=4),
}


def made(config: BertConfig | ResNetConfig) -> BlockNetwork:
    """A network with no tensor at its initial value."""
    torch.manual_seed(0)
    network = config.build()
    for value in network.state_dict().values():
        value.add_(0.1 * torch.rand_like(value) if value.is_floating_point() else 7)
    return network.eval()


def same(network: BlockNetwork, state: dict[str, Tensor]) -> bool:
    own = network.state_dict()
    names = {name for name in own if name != "head.decoder"}
    return state.keys() - {"head.decoder"} == names and all(torch.equal(own[name], state[name]) for name in names)


def refused(path: Path, pickles: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        open_foreign(path, pickles)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("shards", ["50GB", "20KB"])
def test_a_hugging_face_folder_comes_back_bit_by_bit(name: str, shards: str, tmp_path: Path) -> None:
    network = made(HF[name])
    to_hf(network).save_pretrained(tmp_path, max_shard_size=shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shards == "20KB"
    found = open_foreign(tmp_path)
    assert found.config == network.config
    assert same(network, found.state)
    assert same(network, found.network().state_dict())


def edited(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The folder with its weights changed."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


QUERY = "bert.encoder.layer.0.attention.self.query"
DEFECTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda state: state.pop("bert.encoder.layer.1.output.dense.bias"), "missing bert.encoder.layer.1.output.dense.bias"),
    "unexpected": (lambda state: state.update(more=torch.ones(2)), "unexpected more"),
    "renamed": (
        lambda state: state.update({f"{QUERY}.w": state.pop(f"{QUERY}.weight")}),
        f"unexpected {QUERY}.w (renamed from {QUERY}.weight?)",
    ),
    "of another shape": (
        lambda state: state.update({"cls.predictions.bias": torch.zeros(60)}),
        "of another shape cls.predictions.bias [60] for [61]",
    ),
    "not finite": (
        lambda state: state["bert.encoder.layer.0.output.dense.weight"].fill_(float("nan")),
        "not finite or not of floating point bert.encoder.layer.0.output.dense.weight",
    ),
    "of integers": (
        lambda state: state.update({"cls.predictions.bias": torch.zeros(61, dtype=torch.int8)}),
        "not finite or not of floating point cls.predictions.bias",
    ),
    "untied": (lambda state: state.update({"cls.predictions.decoder.weight": torch.zeros(61, 24)}), "this BERT ties them"),
    "no head": (
        lambda state: [state.pop(name) for name in list(state) if name.startswith("cls.predictions")],
        "has no masked-language-model head",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_keys_that_do_not_fit_are_listed(name: str, tmp_path: Path) -> None:
    to_hf(made(BERT)).save_pretrained(tmp_path)
    change, said = DEFECTS[name]
    assert said in refused(edited(tmp_path, change))


def test_names_of_old_checkpoints_are_known(tmp_path: Path) -> None:
    network = made(BERT)
    to_hf(network).save_pretrained(tmp_path)

    def age(state: dict[str, Tensor]) -> None:
        for name in list(state):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            state[old] = state.pop(name)
        state["bert.embeddings.position_ids"] = torch.arange(20)[None]
        state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()

    assert same(network, open_foreign(edited(tmp_path, age)).state)


def test_folders_that_are_no_teacher(tmp_path: Path) -> None:
    assert "no such file or folder; give a run of wtn_pretrain" in refused(tmp_path / "absent")
    assert "holds nothing that is known here" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "model_type 'gpt2' is not supported; supported are bert" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json: cannot be read" in refused(tmp_path)
    to_hf(made(BERT)).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "hidden_act": "relu"}))
    assert "hidden_act 'relu' is not supported" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**told, "num_hidden_layers": 3}))
    assert "missing bert.encoder.layer.2" in refused(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "holds no weights" in refused(tmp_path)


SHAPES: dict[str, tuple[BertConfig | ResNetConfig, dict[str, object], str]] = {
    "heads that do not divide": (BERT, {"num_attention_heads": 7}, "is not"),
    "no layers": (BERT, {"num_hidden_layers": 0}, "layers is 0"),
    "layers of no kind": (BERT, {"num_hidden_layers": "two"}, ""),
    "fewer words than none": (BERT, {"vocab_size": -5}, ""),
    "stages of unequal number": (RESNET, {"hidden_sizes": [16], "depths": [1, 2, 3]}, "must have one number a stage each"),
    "bottlenecks that cannot be": (RESNET, {"hidden_sizes": [18, 30]}, "must be multiples of 4"),
    "a stage without blocks": (RESNET, {"depths": [0, 2]}, "every stage needs at least 1"),
    "no channels": (RESNET, {"num_channels": 0}, "image_channels is 0"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_settings_that_tell_of_no_network(name: str, tmp_path: Path) -> None:
    config, change, said = SHAPES[name]
    to_hf(made(config)).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, **change}))
    line = refused(tmp_path)
    assert line.startswith(str(tmp_path)) and said in line


def test_tensors_that_tell_of_no_network(tmp_path: Path) -> None:
    state = under_their_names(made(CIFAR))
    # parameter-free shortcuts cannot lose channels
    for name in list(state):
        if name.startswith("layer2"):
            state[name] = state[name][:2].contiguous() if state[name].dim() else state[name]
    save_file(state, tmp_path / "narrowing.safetensors")
    line = refused(tmp_path / "narrowing.safetensors")
    assert line.startswith(str(tmp_path)) and "cannot go from 4 to 2 channels" in line
    whole = as_megatron(made(HF["megatron-bert"]), 3.0)
    whole["args"].num_attention_heads = 7  # type: ignore[attr-defined]
    torch.save(whole, tmp_path / "heads.pt")
    line = refused(tmp_path / "heads.pt", pickles=True)
    assert line.startswith(str(tmp_path)) and "is not a multiple of heads 7" in line


def test_a_folder_of_pickles_needs_consent_and_gives_tensors_alone(tmp_path: Path) -> None:
    network = made(BERT)
    model = to_hf(network)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "is a pickle, read only if you say so; set wide.teacher_pickle=true" in refused(tmp_path)
    assert same(network, open_foreign(tmp_path, pickles=True).state)
    torch.save({"code": Path.unlink}, tmp_path / "pytorch_model.bin")
    for _ in range(2):
        line = refused(tmp_path, pickles=True)
        assert "is no pickle of tensors" in line and line.isprintable()
        assert "add_safe_globals" not in line and "weights_only" not in line
        (tmp_path / "pytorch_model.bin").write_bytes(b"damaged")


def test_a_link_of_a_hubs_cache_is_what_its_name_says(tmp_path: Path) -> None:
    """There files are links to blobs that are named by their hashes."""
    network = made(RESNET)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file(under_their_names(network), tmp_path / "blobs" / "0a1b2c")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(Path("..") / "blobs" / "0a1b2c")
    found = open_foreign(tmp_path / "snapshot" / "model.safetensors")
    assert same(network, found.state) and found.hashes().keys() == {"model.safetensors"}


def test_our_export_to_torchvision_comes_back(tmp_path: Path) -> None:
    network = made(ResNetConfig(block="basic", depths=(1, 1, 1, 1), channels=(64, 128, 256, 512), image_channels=3, classes=4))
    write_torchvision(network, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}')
    found = open_foreign(tmp_path)
    assert found.config == network.config and same(network, found.state)
    assert found.pixels == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    (tmp_path / "model.json").write_text("{}")
    assert "unknown model family None" in refused(tmp_path)


def under_their_names(network: BlockNetwork) -> dict[str, Tensor]:
    assert isinstance(network.config, ResNetConfig)
    own = network.state_dict()
    return {theirs: own[ours].clone() for theirs, ours in torchvision.names(network.config).items()}


@pytest.mark.parametrize("config", [RESNET, CIFAR], ids=["imagenet", "cifar"])
def test_state_dicts_in_torchvision_names(config: ResNetConfig, tmp_path: Path) -> None:
    network = made(config)
    state = under_their_names(network)
    save_file(state, tmp_path / "whole.safetensors")
    found = open_foreign(tmp_path / "whole.safetensors")
    assert found.config == config
    assert same(network, found.state)
    # as training scripts save it, and as torch saved it before batch norms counted
    old = {f"module.{name}": value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save({"state_dict": old, "best_prec1": 1.0}, tmp_path / "old.th")
    assert "is a pickle" in refused(tmp_path / "old.th")
    again = open_foreign(tmp_path / "old.th", pickles=True).state
    assert all(torch.equal(again[name], value) for name, value in found.state.items() if not name.endswith("num_batches_tracked"))
    state.pop("layer2.0.bn1.running_var")
    save_file(state, tmp_path / "part.safetensors")
    assert "missing layer2.0.bn1.running_var" in refused(tmp_path / "part.safetensors")
    state.pop("conv1.weight")
    save_file(state, tmp_path / "part.safetensors")
    assert "are of no network that is known here" in refused(tmp_path / "part.safetensors")


# of torchvision's and timm's networks of these names: tensors, parameters, and shapes that tell them apart
KNOWN = {
    "resnet18": (122, 11_689_512, {"layer4.1.conv2.weight": (512, 512, 3, 3), "fc.weight": (1000, 512)}),
    "resnet50": (320, 25_557_032, {"layer4.2.conv2.weight": (512, 512, 3, 3), "layer1.0.downsample.0.weight": (256, 64, 1, 1)}),
    "resnet101": (626, 44_549_160, {"layer3.22.conv3.weight": (1024, 256, 1, 1), "layer4.0.downsample.1.running_var": (2048,)}),
    "wide-resnet50-2": (320, 68_883_240, {"layer1.0.conv2.weight": (128, 128, 3, 3), "layer4.2.conv3.weight": (2048, 1024, 1, 1)}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_names_and_shapes_are_those_that_torchvision_publishes(name: str) -> None:
    from wtn_pretrain.config import validate
    from wtn_pretrain.models.base import expand_preset

    tensors, parameters, shapes = KNOWN[name]
    config = validate(ResNetConfig, expand_preset({"preset": name}))
    with torch.device("meta"):
        network = config.build()
    own, names = network.state_dict(), torchvision.names(config)
    assert len(names) == tensors
    assert parameter_count(network) == parameters
    assert {key: tuple(own[names[key]].shape) for key in shapes} == shapes
    assert torchvision.shape({theirs: own[ours] for theirs, ours in names.items()}, name) == config.model_copy(update={"image_size": 0})


def test_a_timm_folder(tmp_path: Path) -> None:
    network = made(RESNET)
    save_file(under_their_names(network), tmp_path / "model.safetensors")
    told = {"architecture": "resnet50", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    found = open_foreign(tmp_path)
    assert same(network, found.state)
    assert found.pixels == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert found.labels is None
    (tmp_path / "config.json").write_text(json.dumps({**told, "label_names": list("edcba")}))
    assert open_foreign(tmp_path).labels == tuple("edcba")
    for change in ({"architecture": "resnet50d"}, {"model_args": {"act_layer": "silu"}}):
        (tmp_path / "config.json").write_text(json.dumps({**told, **change}))
        assert "is not supported; timm's resnet" in refused(tmp_path)


def as_megatron(network: BlockNetwork, version: float) -> dict[str, object]:
    """The network as Megatron-LM wrote it, query, key and value in the order of a checkpoint version."""
    own, config = network.state_dict(), network.config
    assert isinstance(config, BertConfig)
    plain = {theirs: own[ours].clone() for theirs, ours in megatron.names(config).items()}
    transformer: dict[str, Tensor] = {}
    for name in [name for name in plain if name.startswith(("layers.", "final_layernorm."))]:
        layer, _, kind = name.rpartition(".")
        if layer.endswith((".key", ".value")):
            continue
        if layer.endswith(".query"):
            stem = layer.removesuffix(".query")
            parts = torch.stack(
                [plain[f"{stem}.{part}.{kind}"].unflatten(0, (config.heads, config.head_size)) for part in ("query", "key", "value")]
            )
            order = {0: (0, 1, 2), 1: (1, 2, 0), 2: (1, 0, 2), 3: (1, 0, 2)}[int(version)]
            rest = tuple(range(3, parts.dim()))
            transformer[f"{stem}.attention.query_key_value.{kind}"] = parts.permute(*order, *rest).flatten(0, 2).contiguous()
        else:
            transformer[name] = plain[name]

    def inside(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}

    embedding = {name: {"weight": plain[f"{name}.weight"]} for name in ("word_embeddings", "position_embeddings", "tokentype_embeddings")}
    language = {"embedding": embedding, "transformer": transformer, "pooler": inside("pooler.")}
    model = {"language_model": language, "lm_head": inside("lm_head."), "binary_head": inside("binary_head.")}
    args = argparse.Namespace(num_attention_heads=config.heads, num_layers=config.layers, layernorm_epsilon=config.layer_norm_eps)
    # as Megatron keeps the states of all random generators
    states = {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state()}  # noqa: NPY002
    more = {"cuda_rng_state": torch.get_rng_state(), "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()}}
    return {"model": model, "args": args, "checkpoint_version": version, "iteration": 10, "rng_state": [{**states, **more}]}


@pytest.mark.parametrize("version", [0.0, 1.0, 2.0, 3.0])
def test_a_megatron_checkpoint(version: float, tmp_path: Path) -> None:
    network = made(HF["megatron-bert"])
    folder = tmp_path / "iter_0000010" / "mp_rank_00"
    folder.mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    whole = as_megatron(network, version)
    torch.save(whole, folder / "model_optim_rng.pt")
    assert "is a pickle" in refused(tmp_path)
    found = open_foreign(tmp_path, pickles=True)
    assert same(network, found.state)
    assert found.config.model_copy(update={"dropout": 0.1}) == network.config
    del whole["model"]["lm_head"]["bias"]  # type: ignore[index]
    torch.save(whole, folder / "model_optim_rng.pt")
    assert "missing lm_head.bias" in refused(folder / "model_optim_rng.pt", pickles=True)
    del whole["args"]
    torch.save(whole, folder / "part.pt")
    assert "holds no args with num_attention_heads, which the weights do not show; set wide.teacher_heads" in refused(
        folder / "part.pt", pickles=True
    )
    whole["model"]["lm_head"]["bias"] = found.state["head.bias"]  # type: ignore[index]
    torch.save(whole, folder / "part.pt")
    assert same(network, open_foreign(folder / "part.pt", pickles=True, heads=3).state)
    assert same(network, wtn_pretrain.load(folder / "part.pt", pickles=True, heads=3).state_dict())
    with pytest.raises(UserError, match="its args say 3 heads and wide.teacher_heads 4"):
        open_foreign(folder / "model_optim_rng.pt", pickles=True, heads=4)


def test_a_run_and_a_stage_of_ours(tmp_path: Path) -> None:
    network = made(CIFAR)
    (tmp_path / "config.yaml").write_text("run: {name: x}")
    assert "wide: holds no finished network" in refused(tmp_path)
    save_network(tmp_path / "wide", network.config, network.state_dict())
    for place in (tmp_path, tmp_path / "wide"):
        assert same(network, open_foreign(place).state)


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_trained_cifar_networks_load(depth: int, parameters: int, shared: Callable[[str], Path]) -> None:
    (file,) = shared("fixtures").glob(f"resnet-cifar/resnet{depth}-*.th")
    assert "is a pickle" in refused(file)
    found = open_foreign(file, pickles=True, image_size=32)
    blocks = (depth - 2) // 6
    expected = ResNetConfig(
        block="basic", stem="cifar", shortcut="padding", depths=(blocks,) * 3, channels=(16, 32, 64), stem_channels=16,
        image_channels=3, image_size=32, classes=10,
    )  # fmt: skip
    assert found.config == expected
    assert parameter_count(found.network()) == parameters
