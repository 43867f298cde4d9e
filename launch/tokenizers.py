"""The tokenizer of a model folder, checked against the model it is to feed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launch.model_files import read_json
from orchestrator.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path


def load_tokenizer(folder: Path, vocab_size: int) -> Any:
    """Loads and checks a tokenizer.

    Args:
        folder: A model folder.
        vocab_size: Rows of the model's embedding; 0: not known.

    Raises:
        ModelError: it cannot be loaded, has no end-of-sequence token, or ids that the model has no embedding for.
    """
    for path in folder.glob("*token*.json"):
        read_json(path)  # names the line, which the libraries do not
    _refuse_code(folder)
    tokenizer = _from_folder(folder)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder / 'tokenizer_config.json'}: the tokenizer has no end-of-sequence token, so completions could"
            " never end: set eos_token there to the token the model was trained to end with"
        )
    largest = max(tokenizer.get_vocab().values())
    if 0 < vocab_size <= largest:
        raise ModelError(
            f"{folder}: the tokenizer has ids up to {largest}, but vocab_size in config.json is {vocab_size}:"
            " these are not of one model (eos_token may name a token it does not have)"
        )
    return tokenizer


def _refuse_code(folder: Path) -> None:
    """Else who loads it later would find out: what is loaded here is the file that holds its rules."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if "AutoTokenizer" in (config.get("auto_map") or {}):
        import transformers

        if not hasattr(transformers, str(config.get("tokenizer_class"))):
            raise ModelError(
                f"{path}: tokenizer_class {config.get('tokenizer_class')!r} needs code that comes with the model"
                " (auto_map), which is never run here"
            )


def _from_folder(folder: Path) -> Any:
    try:
        if (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast  # without torch; AutoTokenizer takes five times as long

            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises it bare
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
