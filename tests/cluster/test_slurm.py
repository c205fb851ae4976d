"""The shipped batch scripts under a real Slurm of two nodes on this machine: slurmctld, slurmd, munged and namespaces (`slurm.py`)."""

import re
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cluster.slurm import CPUS, Slurm, slurm, told, until_step, why_no_slurm
from tests.running import BERT, ROOT, Forge, equal_bits, losses, recipe, steps_logged, weights, write_recipe
from wtn_pretrain.parallel.launchers import expand_hosts

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm() or "Slurm is here")]

SMALL = ["--gpus-per-node=0", "--cpus-per-task=1", "--time=20"]
"""What the shipped scripts ask for, brought down to this machine."""
LONG = {"wide.steps": 300, "wide.checkpoint_every": 250}
"""The checkpoint of its own comes late, so that what continues is the one that the signal asked for."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as made:
        yield made


def sbatch(cluster: Slurm, folder: Path, stage: str, *arguments: str, options: tuple[str, ...] = ()) -> int:
    """Submits a shipped batch script for two nodes of one rank, from a folder that holds the recipe."""
    cluster.environment["WTN_ROOT"] = str(ROOT)
    call = ["--nodes=2", "--ntasks-per-node=1", *SMALL, *options, str(ROOT / "scripts/slurm" / f"{stage}.sbatch")]
    return cluster.submit(*call, "--config", "recipe.yaml", *arguments, cwd=folder)


def submit(cluster: Slurm, folder: Path, *arguments: str, ranks: int = 1) -> str:
    """tools/submit.py for two nodes of `ranks` ranks, followed to the end of its jobs, which must succeed."""
    call = ["python", str(ROOT / "tools/submit.py"), "recipe.yaml", "--nodes", "2", "--ranks-per-node", str(ranks)]
    return cluster.succeed(*call, "--gpus-per-node", "0", "--time", "20", *arguments, cwd=folder, timeout=600)


def test_lists_of_hosts_are_read_as_slurm_does(cluster: Slurm) -> None:
    lists = ["n1", "n[1-3]", "n[01-03,7],login", "gpu-a[08-11,100]-ib[0-1],x", "a,b,c[2]", "r[1-2]n[09-10]"]
    for nodes in lists:
        assert list(expand_hosts(nodes)) == cluster.succeed("scontrol", "show", "hostnames", nodes, cwd=cluster.folder).split()


def test_two_nodes_give_the_loss_curve_of_two_processes(cluster: Slurm, forge: Forge, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    folder = tmp_path / "there"
    folder.mkdir()
    plain = forge.start("train_wide.py", write_recipe(tmp_path / "here" / "recipe.yaml", recipe(BERT)), ranks=2)
    write_recipe(folder / "recipe.yaml", recipe(BERT))
    job = sbatch(cluster, folder, "wide")
    facts = cluster.wait(job)
    assert facts["JobState"] == "COMPLETED", told(folder, job)
    # a log each of node 0 with rank 0 and node 1 with rank 1; the first says who has met
    first, second = ((folder / "logs" / f"wide-{job}" / name).read_text() for name in ("0-0.log", "1-1.log"))
    assert re.search(r"^2 ranks on 2 hosts, started by srun; rank 0 at n1:\d+; gloo$", first, re.MULTILINE), first
    assert "hosts" not in second
    plain.succeed()
    stages = [tmp_path / place / "runs/bert/wide" for place in ("here", "there")]
    assert losses(stages[0]) == losses(stages[1])
    assert equal_bits(weights(stages[0]), weights(stages[1]))


def test_the_whole_chain(cluster: Slurm, tmp_path: Path) -> None:
    write_recipe(tmp_path / "recipe.yaml", recipe(BERT, {"export.formats": ["hf"], "narrow.plan": "0-1,2-3"}))
    said = submit(cluster, tmp_path, "--chain")
    jobs = [int(number) for number in re.findall(r"^(?:wide|imitate|finetune|method): job (\d+)", said, re.MULTILINE)]
    assert len(jobs) == 4 and re.search(rf"^imitate: job {jobs[1]} after {jobs[0]}", said, re.MULTILINE), said
    facts = [cluster.facts(job) for job in jobs]
    assert [fact["JobState"] for fact in facts] == ["COMPLETED"] * 4
    assert all(before["EndTime"] <= after["StartTime"] for before, after in pairwise(facts))
    assert (tmp_path / "runs/bert/summary.json").exists()
    # followed: states, and what the first rank says
    assert f"job {jobs[1]}: pending (Dependency)" in said or f"job {jobs[1]}: running" in said
    assert said.count("  2 ranks on 2 hosts, started by srun;") == 4
    assert re.search(r"^#SBATCH --mem=\d+M$", (tmp_path / "runs/bert/slurm/imitate.sbatch").read_text(), re.MULTILINE)


def test_a_failed_stage_cancels_those_after_it(cluster: Slurm, tmp_path: Path) -> None:
    """The shell's chain; the first stage's data is not there."""
    write_recipe(tmp_path / "recipe.yaml", recipe(BERT, {"data.source": "files", "data.paths": ["nowhere.txt"]}))
    cluster.environment |= {"WTN_ROOT": str(ROOT), "SBATCH_GPUS_PER_NODE": "0"}
    try:
        call = ["env", "SBATCH_TIMELIMIT=20", "bash", str(ROOT / "scripts/slurm/chain.sh"), "--config", "recipe.yaml"]
        # the scripts ask for 8 ranks on a node; these nodes have fewer cores
        smaller = tmp_path / "bin"
        smaller.mkdir()
        (smaller / "sbatch").write_text('#!/bin/sh\nexec /usr/bin/sbatch --nodes=2 --ntasks-per-node=1 --cpus-per-task=1 "$@"\n')
        (smaller / "sbatch").chmod(0o755)
        said = cluster.succeed("env", f"PATH={smaller}:{cluster.environment['PATH']}", *call, cwd=tmp_path)
    finally:
        del cluster.environment["SBATCH_GPUS_PER_NODE"]
    jobs = [int(number) for number in re.findall(r": job (\d+)", said)]
    states = [cluster.wait(job)["JobState"] for job in jobs]
    assert states == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"], told(tmp_path, jobs[0])
    # said once, by one rank, and repeated where the job's own log is
    lines = [line for path in (tmp_path / "logs").rglob("*.log") for line in path.read_text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "nowhere.txt" in lines[0], told(tmp_path, jobs[0])
    assert lines[0] in (tmp_path / f"wide-{jobs[0]}.out").read_text()


def test_an_array(cluster: Slurm, tmp_path: Path) -> None:
    write_recipe(tmp_path / "recipe.yaml", recipe(BERT))
    said = submit(cluster, tmp_path, "--stage", "wide", "--vary", "wide.optimizer.lr=1e-2,2e-2")
    assert re.search(r"^job \d+: completed", said, re.MULTILINE), said
    runs = sorted(path.parent.parent.name for path in tmp_path.glob("runs/*/wide/done.json"))
    assert runs == ["bert-lr-1e-2", "bert-lr-2e-2"]
    assert losses(tmp_path / "runs" / runs[0] / "wide")[-1] != losses(tmp_path / "runs" / runs[1] / "wide")[-1]


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Slurm, tmp_path: Path) -> None:
    write_recipe(tmp_path / "recipe.yaml", recipe(BERT, {**LONG, "wide.steps": 3000, "wide.checkpoint_every": 3000}))
    job = sbatch(cluster, tmp_path, "wide")
    until_step(cluster, tmp_path, job, 5)
    cluster.succeed("scancel", str(job), cwd=tmp_path)
    facts = cluster.wait(job)
    assert facts["JobState"] == "CANCELLED" and facts["Restarts"] == "0"
    assert all(cluster.hosts[name].empty("train_wide.py") for name in ("n1", "n2"))
    time.sleep(3)
    assert cluster.facts(job)["JobState"] == "CANCELLED"
    assert re.search(r"left after step \d+ of 3000 on SIGTERM, all saved", told(tmp_path, job)), told(tmp_path, job)


@pytest.mark.parametrize("how", ["signal", "requeue", "urgent"])
def test_a_preempted_job_continues_bit_for_bit(how: str, cluster: Slurm, forge: Forge, tmp_path: Path) -> None:
    """Told by the signal that Slurm sends ahead of a limit, taken from its nodes and put back by an operator, or by Slurm itself since a
    job of higher priority wants them; each reaches all processes, those that load data too."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        write_recipe(folder / "recipe.yaml", recipe(BERT, {**LONG, "data.workers": 1}))
    job = sbatch(cluster, there, "wide")
    # as the next stage of a chain waits
    after = [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--job-name=next", "--output=%x-%j.out", "--wrap=true"]
    following = cluster.submit(*after, cwd=there)
    until_step(cluster, there, job, 20)
    if how == "signal":
        cluster.succeed("scancel", "--signal=USR1", str(job), cwd=there)
    elif how == "requeue":
        cluster.succeed("scontrol", "requeue", str(job), cwd=there)
    else:
        call = ["--partition=urgent", "--nodes=2", "--ntasks-per-node=4", "--job-name=urgent", "--output=%x-%j.out", "--wrap=sleep 5"]
        urgent = cluster.submit(*call, cwd=there)
    cluster.wait(job, "PENDING", "REQUEUED")
    if how == "urgent":
        assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    by = "SIGUSR1" if how == "signal" else "SIGTERM"
    said = told(there, job)
    left = re.search(rf"left after step (\d+) of 300 on {by}, all saved", said)
    assert left, said
    step = int(left[1])
    assert 20 <= step < 250 and (there / f"runs/bert/wide/checkpoints/step{step}").is_dir()
    facts = cluster.wait(job)
    assert facts["JobState"] == "COMPLETED" and facts["Restarts"] == "1", told(there, job)
    then = cluster.wait(following)
    assert then["JobState"] == "COMPLETED" and then["StartTime"] >= facts["EndTime"]
    forge.start("train_wide.py", here / "recipe.yaml", ranks=2).succeed(240)
    stages = [place / "runs/bert/wide" for place in (here, there)]
    assert losses(stages[0]) == losses(stages[1])
    assert equal_bits(weights(stages[0]), weights(stages[1]))


def test_a_job_leaves_ahead_of_its_time_limit(cluster: Slurm, tmp_path: Path) -> None:
    """A limit of two minutes; Slurm sends its signal 45 s before, or up to a minute earlier."""
    write_recipe(tmp_path / "recipe.yaml", recipe(BERT, {"wide.steps": 100000, "wide.checkpoint_every": 100000}))
    job = sbatch(cluster, tmp_path, "wide", options=("--time=2", "--signal=USR1@45"))
    try:
        cluster.wait(job, "RUNNING")
        cluster.wait(job, "PENDING", "REQUEUED")
        left = re.search(r"left after step (\d+) of 100000 on SIGUSR1, all saved", told(tmp_path, job))
        assert left and "told to end, all saved: back into the queue" in told(tmp_path, job), told(tmp_path, job)
        assert (tmp_path / f"runs/bert/wide/checkpoints/step{left[1]}").is_dir()
        # the next start has as long again
        cluster.wait(job, "RUNNING")
        until_step(cluster, tmp_path, job, int(left[1]) + 5)
        assert cluster.facts(job)["Restarts"] == "1"
    finally:
        cluster.succeed("scancel", str(job), cwd=tmp_path)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    steps = steps_logged(tmp_path / "runs/bert/wide")
    assert steps == list(range(1, len(steps) + 1))


def test_a_job_that_loses_a_rank_continues(cluster: Slurm, tmp_path: Path) -> None:
    """A rank killed as the kernel does where memory is short; lost again, the job has had its starts and fails."""
    write_recipe(tmp_path / "recipe.yaml", recipe(BERT, {**LONG, "wide.steps": 100000, "wide.checkpoint_every": 10}))
    cluster.environment["WTN_LOST"] = "1"
    try:
        job = sbatch(cluster, tmp_path, "wide")
    finally:
        del cluster.environment["WTN_LOST"]
    for step, then in ((15, "PENDING"), (60, "FAILED")):
        cluster.wait(job, "RUNNING")
        until_step(cluster, tmp_path, job, step)
        for pid in cluster.hosts["n2"].processes("train_wide.py"):
            subprocess.run(["kill", "-KILL", str(pid)], check=False)
        facts = cluster.wait(job, then)
        assert all(cluster.hosts[name].empty("train_wide.py") for name in ("n1", "n2"))
        reached = max(steps_logged(tmp_path / "runs/bert/wide"))
        assert reached < 100000
    assert facts["Restarts"] == "1" and facts["ExitCode"] == "137:0", told(tmp_path, job)
    said = (tmp_path / f"wide-{job}.out").read_text()
    assert said.count("a rank was lost or hung (exit code 137), on from the newest checkpoint: back into the queue") == 1, said
    # the second start went on where the first was
    steps = steps_logged(tmp_path / "runs/bert/wide")
    assert steps == list(range(1, len(steps) + 1))


def test_the_last_element_of_an_array_comes_back_alone(cluster: Slurm, tmp_path: Path) -> None:
    """Its number is that of the whole array."""
    write_recipe(tmp_path / "recipe.yaml", recipe(BERT, {**LONG, "wide.steps": 3000, "wide.checkpoint_every": 3000}))
    lines = [f"--run.name=bert-{number} --run.seed={number}" for number in range(2)]
    (tmp_path / "sweep.txt").write_text("\n".join(lines) + "\n")
    cluster.environment |= {"WTN_SWEEP": str(tmp_path / "sweep.txt"), "WTN_SCRIPT": "scripts/train_wide.py"}
    try:
        job = sbatch(cluster, tmp_path, "sweep", options=("--array=0-1",))
    finally:
        del cluster.environment["WTN_SWEEP"], cluster.environment["WTN_SCRIPT"]
    try:
        deadline = time.monotonic() + 240
        while any(max(steps_logged(tmp_path / f"runs/bert-{number}/wide"), default=0) < 5 for number in range(2)):
            assert time.monotonic() < deadline, cluster.logs()
            time.sleep(0.2)
        last = f"{job}_1"
        assert cluster.facts(last)["JobId"] == str(job)
        cluster.succeed("scancel", "--signal=USR1", last, cwd=tmp_path)
        assert cluster.wait(last, "PENDING", hurry=False)["Restarts"] == "1"
        first = cluster.facts(f"{job}_0")
        assert (first["JobState"], first["Restarts"]) == ("RUNNING", "0")
    finally:
        cluster.succeed("scancel", str(job), cwd=tmp_path)
    for element in range(2):
        assert cluster.wait(f"{job}_{element}")["JobState"] == "CANCELLED"


def test_an_allocation_that_does_not_fit_the_plan(cluster: Slurm, tmp_path: Path) -> None:
    write_recipe(tmp_path / "recipe.yaml", recipe(BERT, {"narrow.plan": "0-1,2,3", "compare.scratch": False}))
    refused = cluster.run(
        "python", str(ROOT / "tools/submit.py"), "recipe.yaml", "--stage", "imitate", "--nodes", "2", "--ranks-per-node", "1", cwd=tmp_path
    )
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert refused.stderr.startswith("error: narrow.plan: 0-1x1,2-2x1,3-3x1 is for 3 ranks and this run has 2"), refused.stderr
    # and within the job, before stage 1 begins
    job = sbatch(cluster, tmp_path, "method")
    facts = cluster.wait(job)
    assert facts["JobState"] == "FAILED", told(tmp_path, job)
    # once where the ranks say it, and once where the job does
    lines = [line for line in told(tmp_path, job).splitlines() if re.search(r"^error: |(log|out): error: ", line)]
    assert len(lines) == 2, told(tmp_path, job)
    assert all("narrow.plan: 0-1x1,2-2x1,3-3x1 is for 3 ranks and this run has 2" in line for line in lines), lines
    assert not (tmp_path / "runs/bert/wide").exists()
    assert all(cluster.hosts[name].empty("run.py") for name in ("n1", "n2"))


def test_without_srun_a_process_is_alone(cluster: Slurm, tmp_path: Path) -> None:
    """Plain `python` in a batch script of two nodes must not wait for ranks that nobody starts."""
    write_recipe(tmp_path / "recipe.yaml", recipe(BERT))
    script = f"python {ROOT}/scripts/train_wide.py --config recipe.yaml"
    job = cluster.submit("--nodes=2", "--ntasks-per-node=2", "--job-name=plain", "--output=%x-%j.out", f"--wrap={script}", cwd=tmp_path)
    facts = cluster.wait(job)
    assert facts["JobState"] == "COMPLETED", told(tmp_path, job)
    assert "1 rank, started by python; gloo" in told(tmp_path, job)
    assert CPUS >= 2
