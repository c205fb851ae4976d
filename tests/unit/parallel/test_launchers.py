"""What each launcher's variables say of a process, and which of them win."""

import socket
from pathlib import Path

import pytest

from wtn_pretrain.errors import UserError
from wtn_pretrain.parallel.alike import difference, identity
from wtn_pretrain.parallel.launchers import Start, device_index, expand_hosts, find_start, host_name
from wtn_pretrain.parallel.meeting import join_seconds, meet

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "localhost,nobody[2-3]",
    "SLURM_JOB_NODELIST": "elsewhere[1-9]",
    "SLURMD_NODENAME": "nobody2",
}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x"}


def test_srun_and_what_it_says_of_the_step() -> None:
    environ = dict(SRUN)
    start = find_start(environ)
    assert start == Start("srun", 5, 1, 8, "localhost", 12_000 + (16 * 4711 + 2) % 20_000)
    assert [environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")] == ["5", "1", "8", "localhost"]
    assert host_name(environ) == "nobody2"
    # the same for all ranks, another for the next step and job
    assert find_start({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).port == start.port
    ports = {find_start({**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port for job in (1, 2) for step in range(4)}
    assert len(ports) == 8 and all(12_000 <= port < 32_000 for port in ports)


def test_a_given_place_wins() -> None:
    assert find_start({**SRUN, **TORCHRUN}) == Start("torchrun", 3, 1, 4, "a", 29500)
    deepspeed = {name: value for name, value in TORCHRUN.items() if name != "TORCHELASTIC_RUN_ID"} | {"CROSS_RANK": "1"}
    assert find_start(deepspeed).launcher == "deepspeed"
    # of srun's ranks only what is missing is taken from Slurm
    own = find_start({**SRUN, "RANK": "1", "WORLD_SIZE": "2"})
    assert own == Start("hand", 1, 1, 2, "localhost", find_start(dict(SRUN)).port)
    assert find_start({**SRUN, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "444"}).master == "10.0.0.7:444"


def test_mpirun() -> None:
    """Without it, every rank would train the whole run by itself; within Slurm mpirun starts its daemons by srun, one a node."""
    ours = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
    hydra = {"PMI_RANK": "3", "MPI_LOCALRANKID": "1", "PMI_SIZE": "4"}
    met = {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    for environ in (ours, hydra, {**SRUN, **ours}, {**SRUN, **hydra}):
        assert find_start({**environ, **met}) == Start("mpirun", 3, 1, 4, "a", 29500)
    assert find_start({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8"}).launcher == "srun"
    assert find_start({**ours, **TORCHRUN}).launcher == "torchrun"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1"},
        # a batch script: no step
        {name: value for name, value in SRUN.items() if "STEP" not in name},
        # steps of Slurm's own: the batch script, and the shell of salloc
        {**SRUN, "SLURM_STEP_ID": str(0xFFFFFFFB)},
        {**SRUN, "SLURM_STEP_ID": str(0xFFFFFFFA)},
        # srun --pty bash
        {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
    ],
)
def test_a_process_alone(environ: dict[str, str]) -> None:
    start = find_start(dict(environ))
    assert (start.rank, start.world_size, start.address) == (0, 1, "127.0.0.1")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set"),
        ({"RANK": "1", "WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "numbered from 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set and MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK is set and MASTER_PORT is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "'x' is no port"),
        ({**TORCHRUN, "LOCAL_RANK": "first"}, "LOCAL_RANK: 'first' is not a number"),
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "a"},
            "mpirun has started 2 ranks and says nothing of rank 0's host; pass MASTER_ADDR",
        ),
        (
            {**SRUN, "SLURM_STEP_NODELIST": "nobody.invalid,b"},
            "nobody.invalid, the first host of SLURM_STEP_NODELIST, is unknown on nobody2",
        ),
        ({**SRUN, "SLURM_STEP_NODELIST": "n[a-b]"}, "no list of hosts"),
    ],
)
def test_contradictions_are_one_line(environ: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no scontrol to ask
    with pytest.raises(UserError, match=message) as caught:
        find_start(dict(environ))
    assert "\n" not in str(caught.value)


def test_lists_of_hosts() -> None:
    expected = {
        "n1": ["n1"],
        "n[1-3]": ["n1", "n2", "n3"],
        "n[08-10,7],login": ["n08", "n09", "n10", "n7", "login"],
        "a[1-2]b[3,5]": ["a1b3", "a1b5", "a2b3", "a2b5"],
        "": [],
    }
    assert {nodes: list(expand_hosts(nodes)) for nodes in expected} == expected


def test_the_device_of_a_rank() -> None:
    fourth = Start("srun", 11, 3, 16, "a", 1)
    assert device_index(fourth, 4, {}) == 3
    # Slurm shows each task its own device
    assert device_index(fourth, 1, {"SLURM_GPUS_PER_TASK": "1"}) == 0
    for environ, devices in (({}, 1), ({"SLURM_GPUS_PER_TASK": "1"}, 2)):
        with pytest.raises(UserError, match=f"rank 11 is number 4 on nobody2, which shows {devices} devices; start as many ranks a host"):
            device_index(fourth, devices, {**environ, "SLURMD_NODENAME": "nobody2"})


def test_what_differs_between_two_checkouts(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    for name in ("one.py", "part/two.py"):
        (tmp_path / name).write_text("x = 1\n")
    first = identity(tmp_path)
    assert {"torch", "deepspeed", f"{tmp_path.name}/part/two.py"} < first.keys()
    assert difference(identity(tmp_path), first) is None
    (tmp_path / "part/two.py").write_text("x = 2\n")
    assert difference(identity(tmp_path), first) == f"has another {tmp_path.name}/part/two.py; give every host the same checkout"
    (tmp_path / "one.py").unlink()
    assert difference(identity(tmp_path), first) == f"lacks {tmp_path.name}/one.py (1 more files differ); give every host the same checkout"
    assert (
        difference(first, identity(tmp_path))
        == f"has another {tmp_path.name}/part/two.py (1 more files differ); give every host the same checkout"
    )
    older = {**first, "torch": "2.11.0"}
    assert difference(older, first) == f"has torch 2.11.0 where rank 0 has {first['torch']}; give every host the same environment"


def test_a_port_that_another_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        start = Start("hand", 0, 0, 2, "127.0.0.1", taken.getsockname()[1])
        with pytest.raises(UserError, match=f"port {start.port} of .* is taken by another process; give another"):
            meet(start, 5)
    # nobody is there any more
    with pytest.raises(UserError, match=f"rank 1 on .* has not reached rank 0 at 127.0.0.1:{start.port} within 0.1 s"):
        meet(start._replace(rank=1), 0.1)
    monkeypatch.setenv("WTN_JOIN_SECONDS", "soon")
    with pytest.raises(UserError, match="WTN_JOIN_SECONDS: 'soon' is not a number above 0"):
        join_seconds()
