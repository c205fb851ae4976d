"""What tests of several folders share."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import environment, free_port


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two ranks that have met once: on a fresh machine that compiles DeepSpeed's shared-memory collectives for minutes."""
    folder = tmp_path_factory.mktemp("two-ranks")
    script = folder / "meet.py"
    script.write_text(
        "import os\n"
        "os.environ.setdefault('DS_ACCELERATOR', 'cpu')\n"
        "import deepspeed.comm as dist\n"
        "dist.init_distributed('gloo', auto_mpi_discovery=False, verbose=False)\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    launcher = str(Path(sys.executable).parent / "deepspeed")
    call = [launcher, "--num_accelerators", "2", "--master_port", str(free_port()), str(script)]
    with subprocess.Popen(
        call, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=600)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-4000:]


@pytest.fixture(scope="session")
def one_rank() -> None:
    """This process as the only rank of a process group, which it keeps until it ends."""
    from wtn_pretrain.parallel.launch import start_ranks

    assert start_ranks().world_size == 1
