"""How the command line of a tool ends, in a process of its own: its status, and what it says."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ROOT

FULL = "print('x' * 100000)"


@pytest.mark.parametrize(
    ("work", "reader", "status", "said"),
    [
        ("return 'done'", "cat", 0, ""),
        ("return 1", "cat", 1, ""),
        # all is done when nobody reads it
        ("return 'x' * 1000000", "true", 0, ""),
        ("import time; time.sleep(0.5); print('short'); return 1", "true", 1, ""),
        # whoever reads leaves while there is work left
        (f"import time; time.sleep(0.5); {FULL}; return 1", "true", 141, ""),
        # what breaks is not where it prints
        ("raise BrokenPipeError(32, 'a worker has gone')", "cat", 1, "a worker has gone"),
        ("raise UserError('a mistake')", "cat", 2, "error: a mistake\n"),
        ("import os; os.kill(os.getpid(), 2)", "cat", 130, "given up\n"),
    ],
    ids=["text", "a status", "text that nobody reads", "lines that nobody reads", "a reader that leaves", "a worker", "a mistake", "^C"],
)
def test_a_status_says_what_was_done(work: str, reader: str, status: int, said: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom wtn_pretrain.arguments import command\nfrom wtn_pretrain.errors import UserError\n"
        f"def work():\n    {work}\nsys.exit(command(work, interrupted='given up'))\n"
    )
    call = f"{sys.executable} {program} | {reader}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", call],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == status, done.stderr
    assert done.stderr == said if status != 1 or not said else said in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    program = "import sys; from wtn_pretrain.arguments import command; sys.exit(command(lambda: 'text'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    line = "error: standard output: cannot be written (No space left on device); send it elsewhere\n"
    assert (done.returncode, done.stderr) == (2, line)
