"""Merging: the plain thin network computes what the bridged one does, over random shapes and weights, or is refused by name."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wtn_pretrain.compress.merge import TOLERANCE, Bridged, merge, merge_and_check
from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.bridges import Bridge, bridge_kinds, make_bridges
from wtn_pretrain.imitation.pairing import pair
from wtn_pretrain.models import BertConfig, BlockConfig, BlockNetwork, ResNetConfig

FEW = settings(max_examples=20, deadline=None)


@st.composite
def resnets(draw: st.DrawFn) -> ResNetConfig:
    block = draw(st.sampled_from(["basic", "bottleneck"]))
    stages = draw(st.integers(1, 3))
    unit = 8 if block == "bottleneck" else 2
    return ResNetConfig(
        block=block,
        stem=draw(st.sampled_from(["cifar", "imagenet"])),
        stem_channels=draw(st.sampled_from([2, 4, 8])),
        channels=tuple(unit * draw(st.integers(1, 3)) for _ in range(stages)),
        depths=tuple(draw(st.integers(1, 3)) for _ in range(stages)),
        image_channels=draw(st.sampled_from([1, 3])),
        image_size=16,
        classes=5,
    )


@st.composite
def berts(draw: st.DrawFn) -> BertConfig:
    heads = draw(st.sampled_from([1, 2, 3]))
    return BertConfig(
        vocab_size=31,
        hidden_size=heads * draw(st.sampled_from([2, 4, 6])),
        heads=heads,
        layers=draw(st.integers(1, 4)),
        max_positions=12,
        norm=draw(st.sampled_from(["pre", "post"])),
        pair_head=draw(st.sampled_from(["none", "nsp"])),
        initializer_range=0.3,
    )


def batch(config: BlockConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    if isinstance(config, BertConfig):
        mask = torch.ones(3, 12, dtype=torch.long)
        mask[1, 7:] = 0
        return {"input_ids": torch.randint(0, 31, (3, 12)), "attention_mask": mask}
    assert isinstance(config, ResNetConfig)
    return {"pixels": torch.randn(3, config.image_channels, 16, 16, dtype=dtype)}


def train_a_little(network: torch.nn.Module, config: BlockConfig, dtype: torch.dtype) -> None:
    """Real steps, so that batch norms have statistics and weights are not those of the initialisation."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    network.train()
    for _ in range(4):
        logits = network(batch(config, dtype))
        torch.nn.functional.cross_entropy(logits.flatten(0, -2), torch.zeros(logits[..., 0].numel(), dtype=torch.long)).backward()
        optimizer.step()
        optimizer.zero_grad()


def bridged_pair(config: BlockConfig, outer: float, kind: str, dtype: torch.dtype, trained: bool) -> Bridged:
    torch.manual_seed(0)
    thin, wide = config.build().to(dtype), config.widen(1, outer, None).build().to(dtype)
    pairing = pair(config, wide.config, unit="stage" if kind == "free" else "block")
    bridges = make_bridges(thin, wide, pairing, kind, [batch(config, dtype) for _ in range(2)], rows=64)
    for bridge in bridges.values():
        bridge.to(dtype)
        if bridge.free_reduce is not None:
            # a free pair is anything but the identity once trained
            bridge.free_reduce.data += 0.3 * torch.randn_like(bridge.free_reduce)
    network = Bridged(thin, bridges)
    if trained:
        train_a_little(network, config, dtype)
    return network


def check(network: Bridged, config: BlockConfig, dtype: torch.dtype) -> None:
    merged = merge_and_check(network, batch(config, dtype))
    assert merged.difference <= TOLERANCE[dtype]
    assert merged.network.state_dict().keys() == config.build().state_dict().keys()


@FEW
@given(config=resnets(), outer=st.sampled_from([1.5, 2.0, 3.0]), kind=st.sampled_from(["auto", "constrained"]), trained=st.booleans())
def test_resnet_merges_exactly(config: ResNetConfig, outer: float, kind: str, trained: bool) -> None:
    check(bridged_pair(config, outer, kind, torch.float64, trained), config, torch.float64)


@FEW
@given(config=berts(), outer=st.sampled_from([2.0, 3.0]), kind=st.sampled_from(["auto", "constrained"]), trained=st.booleans())
def test_bert_merges_exactly(config: BertConfig, outer: float, kind: str, trained: bool) -> None:
    check(bridged_pair(config, outer, kind, torch.float64, trained), config, torch.float64)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        BertConfig(vocab_size=31, hidden_size=16, heads=2, layers=6, max_positions=12, norm="pre"),
        ResNetConfig(
            block="basic", stem="cifar", stem_channels=8, channels=(8, 16), depths=(3, 3), image_channels=3, image_size=16, classes=5
        ),
    ],
    ids=["bert", "resnet"],
)
def test_merges_in_single_precision(config: BlockConfig, trained: bool) -> None:
    check(bridged_pair(config, 2.0, "auto", torch.float32, trained), config, torch.float32)


def stages_with_projections() -> ResNetConfig:
    return ResNetConfig(stem="cifar", stem_channels=4, channels=(8, 16), depths=(2, 3), image_channels=3, image_size=16, classes=5)


def test_free_bridges_at_stage_boundaries_fold_and_change_the_weights() -> None:
    config = stages_with_projections()
    network = bridged_pair(config, 2.0, "free", torch.float64, trained=True)
    free = [name for name, bridge in network.bridges.items() if bridge.free]
    assert free == ["0", "2"], "the stem and the first stage end before a projection; the top has no block above it"
    merged = merge_and_check(network, batch(config, torch.float64))
    assert not torch.equal(merged.network.blocks[2].convs[0].weight, network.thin.blocks[2].convs[0].weight)
    # the control: without folding, the thin network is another function
    inputs = batch(config, torch.float64)
    network.eval()
    with torch.no_grad():
        assert (network.thin.eval()(inputs) - network(inputs)).abs().max() > 1e-3


def test_a_free_bridge_over_an_identity_skip_is_refused_by_name() -> None:
    config = stages_with_projections()
    thin, wide = config.build(), config.widen(1, 2, None).build()
    pairing = pair(config, wide.config)
    with pytest.raises(UserError, match=r"free bridge after block 1 cannot be merged exactly: the identity skip of block 2 \(stage 1\)"):
        bridge_kinds(thin, wide, pairing, "free")
    with pytest.raises(UserError, match=r"boundary 1 cannot be merged exactly.*narrow.bridge=auto or constrained"):
        merge(Bridged(thin, {1: Bridge(torch.randn(16, 8), free=True)}))
    bert = BertConfig(vocab_size=31, hidden_size=8, heads=2, layers=2)
    with pytest.raises(UserError, match=r"free bridge after the stem.*encoder layer 1"):
        bridge_kinds(bert.build(), bert.widen(1, 2, None).build(), pair(bert, bert.widen(1, 2, None)), "free")


def test_an_ill_conditioned_constrained_bridge_is_refused() -> None:
    config = stages_with_projections()
    expand = torch.randn(16, 8)
    expand[:, 1] = expand[:, 0]
    with pytest.raises(UserError, match="boundary 1 is ill-conditioned"):
        merge(Bridged(config.build(), {1: Bridge(expand, free=False)}))


def test_merging_leaves_the_bridged_network_as_it_was() -> None:
    config = stages_with_projections()
    network = bridged_pair(config, 2.0, "free", torch.float64, trained=False)
    before = copy.deepcopy(network.state_dict())
    merge(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_inner_widening_needs_no_bridges() -> None:
    for config in (stages_with_projections(), BertConfig(vocab_size=31, hidden_size=8, heads=2, layers=2)):
        wide = config.widen(4, 1, None)
        thin_network: BlockNetwork = config.build()
        assert make_bridges(thin_network, wide.build(), pair(config, wide), "auto", []) == {}
