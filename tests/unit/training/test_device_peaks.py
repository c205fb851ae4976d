"""What devices promise, by the names that they give themselves."""

import pytest

from wtn_pretrain.device import known_peak, peak_flops


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "tf32", 418),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA L4", "fp16", 121),
        ("NVIDIA L40S", "fp16", 362),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA GeForce RTX 4090", "tf32", 82.6),
        ("NVIDIA GB200", "bf16", 2500),
        ("A card of tomorrow", "bf16", None),
    ],
)
def test_peaks_by_name(name: str, precision: str, teraflops: float | None) -> None:
    assert known_peak(name, precision) == (None if teraflops is None else teraflops * 1e12)


def test_nothing_is_promised_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from wtn_pretrain import device

    monkeypatch.setattr(device, "device", lambda: torch.device("cpu"))
    assert peak_flops("bf16") is None
