"""GPU paths for weights, over vLLM's native weight transfer: NCCL broadcast, and CUDA IPC on one GPU.

    learner:  WeightSender.send() --> call("receive", ...) --> generator: WeightReceiver.receive(update_info)
                       `------------- tensors over NCCL or IPC -------------------^

Written to the interface of vLLM 0.32 (`vllm.distributed.weight_transfer`). The control flow is tested on a CPU with a
backend of the test's own; NCCL and IPC themselves have **not been run here**: there were no two GPUs with vLLM.

Between the start and the finish of vLLM's update a model has no usable weights, so both belong into one call of the
engine's owner, with no decoding step between them. `WeightReceiver.receive` is that call; vLLM's client protocol, which
knows them as separate calls, is met by `_Client`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch

    from actors.vllm_engine import VllmEngine


class WeightReceiver:
    """The generator's end. Needs an engine made with `weight_transport` `nccl` or `ipc`."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine

    def init(self, init_info: dict[str, Any]) -> None:
        """Joins the sender's group; blocks until every other member has joined."""
        self._engine.call_workers("init_weight_transfer_engine", init_info)

    def receive(self, update_info: dict[str, Any]) -> None:
        """Takes one whole set of weights and drops every cache of the old ones.

        An engine in which this failed holds no usable weights: restart it.

        Args:
            update_info: What the sender's backend says about the tensors to come.
        """
        self._engine.call_workers("start_weight_update")
        self._engine.call_workers("update_weights", update_info)
        self._engine.call_workers("finish_weight_update")
        self._engine.drop_caches()


class WeightSender:
    """The learner's end: every learner process makes one and calls `send` together with the others."""

    def __init__(
        self,
        *,
        backend: str,
        tensors: Callable[[], Mapping[str, torch.Tensor]],
        call: Callable[[str, Sequence[dict[str, Any]]], None],
        num_receivers: int,
        workers_per_receiver: int = 1,
        rank: int = 0,
        master_address: str = "127.0.0.1",
        master_port: int = 0,
    ) -> None:
        """Joins the group of all receivers.

        Args:
            backend: `nccl`, or `ipc` where sender and receivers share one GPU.
            tensors: The current weights on the GPU under their Hugging Face names: the same names, shapes and dtypes
                each time.
            call: ``call(method, payloads)`` runs `WeightReceiver.<method>` of receiver i on ``payloads[i]``, all at
                once, and returns when all have, or raises at its deadline. Used in the process of rank 0 only.
            num_receivers: Engines.
            workers_per_receiver: GPUs of one engine.
            rank: Of this learner process.
            master_address: Where rank 0 listens (`nccl`).
            master_port: A free port there (`nccl`).

        Raises:
            ConfigError: No such backend.
        """
        from vllm.distributed.weight_transfer import factory

        info: Any
        if backend == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            world_size = 1 + num_receivers * workers_per_receiver
            info = NCCLTrainerInitInfo(master_address, master_port, world_size, rank=rank)
        elif backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            info = IPCTrainerInitInfo(rank=rank)
        else:
            raise ConfigError(f"cluster.weight_transport is {backend!r}; this path knows 'nccl' and 'ipc'.")
        client = _Client(call, num_receivers, workers_per_receiver)
        make = factory.WeightTransferTrainerFactory.trainer_init
        self._engine: Any = make(info, client=client, source=_Source(tensors))

    def send(self) -> None:
        """Sends the current weights; returns when all receivers hold them."""
        self._engine.send_weights()

    def close(self) -> None:
        """Leaves the group."""
        self._engine.shutdown()


class _Source:
    """vLLM's `WeightSource`: what will be sent, and the tensors themselves, in one order."""

    def __init__(self, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        self._tensors = tensors

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors().items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._tensors().items())


class _Client:
    """vLLM's `VLLMWeightSyncClient` over any number of engines of their own."""

    def __init__(
        self, call: Callable[[str, Sequence[dict[str, Any]]], None], num_receivers: int, workers_per_receiver: int
    ) -> None:
        self._call = call
        self._num_receivers = num_receivers
        self._workers = workers_per_receiver

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every engine counts its workers from 0, so each gets ranks of its own in the sender's group."""
        payloads = [dict(init_info) for _ in range(self._num_receivers)]
        if "rank_offset" in init_info:
            for index, payload in enumerate(payloads):
                payload["rank_offset"] = init_info["rank_offset"] + index * self._workers
        self._call("init", payloads)

    def start_weight_update(self) -> None:
        """Part of `WeightReceiver.receive`."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("receive", [update_info] * self._num_receivers)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Part of `WeightReceiver.receive`."""
