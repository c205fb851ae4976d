"""What a process frees on a CPU stays its own: steps fault no pages in again, and an allocator that the user has set is left alone."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from wtn_pretrain.device import keep_freed_memory

torch.set_num_threads(1)
print(keep_freed_memory())
def step():
    # 16 MiB each, freed from the top of the heap downwards as activations are
    kept = [torch.ones(2**22) for _ in range(8)]
    while kept:
        kept.pop()
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)
"""


def faults_of_a_step(**settings: str) -> tuple[bool, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment | settings, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library's settings")
def test_a_step_takes_no_page_from_the_kernel_again() -> None:
    kept, faults = faults_of_a_step()
    # a step makes 32768 pages of 4 KiB
    assert kept and faults < 1000
    # a threshold of 64 KiB, at which every tensor goes back to the kernel: what the test would see if nothing were kept
    kept, faults = faults_of_a_step(MALLOC_MMAP_THRESHOLD_="65536")
    assert not kept and faults > 4000
    # tunables that are none of the allocator's are no choice of one
    assert faults_of_a_step(GLIBC_TUNABLES="glibc.rtld.optional_static_tls=2000")[0]
    assert not faults_of_a_step(GLIBC_TUNABLES="glibc.malloc.tcache_count=7")[0]
