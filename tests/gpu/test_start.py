"""What a start asks of this machine's accelerator."""

import torch

from tests.gpu.accelerator import needed
from wtn_pretrain.device import peak_memory
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.training.config import TrainSection
from wtn_pretrain.training.engine import deepspeed_config
from wtn_pretrain.training.partitioned import partition

pytestmark = needed


def test_weights_for_host_memory_pass_the_device_one_by_one(one_rank: None) -> None:
    network = BertConfig(vocab_size=30528, hidden_size=1024, layers=24, heads=16).build()
    whole = 4 * sum(value.numel() for value in network.parameters())
    config = deepspeed_config(TrainSection(batch_size=2, deepspeed="ds_configs/zero3_offload.json"), "wide", 1, 1)
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    partition(network, config)
    held = peak_memory() - before
    print(f"{held / 2**20:.0f} MiB of {whole / 2**20:.0f} MiB")
    # the word embedding is a tenth of all, and may be there twice
    assert 0 < held < whole / 4
