"""Log-probs and their gradients do not depend on packing, padding, prompt sharing or vocabulary chunks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import FalconConfig, Gemma2Config, LlamaConfig, MambaConfig

from learners import flex_attention
from learners import logprobs as logprobs_module
from learners.cpu_attention import Group
from learners.logprobs import ChunkedLogprobs, check_flex, check_packing, plain_token_logprobs, token_logprobs
from learners.packed import ATTENTION, Way, can_share, plan_packing
from learners.policy import Policy
from orchestrator.batching import pack_sequences
from tests.learning import CONFIGS, VOCAB, make_model


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def packed_model(name, device="cpu"):
    model = make_model(name).to(device)
    model.set_attn_implementation(ATTENTION)
    return model


@st.composite
def packed_columns(draw):
    """Up to four prompts with up to four completions, of lengths 1 to 20."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def tokens(longest):
        return tuple(random.integers(0, VOCAB, draw(st.integers(1, longest))).tolist())

    sequences = []
    for _ in range(draw(st.integers(1, 4))):
        prompt = tokens(20)
        sequences += [(prompt, tokens(20)) for _ in range(draw(st.integers(1, 4)))]
    return pack_sequences(sequences)[0]


def gradients(model, logprobs):
    model.zero_grad()
    (logprobs * torch.linspace(-1, 1, len(logprobs), device=logprobs.device)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(found, expected, tolerance=1e-5):
    """To this share of a parameter's largest gradient: small ones are what is left of sums of large ones."""
    for parameter, gradient in found.items():
        scale = max(1.0, float(expected[parameter].abs().max()))
        assert float((gradient - expected[parameter]).abs().max()) <= tolerance * scale, parameter


WAYS = [
    (name, way)
    for name in CONFIGS
    for way in (Way.ROWS, Way.GROUPS)
    if way is Way.ROWS or can_share(packed_model(name))
]


@pytest.mark.parametrize(("name", "way"), WAYS)
@given(columns=packed_columns(), vocab_chunk=st.sampled_from([1, 7, 60, 61, 1000]), logits_mb=st.sampled_from([0, 1]))
@settings(max_examples=20, deadline=None)
def test_packed_equals_plain_with_gradients(name, way, columns, vocab_chunk, logits_mb):
    model = packed_model(name)
    packed = token_logprobs(model, columns, vocab_chunk=vocab_chunk, logits_mb=logits_mb, collision=True, way=way)
    plain = plain_token_logprobs(model, columns, collision=True)
    torch.testing.assert_close(packed.log_collision, plain.log_collision, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed.logprobs, plain.logprobs, atol=1e-5, rtol=1e-5)
    assert_same(gradients(model, packed.logprobs), gradients(model, plain.logprobs))


def test_plain_equals_one_sequence_at_a_time():
    """The reference itself, against a forward without any padding or mask."""
    model = packed_model("llama")
    sequences = [((5, 6, 7), (8, 9)), ((5, 6, 7), (3,)), ((2,), (4, 4, 4, 1))]
    columns, _ = pack_sequences(sequences)
    alone = []
    for prompt, completion in sequences:
        ids = torch.tensor([prompt + completion])
        logprobs = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0]
        alone += [logprobs[place - 1, ids[0, place]] for place in range(len(prompt), ids.shape[1])]
    torch.testing.assert_close(plain_token_logprobs(model, columns).logprobs, torch.stack(alone))


def test_states_are_those_that_predict_the_completion():
    """From the prompt's last token to the completion's last but one, each sequence run alone."""
    model = packed_model("llama")
    sequences = [((5, 6, 7), (8, 9)), ((5, 6, 7), (3,)), ((2,), (4, 4, 4, 1))]
    states = token_logprobs(model, pack_sequences(sequences)[0], vocab_chunk=16).states
    assert states is not None
    assert not states.requires_grad
    for (prompt, completion), found in zip(sequences, states, strict=True):
        hidden = model.model(input_ids=torch.tensor([prompt + completion]), use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(found, hidden[len(prompt) - 1 : -1].sum(0))


def test_packing_layout_of_the_docstring():
    columns, _ = pack_sequences([((4, 5), (6,)), ((4, 5), (7, 8))])
    packing = plan_packing(columns, torch.device("cpu"))
    assert packing.positions.tolist() == [[0, 1, 2, 2, 3]]
    assert [rows.tolist() for rows in packing.rows] == [[[0, 1, 3, 4], [0, 1, 2, 0]]]
    shared = plan_packing(columns, torch.device("cpu"), way=Way.GROUPS)
    assert shared.positions.tolist() == packing.positions.tolist()
    assert shared.groups == (Group(prompt=slice(0, 2), completions=(slice(2, 3), slice(3, 5))),)


def test_prompts_are_shared_where_slices_are_long_and_no_window_forbids_it(monkeypatch):
    planned = []

    def noted(columns, device, *, way):
        planned.append(way)
        return plan_packing(columns, device, way=way)

    monkeypatch.setattr("learners.packed.plan_packing", noted)
    long, short = ((tuple(range(9)) * 8, (1,) * length) for length in (60, 10))
    for name, sequences in (("llama", [long]), ("llama", [short]), ("mistral", [long])):
        token_logprobs(packed_model(name), pack_sequences(sequences)[0], vocab_chunk=16)
    assert planned == [Way.GROUPS, Way.ROWS, Way.ROWS]


@pytest.fixture
def unfused(monkeypatch):
    """FlexAttention's plain form, which has gradients on CPUs too, in place of its kernels for GPUs."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *states: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_kernel", lambda: torch_flex.flex_attention)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@given(columns=packed_columns())
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flex_attention_of_shared_prompts_equals_rows(unfused, name, columns):
    model = packed_model(name)
    rows, flex = (token_logprobs(model, columns, vocab_chunk=16, way=way).logprobs for way in (Way.ROWS, Way.FLEX))
    torch.testing.assert_close(flex, rows, atol=1e-5, rtol=1e-4)
    assert_same(gradients(model, flex), gradients(model, rows))


@given(
    prompts=st.lists(
        st.tuples(
            st.sampled_from([1, 60, 127, 128, 129]),
            st.lists(st.sampled_from([1, 30, 128, 300]), min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=30)
def test_blocks_of_flex_attention_are_those_whose_tokens_see_each_other(prompts):
    sequences = [((number,) * length, (9,) * each) for number, (length, many) in enumerate(prompts) for each in many]
    columns, _ = pack_sequences(sequences)
    mask, size = flex_attention.mask_of(columns, torch.device("cpu")), -(-len(columns.tokens) // 128) * 128
    dense = torch_flex.create_mask(mask.mask_mod, 1, 1, size, size, device="cpu")[0, 0]
    blocks = dense.view(size // 128, 128, size // 128, 128).transpose(1, 2).flatten(2)
    whole, part = blocks.all(-1), blocks.any(-1) & ~blocks.all(-1)
    for expected, counts, order in (
        (part, mask.kv_num_blocks, mask.kv_indices),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for query, seen in enumerate(expected):
            assert order[0, 0, query, : counts[0, 0, query]].tolist() == seen.nonzero().flatten().tolist()


def test_flex_attention_is_compared_with_rows_before_it_is_used(unfused, monkeypatch):
    """Wrong values, gradients and kernels that do not work are found out."""
    model, attend = packed_model("llama"), flex_attention.attend

    def refused():
        return check_flex(model, vocab_chunk=16, dtype=torch.float32)

    def blind(columns, device):
        return torch_flex.create_block_mask(lambda b, h, q, k: q >= k, None, None, 1024, 1024, device=device)

    assert refused() is None
    assert "sliding window" in check_flex(packed_model("mistral"), vocab_chunk=16, dtype=torch.float32)
    with monkeypatch.context() as patched:
        patched.setattr(flex_attention, "mask_of", blind)
        assert "its log-probs differ" in refused()
    with monkeypatch.context() as patched:
        patched.setattr(flex_attention, "attend", lambda q, k, v, *rest: attend(q, k.detach(), v, *rest))
        assert "its gradients differ" in refused()
    with monkeypatch.context() as patched:
        patched.setattr(flex_attention, "_kernel", lambda: 1 / 0)
        assert "ZeroDivisionError" in refused()


def test_rows_of_different_length_do_not_share_a_bucket():
    columns, _ = pack_sequences([((1,), (2,) * 39), ((1,), (2,) * 38), ((1,), (2, 3))])
    packing = plan_packing(columns, torch.device("cpu"))
    assert [tuple(rows.shape) for rows in packing.rows] == [(2, 40), (1, 3)]


@given(
    rows=st.integers(1, 5),
    vocabulary=st.integers(1, 9),
    chunk=st.integers(1, 11),
    bias=st.booleans(),
    kept_bytes=st.sampled_from([0, 1 << 20]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_chunked_logprobs_with_gradients(rows, vocabulary, chunk, bias, kept_bytes, seed):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return (3 * torch.randn(shape, generator=generator)).requires_grad_()

    leaves = [leaf(rows, 4), leaf(vocabulary, 4)] + ([leaf(vocabulary)] if bias else [])
    hidden, weight, offset = (*leaves, None)[:3]
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    slopes = torch.randn(rows, generator=generator)
    everywhere = torch.nn.functional.linear(hidden, weight, offset).log_softmax(-1)
    whole = everywhere.gather(1, targets[:, None])[:, 0]
    ours, collision = ChunkedLogprobs.apply(hidden, weight, offset, targets, chunk, True, kept_bytes)
    torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(collision, (2 * everywhere).logsumexp(1).detach(), atol=1e-5, rtol=1e-5)
    expected = torch.autograd.grad((whole * slopes).sum(), leaves)
    for _ in range(2):  # what is kept outlasts a backward pass
        found = torch.autograd.grad((ours * slopes).sum(), leaves, retain_graph=True)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
def test_a_second_derivative_is_refused(kept_bytes):
    """It would lack what the kept logits depend on."""
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    logprobs, _ = ChunkedLogprobs.apply(hidden, weight, None, torch.tensor([0, 1, 2]), 4, False, kept_bytes)
    (slope,) = torch.autograd.grad((logprobs * logprobs).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_logits_are_kept_where_they_are_few(monkeypatch):
    """A product a chunk in the forward pass; in the backward pass two, and a third where they are computed again."""
    made = []
    product = logprobs_module._product
    monkeypatch.setattr("learners.logprobs._product", lambda *sides: made.append(sides) or product(*sides))
    model = packed_model("llama")
    columns = pack_sequences([((1, 2), (3, 4)), ((1, 2), (5,))])[0]
    for logits_mb, in_backward in ((1, 2), (0, 3)):
        logprobs = token_logprobs(model, columns, vocab_chunk=VOCAB, logits_mb=logits_mb).logprobs
        made.clear()
        logprobs.sum().backward()
        assert len(made) == in_backward
    hidden, weight = torch.zeros(2, 4, requires_grad=True), torch.zeros(8, 4)
    few, many = (
        ChunkedLogprobs.apply(hidden, weight, None, torch.tensor([0, 1]), 8, False, kept_bytes)[0]
        for kept_bytes in (2 * 8 * 4, 2 * 8 * 4 - 1)
    )
    assert len(few.grad_fn.saved_tensors) == len(many.grad_fn.saved_tensors) + 2


def test_huge_logits_do_not_overflow():
    hidden, weight = torch.tensor([[1e4]]), torch.tensor([[1.0], [-1.0], [0.5]])
    logprobs = ChunkedLogprobs.apply(hidden, weight, None, torch.tensor([0]), 2, False, 0)[0]
    assert logprobs.item() == 0.0


@pytest.mark.parametrize("name", CONFIGS)
def test_check_accepts_what_it_should(name):
    assert check_packing(packed_model(name), vocab_chunk=16) is None


SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, intermediate_size=32), "final_logit_softcapping"),
        (MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2), "linear_attention"),
        # Its attention is its own and never sees the packing: only the comparison tells.
        (FalconConfig(**SMALL, initializer_range=0.3, eos_token_id=1), "differ by"),
    ],
)
def test_architectures_that_packing_cannot_serve_fall_back_with_the_reason(config, reason):
    model = make_model(config)
    policy = Policy(model, dtype="float32", vocab_chunk=16)
    assert reason in policy.packing_refused
    columns, _ = pack_sequences([((1, 2), (3, 4)), ((1, 2), (5,))])
    torch.testing.assert_close(policy(columns), plain_token_logprobs(model, columns).logprobs)


def test_check_refuses_a_model_whose_attention_looks_across_completions(monkeypatch):
    """A packing that lets each row begin with the previous completion must be noticed by the numbers."""
    model = packed_model("llama")

    def shifted(columns, device, *, way):
        packing = plan_packing(columns, device, way=way)
        return replace(packing, rows=tuple(rows.roll(1, 0) for rows in packing.rows))

    monkeypatch.setattr("learners.packed.plan_packing", shifted)
    assert "differ by" in check_packing(model, vocab_chunk=16)


def test_check_refuses_prompts_that_are_shared_wrongly(monkeypatch):
    """The first completion of a group seen by all others."""

    def leaky(columns, device, *, way):
        packing = plan_packing(columns, device, way=way)
        groups = tuple(
            Group(prompt=slice(group.prompt.start, group.completions[0].stop), completions=group.completions[1:])
            for group in packing.groups
            if len(group.completions) > 1
        )
        return replace(packing, groups=groups)

    monkeypatch.setattr("learners.packed.plan_packing", leaky)
    assert "differ by" in check_packing(packed_model("llama"), vocab_chunk=16)


def test_bfloat16_is_close_to_float32():
    model = make_model("llama")
    columns, _ = pack_sequences([((1, 2, 3), (4, 5, 6, 7)), ((1, 2, 3), (9, 8))])
    exact = Policy(model, dtype="float32", vocab_chunk=16)(columns)
    rough = Policy(model, dtype="bfloat16", vocab_chunk=16)(columns)
    assert rough.dtype == torch.float32
    assert 0 < float((exact - rough).detach().abs().max()) < 0.3


class Products(TorchDispatchMode):
    """Counts matrix products of layers."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def test_activation_checkpointing_changes_nothing_but_what_is_computed_twice():
    columns, _ = pack_sequences([((1, 2, 3), (4, 5, 6, 7)), ((1, 2, 3), (9, 8))])
    results, products = {}, {}
    for checkpointing in ("none", "selective", "full"):
        model = make_model("llama")
        policy = Policy(model, dtype="float32", vocab_chunk=16, activation_checkpointing=checkpointing)
        assert model.model.layers[0].gradient_checkpointing is (checkpointing != "none")
        with Products() as counter:
            results[checkpointing] = gradients(model, policy(columns))
        products[checkpointing] = counter.count
    for name, gradient in results["none"].items():
        assert torch.equal(gradient, results["selective"][name]), name
        assert torch.equal(gradient, results["full"][name]), name
    layers = make_model("llama").config.num_hidden_layers
    assert products["selective"] == products["none"]
    # q, k, v, o, gate, up; the last, down, need not be computed again: nothing behind it in the layer needs its result.
    assert products["full"] - products["none"] in (6 * layers, 7 * layers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.3)])
def test_packed_equals_plain_on_cuda(name, dtype, tolerance):
    sequences = [((1, 2, 3), (4, 5, 6, 7)), ((1, 2, 3), (9, 8)), ((5,), (6,) * 30)]
    columns, _ = pack_sequences(sequences)
    model = packed_model(name, "cuda")
    policy = Policy(model, dtype=dtype, vocab_chunk=16)
    assert policy.packing_refused is None
    packed, plain = policy(columns), plain_token_logprobs(model, columns).logprobs
    torch.testing.assert_close(packed, plain, atol=tolerance, rtol=tolerance)
    assert_same(gradients(model, packed), gradients(model, plain), tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flex_attention_is_used_on_cuda(dtype):
    """Its kernels want heads as wide as these."""
    config = LlamaConfig(**SMALL | {"hidden_size": 64, "num_attention_heads": 2}, intermediate_size=64)
    assert Policy(make_model(config).to("cuda"), dtype=dtype, vocab_chunk=16, flex=True).way is Way.FLEX
