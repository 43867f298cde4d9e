"""What a model folder holds, read without loading it: `config.json`, safetensors headers, the tokenizer's files.

A safetensors file begins with its table of tensors, so that a model of any size is inspected in milliseconds and
nothing in it can run. Loads no torch.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from launch.safetensors_header import read_header as read_header  # its users know it from here
from orchestrator.errors import ModelError
from orchestrator.types import PolicyVersion

if TYPE_CHECKING:
    from collections.abc import Mapping

    from conf.schema import ModelConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CAUSAL = ("CausalLM", "LMHeadModel")
_HUB_TIMEOUT_S = 5.0
_SHOWN = 200
_ENDS = 1 << 20  # bytes
_SAMPLE, _SAMPLES = 1 << 16, 256  # bytes, and how many of them
_READ_WHOLE = (".json", ".jinja", ".model", ".txt", ".tiktoken")


TINY_VOCABULARY = 32
"""Roughly; `launch.tiny` has the exact one, behind an import of transformers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes that decide what a model costs.

    Example: ``ModelShape(num_parameters=494_032_768, num_layers=24, hidden_size=896, intermediate_size=4864,
    kv_width=128, vocab_size=151_936, context=32_768)``
    """

    num_parameters: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    kv_width: int
    """Key/value heads times the width of one: values a layer caches of one token, twice."""
    vocab_size: int
    """Rows of the embedding."""
    context: int
    """Longest sequence the model can read, tokens."""


def tiny_shape(model: ModelConfig, vocab_size: int) -> ModelShape:
    """The shape of the Llama that `model.tiny` describes."""
    tiny, width = model.tiny, model.tiny.hidden_size
    layer = 4 * width * width + 3 * width * tiny.intermediate_size + 2 * width
    return ModelShape(
        num_parameters=tiny.num_layers * layer + 2 * vocab_size * width + width,
        num_layers=tiny.num_layers,
        hidden_size=width,
        intermediate_size=tiny.intermediate_size,
        kv_width=width,
        vocab_size=vocab_size,
        context=model.max_length,
    )


def find_model(path: str, key: str = "model.path") -> Path:
    """The folder of a model: itself, or the snapshot of a hub id, from the local cache or fetched into it.

    Only configuration, tokenizer and safetensors are fetched; nothing is with HF_HUB_OFFLINE=1.

    Args:
        path: A folder or a hub id.
        key: What the user gave it as, for messages.

    Raises:
        ModelError: neither is there, or the hub does not give it.
    """
    folder = Path(path)
    try:
        if folder.is_dir():
            return folder
        is_there = folder.exists()
    except OSError as error:  # such as a name that is longer than any file's may be
        raise ModelError(f"{key}={path[:_SHOWN]}: cannot be looked for: {error.strerror}") from error
    if is_there:
        raise ModelError(f"{key}={path}: a file; name the folder that holds config.json and the weights")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(f"{key}={path}: no such folder (looked for {folder.absolute()})")
    from huggingface_hub import constants, model_info, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    unreachable: Any = HfHubHTTPError.__bases__  # OSError, and what the hub's client raises: httpx's, or httpx2's
    try:
        with suppress(LocalEntryNotFoundError):
            return Path(snapshot_download(path, local_files_only=True))
        model_info(path, timeout=_HUB_TIMEOUT_S)  # asks once, where a download asks again and again
        return Path(snapshot_download(path, allow_patterns=_FETCHED))
    except (HFValidationError, *unreachable) as error:
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ModelError(
            f"{key}={path}: no such folder (looked for {folder.absolute()}), no hub model of that name in the cache"
            f" {constants.HF_HUB_CACHE}, and the hub does not give it ({said}): correct the path,"
            f" log in (hf auth login), or fetch it once where there is a network: hf download {path}"
        ) from error


def folder_version(folder: str | Path) -> PolicyVersion:
    """The identity of weights that are served as they lie in a folder: by the bytes of their files."""
    digest = xxhash.xxh3_64()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return PolicyVersion(number=0, digest=digest.hexdigest())


def fingerprint(folder: Path) -> str:
    """16 hex digits that tell one model from another, without reading all of it.

    Of config, tokenizer and chat template, and of the size, the ends and some hundred places between
    them of each file of weights: training moves every tensor, if only by a bit.
    """
    digest = xxhash.xxh3_64()
    for path in sorted(one for one in folder.iterdir() if one.suffix in _READ_WHOLE):
        digest.update(path.name.encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            for place in range(_ENDS, size - _ENDS, max(_SAMPLE, (size - 2 * _ENDS) // _SAMPLES)):
                file.seek(place)
                digest.update(file.read(_SAMPLE))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()


def inspect_model(folder: Path) -> ModelShape:
    """Checks that a folder holds a causal language model with safetensors and a tokenizer.

    Raises:
        ModelError: what is missing or wrong; everything that was found, a line each.
    """
    if (folder / "ledger.sqlite").is_file() and (folder / "model").is_dir():
        raise ModelError(f"{folder}: a run folder; the model that it ended with is {folder / 'model'}")
    config: Mapping[str, Any] = {}
    num_parameters = 0
    complaints = []
    try:
        config = read_config(folder)
    except ModelError as error:
        complaints.append(str(error))
    try:
        num_parameters = count_parameters(folder)
    except ModelError as error:
        complaints.append(str(error))
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        complaints.append(
            f"{folder}: no tokenizer (none of {', '.join(TOKENIZER_FILES)}): copy the tokenizer files of the model it"
            " was trained from, or write them with tokenizer.save_pretrained(folder)"
        )
    if complaints:
        raise ModelError("\n".join(complaints))
    return shape_of(folder / "config.json", config, num_parameters)


def read_config(folder: Path) -> Mapping[str, Any]:
    """The `config.json` of a causal language model. Raises ModelError: there is none, or it is of something else."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{path}: no such file: model.path must name a folder in the Hugging Face layout")
    config = read_json(path)
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ModelError(f"{path}: architectures is {architectures!r}, expected a list of names")
    if not isinstance(config.get("text_config", {}), dict):
        raise ModelError(f"{path}: text_config is {config['text_config']!r}, expected an object")
    if architectures and not any(name.endswith(CAUSAL) for name in architectures):
        raise ModelError(f"{path}: architectures is {', '.join(architectures)}, not a causal language model")
    if "auto_map" in config and "model_type" not in config:
        raise ModelError(f"{path}: needs code that comes with the model (auto_map), which is never run here")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError with the line for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from error
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:  # absurdly deep nesting, or digits without end
        raise ModelError(f"{path}: not usable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return value


def count_parameters(folder: Path) -> int:
    """Of all tensors in a folder's safetensors, whatever kind of model it holds. Raises as `read_shapes`."""
    return sum(map(math.prod, read_shapes(folder).values()))


def read_shapes(folder: Path) -> dict[str, list[int]]:
    """Names and shapes of all tensors in a folder's safetensors.

    Raises:
        ModelError: there are none, or one of the files is missing, damaged or cut short.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else []
        strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if strange:
            raise ModelError(f"{index}: names {strange[0]!r} as a file of weights: such must lie in the folder itself")
        shards = sorted(set(names))
    elif (folder / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    else:
        raise ModelError(_no_weights(folder))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing or not shards:
        raise ModelError(f"{index}: names {len(missing)} files that are missing, the first {missing[:1]}: fetch them")
    shapes = {tensor: shape for name in shards for tensor, shape in read_header(folder / name).items()}
    if not shapes:
        raise ModelError(f"{folder}: no tensors in its safetensors: fetch it again")
    return shapes


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: weights only as pickle ({', '.join(pickles[:3])}), which can run code when loaded and is never"
            ' read here. Convert once, if you trust them: python -c "from transformers import AutoModelForCausalLM as'
            f" M; M.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    if (folder / "adapter_model.safetensors").is_file():
        return f"{folder}: holds a LoRA adapter, not a model: merge it into its base model first"
    return f"{folder}: no weights (model.safetensors, or model.safetensors.index.json with its shards)"


def shape_of(path: Path, config: Mapping[str, Any], num_parameters: int) -> ModelShape:
    """Sizes under the names that model families give them, in the `config.json` at `path`; 0 where none is known."""
    part = config.get("text_config") or {}
    if not isinstance(part, dict):
        raise ModelError(f"{path}: text_config is {part!r}, expected an object")
    text = {**config, **part}

    def find(*names: str, default: int = 0) -> int:
        name = next((name for name in names if text.get(name) is not None), None)
        if name is None:
            return default
        if type(text[name]) is not int or text[name] < 1:
            raise ModelError(f"{path}: {name} is {text[name]!r}, expected a whole number above 0")
        return int(text[name])

    width, heads = find("hidden_size", "n_embd", "d_model"), find("num_attention_heads", "n_head", default=1)
    kv_heads, head = find("num_key_value_heads", default=heads), find("head_dim", default=width // heads)
    return ModelShape(
        num_parameters=num_parameters,
        num_layers=find("num_hidden_layers", "n_layer", "num_layers"),
        hidden_size=width,
        intermediate_size=find("intermediate_size", "n_inner", "ffn_dim", default=4 * width),
        kv_width=kv_heads * head,
        vocab_size=find("vocab_size"),
        context=find("max_position_embeddings", "n_positions", "n_ctx"),
    )
