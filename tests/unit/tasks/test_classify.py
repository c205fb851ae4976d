"""Classification: soft targets against torch's, and what does not depend on them."""

import pytest
import torch
import torch.nn.functional as F

from wtn_pretrain.data.images import ImageData
from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.models import ResNetConfig
from wtn_pretrain.models.base import flops
from wtn_pretrain.tasks.classify import ClassifySection, ClassifyTask

SHAPE = ResNetConfig(block="basic", stem="cifar", channels=(4, 8), depths=(1, 1), stem_channels=4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mixed_loss_is_torchs_with_probabilities(smoothing: float) -> None:
    task = ClassifyTask(ClassifySection(label_smoothing=smoothing), ImageData(mixup=0.3, cutmix=1.0))
    torch.manual_seed(0)
    network = task.complete(SHAPE).build()
    batch = task.stream(16, steps=10, seed=0).micro_batch(0, 0)
    own, partner = (F.one_hot(batch[name], 10).float() for name in ("labels", "partner_labels"))
    share = batch["own_share"][:, None]
    logits = network(batch)
    expected = F.cross_entropy(logits, share * own + (1 - share) * partner, label_smoothing=smoothing)
    loss = task.loss(network, batch)["loss"]
    # the same terms, added in another order
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    weights = list(network.parameters())
    for one, other in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    # which the labels alone do not give
    assert not torch.isclose(loss, F.cross_entropy(logits, batch["labels"], label_smoothing=smoothing), rtol=1e-4)


def test_the_metric_counts_labels_alone() -> None:
    task = ClassifyTask(ClassifySection(label_smoothing=0.1), ImageData(mixup=0.3))
    network = task.complete(SHAPE).build().eval()
    batch = BatchStream(task.valid, 32, seed=0).micro_batch(0, 0)
    tally = task.tally(network, batch)
    logits = network(batch)
    assert tally["count"] == 32 and tally["right"] == (logits.argmax(1) == batch["labels"]).sum()
    torch.testing.assert_close(tally["loss"], F.cross_entropy(logits, batch["labels"], reduction="sum"))


def test_flops_follow_the_side_of_the_images() -> None:
    task = ClassifyTask(ClassifySection(), ImageData(size=16, sizes=((0.25, 8), (0.5, 12))))
    config = task.complete(SHAPE)
    assert config.image_size == 16 and task.forward_flops(config) == flops(config)
    sides = [stream["pixels"].shape[-1] for (stream,) in task.stream(4, steps=8, seed=0).iterate(0, 8)]
    assert sides == [8, 8, 12, 12, 16, 16, 16, 16]
    counted = [flops(config.model_copy(update={"image_size": side})).total for side in sides]
    assert [task.step_flops(config, step, 8).total for step in range(8)] == counted
    assert task.stage_flops(config, 8) == sum(counted) / 8
    # a classifier of few FLOPs apart, they go with the area
    assert counted[0] / counted[-1] == pytest.approx(1 / 4, rel=0.01)
    plain = ClassifyTask(ClassifySection(), ImageData(size=16))
    assert plain.stage_flops(config, 8) == flops(config).total and type(plain.stream(4, steps=8, seed=0)) is BatchStream


def test_networks_take_every_side() -> None:
    task = ClassifyTask(ClassifySection(), ImageData(size=16, sizes=((0.5, 9),)))
    network = task.complete(SHAPE).build()
    for (batch,) in task.stream(4, steps=2, seed=0).iterate(0, 2):
        task.loss(network, batch)["loss"].backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
