"""Typed configuration: sections, one YAML file, `--section.key=value` overrides, and the help made from them.

A section is a pydantic model whose fields are explained by the string under each field; that string is the help text.
Sections live with the code that they configure; `wtn_pretrain.recipe` joins them into a whole run.
"""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from wtn_pretrain.errors import UserError


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


S = TypeVar("S", bound=Section)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, read with the safe loader (tags that would run code are refused)."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"configuration {path}: {error.strerror}; give an existing YAML file to --config") from None
    except UnicodeDecodeError:
        raise UserError(f"configuration {path}: not a text file; give a YAML file to --config") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise UserError(
            f"configuration {path}{where}: not valid YAML ({' '.join(str(getattr(error, 'problem', error)).split())})"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"configuration {path}: holds no sections; see configs/ for examples")
    return tree


def override(tree: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """`tree` with `section.key=value` assignments applied; values are read as YAML."""
    result = _copied(tree)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise UserError(f"argument --{assignment}: expected --section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"argument --{path}: {text!r} is not a YAML value") from None
        node = result
        for key in keys[:-1]:
            child = node.setdefault(key, {})
            if not isinstance(child, dict):
                raise UserError(f"argument --{path}: {key} is a value, not a section")
            node = child
        node[keys[-1]] = value
    return result


def validate(section: type[S], tree: Mapping[str, Any]) -> S:
    """`tree` as a `section`, or a `UserError` that names the key, what is wrong and the nearest valid key."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(_explain(section, problem) for problem in error.errors()[:3])) from None


def dump_yaml(section: Section) -> str:
    """The resolved section as YAML that `read_yaml` and `validate` turn back into it."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe(section: type[Section]) -> str:
    """One line a key: its override flag, type, default and meaning."""
    lines = []
    for path, name, field in _walk(section):
        required = field.is_required()
        default = "required" if required else yaml.safe_dump(_plain(field.get_default(call_default_factory=True)), default_flow_style=True)
        default = default.replace("\n...", "").strip()
        meaning = " ".join((field.description or "").split())
        lines.append(f"  --{path}={name}\n      {meaning} [{default}]")
    return "\n".join(lines)


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple):
        return list(value)
    return value


def _sections(annotation: Any) -> list[type[Section]]:
    """The section types inside an annotation such as `A | B`, `Annotated[A | B, ...]` or `A`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, Section):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [found for part in typing.get_args(annotation) for found in _sections(part)]
    return []


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return "|".join("null" if part is type(None) else _type_name(part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    return getattr(annotation, "__name__", str(annotation)) if typing.get_origin(annotation) is None else str(annotation)


def _walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    for name, field in section.model_fields.items():
        inner = _sections(field.annotation)
        if not inner:
            yield f"{prefix}{name}", _type_name(field.annotation), field
        seen: set[str] = set()
        for choice in inner:
            for path, kind, leaf in _walk(choice, f"{prefix}{name}."):
                if (len(inner) > 1 and path not in seen) or len(inner) == 1:
                    yield path, kind, leaf
                    seen.add(path)


def _explain(section: type[Section], problem: Any) -> str:
    # pydantic puts the tag of a discriminated union into the location: it is no key of the file
    location: list[str] = []
    candidates: list[type[Section]] = [section]
    for part in problem["loc"]:
        fields = {name: field for candidate in candidates for name, field in candidate.model_fields.items()}
        tags = {_tag(candidate) for candidate in candidates}
        if part in fields:
            candidates = _sections(fields[part].annotation)
        elif part in tags:
            candidates = [candidate for candidate in candidates if _tag(candidate) == part]
            continue
        location.append(str(part))
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        parent = ".".join([*location[:-1], ""])
        beside = [parent + name for candidate in candidates for name in candidate.model_fields]
        # the key that was meant is most likely in the same section
        near = difflib.get_close_matches(key, beside, n=1) or difflib.get_close_matches(
            key, [path for path, _, _ in _walk(section) if path != key], n=1, cutoff=0.0
        )
        return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
    if problem["type"] == "missing":
        return f"missing key {key}; set it in the file or with --{key}=VALUE"
    if problem["type"] == "union_tag_not_found":
        name = str(problem["ctx"]["discriminator"]).strip("'")
        return f"missing key {key}.{name}; set it in the file or with --{key}.{name}=VALUE"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _tag(candidate: type[Section]) -> str | None:
    """The literal that picks `candidate` in a discriminated union (its first one-valued literal field)."""
    for field in candidate.model_fields.values():
        if typing.get_origin(field.annotation) is typing.Literal and len(typing.get_args(field.annotation)) == 1:
            return typing.get_args(field.annotation)[0]
    return None
