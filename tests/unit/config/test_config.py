"""The configuration: overrides, refusals by name, help, and every shipped file."""

from pathlib import Path

import pytest
import yaml

from wtn_pretrain.cli import split_arguments
from wtn_pretrain.config import describe, dump_yaml, override, validate
from wtn_pretrain.errors import UserError
from wtn_pretrain.models.hf import why_not_hf
from wtn_pretrain.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))

TREE = {
    "run": {"name": "x"},
    "model": {"family": "resnet", "block": "basic", "stem": "cifar", "channels": [4, 8], "depths": [1, 1]},
    "task": {"kind": "classify"},
    "data": {"kind": "images"},
}


def refused(*assignments: str) -> str:
    with pytest.raises(UserError) as caught:
        validate(Recipe, override(TREE, assignments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=[str(path.relative_to(ROOT)) for path in SHIPPED])
def test_every_shipped_recipe_is_valid_and_headed(path: Path) -> None:
    load_recipe(path)
    assert path.read_text(encoding="utf-8").startswith("#"), "a recipe says what it should reach, on what, in how long"


def test_shipped_recipes_exist() -> None:
    assert len(SHIPPED) >= 4


def test_a_resolved_recipe_reads_back_equal() -> None:
    recipe = validate(Recipe, override(TREE, ["wide.optimizer.lr=0.5", "compare.seeds=[3,4]", "widen.inner=2"]))
    assert validate(Recipe, yaml.safe_load(dump_yaml(recipe))) == recipe


def test_overrides_are_read_as_yaml_and_leave_the_tree_alone() -> None:
    tree = {"a": {"b": 1}}
    assert override(tree, ["a.b=[1, 2]", "a.c=null", "d.e=1e-3", "d.f=text"]) == {
        "a": {"b": [1, 2], "c": None},
        "d": {"e": "1e-3", "f": "text"},
    }
    assert tree == {"a": {"b": 1}}
    assert validate(Recipe, override(TREE, ["wide.optimizer.lr=1e-3"])).wide.optimizer.lr == 1e-3


def test_unknown_keys_name_the_nearest_valid_one() -> None:
    assert refused("wide.optimizer.learning_rate=1").startswith("unknown key wide.optimizer.learning_rate; did you mean")
    assert "did you mean wide.steps?" in refused("wide.step=3")
    assert "did you mean narrow.schedule?" in refused("narrow.shedule=joint")
    assert "model.depths" in refused("model.depth=[1]")
    assert "did you mean data.flip?" in refused("data.flipp=true")


def test_impossible_values_and_combinations_name_the_key() -> None:
    assert refused("wide.batch_size=64", "wide.micro_batch_size=24").startswith(
        "wide: batch_size 64 is not a multiple of micro_batch_size 24"
    )
    assert "task.kind mlm does not fit model.family resnet" in refused("task.kind=mlm")
    assert "narrow: feed teacher contradicts schedule joint" in refused("narrow.schedule=joint", "narrow.feed=teacher")
    assert "narrow.loss mobilebert is for encoder layers" in refused("narrow.loss=mobilebert")
    assert "names a seed twice" in refused("compare.seeds=[1,1]")
    assert "wide.precision" in refused("wide.precision=fp8")
    assert "run.name" in refused("run.name=a/b")
    assert "no preset 'resnet5'" in refused("model.preset=resnet5")
    assert "wide.optimizer.lr" in refused("wide.optimizer.lr=-1")
    assert "is a value, not a section" in refused("run.name.x=1")


def test_missing_keys_are_named() -> None:
    with pytest.raises(UserError, match=r"missing key run; set it in the file or with --run=VALUE"):
        validate(Recipe, {key: value for key, value in TREE.items() if key != "run"})
    with pytest.raises(UserError, match=r"missing key model.family"):
        validate(Recipe, {**TREE, "model": {"depths": [1]}})


def test_files_that_are_no_recipe_are_refused(tmp_path: Path) -> None:
    for text, words in (
        ("a: [", "not valid YAML"),
        ("- 1", "holds no sections"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            load_recipe(path)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        load_recipe(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_help_explains_every_key() -> None:
    lines = describe(Recipe).splitlines()
    keys = [line for line in lines if line.startswith("  --")]
    meanings = [line for line in lines if line.startswith("      ")]
    assert len(keys) == len(meanings) > 80
    silent = [key for key, meaning in zip(keys, meanings, strict=True) if meaning.strip().startswith("[")]
    assert not silent, "every key has a sentence"
    for key in (
        "model.hidden_size",
        "model.depths",
        "data.sequence_length",
        "data.flip",
        "narrow.mobilebert.hidden",
        "wide.schedule.warmup",
    ):
        assert any(line.startswith(f"  --{key}=") for line in keys), key


def test_the_command_line_takes_both_forms() -> None:
    assert split_arguments(["--config", "a.yaml", "--x.y=1", "--z.w", "2", "--local_rank=3"]) == ("a.yaml", ["x.y=1", "z.w=2"])
    for argv, words in ((["--x.y"], "has no value"), (["stray"], "expected --config"), (["--verbose=1"], "unknown")):
        with pytest.raises(UserError, match=words):
            split_arguments(argv)


def test_the_readmes_own_export_exists() -> None:
    """The README loads the quickstart's BERT from its Hugging Face folder."""
    assert why_not_hf(load_recipe(ROOT / "configs" / "quickstart" / "bert.yaml").model) is None
