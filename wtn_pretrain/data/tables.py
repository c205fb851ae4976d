"""Tables through the `datasets` library: a hub name, or a local folder of Parquet, arrow, JSON lines or CSV files; `NAME:CONFIGURATION`
names one of those that a hub data set has."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wtn_pretrain.errors import UserError

_VALIDATION = ("validation", "valid", "val", "dev", "test")


def open_tables(path: str) -> Mapping[str, Any]:
    """The splits of `path`, by name. Raises a UserError that names what `datasets` could not open."""
    import datasets  # takes seconds to import

    try:
        folder = Path(path)
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            found = datasets.load_from_disk(path)
        else:
            name, _, configuration = (path, "", "") if folder.exists() else path.partition(":")
            found = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the library, its file systems and its builders raise all sorts
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(
            f"{path}: `datasets` cannot open it ({type(error).__name__}: {reason}); "
            "give a folder of Parquet files, a hub name or NAME:CONFIGURATION"
        ) from None
    return found if isinstance(found, Mapping) else {"train": found}


def training_table(tables: Mapping[str, Any], path: str) -> Any:
    """The split "train", which must hold rows."""
    if "train" not in tables:
        raise UserError(f"{path}: no split train, only {', '.join(tables)}; name the training files train*")
    if not len(tables["train"]):
        raise UserError(f"{path}: the split train holds no rows; give one that does")
    return tables["train"]


def validation_table(tables: Mapping[str, Any]) -> Any | None:
    """The first of the splits validation and test that holds rows, under any of their usual names."""
    return next((tables[name] for name in _VALIDATION if name in tables and len(tables[name])), None)


def check_column(table: Any, column: str, key: str, path: str) -> None:
    """Refuses a column that the table lacks; `key` is the setting that names it."""
    if column not in table.column_names:
        raise UserError(f"{path}: no column {column}, only {', '.join(table.column_names)}; set {key}")
