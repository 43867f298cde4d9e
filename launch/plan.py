"""`agon plan`: what a run takes of cores, devices and memory, and what it waits for; nothing is started or written."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.roles import roles
from conf.validate import validate
from launch.devices import find_gpu
from launch.estimate import estimate
from launch.model_files import TINY_VOCABULARY, count_parameters, find_model, read_config, shape_of, tiny_shape
from launch.resources import disk_plan, gib, memory_plan, table
from orchestrator.errors import ModelError

if TYPE_CHECKING:
    from conf.schema import Config
    from launch.devices import Device
    from launch.estimate import Work
    from launch.model_files import ModelShape
    from launch.resources import Need


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What actors of one role take.

    Example: ``Row(role="generator", actors=2, cpus=1, gpus=1, host_bytes=966_367_641, gpu_bytes=16_200_000_000)``
    """

    role: str
    actors: int
    cpus: float
    """That each reserves."""
    gpus: float
    host_bytes: int
    """Host memory of each."""
    gpu_bytes: int
    """Memory on all GPUs of each together."""


def plan(config: Config, *, gpu: str, as_json: bool = False) -> str:
    """The plan of a run, for people or as one JSON object.

    Args:
        config: the run.
        gpu: name of the GPU that roles with GPUs use; see `launch/devices.py`.
        as_json: see above.

    Raises:
        UserError: the configuration, the model or the GPU's name is of no use.
    """
    validate(config)
    device, shape = find_gpu(gpu), planned_shape(config)
    needs, disk, work = memory_plan(config, shape), disk_plan(config, shape), estimate(config, shape, device)
    rows = layout(config, needs)
    if as_json:
        found = {
            "parameters": shape.num_parameters,
            "layout": [asdict(row) for row in rows],
            "memory": [asdict(need) | {"bytes": need.bytes} for need in needs],
            "disk": [asdict(need) | {"bytes": need.bytes} for need in disk],
            "iteration": [asdict(one) for one in work],
            "bottleneck": _bottleneck(work).role,
        }
        return json.dumps(found, indent=2)
    head = f"{config.recipe.name}: {shape.num_parameters:,} parameters in {config.model.dtype}"
    parts = [head, _layout_table(rows, device), _fit(rows, device), "memory, all actors of a role together"]
    parts += [table(needs), f"run folder: {gib(sum(need.bytes for need in disk))} at most", table(disk)]
    return "\n".join([*(part for part in parts if part), _work_table(config, work, device)])


def layout(config: Config, needs: list[Need]) -> list[Row]:
    """A row for each role, with what `needs` says of one actor; the controller and Ray itself stand first."""

    def of_each(role: str, *, on_gpu: bool) -> int:
        return sum(need.each for need in needs if need.role == role and need.on_gpu == on_gpu)

    fixed = [
        Row(role=name, actors=1, cpus=0, gpus=0, host_bytes=of_each(name, on_gpu=False), gpu_bytes=0)
        for name in ("ray", "controller")
    ]
    return fixed + [
        Row(
            role=role.name,
            actors=role.count,
            cpus=role.cpus,
            gpus=role.gpus,
            host_bytes=of_each(role.name, on_gpu=False),
            gpu_bytes=of_each(role.name, on_gpu=True),
        )
        for role in roles(config)
    ]


def planned_shape(config: Config) -> ModelShape:
    """Of the policy; where a folder has no weights yet, its `config.json` is enough.

    Raises:
        ModelError: there is no such model, or transformers knows none like it.
    """
    if config.model.kind == "tiny":
        return tiny_shape(config.model, TINY_VOCABULARY)
    folder = _find_described(config.model.path or "")
    described = read_config(folder)
    stored = any(folder.glob("*.safetensors"))
    return shape_of(folder / "config.json", described, count_parameters(folder) if stored else _count_described(folder))


def _find_described(path: str) -> Path:
    """The folder of a model, or of what the cache has of a hub id: a plan is no reason to fetch 140 GB of weights."""
    if Path(path).is_dir():
        return find_model(path)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):
        if isinstance(cached := try_to_load_from_cache(path, "config.json"), str):
            return Path(cached).parent
    raise ModelError(
        f"model.path={path}: no such folder, and no hub model of that name in the cache. For a plan its config.json is"
        f" enough: hf download {path} config.json --local-dir DIR, and model.path=DIR"
    )


def _count_described(folder: Path) -> int:
    """Parameters of the model that a `config.json` describes, none of which are made."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{folder / 'config.json'}: transformers makes no model of it: {error}") from error
    return sum(parameter.numel() for parameter in model.parameters())


def _layout_table(rows: list[Row], device: Device) -> str:
    uses_gpus = any(row.gpus for row in rows)
    head = (
        "role",
        "actors",
        "cpus each",
        "gpus each",
        "host memory each",
        f"on {device.name} each" if uses_gpus else "",
    )
    lines = [head]
    for row in rows:
        on_gpu = gib(row.gpu_bytes) if row.gpus else "-" * uses_gpus
        lines.append((row.role, str(row.actors), f"{row.cpus:g}", f"{row.gpus:g}", gib(row.host_bytes), on_gpu))
    cpus, gpus = (sum(row.actors * getattr(row, kind) for row in rows) for kind in ("cpus", "gpus"))
    host = sum(row.actors * row.host_bytes for row in rows)
    lines.append(("together", "", f"{cpus:g}", f"{gpus:g}", gib(host), ""))
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    return "\n".join(
        "  " + "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def _fit(rows: list[Row], device: Device) -> str:
    """What is larger than the GPUs it is on."""
    return "\n".join(
        f"  too large: {row.role} needs {gib(row.gpu_bytes)}, {row.gpus:g} x {device.name} have"
        f" {gib(row.gpus * device.memory)}"
        for row in rows
        if row.gpu_bytes > row.gpus * device.memory
    )


def _bottleneck(work: list[Work]) -> Work:
    return max(work, key=lambda one: one.seconds)


def _work_table(config: Config, work: list[Work], device: Device) -> str:
    """What an iteration takes, and whether the roles take turns."""
    longest, width = _bottleneck(work), max(len(one.role) for one in work)
    lines = [f"  {one.role:<{width}}  {one.seconds:>10,.0f} s  {one.tokens:>13,} tokens  ({one.what})" for one in work]
    turns = config.pipeline.mode == "sync"
    wall = sum(one.seconds for one in work) if turns else longest.seconds
    how = (
        "one after the other (pipeline.mode=sync)"
        if turns
        else f"beside each other (pipeline.mode={config.pipeline.mode})"
    )
    on = f" on {device.name}" if any(role.gpus for role in roles(config)) else " on the cores that actors reserve"
    return "\n".join(
        [
            f"an iteration, reckoned{on}, judging left out: {wall:,.0f} s, {how}",
            *lines,
            f"  bottleneck: {longest.role}",
        ]
    )
