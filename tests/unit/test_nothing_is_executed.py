"""What others may have put into a run's files is never executed: pickles in the place of any file, YAML that names a function."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.running import BERT, error_lines, recipe, write_recipe
from tests.unit.imitation.test_checkpoints import PART, opened, rendered
from tests.unit.imitation.test_engine import BERT as SHAPE
from tests.unit.imitation.test_engine import section
from tests.unit.training.test_checkpoint_files import write as write_training
from wtn_pretrain.checkpoint.files import MANIFEST, DamagedError, part_of
from wtn_pretrain.cli import main
from wtn_pretrain.errors import UserError
from wtn_pretrain.folder import RunFolder
from wtn_pretrain.imitation.checkpoint.manifest import Stored
from wtn_pretrain.models.store import load_network, load_part, load_shape, save_network
from wtn_pretrain.parallel import launch
from wtn_pretrain.training.checkpoint.contents import contents
from wtn_pretrain.verify import main as verify

pytestmark = pytest.mark.usefixtures("one_rank")


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, (f"touch {self.mark}",))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that is there once something has been executed; that it would be is tried first."""
    mark = tmp_path / "harm"
    pickle.loads(pickle.dumps(Harm(mark)))
    assert mark.exists()
    mark.unlink()
    return mark


def pickles(mark: Path) -> list[bytes]:
    """The harm as pickle writes it, and as torch does, with and without a zip around it."""
    torch.save(Harm(mark), mark.with_suffix(".pt"))
    torch.save(Harm(mark), mark.with_suffix(".old"), _use_new_zipfile_serialization=False)
    return [pickle.dumps(Harm(mark)), mark.with_suffix(".pt").read_bytes(), mark.with_suffix(".old").read_bytes()]


def test_a_pickle_as_any_file_of_a_checkpoint_of_imitation(mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = section(schedule="parallel", steps=3, checkpoint_every=1, checkpoint_keep=9)
    opened(tmp_path / "run", settings).go()
    for harm in pickles(mark):
        for file in (MANIFEST, PART, "latest.json"):
            folder = tmp_path / "again"
            shutil.copytree(tmp_path / "run", folder)
            newest = folder / "checkpoints" / "phase0-step3"
            (newest.parent if file == "latest.json" else newest).joinpath(file).write_bytes(harm)
            if file == PART:
                # whoever places it knows how a checksum is made
                told = part_of(newest / PART).model_dump()
                rendered(newest, lambda body, told=told: body["parts"].update({PART: told}))
            capsys.readouterr()
            run = opened(folder, settings)
            run.monitor.close()
            said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("narrow: ")]
            assert len(said) == (file != "latest.json")
            assert run.first_step == (3 if file == "latest.json" else 2)
            assert verify([str(folder)], "") == (file != "latest.json")
            if file != "latest.json":
                with pytest.raises(DamagedError):
                    Stored(newest).check()
            shutil.rmtree(folder)
    assert not mark.exists()


def test_a_pickle_as_any_file_of_a_checkpoint_of_training(mark: Path, tmp_path: Path) -> None:
    for harm in pickles(mark):
        for file in (MANIFEST, PART):
            folder = write_training(tmp_path / "checkpoints", 3)
            (folder / file).write_bytes(harm)
            if file == PART:
                told = part_of(folder / PART).model_dump()
                rendered(folder, lambda body, told=told: body["parts"].update({PART: told}))
            with pytest.raises(DamagedError):
                contents(folder)
            shutil.rmtree(folder)
    assert not mark.exists()


def test_a_pickle_as_any_file_of_a_network(mark: Path, tmp_path: Path) -> None:
    for harm in pickles(mark):
        stage = tmp_path / "stage"
        save_network(stage, SHAPE, SHAPE.build().state_dict())
        (stage / "model.safetensors").write_bytes(harm)
        with pytest.raises(UserError, match="cannot be read"):
            load_network(stage)
        with pytest.raises(UserError, match="cannot be read"):
            load_part(stage, ["stem"])
        (stage / "model.json").write_bytes(harm)
        with pytest.raises(UserError, match=r"model.json: not valid JSON"):
            load_shape(stage)
        (stage / "done.json").write_bytes(harm)
        with pytest.raises(UserError, match=r"done.json: damaged"):
            RunFolder.result(stage)
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "run: !!python/object/apply:os.system ['touch {mark}']",
        "run: {{name: !!python/object/new:os.system ['touch {mark}']}}",
        "!!python/object/apply:subprocess.check_output [['touch', '{mark}']]",
        "!!python/name:os.system",
    ],
)
def test_yaml_that_names_a_function(
    text: str, mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a process cannot leave its group and join another one
    monkeypatch.setattr(launch, "stop_ranks", lambda: None)
    text = text.format(mark=mark)
    if "apply" in text:
        yaml.unsafe_load(text)
        assert mark.exists()
        mark.unlink()
    harmful, good = tmp_path / "harmful.yaml", write_recipe(tmp_path / "good.yaml", recipe(BERT, {"run.folder": str(tmp_path / "runs")}))
    harmful.write_text(text)
    run = tmp_path / "runs" / "bert"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(text)
    value = text.partition(": ")[2] or text
    for arguments in (["--config", str(harmful)], ["--config", str(good)], ["--config", str(good), f"--wide.deepspeed={value}"]):
        with pytest.raises(SystemExit) as stopped:
            main(lambda stages: stages.wide(), "", arguments)
        assert stopped.value.code == 2
        (line,) = error_lines(capsys.readouterr().err)
        assert line.startswith("error: ")
        assert "not valid YAML" in line or "is not a YAML value" in line or "holds no sections" in line, line
    assert not mark.exists()
