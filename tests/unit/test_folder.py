"""A run's folder: claimed once everything fits, continued by what computes the same, refused for the rest."""

from pathlib import Path

import pytest
import yaml

from wtn_pretrain.cli import main
from wtn_pretrain.errors import UserError
from wtn_pretrain.folder import RunFolder
from wtn_pretrain.parallel import launch

OLD = {
    "run": {"name": "x", "folder": "runs"},
    "wide": {"steps": 3, "log_every": 1},
    "compare": {"seeds": [0]},
    "export": {"formats": ["hf"]},
}


def claimed(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.claim(yaml.safe_dump(OLD))
    return folder


def test_what_computes_the_same_continues_the_run(tmp_path: Path) -> None:
    folder = claimed(tmp_path)
    for section, change in (
        ("run", {"name": "x", "folder": "elsewhere"}),
        ("wide", {"steps": 3, "log_every": 5}),
        ("wide", {"steps": 3, "log_every": 1, "checkpoint_every": 7, "checkpoint_keep": 3, "checkpoint_keep_every": 100}),
        ("compare", {"seeds": [0, 1]}),
        ("export", {"formats": ["onnx"]}),
    ):
        folder.check(yaml.safe_dump({**OLD, section: change}))
    newer = yaml.safe_dump({**OLD, "compare": {"seeds": [0, 1]}})
    folder.claim(newer)
    assert (tmp_path / "config.yaml").read_text() == newer


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("wide", {"steps": 4, "log_every": 1}, "wide.steps was 3 and is now 4"),
        ("compare", {"seeds": [1]}, r"compare.seeds was \[0\] and is now \[1\]"),
        ("run", {"name": "y", "folder": "runs"}, 'run.name was "x" and is now "y"'),
    ],
)
def test_other_work_is_refused_by_key(section: str, change: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        claimed(tmp_path).check(yaml.safe_dump({**OLD, section: change}))


def test_a_mistake_does_not_claim_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The corrected command may use the same name."""
    # other tests of this process go on in its group
    monkeypatch.setattr(launch, "stop_ranks", lambda: None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "run: {name: x}\nmodel: {family: resnet, block: basic, stem: cifar, channels: [4], depths: [1]}\n"
        "task: {kind: classify}\ndata: {kind: images, source: folder, path: /nowhere, size: 8}\n"
    )
    with pytest.raises(SystemExit) as stopped:
        main(lambda stages: None, "", ["--config", str(recipe), f"--run.folder={tmp_path}"])
    assert stopped.value.code == 2
    assert "/nowhere" in capsys.readouterr().err
    assert not (tmp_path / "x" / "config.yaml").exists()


def test_a_network_that_is_not_as_its_stage_left_it_is_refused(tmp_path: Path) -> None:
    network = tmp_path / "model.safetensors"
    network.write_bytes(bytes(1000))
    told = RunFolder.finish(tmp_path, {"metric": 1.0})
    assert RunFolder.result(tmp_path) == told
    assert RunFolder.check_network(tmp_path) == told["model_sha256"]
    network.write_bytes(bytes(999) + b"\1")
    with pytest.raises(UserError, match=r"model.safetensors: is not as the stage left it .*; put the file back, or remove .*done.json"):
        RunFolder.check_network(tmp_path)
    network.unlink()
    with pytest.raises(UserError, match=r"model.safetensors: cannot be read \(No such file"):
        RunFolder.check_network(tmp_path)
    # a stage that finished before checksums were told, or has not
    (tmp_path / "done.json").write_text("{}")
    assert RunFolder.check_network(tmp_path) is None
    assert RunFolder.check_network(tmp_path / "nothing") is None
