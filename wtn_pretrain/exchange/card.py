"""The model card: what the network is, how it was made, how good it is and how to make it again."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from wtn_pretrain.models.base import BlockNetwork, parameter_count
from wtn_pretrain.models.bert.config import BertConfig
from wtn_pretrain.models.resnet.config import ResNetConfig

_METHOD = """It was trained by *Go Wide, Then Narrow* (Zhou et al., ICML 2020): a wide network of the same kind was trained first, this thin
one imitated its intermediate outputs block by block, and was then trained on the objective itself."""


class Origin(NamedTuple):
    """Where an exported network comes from."""

    name: str = ""
    """Of the run."""
    stage: str = ""
    """Of the run that left it."""
    metric: str = ""
    """What quality is measured in, with its unit."""
    results: dict[str, dict[str, Any]] = {}
    """What each stage reported that this network has gone through to its end."""
    recipe: str = ""
    """The run's whole configuration as YAML."""
    commit: str | None = None
    """Of the code that exports."""
    weights: dict[str, str] = {}
    """SHA-256 of the files that the network was read from."""
    data: str = ""
    """The data in words."""
    seed: int | None = None
    """Of the stage."""
    step: int | None = None
    """Of the stage, where the network is that of a checkpoint and not what the stage left in the end."""


def model_card(network: BlockNetwork, origin: Origin, license: str, certificate: dict[str, Any]) -> str:
    """`README.md` of an export, with the front matter that model hubs read."""
    images = isinstance(network.config, ResNetConfig)
    front: dict[str, Any] = {
        "license": license or "other",
        "library_name": "transformers" if certificate["format"] == "hf" else certificate["format"],
        "pipeline_tag": "image-classification" if images else "fill-mask",
        "tags": ["knowledge-distillation", "go-wide-then-narrow"],
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {origin.name or network.config.family}", ""]
    lines += [f"{_shape(network)}, {parameter_count(network):,} parameters.", ""]
    if origin.stage in ("narrow", "finetune"):
        lines += [_METHOD, ""]
    if origin.stage:
        seed = "" if origin.seed is None else f" of seed {origin.seed}"
        when = "as it ended" if origin.step is None else f"at its step {origin.step}, before its end"
        lines += [f"It is the network of stage {origin.stage}{seed}, {when}.", ""]
    if origin.results:
        lines += ["## Quality", "", f"| stage | {origin.metric} | steps |", "| --- | --- | --- |"]
        lines += [f"| {stage} | {result['metric']:.2f} | {result['steps']} |" for stage, result in origin.results.items()]
        lines += ["", f"On the validation part of: {origin.data}.", ""]
    wide = origin.results.get("wide", {})
    if wide.get("teacher"):
        hashes = ", ".join(f"{name} {value}" for name, value in wide.get("sha256", {}).items())
        lines += [f"The wide network was not trained here: it was read from {Path(wide['teacher']).name} (SHA-256: {hashes}).", ""]
    lines += ["## This export", "", _said(certificate), ""]
    lines += ["## Licence", "", license or "Not stated. The licences of the data and of the teacher decide what may be done with it.", ""]
    if origin.recipe:
        lines += ["## How to make it again", "", "```", "python scripts/run.py --config recipe.yaml", "```", "", "with this `recipe.yaml`"]
        lines += [f"and the code at commit {origin.commit}:" if origin.commit else "and the same version of the code:"]
        lines += ["", "```yaml", origin.recipe.strip(), "```", ""]
    return "\n".join(lines)


def _shape(network: BlockNetwork) -> str:
    config = network.config
    if isinstance(config, BertConfig):
        return (
            f"A BERT ({config.norm}-LN) of {config.layers} layers, {config.hidden_size} wide, with {config.heads} heads of "
            f"{config.head_size}, {config.intermediate_size} units a feed-forward layer and {config.vocab_size} words"
        )
    assert isinstance(config, ResNetConfig)
    return (
        f"A ResNet of {list(config.depths)} {config.block} blocks, {list(config.channels)} channels wide ({list(config.inner_channels)} "
        f"inside), for images of {config.image_size} x {config.image_size} pixels and {config.classes} classes"
    )


def _said(certificate: dict[str, Any]) -> str:
    text = (
        f"Against the original, on {len(certificate['shapes'])} shapes of real inputs: logits differ by at most "
        f"{certificate['max_difference']:.1e}, the top answer agrees in {100 * certificate['top1_agreement']:.2f}% "
        f"(`parity.json`; opened with {certificate['opened_with']})."
    )
    if certificate.get("metric_after") is not None:
        text += f" The metric is {certificate['metric_before']:.2f} before and {certificate['metric_after']:.2f} after."
    return text
