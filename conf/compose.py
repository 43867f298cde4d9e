"""Composes a run's configuration: schema, then `conf/**.yaml` along Hydra's defaults list, then the command line.

Hydra resolves which files take part and in which order (`conf/layers.py`); every value is then assigned, one at a time,
to the typed schema by OmegaConf, which refuses unknown keys and wrong types. Because each value still knows its place,
messages name it and `explain` can show it. Loads neither ray, torch nor vllm.
"""

from __future__ import annotations

import os
import reprlib
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, ValidationError

from conf.layers import UNREADABLE, Setting, fills_in, groups, knobs, packaged, read
from conf.reads import unread
from conf.schema import Config
from conf.validate import Problem, problems
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

CONFIG_FILE = "config.yaml"
"""Of a run folder: its whole configuration."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring = 2, 200
COMMAND_LINE = "command line"
SCHEMA_DEFAULT = "schema default"
_EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list[str]: "a list of texts such as [a, b]",
}


def compose(overrides: Sequence[str], config_file: Path | None = None) -> Config:
    """The configuration of a run.

    Args:
        overrides: ``key=value`` for keys of the schema, ``group=choice``, and ``model=<folder or hub id>``.
        config_file: A complete configuration, as `resolved_yaml` writes it into every run folder, to start from
            instead of the packaged files. Groups cannot be chosen then: it holds the result of that choice.

    Raises:
        ConfigError: an unknown key or choice, a wrong type, a missing or refused value; all that were found.
    """
    return _compose(overrides, config_file)[0]


def compose_resumed(run_dir: Path, overrides: Sequence[str]) -> Config:
    """The configuration of a run that goes on: its own with overrides, of which `launch.run` refuses some.

    Raises:
        ConfigError: `run_dir` holds no run, or as for `compose`.
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{run_dir}: holds no run (there is no {path})")
    return compose([*overrides, f"run_dir={run_dir}"], path)


def explain(overrides: Sequence[str], config_file: Path | None = None) -> list[Setting]:
    """Every key with its value and where it comes from, in the order of the schema; arguments as for `compose`."""
    config, sources = _compose(overrides, config_file)
    values = flatten(asdict(config))
    return [Setting(key, values[key], sources.get(key, SCHEMA_DEFAULT)) for key in knobs()]


def resolved_yaml(config: Config) -> str:
    """The configuration as YAML that `compose(config_file=...)` reads back to an equal one.

    `model.tiny.seed` goes on following `seed` where it did.
    """
    tree = asdict(config)
    if config.model.tiny.seed == config.seed:
        tree["model"]["tiny"]["seed"] = "${seed}"
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def _compose(overrides: Sequence[str], config_file: Path | None) -> tuple[Config, dict[str, str]]:
    choices, given, complaints = _parse(overrides, from_file=config_file is not None)
    layers = packaged(tuple(choices)) if config_file is None else read(config_file, str(config_file))
    settings = [*layers, *given]
    tree = _writable(OmegaConf.structured(Config))
    complaints += [complaint for setting in settings if (complaint := _assign(tree, setting))]
    if complaints:
        raise ConfigError("\n".join(complaints))
    sources = {setting.key: setting.source for setting in settings}
    config = _to_config(tree)
    found = problems(config)
    if not found:
        without = unread(config)
        found = [
            *_without_effect(config, without, given, layers),
            *_groups_without_effect(without, choices, layers),
        ]
    if found:
        raise ConfigError("\n".join(f"{message}{_at(sources.get(key))}" for key, message in found))
    return config, sources


def _without_effect(
    config: Config, without: Mapping[str, str], given: Sequence[Setting], layers: Sequence[Setting]
) -> Iterator[Problem]:
    """What was set on the command line to another value than it had, and is read by nothing."""
    values, before = flatten(asdict(config)), _values(layers)
    for key in dict.fromkeys(setting.key for setting in given):
        if key in without and values[key] != before[key]:
            yield Problem(key, f"{key}={values[key]}: {without[key]}: leave it out")


def _groups_without_effect(
    without: Mapping[str, str], choices: Sequence[str], layers: Sequence[Setting]
) -> Iterator[Problem]:
    """Groups that were chosen on the command line, change something, and of which nothing is read."""
    for choice in choices:
        own = [key for key, _, source in layers if source.startswith(f"conf/{choice.replace('=', '/')}.yaml:")]
        if own and all(key in without for key in own):
            before = _values(packaged(tuple(other for other in choices if other != choice)))
            if any(_values(layers)[key] != before[key] for key in own):
                yield Problem(choice.partition("=")[0], f"{choice}: {without[own[0]]}: leave it out")


def _values(layers: Sequence[Setting]) -> dict[str, Any]:
    """Every key with the value that the schema and these settings give it."""
    return flatten(asdict(Config())) | {setting.key: setting.value for setting in layers}


def _parse(overrides: Sequence[str], *, from_file: bool) -> tuple[list[str], list[Setting], list[str]]:
    """Splits the command line into group choices, values, and complaints about what is neither."""
    choices: list[str] = []
    settings: list[Setting] = []
    complaints: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            complaints.append(f"`{override}`: expected key=value or group=choice")
        elif key == "model" and _is_model_path(value):
            choices.append("model=hf")
            settings.append(Setting("model.path", value, COMMAND_LINE))
        elif key not in groups():
            settings.append(Setting(key, _read_value(key, value), COMMAND_LINE))
        elif value in groups()[key]:
            choices.append(override)
        else:
            complaints.append(_no_such_choice(key, value))
    if from_file and choices:
        complaints.append(
            f"{choices[0]}: chooses a group, but the config that this starts from is complete: set keys of that group"
            f" ({_examples(choices[0].partition('=')[0])}), or start a new run without it"
        )
    return choices, settings, complaints


def _is_model_path(value: str) -> bool:
    """A folder or a hub id, and not a choice of the group or a slip of the finger that looks like one."""
    choices = groups()["model"]
    if value in choices:
        return False
    return "/" in value or os.path.isdir(value) or not get_close_matches(value, choices, n=1, cutoff=0.6)


def _read_value(key: str, text: str) -> Any:
    """Texts are taken as they stand, so that paths and markers need no quoting; everything else is YAML."""
    if text in ("null", "None"):
        return None
    if key in knobs() and knobs()[key].type in (str, str | None):
        quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, *UNREADABLE):
        return text


def _assign(tree: DictConfig, setting: Setting) -> str | None:
    """Sets one value; returns what is wrong with it, if anything."""
    key, value, source = setting
    if key not in knobs():
        return _unknown(key) + _at(source)
    if fills_in(value):
        return (
            f"{key}: `${{...}}` may name another key, as in ${{seed}}, and nothing else; a configuration is kept in the"
            f" run folder, where variables of the environment have no place{_at(source)}"
        )
    try:
        if isinstance(value, list) and any(isinstance(each, list | dict | set | tuple) for each in value):
            raise ValidationError("no key holds lists of lists")  # which aliases can make larger than any memory
        OmegaConf.update(tree, key, value)
    except (OmegaConfBaseException, OverflowError):  # the latter for digits beyond any float
        kind = knobs()[key].type
        optional = type(None) in getattr(kind, "__args__", ())
        expected = _EXPECTED[kind.__args__[0] if optional else kind] + (" or null" if optional else "")
        return f"{key}: expected {expected}, found {'null' if value is None else _SHORT.repr(value)}{_at(source)}"
    return None


def _writable(tree: DictConfig) -> DictConfig:
    """OmegaConf takes a frozen dataclass for a read-only one, and nested sections one by one."""
    OmegaConf.set_readonly(tree, False)
    for name in tree:
        if isinstance(section := tree._get_node(name), DictConfig):
            _writable(section)
    return tree


def _to_config(tree: DictConfig) -> Config:
    try:
        config: Config = OmegaConf.to_object(tree)  # type: ignore[assignment]  # typed by its schema
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: no value: set {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    return config


_OPTIONS = {"resume": "RUN", "config": "FILE"}


def _unknown(key: str) -> str:
    """Names the nearest key: by its whole name first, then by its last part, whatever group that is in."""
    if key in _OPTIONS:
        return f"{key}: an option, not a key: --{key} {_OPTIONS[key]}"
    under = [name for name in knobs() if name.startswith(f"{key}.")]
    if under:
        return f"{key}: a group of keys, not one: set {', '.join(under[:4])}{', ...' if len(under) > 4 else ''}"
    near = get_close_matches(key, [*knobs(), *groups()], n=1, cutoff=0.75)
    last = key.rpartition(".")[2]
    near = near or [name for name in knobs() if name.rpartition(".")[2] == last]
    near = near or get_close_matches(key, knobs(), n=1, cutoff=0.5)
    hint = f": did you mean {' or '.join(near[:3])}?" if near else ""
    siblings = [name.rpartition(".")[2] for name in knobs() if name.rpartition(".")[0] == key.rpartition(".")[0]]
    inside = f"; {key.rpartition('.')[0]} has {', '.join(siblings)}" if "." in key and siblings else ""
    return f"{key}: no such key{hint}{inside}; `agon config` prints all"


def _no_such_choice(group: str, value: str) -> str:
    choices = groups()[group]
    near = get_close_matches(value, choices, n=1, cutoff=0.5)
    keys = [f"{key}={value}" for key, knob in knobs().items() if key.startswith(f"{group}.") and value in knob.choices]
    hint = f"did you mean {(keys or near)[0]}? " if keys or near else ""
    folder = ", or a model's folder or hub id" if group == "model" else ""
    return f"{group}={value}: no such {group}: {hint}choices: {', '.join(choices)}{folder}"


def _examples(group: str) -> str:
    return ", ".join([f"{key}=..." for key in knobs() if key.startswith(f"{group}.")][:2])


def _at(source: str | None) -> str:
    return f" ({source})" if source not in (None, COMMAND_LINE) else ""


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as dotted keys and values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
