"""What is assumed of accelerators by name: the vendors' data sheets, and how much of it training reaches."""

from typing import NamedTuple

from wtn_pretrain.device import known_peak
from wtn_pretrain.errors import UserError
from wtn_pretrain.planning.cluster import Cluster, Link


class Accelerator(NamedTuple):
    """One device and its links, each way at once."""

    name: str
    """As `device.known_peak` knows it."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second to and from its memory."""
    inside: float
    """Bytes a second to the others of its node: NVLink or Infinity Fabric as data sheets have it, one way; PCIe for others."""
    between: float
    """Bytes a second to other nodes: one 400 Gb/s adapter a device (200 Gb/s up to A100), as in the vendors' reference nodes."""


ACCELERATORS = {
    "b200": Accelerator("B200", 180e9, 8.0e12, 900e9, 50e9),
    "h200": Accelerator("H200", 141e9, 4.8e12, 450e9, 50e9),
    "h100": Accelerator("H100", 80e9, 3.35e12, 450e9, 50e9),
    "h100-pcie": Accelerator("H100 PCIe", 80e9, 2.0e12, 64e9, 25e9),
    "a100": Accelerator("A100", 80e9, 2.04e12, 300e9, 25e9),
    "a100-40": Accelerator("A100", 40e9, 1.56e12, 300e9, 25e9),
    "v100": Accelerator("V100", 32e9, 0.9e12, 150e9, 12.5e9),
    "l40s": Accelerator("L40S", 48e9, 0.86e12, 32e9, 25e9),
    "mi300x": Accelerator("MI300X", 192e9, 5.3e12, 448e9, 50e9),
}
"""Data sheets: NVIDIA B200 (DGX), H200, H100, A100, V100, L40S; AMD Instinct MI300X."""

SHARE = 0.8
"""Of a link's bandwidth, what collectives reach."""
USE = {"text": 0.4, "images": 0.2}
"""Model FLOPs utilisation by what is trained on. NVIDIA's DeepLearningExamples reach 0.45 with BERT-Large at 128 tokens and 0.19 with
ResNet-50 on an A100, MLPerf's fastest ResNet-50 0.20 on an H200 (our division of their published rates by peak; see docs/tuning.md)."""
ROOM = 0.9
"""Share of a device's memory that a plan may fill: torch's allocator keeps pieces that fit nothing."""
RESERVE = 2e9
"""Bytes of a device that the driver, libraries and NCCL take."""
STEP = 1e-4
"""Seconds to start a block's pass, however few the rows."""


class Rates(NamedTuple):
    """What a rank reaches."""

    flops: float
    """FLOP a second in passes."""
    bandwidth: float
    """Bytes a second to and from its memory."""
    overhead: float = STEP


def accelerator(name: str) -> Accelerator:
    """By a name of `ACCELERATORS`.

    Raises:
        UserError: there is none of that name.
    """
    found = ACCELERATORS.get(name.lower())
    if found is None:
        raise UserError(f"--device {name}: not known; there are {', '.join(ACCELERATORS)}, or give --flops, --memory and the bandwidths")
    return found


def rates(device: Accelerator, precision: str, use: float) -> Rates:
    """What is reached of a device's peak in `precision` (fp32, tf32, bf16, fp16) at a utilisation of `use`.

    Raises:
        UserError: the device has no units for that.
    """
    peak = known_peak(device.name, precision)
    if peak is None:
        raise UserError(f"--device {device.name}: has no units for {precision}; choose another precision or device")
    return Rates(peak * use, device.bandwidth)


def cluster(device: Accelerator, ranks: int, per_node: int = 8) -> Cluster:
    """Nodes of such devices."""
    inside, between = Link(SHARE * device.inside, 5e-6), Link(SHARE * device.between, 1e-5)
    return Cluster(ranks, per_node, inside, between, memory=device.memory, base=int(RESERVE))
