"""Batch scripts that are filled in from a recipe, and what is refused before anything is submitted."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.running import BERT, ROOT, recipe, write_recipe
from wtn_pretrain.again import mark, mark_of, unmark
from wtn_pretrain.errors import UserError
from wtn_pretrain.planning import search
from wtn_pretrain.planning.choose import choose_plan
from wtn_pretrain.planning.cluster import data_centre
from wtn_pretrain.planning.command import read_job
from wtn_pretrain.planning.costs import DATA_CENTRE
from wtn_pretrain.planning.dispatch import run as plan
from wtn_pretrain.slurm.command import run
from wtn_pretrain.slurm.jobs import Log
from wtn_pretrain.slurm.script import FOLDER, SCRIPTS, SWEEP, fill, minutes


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path / "recipe.yaml", recipe(BERT, {"run.time_limit": 120}))
    return "recipe.yaml"


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run("", [*arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def head(text: str) -> dict[str, str]:
    """The options of sbatch that a script carries."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))


def test_a_stage_is_filled_in(config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = shown(
        capsys, config, "--stage", "wide", "--nodes", "2", "--option", "partition=gpu", "--option", "exclusive=user", "--wide.steps=7"
    )
    assert head(text) == {
        "job-name": "bert-wide",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "1",
        "mem": "0",
        # the run's own two hours and a quarter
        "time": "0-02:15:00",
        "signal": "USR1@120",
        "requeue": "",
        "open-mode": "append",
        "output": "%x-%j.out",
        "partition": "gpu",
        "exclusive": "user",
    }
    assert f"export WTN_ROOT={ROOT}\n" in text
    assert text.rstrip().endswith("# sbatch runs/bert/slurm/wide.sbatch --config recipe.yaml --wide.steps=7")
    assert not (tmp_path / "runs").exists()


def test_the_plan_decides_ranks_and_memory(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, config, "--stage", "imitate", "--narrow.plan=0-1x2,2,3x6", "--gpus-per-node", "0")
    options = head(text)
    # nine ranks fill three nodes of three
    assert (options["nodes"], options["ntasks-per-node"]) == ("3", "3") and "gpus-per-node" not in options
    assert 3 * 512 < int(options["mem"].removesuffix("M")) < 6000
    assert "\n# narrow.plan 0-1x2,2-2x1,3-3x6 on 9 ranks\n" in text
    # a chain has sizes of its own for each job
    chain = shown(capsys, config, "--chain", "--narrow.plan=0-1,2,3x2", "--ranks-per-node", "4")
    scripts = re.split(r"^# runs/bert/slurm/\w+\.sbatch$", chain, flags=re.MULTILINE)[1:]
    assert [head(script)["job-name"] for script in scripts] == ["bert-wide", "bert-imitate", "bert-finetune", "bert-method"]


LARGE = "configs/cluster/bert-base-from-large.yaml"
PLANNED = r"(\w+) ([\d.]+ \w+), ([\d.]+) GB a rank"
H100 = ("--device", "h100", "--run.time_limit=0")
STEPS = 2_000_000_000


def planned(text: str) -> list[list[str]]:
    """What every script says is planned: the stages, one after the other."""
    return [[stage for stage, *_ in re.findall(PLANNED, line)] for line in re.findall(r"^# planned on h100: (.*)$", text, re.MULTILINE)]


def test_a_kind_of_device_decides_time(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    long = (*H100, f"--wide.steps={STEPS}")
    wide = shown(capsys, config, "--stage", "wide", *long)
    told = plan("", ["--config", config, "--stage", "wide", "--ranks", "8", "--device", "h100", long[-1]])
    # what the plan tells of the recipe's own layout
    ((stage, took, held),) = re.findall(PLANNED, wide)
    own = told[told.index("as the recipe has it") :].split("\n\n")[0]
    assert stage == "wide" and f"memory of a rank {held} of" in own and f"steps: {took}," in own
    days, hours, rest = map(int, re.fullmatch(r"(\d+)-(\d+):(\d+):00", head(wide)["time"]).groups())  # type: ignore[union-attr]
    value, unit = took.split()
    minutes = float(value) * {"min": 1, "h": 60, "days": 1440}[unit]
    # rounded to three digits, or a tenth of a day
    assert abs((days * 24 + hours) * 60 + rest - (1.5 * minutes + 15)) < 0.01 * minutes + 110
    # the run's own limit and --time come first
    assert head(shown(capsys, config, "--stage", "wide", *long, "--run.time_limit=60"))["time"] == "0-01:15:00"
    assert head(shown(capsys, config, "--stage", "wide", *long, "--time", "30"))["time"] == "0-00:30:00"
    # the last job of a chain has the baseline alone; without it, as long as where nothing is planned
    chain = shown(capsys, config, "--chain", *H100, "--compare.scratch=false")
    assert planned(chain) == [["wide"], ["narrow"], ["finetune"]]
    assert head(chain.split("#!/usr/bin/env bash")[-1])["time"] == head((FOLDER / SCRIPTS["method"]).read_text())["time"]
    assert planned(shown(capsys, config, *H100)) == [["wide", "narrow", "finetune", "scratch"]]
    # all elements of a sweep have as long as the longest one
    assert head(shown(capsys, config, "--stage", "wide", *H100, "--vary", f"wide.steps={STEPS},10"))["time"] == head(wide)["time"]


def test_what_does_not_fit_a_kind_of_device_is_refused(config: str) -> None:
    message = (
        r"wide: needs [\d.]+ GB a rank on 8 ranks as planned, and of the 40 GB of --device a100-40 90% can be used; .* shows what fits$"
    )
    common = [config, "--stage", "wide", "--device", "a100-40", "--wide.batch_size=8000000", "--dry-run"]
    with pytest.raises(UserError, match="^" + message):
        run("", [*common, "--wide.micro_batch_size=1000000"])
    with pytest.raises(UserError, match=r"^--vary \(--wide.micro_batch_size=1000000\): " + message):
        run("", [*common, "--vary", "wide.micro_batch_size=8,1000000"])
    with pytest.raises(UserError, match="--device k80: not known"):
        run("", [config, "--device", "k80", "--dry-run"])


def test_stage_two_takes_what_its_schedule_takes(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As tools/plan.py says of the same device: an H100 at two fifths of its 67 TFLOP/s in fp32, four fifths of its links."""
    device = ["--flops", "2.68e13", "--memory-bandwidth", "3.35e12", "--overhead", "1e-4", "--node-bandwidth", "3.6e11"]
    device += ["--bandwidth", "4e10", "--latency", "5e-6", "--memory", "8e10"]
    took = {}
    for below in ("joint", "slow", "frozen"):
        schedule = ("--narrow.schedule=bottom_up", f"--narrow.below={below}", f"--narrow.steps={STEPS}")
        ((_, mine, _),) = re.findall(PLANNED, shown(capsys, config, "--stage", "imitate", *H100, *schedule))
        told = plan("", ["--config", config, "--ranks", "8", *device, *schedule])
        assert f"\nwhole stage: {mine} on 8 ranks" in told
        took[below] = float(mine.removesuffix(" days"))
    # three units alike: 1 + 2 + 3 of them run, with the stem, instead of 3
    assert took["joint"] == took["slow"] > 1.9 * took["frozen"]


def test_an_automatic_plan_is_that_of_the_named_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    arguments = (LARGE, "--stage", "imitate", "--nodes", "2")
    named, unnamed = (
        re.findall(r"^# narrow\.plan (\S+) on 16 ranks$", shown(capsys, *arguments, *more), re.MULTILINE)
        for more in (("--device", "h100"), ())
    )
    job = read_job(LARGE, [])
    # what a rank of the job finds there
    monkeypatch.setattr(search, "here", lambda: DATA_CENTRE)
    monkeypatch.setattr(search, "usual", data_centre)
    monkeypatch.setattr(search, "total_memory", lambda: 80e9)
    there = choose_plan(job.recipe.narrow, job.thin, job.wide, job.pairing, job.counts, 16, job.length)
    assert named == [str(there)] != unnamed


def test_a_sweep_has_an_element_for_every_combination(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, config, "--stage", "wide", "--vary", "wide.optimizer.lr=1e-3,2e-3", "--vary", "run.seed=0,1,2")
    assert head(text)["array"] == "0-5"
    elements = re.findall(r"^# element \d: (.*)$", text, re.MULTILINE)
    assert len(elements) == 6 and elements[1] == "--run.name=bert-lr-1e-3-seed-1 --wide.optimizer.lr=1e-3 --run.seed=1"
    assert "export WTN_SCRIPT=scripts/train_wide.py\n" in text
    # the queue may still hold an earlier sweep of the same run, which reads its own lines
    other = shown(capsys, config, "--stage", "wide", "--vary", "wide.optimizer.lr=3e-3,4e-3")
    files = [re.search(r"^export WTN_SWEEP=(.*)$", one, re.MULTILINE) for one in (text, other)]
    assert files[0] is not None and files[1] is not None and files[0][1] != files[1][1]
    # names of folders, and a list that is one value
    text = shown(capsys, config, "--stage", "wide", "--vary", "wide.deepspeed=ds_configs/zero1.json,ds_configs/zero2.json")
    assert "# element 0: --run.name=bert-deepspeed-ds_configs_zero1.json --wide.deepspeed=ds_configs/zero1.json\n" in text
    text = shown(capsys, config, "--stage", "wide", "--vary", "wide.optimizer.betas=[0.9,0.99],[0.8,0.9]")
    assert head(text)["array"] == "0-1" and "--run.name=bert-betas-0.9_0.99 --wide.optimizer.betas=[0.9,0.99]\n" in text


def test_data_workers_have_cores(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, config, "--stage", "wide", "--data.workers=3")
    assert head(text)["cpus-per-task"] == "4"
    assert head(shown(capsys, config, "--stage", "wide", "--data.workers=3", "--cpus-per-rank", "2"))["cpus-per-task"] == "2"


def test_of_a_chain_that_is_refused_midway_nothing_stays(config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A site's limit may refuse the second job alone: an sbatch that does so, and a scancel that writes down what it was given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    refuses = '#!/bin/sh\ncase "$*" in *imitate*) echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1;; esac\necho 71\n'
    for name, text in (("sbatch", refuses), ("scancel", f'#!/bin/sh\necho "$@" > {tmp_path}/cancelled\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    with pytest.raises(UserError, match="imitate: sbatch refuses: QOSMaxSubmitJobPerUserLimit; the jobs before it are cancelled again"):
        run("", [config, "--chain"])
    assert (tmp_path / "cancelled").read_text() == "71\n"
    # the shell's chain does the same
    (tmp_path / "cancelled").unlink()
    done = subprocess.run(["bash", str(FOLDER / "chain.sh"), "--config", "recipe.yaml"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "wide: job 71\n")
    assert done.stderr.endswith("error: imitate was refused; the jobs before it are cancelled again\n")
    assert (tmp_path / "cancelled").read_text() == "71\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "imitate", "--narrow.plan=0-1,2-3x3", "--nodes", "1", "--ranks-per-node", "3"], "is for 4 ranks and this run has 3"),
        (["--stage", "imitate", "--narrow.plan=0-1,2-3x3", "--nodes", "3"], "is for 4 ranks and this run has 3"),
        (["--stage", "wide", "--nodes", "3"], "wide.batch_size: 16 cannot be split into equal micro-batches over 24 data ranks; 16 ranks"),
        (["--stage", "wide", "--wide.micro_batch_size=4"], "micro-batches of 4 over 8 data ranks; 4 ranks would fit"),
        (["--stage", "finetune", "--finetune.tensor_parallel=2", "--ranks-per-node", "3"], "finetune.tensor_parallel: 2 does not divide 3"),
        (["--stage", "imitate", "--ranks-per-node", "4096"], "use fewer ranks"),
        (["--chain", "--vary", "run.seed=0,1"], "--chain, --vary"),
        (["--vary", "seed=1"], "write SECTION.KEY=VALUE,VALUE"),
        (["--vary", "run.seed=0, 1"], "without spaces"),
        (["--stage", "wide", "--vary", "wide.stepz=1,2"], "--vary .--wide.stepz=1.: .*did you mean wide.steps"),
        (["--stage", "wide", "--vary", "wide.batch_size=16,12"], "--vary .--wide.batch_size=12.: wide.batch_size: 12 cannot be split"),
        (["--stage", "wide", "--vary", "data.paths=[a/b],[a-b]", "--vary", "run.seed=1,1"], "two runs would be called"),
        (["--option", "partition="], "write NAME=VALUE"),
        (["--option", "-p gpu"], "write NAME=VALUE"),
        (["--nonsense"], "'--nonsense': unknown"),
        (["--nodes", "0"], "not a whole number of at least 1"),
        (["--wide.step=3"], "did you mean wide.steps"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arguments: list[str], message: str, config: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run("", [config, *arguments])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_without_slurm(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="sbatch is not installed here; submit from a login node"):
        run("", [config, "--stage", "wide"])


def test_the_shipped_scripts() -> None:
    for name in (*SCRIPTS.values(), SWEEP, "common.sh", "chain.sh"):
        subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)
    heads = {name: head((FOLDER / name).read_text()) for name in (*SCRIPTS.values(), SWEEP)}
    for name, options in heads.items():
        assert options["signal"] == "USR1@120" and "requeue" in options, name
        assert options["output"] == "%x-%j.out" and options["open-mode"] == "append", name
    for stage, name in SCRIPTS.items():
        script = re.search(r"^run_ranks (\S+)", (FOLDER / name).read_text(), re.MULTILINE)
        assert script is not None and (ROOT / script[1]).exists(), stage


def test_filling_in() -> None:
    text = "#!/bin/sh\n#SBATCH --nodes=1\n#SBATCH --gpus=8\n##SBATCH --account=ACCOUNT\ntrue\n"
    filled = fill(text, {"nodes": "4", "gpus": None, "account": "me", "qos": "high", "exclusive": ""}, {"A": "a b"}, ["why"])
    assert (
        filled
        == "#!/bin/sh\n#SBATCH --nodes=4\n#SBATCH --account=me\n#SBATCH --qos=high\n#SBATCH --exclusive\n# why\nexport A='a b'\ntrue\n"
    )
    assert [minutes(value) for value in (0.2, 75, 1440, 3000.4)] == ["0-00:01:00", "0-01:15:00", "1-00:00:00", "2-02:00:00"]


def test_a_log_is_told_once(tmp_path: Path) -> None:
    said: list[str] = []
    log, path = Log(said.append), tmp_path / "log"
    log.tell(path)
    path.write_text("one\ntw")
    log.tell(path)
    path.write_text("one\ntwo\nthree\n")
    log.tell(path)
    log.tell(path)
    # another element's, of which nothing has been told yet
    (tmp_path / "other").write_text("1\n2\n")
    log.tell(tmp_path / "other")
    assert said == ["  one", "  two", "  three", "  1", "  2"]


def test_the_mark_of_a_run_that_was_told_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark(tmp_path, "left after step 3")
    assert (tmp_path / "preempted").read_text() == "left after step 3\n"
    unmark(tmp_path)
    unmark(tmp_path)
    assert not (tmp_path / "preempted").exists()
    monkeypatch.setenv("WTN_MARK", str(tmp_path / "elsewhere" / "mark"))
    mark(tmp_path, "again")
    assert mark_of(tmp_path).read_text() == "again\n" and not (tmp_path / "preempted").exists()


@pytest.mark.parametrize(
    ("said", "code", "requeued"),
    [
        ("n2: task 1: Exited with exit code 2", 2, False),
        ("n2: task 1: Exited with exit code 1", 1, False),
        ("n2: task 1: Exited with exit code 75", 0, True),
        ("n2: task 1: Killed", 0, True),
    ],
)
def test_a_mistake_of_one_rank_is_no_lost_rank(said: str, code: int, requeued: bool, tmp_path: Path) -> None:
    """srun ends the other ranks, whose code then is its own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    ends = f"echo 'srun: error: {said}' >&2; echo 'srun: error: n1: task 0: Terminated' >&2; exit 143"
    for name, does in (("srun", ends), ("squeue", "echo RUNNING"), ("scontrol", 'echo "scontrol $*"')):
        (folder / name).write_text(f"#!/bin/bash\n{does}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "5", "SLURM_JOB_NAME": "wide", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    variables = {**os.environ, **job, "SLURM_SUBMIT_DIR": str(tmp_path), "WTN_ROOT": str(ROOT), "VIRTUAL_ENV": "here"}
    variables["PATH"] = f"{folder}:{variables['PATH']}"
    done = subprocess.run(["bash", str(FOLDER / "wide.sbatch"), "--config", "x"], capture_output=True, text=True, env=variables)
    assert (done.returncode, "scontrol requeue 5" in done.stdout) == (code, requeued), done.stdout + done.stderr
    # what srun says is seen
    assert said in done.stderr
