"""What tests of whole runs share: small recipes, the real scripts started as a user starts them, and what they leave behind."""

import contextlib
import copy
import importlib.util
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from wtn_pretrain.config import validate
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.parallel.preemption import Notice
from wtn_pretrain.recipe import Recipe
from wtn_pretrain.stages import Stages

ROOT = Path(__file__).resolve().parents[1]

BERT: dict[str, Any] = {
    "run": {"name": "bert", "seed": 3},
    "model": {
        "family": "bert",
        "hidden_size": 32,
        "layers": 3,
        "heads": 2,
        "intermediate_size": 64,
        "max_positions": 32,
        "norm": "pre",
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "widen": {"inner": 2},
    "task": {"kind": "mlm"},
    "data": {"kind": "text", "source": "pydoc", "vocab_size": 256, "sequence_length": 24, "limit_mb": 0.05, "valid_fraction": 0.1},
    "wide": {"steps": 20, "batch_size": 16, "clip": 0.5, "log_every": 1, "optimizer": {"lr": 1e-2}, "schedule": {"warmup": 4}},
    "narrow": {"steps": 20, "batch_size": 16, "log_every": 1, "optimizer": {"lr": 2e-3}},
    "finetune": {"steps": 20, "batch_size": 16, "log_every": 1, "optimizer": {"lr": 1e-3}},
}
"""A tiny pre-LN BERT on the language reference inside Python: seconds a stage."""

RESNET: dict[str, Any] = {
    "run": {"name": "resnet", "seed": 5},
    "model": {"family": "resnet", "block": "basic", "stem": "cifar", "stem_channels": 8, "channels": [8, 16], "depths": [2, 1]},
    "widen": {"inner": 2},
    "task": {"kind": "classify"},
    "data": {"kind": "images", "source": "digits", "shift": 1},
    "wide": {
        "steps": 20,
        "batch_size": 32,
        "clip": 0.5,
        "log_every": 1,
        "optimizer": {"name": "sgd", "lr": 0.2, "weight_decay": 5e-4},
        "schedule": {"name": "cosine", "warmup": 4},
    },
    "narrow": {"steps": 20, "batch_size": 32, "log_every": 1, "optimizer": {"lr": 2e-3}},
    "finetune": {"steps": 20, "batch_size": 32, "log_every": 1, "optimizer": {"name": "sgd", "lr": 0.02}},
}
"""A tiny ResNet of basic blocks on scikit-learn's digits."""


def recipe(base: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A copy of a recipe with `section.key` -> value changed; a value of None removes the key."""
    tree = copy.deepcopy(dict(base))
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = copy.deepcopy(value)
    return tree


def write_recipe(path: Path, tree: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(tree), sort_keys=False), encoding="utf-8")
    return path


def stages_here(tree: Mapping[str, Any]) -> Stages:
    """A run in this process, which goes on listening to its own signals."""
    with contextlib.closing(Notice()) as notice:
        return Stages(validate(Recipe, dict(tree)), Place(0, 1), notice)


def compiled(op: str) -> bool:
    """Whether DeepSpeed has compiled an op for this environment, which takes minutes at first use: tests wait for that only if WTN_COMPILE
    is set."""
    if os.environ.get("WTN_COMPILE"):
        return True
    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None:
        return False
    here, installed = str(Path(found.origin).parent), Path(found.origin).stat().st_ctime
    builds = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions")).rglob(f"{op}*.so")
    # what was built of another environment's sources, or before these were installed, would be built again
    return any(
        here in (built.parent / "build.ninja").read_text() and built.stat().st_mtime > installed
        for built in builds
        if (built.parent / "build.ninja").exists()
    )


@contextlib.contextmanager
def no_room(size: int) -> Iterator[None]:
    """Lets no file of this process grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def free_port() -> int:
    """A port that nobody listens on, and that no outgoing connection takes meanwhile, as those have higher ones."""
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def environment() -> dict[str, str]:
    """This environment without a launcher's marks, offline, one thread a rank, and with the tools beside this Python on the path."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }


def command(script: str, config: Path, *overrides: str, ranks: int = 1) -> list[str]:
    """The command line of a script of the repository, under DeepSpeed's launcher where there are ranks to start."""
    call = [str(ROOT / "scripts" / script), "--config", str(config), *overrides]
    if ranks == 1:
        return [sys.executable, *call]
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_accelerators", str(ranks), "--master_port", str(free_port()), *call]


def start(
    script: str, config: Path, *overrides: str, ranks: int = 1, timeout: float = 240, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end, in the folder of its configuration unless told; the whole process group ends with the time allowed."""
    process = subprocess.Popen(
        command(script, config, *overrides, ranks=ranks),
        cwd=cwd or config.parent,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"{script} did not end in {timeout} s\n{out[-2000:]}\n{err[-2000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def succeed(
    script: str, config: Path, *overrides: str, ranks: int = 1, timeout: float = 240, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`start`, which must exit with 0."""
    done = start(script, config, *overrides, ranks=ranks, timeout=timeout, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def kill_at(script: str, config: Path, *overrides: str, stage: Path, step: int, ranks: int = 1, timeout: float = 240) -> int:
    """Starts a script and kills it (SIGKILL, every process) once `stage` has logged `step`; returns the last step that was logged."""
    process = subprocess.Popen(
        command(script, config, *overrides, ranks=ranks),
        cwd=config.parent,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # who watches must come first where cores are few
        preexec_fn=lambda: os.nice(5),
    )
    deadline = time.monotonic() + timeout
    try:
        while max(steps_logged(stage), default=0) < step:
            assert process.poll() is None, f"{script} ended before it logged step {step}"
            assert time.monotonic() < deadline, f"{script} did not log step {step} in {timeout} s"
            time.sleep(0.005)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return max(steps_logged(stage))


class Started:
    """Ranks that a `Forge` has started."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder, self._ranks = folder, ranks
        self.began = time.monotonic()

    def pids(self) -> list[int]:
        """The process number of every rank."""
        return self._read("pids", 30)

    def kill(self, *ranks: int, by: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to some of the ranks, to all if none is given; those that have ended are left alone."""
        pids = self.pids()
        for rank in ranks or range(self._ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[rank], by)

    def stderr(self) -> str:
        path = self._folder / "stderr"
        return path.read_text() if path.exists() else ""

    def codes(self, timeout: float = 120) -> list[int]:
        """Waits for the end of all ranks; their exit codes."""
        return self._read("codes", timeout)

    def succeed(self, timeout: float = 120) -> None:
        """Waits for all ranks, which must exit with 0."""
        codes = self.codes(timeout)
        assert not any(codes), f"{codes}\n{self.stderr()[-6000:]}"

    def ended(self) -> bool:
        return (self._folder / "codes").exists()

    def seconds(self) -> float:
        """From the start of all ranks to the end of the last one, which has ended."""
        return (self._folder / "codes").stat().st_mtime - (self._folder / "pids").stat().st_mtime

    def errors(self) -> list[str]:
        """What the ranks say on standard error beside their progress."""
        return [line for line in self.stderr().splitlines() if line.strip() and not line.startswith(("narrow", "wide"))]

    def _read(self, name: str, timeout: float) -> list[int]:
        path = self._folder / name
        deadline = time.monotonic() + timeout
        while not path.exists():
            if time.monotonic() > deadline:
                if name == "codes":
                    self.kill()
                raise AssertionError(f"no {name} in {timeout} s\n{self.stderr()[-4000:]}")
            time.sleep(0.01)
        return json.loads(path.read_text())


def reached(started: Started, stage: Path, step: int, when: Callable[[], bool] = lambda: True, timeout: float = 90) -> None:
    """Waits until a stage has logged a step, and `when` holds."""
    deadline = time.monotonic() + timeout
    while max(steps_logged(stage), default=0) < step or not when():
        assert not started.ended(), started.stderr()[-4000:]
        assert time.monotonic() < deadline, f"step {step} was not logged in {timeout} s\n{started.stderr()[-4000:]}"
        time.sleep(0.005)


class Forge:
    """Starts ranks without a launcher, as forks of one process that has imported everything (`forge.py`): seconds faster than anew."""

    def __init__(self, folder: Path, variables: Mapping[str, str] | None = None) -> None:
        """`variables`: more of the environment of all that it starts."""
        self._folder, self._count = folder, 0
        self._started: list[Started] = []
        # gloo, whatever this machine has
        env = {**environment(), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", **(variables or {})}
        call = [sys.executable, str(ROOT / "tests" / "forge.py")]
        self._process = subprocess.Popen(call, env=env, cwd=folder, stdin=subprocess.PIPE, text=True)

    def start(
        self,
        script: str,
        config: Path,
        *overrides: str,
        ranks: int = 1,
        each: Sequence[Sequence[str]] = (),
        variables: Mapping[str, str] | None = None,
    ) -> Started:
        """Starts `ranks` ranks of a script of the repository; `each`: further arguments of every rank; `variables`: of the environment."""
        arguments = ["--config", str(config), *overrides]
        return self.program(ROOT / "scripts" / script, *arguments, cwd=config.parent, ranks=ranks, each=each, variables=variables)

    def program(
        self,
        program: Path,
        *arguments: str,
        cwd: Path,
        ranks: int = 1,
        each: Sequence[Sequence[str]] = (),
        variables: Mapping[str, str] | None = None,
    ) -> Started:
        """Starts `ranks` ranks of any program."""
        assert self._process.poll() is None, "the forge has ended"
        folder = self._folder / str(self._count)
        folder.mkdir()
        self._count += 1
        job = {
            "script": str(program),
            "arguments": arguments,
            "ranks": ranks,
            "each": [list(more) for more in each] or [[]] * ranks,
            "environment": {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **(variables or {})},
            "cwd": str(cwd),
            "folder": str(folder),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        started = Started(folder, ranks)
        self._started.append(started)
        return started

    def close(self) -> None:
        """Ends the forge, and whatever is left of what it has started."""
        for started in self._started:
            if not started.ended():
                started.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def records(stage: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The records of a stage's `metrics.jsonl`, without a line that a kill cut short."""
    path = stage / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if record["kind"] == kind]


def steps_logged(stage: Path) -> list[int]:
    return [record["step"] for record in records(stage)]


def losses(stage: Path) -> list[float]:
    """The loss of every step from 1 on; each step must be there once."""
    found = records(stage)
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return [record["loss"] for record in found]


def weights(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(stage / "model.safetensors")


def equal_bits(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def error_lines(stderr: str, launched: bool = False) -> list[str]:
    """What a script says on standard error, without the warnings of libraries that say something on every start."""
    noise: Sequence[str] = ("[launch.py:", "[runner.py:", "launch.py:", "exits with return code") if launched else ()
    return [line for line in stderr.splitlines() if line.strip() and not any(mark in line for mark in noise)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, byte by byte, but for the one that says who works there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
