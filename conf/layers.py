"""Where values come from: every YAML file, and the command line, as settings that know their place."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

import yaml

from conf.schema import Config
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FOLDER = Path(__file__).parent
_OWN_KEY = re.compile(r"\$\{[A-Za-z0-9_.]+\}")
UNREADABLE = (ValueError, KeyError, AttributeError, TypeError, RecursionError, OverflowError)
"""What PyYAML raises beside its own errors: for tags on values that are none, dates that do not exist, endless digits,
absurdly deep nesting."""


class Setting(NamedTuple):
    """One value and its place: ``("learner.lr", 5e-7, "conf/recipe/iterative_dpo.yaml:22")``."""

    key: str
    value: Any
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Knob:
    """What `conf/schema.py` says of one key."""

    type: Any
    meaning: str
    choices: tuple[str, ...]
    low: float | None
    above: float | None
    high: float | None


@cache
def knobs() -> Mapping[str, Knob]:
    """Every key there is, dotted, in the order of the schema."""
    return dict(_knobs(Config, ""))


def _knobs(schema: Any, prefix: str) -> Iterator[tuple[str, Knob]]:
    types = get_type_hints(schema)
    for field in fields(schema):
        kind, key = types[field.name], f"{prefix}{field.name}"
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _knobs(kind, f"{key}.")
        else:
            yield key, Knob(type=kind, **field.metadata)


@cache
def groups() -> Mapping[str, tuple[str, ...]]:
    """The choices of every group, each a file ``conf/<group>/<choice>.yaml``; `tuned` follows from two others."""
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted(FOLDER.glob("*/*.yaml")):
        if path.parent.name != "tuned":
            found[path.parent.name] = (*found.get(path.parent.name, ()), path.stem)
    return {field.name: found[field.name] for field in fields(Config) if field.name in found}


@cache
def packaged(choices: tuple[str, ...]) -> tuple[Setting, ...]:
    """All settings of `conf/config.yaml` and what its defaults list leads to, the later ones winning.

    A part that was asked for by name wins over what the recipe and the tuned file say of that part: ``pairing=all``
    must not be undone by a file the user never named.

    Args:
        choices: Group choices as Hydra writes them, ``loss=rpo``; each must exist.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with initialize_config_dir(str(FOLDER), job_name="agon", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        defaults = loader.compute_defaults_list("config", list(choices), RunMode.RUN).defaults
    asked_for = {choice.partition("=")[0] for choice in choices} - {"recipe", "model"}  # these choose the tuned file
    settings: list[Setting] = []
    last: list[Setting] = []
    for entry in defaults:
        path = FOLDER / f"{entry.config_path}.yaml"
        if path.is_file() and not entry.config_path.startswith("hydra/"):
            layer = last if path.parent.name in asked_for else settings
            layer += read(path, f"conf/{entry.config_path}.yaml", entry.package or "")
    return (*settings, *last)


def read(path: Path, name: str, package: str = "") -> list[Setting]:
    """The settings of one YAML file, a Hydra defaults list left out.

    Args:
        path: The file.
        name: What to call it in sources and messages.
        package: Dotted key its content is put under; empty for the root.

    Raises:
        ConfigError: the file cannot be read or is not a mapping; with its line.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8-sig"))
        root = loader.get_single_node()
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise _not_a_key(name, root)
        return list(_leaves(loader, root, name, package.removeprefix("_global_"))) if root else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: cannot be read ({error})") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{name}{line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {' '.join(str(error).split())}") from error
    except ConfigError:
        raise
    except UNREADABLE as error:
        raise ConfigError(f"{name}: not usable YAML: {type(error).__name__}: {error}") from error


def _leaves(loader: Any, node: Any, name: str, prefix: str) -> Iterator[Setting]:
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _not_a_key(name, key_node)
        key = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
        if key == "defaults":
            continue
        if isinstance(value_node, yaml.MappingNode) and key not in knobs():
            yield from _leaves(loader, value_node, name, key)
        else:
            value = loader.construct_object(value_node, deep=True)
            yield Setting(key, value, f"{name}:{key_node.start_mark.line + 1}")


def fills_in(value: Any) -> bool:
    """Whether OmegaConf would fill in more than other keys: variables of the environment, and what else it resolves."""
    texts = value if isinstance(value, list) else [value]
    return any("${" in _OWN_KEY.sub("", text) for text in texts if isinstance(text, str))


def _not_a_key(name: str, node: Any) -> ConfigError:
    return ConfigError(f"{name}:{node.start_mark.line + 1}: expected `key: value` lines, found something else")
