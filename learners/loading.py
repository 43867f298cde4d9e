"""Models and tokenizers out of folders: safetensors only, no code that comes with them, dropout off, every weight read.

Where a file lacks a tensor, transformers fills it with random numbers and goes on; here that is refused.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from learners.products import use_fastest_products
from orchestrator.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

VERSION = transformers.__version__
_SHOWN = 3
_LOCAL = {"trust_remote_code": False, "local_files_only": True}
_TELL = {"output_loading_info": True, "ignore_mismatched_sizes": True}
_REFUSALS = (OSError, ValueError, ImportError, StrictDataclassError)
"""What transformers raises at a folder that it does not take."""


def tokenizer_of(folder: str | Path) -> Any:
    """The tokenizer in a folder. Raises ModelError: it cannot be loaded, or needs code that comes with it."""
    try:
        return AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except _REFUSALS as error:
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {error}") from error


def load(loader: Any, folder: str | Path, dtype: torch.dtype) -> nn.Module:
    """The model in a folder.

    Args:
        loader: an `AutoModel...` of transformers.
        folder: of the model.
        dtype: of its weights.

    Raises:
        ModelError: the folder holds no model that `loader` knows, or not all of its weights.
    """

    def read(config: Any) -> Any:
        return loader.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True, **_LOCAL, **_TELL)

    use_fastest_products()
    return _load(folder, read).eval()


def check_weights(loader: Any, folder: str | Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Whether `load` would find every weight, told from the headers of the files: no weight is read.

    The names of a checkpoint and of a model differ in ways that transformers alone knows, so it loads the model all
    the same, from tensors without values.

    Args:
        loader: as for `load`.
        folder: of the model.
        shapes: of the tensors in its safetensors, by name.

    Raises:
        ModelError: as `load`.
    """
    state = {name: _Unread(shape) for name, shape in shapes.items()}

    def rehearse(config: Any) -> Any:
        with torch.device("meta"):
            model_class = type(loader.from_config(config))
        _check_name(folder, config.architectures or [model_class.__name__], model_class.__name__)
        return model_class.from_pretrained(None, config=config, dtype=torch.float32, state_dict=state, **_TELL)

    _load(folder, rehearse)


class _Unread:
    """Stands for a tensor in a file, as transformers' loader takes it; read, it has a shape and no values."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = shape

    def __getitem__(self, _: Any) -> _Unread:
        return self

    def to(self, **_: Any) -> Tensor:
        return torch.empty(tuple(self._shape), device="meta")


def _load(folder: str | Path, read: Callable[[Any], tuple[nn.Module, Mapping[str, Any]]]) -> nn.Module:
    with _quiet():
        try:
            config: Any = AutoConfig.from_pretrained(folder, **_LOCAL)
            for name, value in vars(config).items():
                if isinstance(value, float) and "drop" in name:
                    setattr(config, name, 0.0)
            model, info = read(config)
        except RuntimeError as error:
            if "conversion" not in str(error):
                raise
            raise ModelError(
                f"{folder}: tensors that transformers {VERSION} merges into one are missing or differ in size: fetch"
                " the folder again, or take the config.json that was saved with them"
            ) from error
        except _REFUSALS as error:
            said = str(error).strip().partition("\n")[0]
            raise ModelError(f"{folder}: transformers {VERSION} cannot load a model from it: {said}") from error
    _complain(folder, info)
    if not torch.cuda.is_available():  # on its way there it is copied anyway
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # else memory of the file, whose pages change and vanish with it
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of the weights that are missing, which `_complain` names, and its progress bar."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _check_name(folder: str | Path, names: Sequence[str], right: str) -> None:
    """The name of the architecture, by which vLLM goes; transformers goes by `model_type`."""
    if not any(hasattr(transformers, name) for name in names):
        raise ModelError(
            f"{Path(folder) / 'config.json'}: architectures is {', '.join(names)}, which transformers"
            f" {VERSION} does not know; by its model_type it is {right}: write that"
        )


def _complain(folder: str | Path, info: Mapping[str, Any]) -> None:
    wrong = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    wrong += [
        f"{name} is {list(found)} instead of {list(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"], key=str)
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ModelError(
            f"{folder}: its safetensors do not hold the weights that config.json asks for: {', '.join(wrong[:_SHOWN])}"
            f"{more}: fetch the folder again, or take the config.json that was saved with them"
        )
