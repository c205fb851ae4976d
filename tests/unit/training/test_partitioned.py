"""Under ZeRO 3 DeepSpeed is handed a network of which every parameter has left its part already."""

from typing import Any

import deepspeed
import pytest
import torch

from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.tasks.base import TaskModule
from wtn_pretrain.training.config import TrainSection
from wtn_pretrain.training.engine import gathered_state, start_engine


class Nothing:
    """In the place of a task that is not asked."""


@pytest.mark.parametrize(("file", "precision"), [("zero3", "fp32"), ("zero3_offload", "fp32"), ("zero3", "bf16_weights")])
def test_the_network_is_never_whole(file: str, precision: str, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = BertConfig(vocab_size=64, hidden_size=16, layers=2, heads=2, max_positions=8).build()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    handed: list[tuple[int, set[torch.dtype], int]] = []
    plain = deepspeed.initialize

    def initialize(*arguments: Any, **settings: Any) -> Any:
        parameters = list(settings["model"].parameters())
        dtypes = {parameter.ds_tensor.dtype for parameter in parameters}
        handed.append((max(parameter.numel() for parameter in parameters), dtypes, sum(parameter.ds_numel for parameter in parameters)))
        return plain(*arguments, **settings)

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    section = TrainSection(batch_size=2, precision=precision, deepspeed=f"ds_configs/{file}.json")
    engine = start_engine(TaskModule(network, Nothing()), section, "wide", 1, 1)  # type: ignore[arg-type]
    ((largest, dtypes, elements),) = handed
    assert largest == 0
    assert dtypes == {torch.float32 if precision == "fp32" else torch.bfloat16}
    assert elements == sum(value.numel() for name, value in before.items() if name != "head.decoder")
    # biases and norms do not decay: they were told from matrices while they had their shapes
    matrices = [{len(parameter.ds_shape) >= 2 for parameter in group} for group in engine.optimizer.fp16_groups]
    assert matrices == [{True}, {False}]
    assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [0.01, 0.0]
    state = gathered_state(engine, network)
    assert state is not None
    for name, value in before.items():
        torch.testing.assert_close(state[name], value if precision == "fp32" else value.bfloat16().float(), rtol=0, atol=0)
    engine.destroy()
