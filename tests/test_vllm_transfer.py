"""The control flow of GPU weight transfer, on a CPU: vLLM's own update cycle with a backend that moves nothing."""

from dataclasses import dataclass, field
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from actors.engines import build_engine
from actors.vllm_transfer import WeightReceiver, WeightSender
from orchestrator.errors import ConfigError
from orchestrator.types import GenerationRequest, SamplingParams
from orchestrator.weights import checksums
from tests.models import CONTEXT, make_model, make_weights

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def in_transit():
    """Tensors that the backend `test` delivers."""
    from vllm.distributed.weight_transfer import factory, ipc_engine
    from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

    tensors = {}

    @dataclass
    class Init(WeightTransferInitInfo):
        pass

    @dataclass
    class Update(WeightTransferUpdateInfo):
        names: list = field(default_factory=list)

    class Backend(ipc_engine.IPCWeightTransferEngine):  # its start and finish, with nothing of IPC between them
        init_info_cls, update_info_cls = Init, Update

        def init_transfer_engine(self, init_info):
            pass

        def receive_weights(self, update_info):
            self.model.load_weights((name, tensors[name]) for name in update_info.names)

    factory.WeightTransferEngineFactory.register_engine("test", Backend)
    return tensors


@pytest.mark.parametrize("kind", ["llama_tied", "qwen3"])
def test_received_weights_are_exact_for_running_requests_too(kind, tmp_path, in_transit):
    engine = build_engine(
        "vllm",
        model_dir=str(make_model(kind, tmp_path)),
        dtype="float32",
        max_length=CONTEXT,
        max_num_seqs=4,
        kv_cache_mb=32,
        gpu_memory_utilization=0.5,
        tensor_parallel_size=1,
        seed=0,
        weight_transport="test",
    )
    receiver = WeightReceiver(engine)
    receiver.init({})
    new = make_weights(kind, 1, engine._vocab_size)
    in_transit.clear()
    in_transit.update(new.state_dict())
    prompt = tuple(range(3, 43))
    sampling = SamplingParams(max_tokens=20)
    engine.add(GenerationRequest(id="r", prompt_token_ids=prompt, sampling=sampling, seed=3))
    for _ in range(5):
        engine.step()
    receiver.receive({"names": list(in_transit)})
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert engine.outdated(checksums(in_transit)) == []
    moved = next(name for name in in_transit if name.endswith("k_proj.weight"))
    assert engine.outdated(checksums(in_transit | {moved: in_transit[moved] + 1e-6})) == [moved]
    tokens = torch.tensor([*prompt, *outputs[0].token_ids])
    with torch.no_grad():
        logprobs = new(input_ids=tokens[None]).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, tokens[1:, None])[len(prompt) - 1 :, 0].numpy()
    np.testing.assert_allclose(outputs[0].logprobs[5:], expected[5:], atol=1e-4)
    assert np.abs(np.array(outputs[0].logprobs[:5]) - expected[:5]).max() > 0.1
    engine.close()


def test_sender_gives_every_worker_of_every_engine_a_rank_and_describes_what_it_sends(monkeypatch):
    from vllm.distributed.weight_transfer import factory

    made, calls = {}, []

    class Trainer:
        def __init__(self, info, client, source):
            made.update(info=info, client=client, source=source)
            client.init_weight_transfer_engine({"rank_offset": 1, "world_size": info.world_size})

        def send_weights(self):
            made["client"].start_weight_update()
            made["client"].update_weights({"names": [name for name, _ in made["source"]]})
            made["client"].finish_weight_update()

    monkeypatch.setattr(factory.WeightTransferTrainerFactory, "trainer_init", Trainer)
    sender = WeightSender(
        backend="nccl",
        tensors=lambda: {"a": torch.zeros(2, 3, dtype=torch.bfloat16)},
        call=lambda method, payloads: calls.append((method, payloads)),
        num_receivers=3,
        workers_per_receiver=2,
        master_port=29511,
    )
    sender.send()
    assert made["info"].world_size == 7
    assert (made["info"].master_port, made["info"].rank) == (29511, 0)
    (meta,) = made["source"].metadata()
    assert (meta.name, meta.dtype, meta.shape) == ("a", torch.bfloat16, (2, 3))
    assert calls == [
        ("init", [{"rank_offset": offset, "world_size": 7} for offset in (1, 3, 5)]),
        ("receive", [{"names": ["a"]}] * 3),
    ]


def test_other_backends_are_refused():
    with pytest.raises(ConfigError, match="'carrier pigeon'"):
        WeightSender(backend="carrier pigeon", tensors=dict, call=print, num_receivers=1)
