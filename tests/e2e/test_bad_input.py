"""A mistake of the user's is one line on standard error that names the thing and the remedy, exit code 2, and nothing lost.

Most go through `wtn_pretrain.cli.main` in this process, which is what the scripts are; some start the script itself.
"""

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.running import BERT, RESNET, contents, kill_at, recipe, start, succeed, write_recipe
from wtn_pretrain.cli import main
from wtn_pretrain.imitation.checkpoint.manifest import checkpoints_in
from wtn_pretrain.parallel import launch
from wtn_pretrain.stages import Stages

pytestmark = pytest.mark.slow

Refused = Callable[..., str]
WORK: dict[str, Callable[[Stages], object]] = {
    "train_wide.py": lambda stages: stages.wide(),
    "imitate.py": lambda stages: [stages.narrow(seed) for seed in stages.recipe.compare.seeds],
    "finetune.py": lambda stages: [stages.finetune(seed) for seed in stages.recipe.compare.seeds],
}
PROGRESS = ("wide ", "narrow ", "finetune ")
"""How the lines begin by which a stage says how far it is."""


def the_line(stderr: str) -> str:
    """The only line of standard error beside a stage's progress."""
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith(PROGRESS)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: "), stderr
    return lines[0]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, one_rank: None) -> Refused:
    """Starts a script's work on a recipe in this process; the one line that comes of it. What was there before is unchanged."""

    def call(tree: dict[str, Any] | Path, *overrides: str, script: str = "train_wide.py") -> str:
        config = tree if isinstance(tree, Path) else write_recipe(tmp_path / "recipe.yaml", tree)
        monkeypatch.chdir(tmp_path)
        # DeepSpeed cannot leave a process group and join a second one in the same process
        monkeypatch.setattr(launch, "stop_ranks", lambda: None)
        before = contents(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(WORK[script], "purpose", ["--config", str(config), *overrides])
        said = capsys.readouterr()
        assert exit_.value.code == 2, said.err
        assert "Traceback" not in said.out + said.err
        after = contents(tmp_path)
        assert {name: after.get(name) for name in before} == before
        return the_line(said.err)

    return call


CONFIGURATION: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "key missing": (BERT, {"run.name": None}, ("missing key run.name", "--run.name=VALUE")),
    "section missing": (BERT, {"data": None}, ("missing key data",)),
    "kind missing": (BERT, {"task.kind": None}, ("missing key task.kind", "--task.kind=VALUE")),
    "unknown family": (BERT, {"model.family": "vit"}, ("model", "'vit'", "'bert'")),
    "unknown preset": (BERT, {"model.preset": "bert-tyny"}, ("model.preset", "'bert-tyny'", "bert-tiny")),
    "unknown key": (BERT, {"wide.stepz": 3}, ("unknown key wide.stepz", "did you mean wide.steps?")),
    "unknown key below": (
        BERT,
        {"wide.optimizer.learning_rate": 3},
        ("unknown key wide.optimizer.learning_rate", "did you mean wide.optimizer."),
    ),
    "unknown key of a model": (BERT, {"model.hidden": 3}, ("unknown key model.hidden", "did you mean model.hidden_size?")),
    "unknown section": (BERT, {"finetun": {"steps": 3}}, ("unknown key finetun", "did you mean finetune")),
    "precision misspelt": (BERT, {"wide.precision": "bf15"}, ("wide.precision", "'fp32', 'bf16', 'bf16_weights' or 'fp16'")),
    "optimizer misspelt": (RESNET, {"finetune.optimizer.name": "adam"}, ("finetune.optimizer.name", "'adamw'")),
    "text for a number": (BERT, {"wide.steps": "many"}, ("wide.steps", "integer")),
    "negative number": (BERT, {"narrow.steps": -1}, ("narrow.steps", "greater than or equal to 1")),
    "run name that is a path": (BERT, {"run.name": "../elsewhere"}, ("run.name",)),
    "heads do not divide": (BERT, {"widen.inner": 1.25}, ("widen", "inner 1.25", "2.5 heads", "choose factors")),
    "head size does not divide": (BERT, {"model.heads": 3}, ("model", "hidden_size 32", "heads 3", "head_size")),
    "channels do not divide": (RESNET, {"widen.inner": 1.3}, ("widen.inner", "inner_channels", "choose a factor")),
    "wrong number of stages": (RESNET, {"widen.blocks": [3]}, ("widen.blocks", "2 stages")),
    "task of another model": (RESNET, {"task.kind": "mlm"}, ("task.kind mlm", "model.family resnet", "use classify")),
    "loss of another model": (RESNET, {"narrow.loss": "mobilebert"}, ("narrow.loss mobilebert", "use energy_mse")),
    "micro-batch does not divide": (BERT, {"wide.micro_batch_size": 5}, ("wide", "batch_size 16", "micro_batch_size 5")),
    "rows longer than positions": (BERT, {"data.sequence_length": 40}, ("data.sequence_length", "40", "model.max_positions 32")),
    "classes unlike the data": (RESNET, {"model.classes": 7}, ("model.classes", "7", "10", "0 to take the data's")),
    "vocabulary below the tokenizer": (BERT, {"model.vocab_size": 100}, ("model.vocab_size", "100 rows", "tokenizer 256", "or more")),
    "depth map too short": (BERT, {"narrow.depth_map": [1, 3]}, ("narrow.depth_map", "[1, 3]", "3 student units")),
    "depth map reversed": (BERT, {"narrow.depth_map": [2, 1, 3]}, ("narrow.depth_map", "from teacher block 2 to 1", "must rise")),
    "depth map skips the top": (
        BERT,
        {"widen.blocks": [4], "narrow.depth_map": [1, 2, 3]},
        ("narrow.depth_map", "skips the teacher's top blocks", "end with 4"),
    ),
    "depth map off the teacher": (BERT, {"narrow.depth_map": [1, 2, 9]}, ("narrow.depth_map", "blocks 1 to 3")),
    "depth map across resolutions": (
        RESNET,
        {"widen.blocks": [2, 2], "narrow.depth_map": [1, 3, 4]},
        ("narrow.depth_map", "student block 2 and teacher block 3", "same resolution"),
    ),
    "teacher too shallow": (RESNET, {"widen.blocks": [1, 1]}, ("narrow.depth_map", "2 student blocks", "at least as deep")),
    "DeepSpeed file missing": (BERT, {"wide.deepspeed": "zero9.json"}, ("wide.deepspeed", "no file zero9.json", "ds_configs/")),
    "LARS where ZeRO partitions": (
        RESNET,
        {"narrow.optimizer.name": "lars", "narrow.deepspeed": "ds_configs/zero1.json"},
        ("narrow.optimizer.name", "lars", "ZeRO 1", "zero0.json"),
    ),
    "tensor ranks divide no head": (BERT, {"wide.tensor_parallel": 3}, ("wide.tensor_parallel", "3")),
    "tensor ranks of a ResNet": (RESNET, {"wide.tensor_parallel": 2}, ("wide.tensor_parallel", "resnet", "set it to 1")),
    "positions divided without tensor ranks": (BERT, {"wide.sequence_parallel": True}, ("wide: sequence_parallel", "tensor_parallel")),
    "averages of rounded weights": (
        BERT,
        {"wide.ema": 0.9, "wide.precision": "bf16_weights"},
        ("wide: ema", "bf16_weights", "use bf16 or fp32"),
    ),
    "averages under ZeRO 3": (BERT, {"wide.ema": 0.9, "wide.deepspeed": "ds_configs/zero3.json"}, ("wide.ema", "ZeRO 3", "zero2.json")),
    "fp16 without its loss scaling": (BERT, {"wide.precision": "fp16"}, ("wide.precision", "fp16")),
    "kernels that are not installed": (BERT, {"run.kernels": "apex"}, ("run.kernels: apex", "set run.kernels to auto or torch")),
    "kernels misspelt": (BERT, {"run.kernels": "cuda"}, ("run.kernels", "'auto', 'torch', 'triton' or 'apex'")),
    "no such text": (BERT, {"data.source": "files", "data.paths": ["absent.txt"]}, ("absent.txt", "no such file", "data.paths")),
    "no such folder of images": (RESNET, {"data.source": "folder", "data.path": "absent"}, ("absent", "no such folder", "data.path")),
}


@pytest.mark.parametrize("name", CONFIGURATION)
def test_recipes_that_cannot_run(name: str, refused: Refused) -> None:
    base, changes, fragments = CONFIGURATION[name]
    line = refused(recipe(base, changes))
    assert all(fragment in line for fragment in fragments), line


ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown argument": (("--verbose=1",), ("--verbose", "unknown", "--section.key=value")),
    "no value": (("--wide.steps",), ("--wide.steps", "has no value")),
    "no argument": (("wide.steps=3",), ("'wide.steps=3'", "--section.key=value")),
    "unknown key": (("--wide.step=3",), ("unknown key wide.step", "did you mean wide.steps?")),
    "not YAML": (("--wide.betas=[0.9,",), ("--wide.betas", "'[0.9,'", "not a YAML value")),
    "below a value": (("--run.name.first=a",), ("--run.name.first", "name is a value, not a section")),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_mean_nothing(name: str, refused: Refused) -> None:
    overrides, fragments = ARGUMENTS[name]
    line = refused(recipe(BERT), *overrides)
    assert all(fragment in line for fragment in fragments), line


FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "not YAML": (b"run: {name: [", ("recipe.yaml:1", "not valid YAML")),
    "code in a tag": (b"run: !!python/object/apply:os.system ['true']", ("recipe.yaml", "not valid YAML")),
    "no mapping": (b"- run\n- model\n", ("recipe.yaml", "holds no sections", "configs/")),
    "empty": (b"", ("recipe.yaml", "holds no sections")),
    "binary": (bytes(range(128, 256)), ("recipe.yaml", "not a text file")),
    "control characters": (b"run:\x00name", ("recipe.yaml", "not valid YAML")),
    "a section that is a word": (b"run: here\n", ("run",)),
}


@pytest.mark.parametrize("name", FILES)
def test_configuration_files_that_hold_none(name: str, tmp_path: Path, refused: Refused) -> None:
    content, fragments = FILES[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    line = refused(path)
    assert all(fragment in line for fragment in fragments), line


def test_no_configuration(tmp_path: Path, refused: Refused) -> None:
    assert "configuration" in refused(tmp_path / "absent.yaml")
    assert "configuration" in refused(tmp_path)


TEXT: dict[str, tuple[bytes, str, tuple[str, ...]]] = {
    "empty": (b"", "some.txt", ("some.txt", "holds no text", "data.paths")),
    "blank": (b"\n \n\t\n", "some.txt", ("some.txt", "holds no text")),
    "binary": (
        b"a few words\n" * 9 + b"\x7fELF\x00\x01" + bytes(range(256)),
        "some.txt",
        ("some.txt", "not a text file", "zero byte", "data.paths"),
    ),
    "another encoding": ("café au lait\n".encode("latin-1") * 50, "some.txt", ("some.txt", "not UTF-8", "convert")),
    "no gzip file": (b"a few words\n" * 50, "some.txt.gz", ("some.txt.gz", "cannot be read")),
    "cut gzip file": (
        gzip.compress(np.random.default_rng(0).bytes(5000).hex().encode())[:-900],
        "some.txt.gz",
        ("some.txt.gz", "cannot be read"),
    ),
    "too short": (b"a few words\n", "some.txt", ("too short",)),
}


@pytest.mark.parametrize("name", TEXT)
def test_text_that_is_none(name: str, tmp_path: Path, refused: Refused) -> None:
    content, file, fragments = TEXT[name]
    (tmp_path / file).write_bytes(content)
    line = refused(recipe(BERT, {"data": {"kind": "text", "source": "files", "paths": [file], "sequence_length": 16}}))
    assert all(fragment in line for fragment in fragments), line


def image_folder(root: Path) -> Path:
    """Two classes of twelve images."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 8), ("valid", 4)):
        for label in ("dark", "light"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(0, 120, (12, 12, 3)) + (120 if label == "light" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / label / f"{number}.png")
    return root


FOLDER = {"data": {"kind": "images", "source": "folder", "path": "images", "size": 8}, "wide.batch_size": 16, "wide.steps": 2}


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_corrupt_image(damage: str, split: str, tmp_path: Path, refused: Refused) -> None:
    path = image_folder(tmp_path / "images") / split / "light" / "2.png"
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "text": b"no image", "empty": b""}[damage])
    line = refused(recipe(RESNET, FOLDER))
    assert "2.png: cannot be decoded" in line
    assert "repair or remove it" in line


def test_corrupt_image_read_by_a_worker(tmp_path: Path, refused: Refused) -> None:
    (image_folder(tmp_path / "images") / "train" / "light" / "2.png").write_bytes(b"no image")
    assert "2.png: cannot be decoded" in refused(recipe(RESNET, {**FOLDER, "data.workers": 1}))


def test_class_folder_without_images(tmp_path: Path, refused: Refused) -> None:
    (image_folder(tmp_path / "images") / "train" / "none").mkdir()
    line = refused(recipe(RESNET, FOLDER))
    assert "none: no images" in line


def idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def idx_folder(root: Path, labels: np.ndarray, images: int = 40) -> None:
    root.mkdir()
    idx(root / "train-images-idx3-ubyte", np.random.default_rng(0).integers(0, 256, (images, 8, 8)))
    idx(root / "train-labels-idx1-ubyte", labels)


IDX = {"data": {"kind": "images", "source": "idx", "path": "digits", "classes": 10}}


def test_label_out_of_range(tmp_path: Path, refused: Refused) -> None:
    labels = np.arange(40) % 10
    labels[17] = 12
    idx_folder(tmp_path / "digits", labels)
    line = refused(recipe(RESNET, IDX))
    assert "train-labels-idx1-ubyte: label 12 at index 17 is outside 0..9" in line
    assert "data.classes" in line


def test_labels_of_other_images(tmp_path: Path, refused: Refused) -> None:
    idx_folder(tmp_path / "digits", np.arange(30) % 10)
    assert "30 labels for the 40 images" in refused(recipe(RESNET, IDX))


def test_tokenizer_of_another_embedding(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(300))]))
    line = refused(recipe(BERT, {"data.tokenizer": "vocab.txt", "model.vocab_size": 256}))
    assert "model.vocab_size: the embedding has 256 rows and the tokenizer 305 tokens" in line


@pytest.mark.parametrize("place", ["/proc/here", "recipe.yaml", "recipe.yaml/below"])
def test_unwritable_run_folder(place: str, refused: Refused) -> None:
    line = refused(recipe(RESNET), f"--run.folder={place}")
    assert f"run.folder: {place}" in line
    assert "--run.folder" in line


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """The `wide` folder of a recipe, trained once by the real script."""
    made: dict[str, Path] = {}

    def find(tree: dict[str, Any]) -> Path:
        if str(tree) not in made:
            folder = tmp_path_factory.mktemp("trained")
            succeed("train_wide.py", write_recipe(folder / "recipe.yaml", tree))
            made[str(tree)] = folder / "runs" / tree["run"]["name"] / "wide"
        return made[str(tree)]

    return find


def test_loss_that_is_not_finite(refused: Refused) -> None:
    line = refused(recipe(RESNET, {"wide.optimizer.lr": 1e30, "wide.clip": 0}))
    assert "wide: the loss is " in line
    assert "lower wide.optimizer.lr" in line
    assert "no checkpoint was written yet" in line


def test_loss_that_is_not_finite_between_log_records(refused: Refused, tmp_path: Path) -> None:
    line = refused(recipe(BERT, {"wide.optimizer.lr": 1e30, "wide.log_every": 1000, "wide.checkpoint_every": 6}))
    assert "wide: the loss is " in line
    # three steps are left out in a row, and the next one ends the run
    assert "at step 5, after 3 steps in a row" in line
    assert not (tmp_path / "runs" / "bert" / "wide" / "checkpoints").exists()


def test_imitation_that_is_not_finite(refused: Refused, trained: Callable[[dict[str, Any]], Path], tmp_path: Path) -> None:
    # the checkpoint before the loss is looked at for a record must not hold what is not finite
    tree = recipe(RESNET, {"narrow.optimizer": {"name": "sgd", "lr": 1e30}, "narrow.log_every": 20, "narrow.checkpoint_every": 6})
    shutil.copytree(trained(recipe(RESNET)), tmp_path / "runs" / "resnet" / "wide")
    line = refused(tree, script="imitate.py")
    found = re.search(
        r"narrow: the loss or the gradient of unit 1 is not finite at step (\d+), after 3 steps in a row that were left out for that; "
        r"the samples are named in (\S+);",
        line,
    )
    # the step itself, not the one at which losses are looked at
    assert found is not None and int(found[1]) < 6
    told = json.loads((tmp_path / found[2]).read_text())
    last = int(found[1])
    assert [(batch["step"], batch["batch"], len(batch["indices"])) for batch in told["batches"]] == [
        (step, step - 1, 32) for step in range(last - 3, last + 1)
    ]
    assert "lower narrow.optimizer.lr" in line
    assert not (tmp_path / "runs" / "resnet" / "narrow" / "checkpoints").exists()


# the last of its blocks see one pixel of the digits
PIXEL = {"model.channels": [4, 4, 4, 4], "model.depths": [1, 1, 1, 1]}


def test_one_pixel_to_normalise(refused: Refused) -> None:
    line = refused(recipe(RESNET, {**PIXEL, "wide.batch_size": 1}))
    assert "wide.micro_batch_size: a rank's pass is one sample" in line and line.endswith("; take more samples")


def test_stages_before_their_time(refused: Refused) -> None:
    line = refused(recipe(RESNET), script="imitate.py")
    assert "wide: holds no finished network" in line
    assert "run the stage that writes it first" in line
    assert "narrow: holds no finished network" in refused(recipe(RESNET), script="finetune.py")


def test_teacher_whose_blocks_do_not_fit(refused: Refused, trained: Callable[[dict[str, Any]], Path], tmp_path: Path) -> None:
    shutil.copytree(trained(recipe(RESNET)), tmp_path / "runs" / "resnet" / "wide")
    line = refused(recipe(RESNET, {"widen.inner": 3}), script="imitate.py")
    assert "wide: holds a network of another shape" in line
    assert "--run.name" in line


@pytest.mark.parametrize("file", ["model.safetensors", "model.json"])
def test_damaged_teacher(file: str, refused: Refused, trained: Callable[[dict[str, Any]], Path], tmp_path: Path) -> None:
    wide = shutil.copytree(trained(recipe(RESNET)), tmp_path / "runs" / "resnet" / "wide")
    (wide / file).write_bytes((wide / file).read_bytes()[:-20])
    line = refused(recipe(RESNET), script="imitate.py")
    assert file in line
    assert "run the stage again" in line


def test_a_flipped_byte_in_a_finished_network(refused: Refused, trained: Callable[[dict[str, Any]], Path], tmp_path: Path) -> None:
    wide = shutil.copytree(trained(recipe(RESNET)), tmp_path / "runs" / "resnet" / "wide")
    content = bytearray((wide / "model.safetensors").read_bytes())
    content[-6] ^= 1
    (wide / "model.safetensors").write_bytes(content)
    line = refused(recipe(RESNET), script="imitate.py")
    assert "wide/model.safetensors: is not as the stage left it (its sha256 differs from that in done.json)" in line
    assert not (tmp_path / "runs" / "resnet" / "narrow").exists()


def test_free_bridges_that_cannot_be_merged(refused: Refused, trained: Callable[[dict[str, Any]], Path], tmp_path: Path) -> None:
    outer = recipe(BERT, {"widen": {"inner": 1, "outer": 2}})
    shutil.copytree(trained(outer), tmp_path / "runs" / "bert" / "wide")
    line = refused(recipe(outer, {"narrow.bridge": "free"}), script="imitate.py")
    assert "narrow.bridge: a free bridge after the stem cannot be merged exactly" in line
    assert "narrow.bridge=auto or constrained" in line


def test_free_bridges_are_refused_before_the_wide_network_is_trained(refused: Refused, tmp_path: Path) -> None:
    line = refused(recipe(BERT, {"widen": {"inner": 1, "outer": 2}, "narrow.bridge": "free"}))
    assert "narrow.bridge: a free bridge after the stem cannot be merged exactly" in line
    assert not (tmp_path / "runs" / "bert" / "wide").exists()


def test_folder_of_another_run(refused: Refused, trained: Callable[[dict[str, Any]], Path], tmp_path: Path) -> None:
    shutil.copytree(trained(recipe(RESNET)).parent, tmp_path / "runs" / "resnet")
    line = refused(recipe(RESNET, {"wide.optimizer.lr": 0.3}))
    assert "holds a run with another configuration (wide.optimizer.lr was 0.2 and is now 0.3)" in line
    assert "--run.name" in line


def test_damaged_record_of_a_run(refused: Refused, trained: Callable[[dict[str, Any]], Path], tmp_path: Path) -> None:
    run = shutil.copytree(trained(recipe(RESNET)).parent, tmp_path / "runs" / "resnet")
    (run / "wide" / "done.json").write_text("{")
    assert "done.json: damaged" in refused(recipe(RESNET))
    (run / "config.yaml").write_text("run: [")
    assert "config.yaml:1: not valid YAML" in refused(recipe(RESNET))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, trained: Callable[[dict[str, Any]], Path]) -> Path:
    """The folder of a run that was killed in its second stage, after a checkpoint."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(trained(recipe(RESNET)), folder / "runs" / "resnet" / "wide")
    config = write_recipe(folder / "recipe.yaml", INTERRUPTED)
    stage = folder / "runs" / "resnet" / "narrow"
    kill_at("imitate.py", config, stage=stage, step=25)
    # what lies beyond the checkpoint is dropped by any start, before the optimizers are read
    last = int(newest(stage.parent).rpartition("step")[2])
    kept = [line for line in (stage / "metrics.jsonl").read_text().splitlines(keepends=True)[:last] if json.loads(line)["step"] <= last]
    (stage / "metrics.jsonl").write_text("".join(kept))
    return stage.parent


INTERRUPTED = recipe(RESNET, {"narrow.steps": 200, "narrow.checkpoint_every": 10})


@pytest.mark.parametrize("damage", ["cut", "text", "gone"])
@pytest.mark.parametrize("file", ["manifest.json", "part-00000.safetensors"])
def test_damaged_checkpoint_of_imitation(file: str, damage: str, refused: Refused, interrupted: Path, tmp_path: Path) -> None:
    run = shutil.copytree(interrupted, tmp_path / "runs" / "resnet")
    last, *others = [folder for _, folder in checkpoints_in(run / "narrow" / "checkpoints")]
    # that the one before is used where there is one: tests/unit/imitation
    for folder in others:
        shutil.rmtree(folder)
    path = last / file
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": path.read_bytes()[:-30], "text": b"no checkpoint"}[damage])
    line = refused(INTERRUPTED, script="imitate.py")
    assert f"{file}: " in line
    assert "there is no other checkpoint: remove " in line
    assert "checkpoints to start narrow again" in line


def newest(run: Path) -> str:
    return checkpoints_in(run / "narrow" / "checkpoints")[0][1].name


SCRIPTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "unknown key": ("run.py", BERT, {"wide.stepz": 3}, ("unknown key wide.stepz", "did you mean wide.steps?")),
    "no teacher": ("imitate.py", RESNET, {}, ("wide: holds no finished network",)),
    "not finite": ("train_wide.py", BERT, {"wide.optimizer.lr": 1e30}, ("wide: the loss is ", "lower wide.optimizer.lr")),
    "folder": ("finetune.py", RESNET, {"run.folder": "/proc/here"}, ("run.folder: /proc/here", "--run.folder")),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_themselves(name: str, tmp_path: Path) -> None:
    script, base, changes, fragments = SCRIPTS[name]
    done = start(script, write_recipe(tmp_path / "recipe.yaml", recipe(base, changes)))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    line = the_line(done.stderr)
    assert all(fragment in line for fragment in fragments), line
    # who is here, and by what it computes, may have been told already
    assert all(line.startswith(("1 rank, started by python", "kernels auto on ")) for line in done.stdout.splitlines()), done.stdout
