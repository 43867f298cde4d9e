"""The default engine: vLLM's `LLMEngine` in this process, on a CPU or on GPUs.

Three choices make weights replaceable between two steps and readable back, bit for bit:

* the scheduler runs in the calling process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), so nothing is computed between two
  calls of `step`; only the workers of a tensor-parallel engine are processes of their own;
* on a CPU, linear layers keep their plain weights. vLLM would pack them for oneDNN, and would go on using the packed
  copy of a tied head after an update;
* the prefix cache is dropped with the weights, running requests included: their tokens are prefilled again.
"""

from __future__ import annotations

import os
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from actors import held_weights
from actors.engine import EngineOutput, check_sequences, token_budget
from learners.products import use_fastest_products
from orchestrator.errors import ModelError, PublicationError
from orchestrator.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from orchestrator.types import GenerationRequest
    from orchestrator.weights import TensorRecord

CPU_BLOCK_TOKENS = 32
"""Tokens of one KV block: the smallest a CPU takes, since only whole blocks are shared between prompts."""


class VllmEngine:
    """`actors.engine.Engine` on vLLM."""

    def __init__(
        self,
        *,
        model_dir: str,
        dtype: str,
        max_length: int,
        max_num_seqs: int,
        kv_cache_mb: int,
        gpu_memory_utilization: float,
        tensor_parallel_size: int,
        seed: int,
        weight_transport: str = "object_store",
    ) -> None:
        """Loads the model.

        Args:
            model_dir: Folder with config, tokenizer and safetensors.
            dtype: `float32` or `bfloat16`.
            max_length: Context in tokens, prompt and completion together.
            max_num_seqs: Requests decoded together; more wait.
            kv_cache_mb: KV cache on a CPU, MiB.
            gpu_memory_utilization: Share of a GPU that weights and KV cache may fill.
            tensor_parallel_size: GPUs that share one copy of the weights.
            seed: Seed of whatever has no seed of its own.
            weight_transport: `nccl` and `ipc` prepare the workers for `actors.vllm_transfer`.
        """
        on_gpu = torch.cuda.is_available()
        _prepare_process(on_gpu)
        args: dict[str, Any] = {
            "model": model_dir,
            "dtype": dtype,
            "load_format": "safetensors",
            "max_model_len": max_length,
            "max_num_seqs": max_num_seqs,
            "seed": seed,
            "logprobs_mode": "raw_logprobs",
            "enable_prefix_caching": True,
            "async_scheduling": False,  # a step that is still in flight would mix two sets of weights
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if weight_transport != "object_store":
            args |= {"weight_transfer_config": {"backend": weight_transport}}
        if on_gpu:
            args |= _gpu_arguments(tensor_parallel_size, gpu_memory_utilization)
        else:
            _keep_plain_weights()
            _count_no_ranks()
            args |= _cpu_arguments(max_length=max_length, kv_cache_mb=kv_cache_mb)
        self._engine = _start(args, on_gpu=on_gpu)
        self._max_length = max_length
        self._vocab_size = self._engine.model_config.get_vocab_size()
        self._running: set[str] = set()
        self._finished: list[EngineOutput] = []
        self._num_scored = 0

    def add(self, request: GenerationRequest) -> None:
        """Queues a request. Raises ValueError for one that can never be served."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if request.id in self._running:
            raise ValueError(f"Request {request.id!r} is in flight already; give every request an id of its own.")
        budget = token_budget(request, max_length=self._max_length, vocab_size=self._vocab_size)
        params = SamplingParams(
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            max_tokens=budget,
            seed=request.seed,
            stop=list(request.sampling.stop),
            include_stop_str_in_output=True,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt_token_ids)}
        if request.cache_scope:
            prompt["cache_salt"] = request.cache_scope
        self._engine.add_request(request.id, prompt, params)
        self._running.add(request.id)

    def step(self) -> list[EngineOutput]:
        """Advances every running request by at least one token; returns those that finished."""
        if self._engine.has_unfinished_requests():
            self._pump()
        finished, self._finished = self._finished, []
        return finished

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drops requests; unknown ids are ignored."""
        dropped = set(request_ids) & self._running
        self._engine.abort_request(sorted(dropped))
        self._running -= dropped
        self._finished = [output for output in self._finished if output.request_id not in request_ids]

    def lengths(self) -> Mapping[str, int]:
        """New tokens so far of each request that `step` goes on with."""
        states = self._engine.output_processor.request_states.values()
        return {state.external_req_id: state.detokenizer.num_output_tokens() for state in states}

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._finished) or bool(self._engine.has_unfinished_requests())

    def load_weights(self, tensors: Mapping[str, torch.Tensor], *, lasts: bool = False) -> None:
        """Replaces weights in place and drops every cache of the old ones; `lasts`: see `Engine`.

        Raises:
            PublicationError: vLLM kept its prefix cache.
        """
        self.call_workers(held_weights.load, dict(tensors), lasts)
        self.drop_caches()

    def drop_caches(self) -> None:
        """Forgets all keys and values: those of running requests are computed again.

        Raises:
            PublicationError: vLLM kept its prefix cache.
        """
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise PublicationError(
                "vLLM kept keys and values of the old weights: reset_prefix_cache(reset_running_requests=True) "
                "returned False. Generations would mix two policies; restart this generator."
            )

    def outdated(self, records: Sequence[TensorRecord]) -> list[str]:
        """Names of tensors that have another checksum than their record; see `unreadable`."""
        found = self.call_workers(held_weights.outdated, tuple(records))
        return [record.name for record in records if any(record.name in names for names in found)]

    def unreadable(self, records: Sequence[TensorRecord]) -> list[str]:
        """Those that `outdated` cannot compare: unknown to the model, sharded over devices, or of another dtype."""
        missing: list[str] = self.call_workers(held_weights.unreadable, tuple(records))[0]
        return missing

    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Log-probs of ``sequence[1:]`` given their prefixes, each [len(sequence) - 1]. Every cache is bypassed."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        check_sequences(sequences, max_length=self._max_length, vocab_size=self._vocab_size)
        ids: dict[int, str] = {}
        scored: dict[str, NDArray[np.float32]] = {}
        for index, sequence in enumerate(sequences):
            if len(sequence) == 1:
                continue
            # The last token is forced, not part of the prompt: a prompt as long as the context leaves no room for the
            # one token that vLLM must generate.
            params = SamplingParams(
                temperature=0,
                max_tokens=1,
                allowed_token_ids=[sequence[-1]],
                logprobs=0,
                prompt_logprobs=0,
                skip_reading_prefix_cache=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            ids[index] = f"score/{self._num_scored}"
            self._num_scored += 1
            self._engine.add_request(ids[index], {"prompt_token_ids": list(sequence[:-1])}, params)
        while len(scored) < len(ids):
            self._pump(scored)
        return [scored[ids[i]] if i in ids else np.empty(0, np.float32) for i in range(len(sequences))]

    def call_workers(self, function: str | Callable[..., Any], *args: Any) -> list[Any]:
        """Runs ``function(worker, *args)``, or the worker's method of that name, on every worker of vLLM."""
        results: list[Any] = self._engine.collective_rpc(function, args=args)
        return results

    def close(self) -> None:
        """Frees devices and child processes."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    def _pump(self, scored: dict[str, NDArray[np.float32]] | None = None) -> None:
        """One step of vLLM. Finished requests go to `_finished`, finished scores to `scored`."""
        for output in self._engine.step():
            if output.request_id in self._running:
                self._running.remove(output.request_id)
                self._finished.append(_completion(output))
            elif scored is not None:
                scored[output.request_id] = _scores(output)


def _prepare_process(on_gpu: bool) -> None:
    """Environment that vLLM and torch read when they are imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # each start warns a dozen times about nothing
    if not on_gpu:
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # compiling costs more than it gains at these sizes
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # engines on one machine would bind to the same cores
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB, and it would override `kv_cache_mb`


def _start(args: Mapping[str, Any], *, on_gpu: bool) -> Any:
    """The `LLMEngine` of vLLM."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    config = EngineArgs(**args).create_engine_config()
    if not on_gpu:
        _check_head_size(config.model_config)
    engine = LLMEngine.from_vllm_config(config)
    if not on_gpu:
        use_fastest_products()  # now: vLLM has its own choice as it starts
    return engine


def _gpu_arguments(tensor_parallel_size: int, gpu_memory_utilization: float) -> dict[str, Any]:
    return {
        "tensor_parallel_size": tensor_parallel_size,
        "distributed_executor_backend": "uni" if tensor_parallel_size == 1 else "mp",
        "gpu_memory_utilization": gpu_memory_utilization,
    }


def _cpu_arguments(*, max_length: int, kv_cache_mb: int) -> dict[str, Any]:
    return {
        "enforce_eager": True,
        "kv_cache_memory_bytes": kv_cache_mb << 20,
        "block_size": CPU_BLOCK_TOKENS,
        # Seeded requests with a prompt in several chunks kill a CPU engine: vLLM rewinds their generator by an offset
        # that CPU generators lack.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_length, 4096),
    }


def _keep_plain_weights() -> None:
    """Makes CPU layers multiply with their own weight instead of a packed copy of it."""
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm
    pack = getattr(pack, "__wrapped__", pack)  # a second engine in one process finds the replacement

    @wraps(pack)
    def dispatch(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            pack(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = dispatch


def _count_no_ranks() -> None:
    """Leaves out what nobody asks: how many tokens were likelier than each that was sampled.

    On a GPU vLLM compiles it. On a CPU it goes over the vocabulary twice, which took a twentieth of all decoding.
    """
    from vllm.v1.sample import sampler

    def no_ranks(logprobs: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(logprobs), dtype=torch.int64)

    sampler.batched_count_greater_than = no_ranks


def _check_head_size(model_config: Any) -> None:
    """Refuses at once what vLLM's CPU attention would refuse at the first step."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if model_config.get_head_size() not in sizes:
        raise ModelError(
            f"{model_config.model} has attention heads of {model_config.get_head_size()}; vLLM on a CPU takes {sizes}. "
            "Use another model, a GPU, or generator.kind=transformers."
        )


def _completion(output: Any) -> EngineOutput:
    """Of a finished vLLM request."""
    sequence = output.outputs[0]
    token_ids = tuple(sequence.token_ids)
    logprobs = tuple(entry[token].logprob for token, entry in zip(token_ids, sequence.logprobs, strict=True))
    if sequence.finish_reason == "stop":  # a stop string, an EOS of the generation config, or None for the EOS
        reason = FinishReason.STOP if isinstance(sequence.stop_reason, str) else FinishReason.EOS
    else:
        reason = FinishReason(sequence.finish_reason)
    return EngineOutput(
        request_id=output.request_id,
        token_ids=token_ids,
        text=sequence.text,
        logprobs=logprobs,
        finish_reason=reason,
    )


def _scores(output: Any) -> NDArray[np.float32]:
    """Log-probs of a prompt's tokens but the first, and of the one generated."""
    tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    entries = [*output.prompt_logprobs, *output.outputs[0].logprobs]
    return np.array([entry[token].logprob for token, entry in zip(tokens[1:], entries[1:], strict=True)], np.float32)
