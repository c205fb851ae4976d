"""What a site uncomments in `scripts/slurm/common.sh`, modules and containers, under a real Slurm (`slurm.py`)."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cluster.hosts import Host
from tests.cluster.slurm import NODES, Slurm, slurm, told, until_step, why_no_slurm
from tests.running import BERT, ROOT, recipe, steps_logged, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm() or "Slurm is here")]

MODULES = Path("/etc/profile.d/modules.sh")
"""Where Debian's environment-modules defines `module`."""
LONG = {"wide.steps": 100000, "wide.checkpoint_every": 100000}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as made:
        yield made


def site(folder: Path, heading: str) -> Path:
    """A copy of the project with the lines below a heading of common.sh uncommented, as an editor does it."""
    copy = folder / "project"
    for name in ("scripts", "wtn_pretrain", "ds_configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    common = copy / "scripts/slurm/common.sh"
    lines, within, changed = common.read_text().splitlines(), False, 0
    for number, line in enumerate(lines):
        within = line.startswith(f"# {heading}") or (within and line.startswith("#   "))
        if within and line.startswith("#   "):
            lines[number], changed = line.removeprefix("#   "), changed + 1
    assert changed, f"{common} has no lines below {heading}"
    common.write_text("\n".join(lines) + "\n")
    return copy


def sbatch(cluster: Slurm, copy: Path, folder: Path, environment: dict[str, str]) -> int:
    """Submits stage 1 for two nodes of one rank, from a folder with the recipe and a shell that has only `environment` to pass on."""
    kept = {
        name: cluster.environment[name] for name in ("PATH", "SLURM_CONF", "DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HOME")
    }
    given = [f"{name}={value}" for name, value in {**kept, "WTN_ROOT": str(copy), **environment}.items()]
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=20"]
    script = str(copy / "scripts/slurm/wide.sbatch")
    call = ["env", "-i", *given, "sbatch", "--parsable", *options, script, "--config", "recipe.yaml"]
    return int(cluster.succeed(*call, cwd=folder).split(";")[0])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder that a job is submitted from, apart from the project's."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def modulefiles(tmp_path: Path) -> Path:
    """Modules named as in the shipped line; one sets a variable and brings a python of its own, which is no good."""
    files, tools = tmp_path / "modulefiles", tmp_path / "tools"
    files.mkdir()
    tools.mkdir()
    (tools / "python").write_text("#!/bin/sh\necho 'error: the python of a module'\nexit 2\n")
    (tools / "python").chmod(0o755)
    # only Python's own environment can come first again
    path = f"prepend-path PATH {tools}\n" if (Path(sys.prefix) / "bin/activate").exists() else ""
    (files / "cuda").write_text(f"#%Module1.0\n{path}prepend-path PYTHONPATH {tools}\n")
    (files / "nccl").write_text("#%Module1.0\nsetenv NCCL_DEBUG OF_A_MODULE\n")
    # the ranks, and whatever other python they start, say what has reached them
    said = "import os, sys\nprint('NCCL_DEBUG', os.environ.get('NCCL_DEBUG'), 'in', os.environ.get('SLURM_STEP_ID'), flush=True)\n"
    (tools / "sitecustomize.py").write_text(said)
    return files


@pytest.mark.skipif(not MODULES.exists(), reason="environment-modules is not installed; bash scripts/cluster_tests.sh installs it")
@pytest.mark.parametrize("defined", [False, True], ids=["by-the-script", "exported"])
def test_modules_reach_the_ranks(defined: bool, cluster: Slurm, modulefiles: Path, run: Path, tmp_path: Path) -> None:
    """The function `module` may come with the environment of the shell that submits, or not at all."""
    copy = site(tmp_path, "Modules")
    write_recipe(run / "recipe.yaml", recipe(BERT))
    environment = {"MODULEPATH": str(modulefiles), "VIRTUAL_ENV": sys.prefix}
    if defined:
        shell = subprocess.run(["bash", "-c", f"source {MODULES}; env -0"], capture_output=True, text=True, check=True)
        pairs = (pair.partition("=") for pair in shell.stdout.split("\0"))
        functions = {name: value for name, _, value in pairs if name.startswith(("BASH_FUNC_", "MODULES_CMD"))}
        assert any("module%%" in name for name in functions)
        environment |= functions
    job = sbatch(cluster, copy, run, environment)
    assert cluster.wait(job)["JobState"] == "COMPLETED", told(run, job)
    for name in ("0-0.log", "1-1.log"):
        assert "NCCL_DEBUG OF_A_MODULE in 0" in (run / f"logs/wide-{job}" / name).read_text(), told(run, job)


@pytest.mark.skipif(not MODULES.exists(), reason="environment-modules is not installed; bash scripts/cluster_tests.sh installs it")
def test_a_module_that_is_not_there_ends_the_job(cluster: Slurm, modulefiles: Path, run: Path, tmp_path: Path) -> None:
    (modulefiles / "nccl").unlink()
    copy = site(tmp_path, "Modules")
    write_recipe(run / "recipe.yaml", recipe(BERT))
    job = sbatch(cluster, copy, run, {"MODULEPATH": str(modulefiles)})
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0"), told(run, job)
    said = (run / f"wide-{job}.out").read_text()
    assert "nccl" in said and "submit from the project's folder" not in said, said
    assert not (run / "logs").exists()


IMAGE = """Bootstrap: scratch
%setup
  cd "$APPTAINER_ROOTFS"
  mkdir -p usr etc proc sys dev tmp var/tmp root home
  for link in bin sbin lib lib64; do ln -s "usr/$link" "$link"; done
%environment
  export PATH={path}:/usr/bin:/bin PYTHONPATH=/of/the/image
"""
"""An image whose programs are this machine's, bound from outside; the folders of a run are common.sh's to bind."""


class Container(NamedTuple):
    """A runtime, and how common.sh is to find it."""

    heading: str
    environment: dict[str, str]


@pytest.fixture(params=["Apptainer", "Bubblewrap"])
def container(request: pytest.FixtureRequest, tmp_path: Path) -> Container:
    """An environment in which the shipped line works: a home with the image, and what the image needs from this machine."""
    program = {"Apptainer": "apptainer", "Bubblewrap": "bwrap"}[request.param]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed; bash scripts/cluster_tests.sh installs it where Debian has it")
    home = tmp_path / "home"
    home.mkdir()
    if program == "bwrap":
        # the image is this machine
        (home / "wtn").symlink_to("/")
        return Container(request.param, {"HOME": str(home)})
    binds = {"/usr", "/etc", "/opt", sys.prefix, sys.base_prefix}
    (tmp_path / "wtn.def").write_text(IMAGE.format(path=Path(sys.executable).parent))
    subprocess.run(["apptainer", "build", "--force", home / "wtn.sif", tmp_path / "wtn.def"], check=True, capture_output=True)
    # root of a container of its own has not all the rights that Apptainer would keep; no folder of the run is to be seen by way of /tmp
    given = {"APPTAINER_NO_PRIVS": "1", "APPTAINER_NO_MOUNT": "tmp", "APPTAINER_BIND": ",".join(sorted(binds))}
    return Container(request.param, {"HOME": str(home), **given})


def ranks(cluster: Slurm) -> list[tuple[Host, int]]:
    """The ranks' processes and their hosts, also where a container counts its processes by itself."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, left = [], [(cluster.hosts[name], cluster.hosts[name].pid) for name in NODES]
    while left:
        host, pid = left.pop()
        left += [(host, child) for child in children.get(pid, [])]
        with contextlib.suppress(OSError):
            call = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if Path(os.fsdecode(call[0])).name.startswith("python") and any(word.endswith(b"train_wide.py") for word in call):
                found.append((host, pid))
    return found


def contained(cluster: Slurm) -> bool:
    """Whether there is a rank on each node, and all see other mounts than their node does."""
    found = ranks(cluster)
    inside = [os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink(f"/proc/{host.pid}/ns/mnt") for host, pid in found]
    return {host.name for host, _ in found} == set(NODES) and all(inside)


def test_a_container_is_told_to_end_and_continues(cluster: Slurm, container: Container, run: Path, tmp_path: Path) -> None:
    """The signal ahead of a limit; then taken from its nodes; then cancelled, after which no process is left."""
    copy = site(tmp_path, container.heading)
    write_recipe(run / "recipe.yaml", recipe(BERT, LONG))
    job = sbatch(cluster, copy, run, container.environment)
    step = 0
    for by, call in (("SIGUSR1", ["scancel", "--signal=USR1"]), ("SIGTERM", ["scontrol", "requeue"])):
        until_step(cluster, run, job, step + 5)
        assert contained(cluster)
        cluster.succeed(*call, str(job), cwd=run)
        cluster.wait(job, "PENDING", "REQUEUED")
        left = re.findall(rf"left after step (\d+) of 100000 on {by}, all saved", told(run, job))
        assert left, told(run, job)
        step = int(left[-1])
        assert (run / f"runs/bert/wide/checkpoints/step{step}").is_dir()
        assert not ranks(cluster)
        cluster.wait(job, "RUNNING")
    until_step(cluster, run, job, step + 5)
    cluster.succeed("scancel", str(job), cwd=run)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    assert cluster.facts(job)["Restarts"] == "2", told(run, job)
    assert not ranks(cluster)
    steps = steps_logged(run / "runs/bert/wide")
    assert steps == list(range(1, len(steps) + 1))


def test_a_mistake_in_a_container_fails_the_job(cluster: Slurm, container: Container, run: Path, tmp_path: Path) -> None:
    copy = site(tmp_path, container.heading)
    write_recipe(run / "recipe.yaml", recipe(BERT, {"data.source": "files", "data.paths": ["nowhere.txt"]}))
    job = sbatch(cluster, copy, run, container.environment)
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0"), told(run, job)
    assert "nowhere.txt" in (run / f"wide-{job}.out").read_text()
