"""Exporting a run's network on its own, after the run."""

from wtn_pretrain.errors import UserError
from wtn_pretrain.exchange.write import export
from wtn_pretrain.models.store import load_network
from wtn_pretrain.stages import Stages


def export_run(stages: Stages) -> None:
    """Exports the first seed's fine-tuned thin network into the run's `export` folder and prints each format's standing."""
    section = stages.recipe.export
    network = load_network(stages.seed_folder("finetune", stages.recipe.compare.seeds[0]))
    written = export(network, stages.task, section.formats, stages.folder.path / "export", section.tolerance)
    print("\n".join(standing(name, result) for name, result in written.items()))
    if all("refused" in result for result in written.values()):
        raise UserError("export.formats: none of them can hold this network; add onnx")


def standing(name: str, result: dict[str, object]) -> str:
    """One line on a format: how near its logits are, or why it was refused."""
    if "refused" in result:
        return f"export {name}: not written: {result['refused']}"
    return f"export {name}: logits within {result['max_difference']:.1e} of the original, top-1 agreement {result['top1_agreement']:.4f}"
