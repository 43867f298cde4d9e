"""Makes the decoding engine a configuration names. vLLM is imported only where it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from actors.engine import Engine


def build_engine(kind: str, **kwargs: Any) -> Engine:
    """An engine with its model loaded.

    Args:
        kind: `vllm` or `transformers`.
        **kwargs: Those of `VllmEngine`; both engines take the same.

    Raises:
        ConfigError: No engine of that kind, or its library is not installed.
    """
    if kind == "vllm":
        from actors.vllm_engine import VllmEngine

        return VllmEngine(**kwargs)
    if kind == "transformers":
        from actors.transformers_engine import TransformersEngine

        return TransformersEngine(**kwargs)
    raise ConfigError(f"generator.kind is {kind!r}; it must be 'vllm' or 'transformers'.")
