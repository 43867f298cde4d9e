"""The contract of `actors.engine.Engine`, held by both engines on four architectures against a plain forward pass."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from actors import vllm_engine
from actors.engines import build_engine
from actors.transformers_engine import TransformersEngine
from orchestrator.errors import ConfigError, ModelError
from orchestrator.types import FinishReason, GenerationRequest, SamplingParams
from orchestrator.weights import checksums, pack, unpack
from tests.models import CONTEXT, KINDS, make_config, make_model, make_tokenizer, make_weights

EOS = 2
TOLERANCE = 1e-4
OPTIONS = {
    "dtype": "float32",
    "max_length": CONTEXT,
    "max_num_seqs": 16,
    "kv_cache_mb": 32,
    "gpu_memory_utilization": 0.5,
    "tensor_parallel_size": 1,
    "seed": 0,
}
LONG = tuple(1 + (7 * i) % 290 for i in range(40))  # longer than a KV block: its keys and values are cached
PROMPTS = ((1, 5, 9), (1, 30, 40, 50, 60, 70), LONG, (*LONG, 17), (8,))


class Subject:
    """An engine under test, with its model's tokenizer and reference weights."""

    def __init__(self, engine_kind, model_kind, folder):
        self.model_kind = model_kind
        self.folder = make_model(model_kind, folder)
        self.tokenizer = make_tokenizer(folder)
        self.engine = build_engine(engine_kind, model_dir=str(folder), **OPTIONS)

    @cache  # noqa: B019
    def model(self, seed):
        return make_weights(self.model_kind, seed, len(self.tokenizer))

    def use(self, seed):
        """Loads the weights of that seed."""
        self.engine.load_weights(self.model(seed).state_dict())
        return self.model(seed)

    def run(self, requests):
        """Decodes to the end; outputs in the order of the requests."""
        for request in requests:
            self.engine.add(request)
        return self.drain(requests)

    def drain(self, requests, early=()):
        outputs = {output.request_id: output for output in early}
        while self.engine.has_unfinished():
            outputs |= {output.request_id: output for output in self.engine.step()}
        assert set(outputs) == {request.id for request in requests}
        return [outputs[request.id] for request in requests]


@pytest.fixture(
    scope="module",
    params=[(engine, model) for engine in ("vllm", "transformers") for model in KINDS],
    ids="-".join,
)
def subject(request, tmp_path_factory):
    engine_kind, model_kind = request.param
    if engine_kind == "vllm" and find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    subject = Subject(engine_kind, model_kind, tmp_path_factory.mktemp(model_kind))
    yield subject
    subject.engine.close()


def requests_for(prompts, *, tag="r", stop=(), max_tokens=CONTEXT, temperature=1.0, top_p=1.0, scope=""):
    sampling = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=stop)
    return [
        GenerationRequest(id=f"{tag}{i}", prompt_token_ids=prompt, sampling=sampling, seed=100 + i, cache_scope=scope)
        for i, prompt in enumerate(prompts)
    ]


@torch.no_grad()
def forward_logprobs(model, tokens):
    """The reference: log-probs of tokens[1:] by one unpadded forward pass."""
    tokens = torch.tensor(tokens)
    logprobs = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, tokens[1:, None])[:, 0].numpy()


def error(model, request, output):
    """Absolute errors of an output's log-probs, token by token."""
    assert len(output.logprobs) == len(output.token_ids) > 0
    expected = forward_logprobs(model, [*request.prompt_token_ids, *output.token_ids])
    return np.abs(expected[len(request.prompt_token_ids) - 1 :] - np.array(output.logprobs))


def test_logprobs_are_the_models_own_before_and_after_load_weights(subject):
    requests = requests_for(PROMPTS, temperature=0.7, top_p=0.9)
    for seed in (0, 1):
        model = subject.use(seed)
        for request, output in zip(requests, subject.run(requests), strict=True):
            assert error(model, request, output).max() < TOLERANCE


def test_top_p_keeps_to_the_nucleus_and_temperature_sharpens(subject):
    model = subject.use(0)
    for request in requests_for(PROMPTS, top_p=0.5):
        (output,) = subject.run([request])
        tokens = torch.tensor([*request.prompt_token_ids, *output.token_ids])
        with torch.no_grad():
            probs = model(input_ids=tokens[None]).logits[0].softmax(-1)[len(request.prompt_token_ids) - 1 : -1]
        chosen = probs.gather(1, torch.tensor(output.token_ids)[:, None])
        assert (probs * (probs > chosen)).sum(1).max() < 0.5 + TOLERANCE
    warm = subject.run(requests_for(PROMPTS))
    cold = subject.run(requests_for(PROMPTS, temperature=0.3))
    assert np.mean(np.concatenate([o.logprobs for o in cold])) > np.mean(np.concatenate([o.logprobs for o in warm]))


def test_a_seed_decides_the_completion_whatever_rides_along(subject):
    subject.use(0)
    alone = [subject.run([request])[0] for request in requests_for(PROMPTS)]
    together = subject.run(requests_for(PROMPTS) + requests_for(PROMPTS * 3, tag="other", temperature=0.5))
    assert [output.token_ids for output in together[: len(PROMPTS)]] == [output.token_ids for output in alone]

    requests = requests_for(PROMPTS)
    for request in requests[:2]:
        subject.engine.add(request)
    early = subject.engine.step()
    for request in requests[2:]:
        subject.engine.add(request)
    joined = subject.drain(requests, early)
    assert [output.token_ids for output in joined] == [output.token_ids for output in alone]
    assert len({output.token_ids for output in alone}) == len(PROMPTS)


def test_completions_of_a_prompt_share_its_forward_pass(subject, monkeypatch):
    """vLLM's own cache does this: `test_keys_and_values_are_used_again_within_a_scope_only`."""
    if not isinstance(subject.engine, TransformersEngine):
        pytest.skip("another engine")
    subject.use(0)
    model, rows = subject.engine._model, []
    prefix = PROMPTS[1]
    requests = requests_for([prefix, prefix[:3], prefix, prefix, prefix[:3]])
    alone = [subject.run([request])[0].token_ids for request in requests]
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **given: rows.append(len(given["input_ids"])) or forward(**given))
    assert [output.token_ids for output in subject.run(requests)] == alone
    assert rows[0] == 2


def test_greedy_takes_the_most_likely_token(subject):
    model = subject.use(0)
    for request, output in zip(requests := requests_for(PROMPTS, temperature=0.0), subject.run(requests), strict=True):
        tokens = torch.tensor([[*request.prompt_token_ids, *output.token_ids]])
        with torch.no_grad():
            best = model(input_ids=tokens).logits[0].log_softmax(-1).amax(1)[len(request.prompt_token_ids) - 1 : -1]
        np.testing.assert_allclose(output.logprobs, best.numpy(), atol=TOLERANCE)


def test_eos_ends_a_completion_and_stays_in_its_tokens_only(subject):
    subject.use(0)
    free = subject.run(requests_for(PROMPTS))
    ((likely, _),) = Counter(token for output in free for token in output.token_ids).most_common(1)
    tensors = {name: tensor.clone() for name, tensor in subject.model(0).state_dict().items()}
    for name in {"lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight"} & set(tensors):
        tensors[name][EOS] = 2 * tensors[name][likely]
    subject.engine.load_weights(tensors)
    outputs = subject.run(requests_for(PROMPTS * 2))
    ended = [output for output in outputs if output.finish_reason is FinishReason.EOS]
    assert ended
    for output in outputs:
        assert EOS not in output.token_ids[:-1]
        assert (output.token_ids[-1] == EOS) == (output.finish_reason is FinishReason.EOS)
        assert "</s>" not in output.text
        assert len(output.logprobs) == len(output.token_ids)
    for output in ended:
        whole = subject.tokenizer.decode(output.token_ids[:-1], skip_special_tokens=True)
        assert output.text.rstrip("\ufffd") == whole.rstrip("\ufffd")


def test_stop_strings_stay_in_the_text_and_the_tokens(subject):
    model = subject.use(0)
    checked = 0
    for request, free in zip(requests := requests_for(PROMPTS * 2), subject.run(requests), strict=True):
        pairs = map("".join, pairwise(free.text))
        stop = next((pair for pair in pairs if pair.isascii() and free.text.index(pair) > 4), None)
        if stop is None:
            continue  # too short, or nothing but broken bytes
        sampling = replace(request.sampling, stop=("never to be seen", stop))
        (output,) = subject.run([replace(request, sampling=sampling)])
        assert output.finish_reason is FinishReason.STOP
        assert output.text.endswith(stop)
        assert output.text.count(stop) == 1
        assert output.token_ids == free.token_ids[: len(output.token_ids)]
        assert stop not in subject.tokenizer.decode(output.token_ids[:-1])
        assert stop in subject.tokenizer.decode(output.token_ids)
        assert error(model, request, output).max() < TOLERANCE
        checked += 1
    assert checked


def test_completions_fill_the_context_and_end(subject):
    model = subject.use(0)
    full = tuple(range(3, 3 + CONTEXT))
    requests = requests_for([LONG, full[:-1]], max_tokens=10 * CONTEXT)
    outputs = subject.run(requests)
    for request, output in zip(requests, outputs, strict=True):
        assert output.finish_reason is FinishReason.LENGTH
        assert len(request.prompt_token_ids) + len(output.token_ids) == CONTEXT
        assert error(model, request, output).max() < TOLERANCE
    (short,) = subject.run(requests_for([LONG], max_tokens=3))
    assert (short.finish_reason, len(short.token_ids)) == (FinishReason.LENGTH, 3)


@pytest.mark.parametrize("prompt", [(), tuple(range(3, 3 + CONTEXT)), (1, 100_000), (1, -1)])
def test_requests_that_can_never_be_served_are_refused(subject, prompt):
    with pytest.raises(ValueError, match="Request 'r0'"):
        subject.engine.add(requests_for([prompt])[0])
    assert not subject.engine.has_unfinished()


def test_abort_drops_the_named_requests_only(subject):
    subject.use(0)
    requests = requests_for(PROMPTS * 4)  # more than run at once, so some of those dropped still wait
    expected = subject.run(requests)
    for request in requests:
        subject.engine.add(request)
    with pytest.raises(ValueError, match="in flight"):
        subject.engine.add(requests[0])
    early = subject.engine.step() + subject.engine.step()
    dropped = {requests[i].id for i in (0, 1, 7, -1)} - {output.request_id for output in early}
    assert len(dropped) > 1
    subject.engine.abort([*dropped, "unknown"])
    outputs = subject.drain([request for request in requests if request.id not in dropped], early)
    kept = [output for output in expected if output.request_id not in dropped]
    assert [output.token_ids for output in outputs] == [output.token_ids for output in kept]
    assert subject.run(requests[:1])[0].token_ids == expected[0].token_ids
    for request in requests:
        subject.engine.add(request)
    subject.engine.abort([request.id for request in requests])
    assert not subject.engine.has_unfinished()
    assert subject.engine.step() == []


def test_weights_switch_between_two_steps(subject):
    old = subject.use(0)
    requests = requests_for([*PROMPTS, *PROMPTS[:2]])
    undisturbed = subject.run(requests)
    for request in requests:
        subject.engine.add(request)
    steps, early, switched = 6, [], 0
    for _ in range(steps):
        early += subject.engine.step()
    new = subject.use(1)
    for request, output, before in zip(requests, subject.drain(requests, early), undisturbed, strict=True):
        assert output.token_ids[:steps] == before.token_ids[:steps]
        assert error(old, request, output)[:steps].max() < TOLERANCE
        if len(output.token_ids) > steps:
            assert error(new, request, output)[steps:].max() < TOLERANCE
            assert error(old, request, output)[steps:].max() > 0.1
            switched += 1
    assert switched


def test_outdated_names_exactly_the_tensor_that_is_not_held(subject):
    tensors = subject.use(0).state_dict()
    assert subject.engine.unreadable(checksums(tensors)) == []
    assert subject.engine.outdated(checksums(tensors)) == []
    for name, tensor in tensors.items():
        other = tensor.clone()
        last = other.view(-1)[-1:]
        last.copy_(torch.nextafter(last, last + 1))
        assert subject.engine.outdated(checksums({**tensors, name: other})) == [name]
    odd = {"no.such.weight": torch.zeros(1), **{name: tensor.bfloat16() for name, tensor in tensors.items()}}
    assert subject.engine.unreadable(checksums(odd)) == list(odd)
    assert subject.engine.outdated(checksums(odd)) == []


def test_memory_that_lasts_is_held_itself_and_never_written_to(subject):
    """As shared memory is, which an engine cannot write to: it would die of it."""
    first, second = (dict(subject.model(seed).named_parameters()) for seed in (0, 1))  # tied ones once
    records, (bucket,) = pack(second)
    published = bucket.copy()
    subject.engine.load_weights(unpack(records, [bucket]), lasts=True)
    assert subject.engine.outdated(records) == []
    scored = subject.engine.score([LONG])[0]
    np.testing.assert_allclose(scored, forward_logprobs(subject.model(1), LONG), atol=TOLERANCE)
    bucket[:] ^= 255
    held = set(subject.engine.outdated(records))
    bucket[:] = published
    assert {name for name in second if "layers." in name or "ln_" in name} <= held
    # One at a time, so that what lies beside it in a fused layer has to be kept.
    for name, tensor in first.items():
        subject.engine.load_weights({name: tensor})
    np.testing.assert_array_equal(bucket, published)
    assert subject.engine.outdated(checksums(first)) == []
    scored = subject.engine.score([LONG])[0]
    np.testing.assert_allclose(scored, forward_logprobs(subject.model(0), LONG), atol=TOLERANCE)


def test_outdated_sees_one_tensor_that_was_loaded_wrong(subject):
    tensors = subject.use(0).state_dict()
    records = checksums(tensors)
    tied = {"lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight"}
    for name, tensor in tensors.items():
        if name in tied:
            continue
        subject.engine.load_weights({name: tensor + 1})
        assert subject.engine.outdated(records) == [name]
        subject.engine.load_weights({name: tensor})
    assert subject.engine.outdated(records) == []


def test_score_equals_a_forward_pass_and_bypasses_caches(subject):
    sequences = [LONG, (*LONG, 3, 4), tuple(range(3, 3 + CONTEXT)), (5, EOS), (5,), (7, 8, 9)]
    for seed in (0, 1, 0):
        model = subject.use(seed)
        subject.run(requests_for([LONG, (*LONG, 3)], max_tokens=2))
        scores = subject.engine.score(sequences)
        for sequence, score in zip(sequences, scores, strict=True):
            assert score.shape == (len(sequence) - 1,)
            assert score.dtype == np.float32
            np.testing.assert_allclose(score, forward_logprobs(model, sequence), atol=TOLERANCE)
    with pytest.raises(ValueError, match="Sequence 1"):
        subject.engine.score([(5, 6), tuple(range(CONTEXT + 1))])
    assert subject.engine.score([]) == []


def test_score_disturbs_no_running_request(subject):
    subject.use(0)
    requests = requests_for(PROMPTS, max_tokens=3)
    expected = subject.run(requests)
    for request in requests:
        subject.engine.add(request)
    early = subject.engine.step()
    subject.engine.score([LONG] * 3)
    outputs = subject.drain(requests, early)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


def test_no_vllm_is_loaded_by_the_stand_in():
    code = "import sys, actors.transformers_engine, actors.vllm_engine; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_what_an_engine_cannot_serve_is_refused_at_the_start(tmp_path):
    folder = make_model("llama", tmp_path / "llama")
    with pytest.raises(ConfigError, match="'sglang'"):
        build_engine("sglang", model_dir=str(folder), **OPTIONS)
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        build_engine("transformers", model_dir=str(folder), **{**OPTIONS, "tensor_parallel_size": 2})
    with pytest.raises(ModelError, match="max_length is 9999"):
        build_engine("transformers", model_dir=str(folder), **{**OPTIONS, "max_length": 9999})


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_heads_that_vllm_cannot_run_are_refused_at_the_start(tmp_path):
    config = make_config("llama", 300)
    config.head_dim = 8
    make_tokenizer(tmp_path)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="heads of 8"):
        build_engine("vllm", model_dir=str(tmp_path), **OPTIONS)


def test_keys_and_values_are_used_again_within_a_scope_only(subject, monkeypatch):
    if not isinstance(subject.engine, vllm_engine.VllmEngine):
        return  # it keeps none
    subject.use(0)
    used, completion = [], vllm_engine._completion
    monkeypatch.setattr(
        vllm_engine, "_completion", lambda output: used.append(output.num_cached_tokens) or completion(output)
    )
    for scope in ("rollout/1/p0", "rollout/1/p0", "rollout/1/p8", "rollout/1/p0"):
        subject.run(requests_for([LONG], max_tokens=1, scope=scope))
    assert used == [0, vllm_engine.CPU_BLOCK_TOKENS, 0, vllm_engine.CPU_BLOCK_TOKENS]
