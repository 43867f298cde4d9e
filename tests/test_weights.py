"""A generator holds what was published, or says which tensor of which version it does not hold."""

import asyncio
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.generator import Generator
from learners.learner import Learner
from orchestrator.errors import DeadlineError, PublicationError
from orchestrator.weights import Probe, Publication, corrupted, install, pack, unpack, version_of
from tests.fakes import CountingEngine

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]


@st.composite
def tensors(draw):
    shapes = draw(st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=3), min_size=1, max_size=6))
    seed = draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    named = {}
    for index, shape in enumerate(shapes):
        dtype = draw(st.sampled_from(DTYPES))
        named[f"layer.{index}"] = (torch.randn(shape, generator=generator) * 100).to(dtype)
    return named


@settings(max_examples=80, deadline=None)
@given(named=tensors(), bucket_bytes=st.integers(1, 600))
def test_packing_is_lossless_for_any_bucket_size(named, bucket_bytes):
    records, buckets = pack(named, bucket_bytes)
    assert corrupted(records, buckets) == []
    found = unpack(records, buckets)
    assert list(found) == list(named)
    for name, tensor in named.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_strided_tensors_are_packed_in_order():
    tensor = torch.arange(12.0).view(3, 4).t()
    records, buckets = pack({"t": tensor})
    assert torch.equal(unpack(records, buckets)["t"], tensor)


def test_version_depends_on_every_value_and_name():
    base = {"a": torch.zeros(4), "b": torch.ones(3)}
    version = version_of(3, pack(base)[0])
    assert version == version_of(3, pack(base, bucket_bytes=1)[0]), "not on how they were bucketed"
    assert version != version_of(3, pack({"a": torch.zeros(4), "c": torch.ones(3)})[0])
    assert version != version_of(3, pack({"a": torch.zeros(4), "b": torch.tensor([1.0, 1.0, 1.0000001])})[0])


def publication(named, logprobs=(-1.0, -1.0)):
    records, buckets = pack(named, bucket_bytes=64)
    probe = Probe(token_ids=(1, 2, 3), logprobs=logprobs, tolerance=1e-4)
    return Publication(version=version_of(7, records), records=records, buckets=tuple(buckets), probe=probe)


NAMED = {"model.embed": torch.arange(8.0), "model.head": torch.ones(8)}


def test_install_loads_and_proves():
    engine, published = CountingEngine(), publication(NAMED)
    assert install(engine, published, published.buckets, holder="generator-0") == published.version
    assert torch.equal(engine.weights["model.embed"], NAMED["model.embed"])


@pytest.mark.parametrize("hidden", [(), ("model.head",)])
def test_damaged_bytes_are_named_whether_or_not_the_engine_shows_what_it_holds(hidden):
    engine, published = CountingEngine(), publication(NAMED)
    engine.hidden = hidden
    damaged = [bucket.copy() for bucket in published.buckets]
    damaged[1][0] ^= 1
    with pytest.raises(
        PublicationError, match=rf"generator-1: tensor model\.head of weights {published.version} arrived with another"
    ):
        install(engine, published, damaged, holder="generator-1")
    assert bool(engine.weights) is not bool(hidden), "what cannot be seen afterwards is looked at before"


def test_an_engine_that_ignores_the_update_is_named():
    engine, published = CountingEngine(), publication(NAMED)
    engine.ignores_updates = True
    with pytest.raises(PublicationError, match=r"generator-0: tensor model\.embed does not hold .*v7-.*2 of 2"):
        install(engine, published, published.buckets, holder="generator-0")


def test_weights_that_diverged_are_no_fault_of_the_engine():
    published = publication(NAMED, logprobs=(-1.0, float("nan")))
    with pytest.raises(PublicationError, match=r"weights v7-.* not finite, in the learner itself.*learner\.lr"):
        install(CountingEngine(), published, published.buckets, holder="generator-0")


def test_weights_that_were_sent_are_compared_by_their_checksums():
    """Over NCCL and IPC: the probe alone cannot tell an update that moves it by less than its tolerance."""
    engine, published = CountingEngine(), replace(publication(NAMED), buckets=())
    engine.load_weights(NAMED | {"model.head": torch.ones(8) * (1 + 1e-6)})
    with pytest.raises(PublicationError, match=r"generator-0: tensor model\.head does not hold .*v7-.*1 of 2"):
        install(engine, published, (), holder="generator-0")
    engine.load_weights(NAMED)
    assert install(engine, published, (), holder="generator-0") == published.version
    engine.load_weights({name: tensor.bfloat16() for name, tensor in NAMED.items()})
    assert engine.outdated(published.records) == [], "in another dtype they cannot be compared"


class Waiting(Generator):
    """Its bytes come when the test says so."""

    def receive(self, publication, deadline_s):
        assert self.gate.wait(deadline_s)
        return publication.buckets


def test_a_generator_answers_while_it_fetches_weights(monkeypatch):
    monkeypatch.setattr("actors.generator.build_engine", lambda kind: CountingEngine())
    generator, published = Waiting("generator-0", "counting", {}), publication(NAMED)
    generator.gate = threading.Event()

    async def publish():
        update = asyncio.create_task(generator.update_weights(published, 20.0))
        await asyncio.sleep(0)
        assert await generator.generated() == (0, 0)
        assert not update.done()
        generator.gate.set()
        return await update

    assert asyncio.run(publish()) == published.version


class Deaf:
    def transfer(self, method, payload):
        time.sleep(60)


def test_bytes_and_transfers_have_a_deadline(ray_cluster):
    """Both name the key that sets it."""
    deaf = ray.remote(num_cpus=0)(Deaf).remote()
    generator = Generator.__new__(Generator)
    generator.name = "generator-0"
    published = replace(publication(NAMED), buckets=(deaf.transfer.remote("", {}),))
    with pytest.raises(DeadlineError, match=r"generator-0: bytes of weights v7.*cluster\.publish_deadline_s"):
        generator.receive(published, 0.1)
    learner = Learner.__new__(Learner)
    learner._receivers, learner._transport, learner._publish_deadline_s = [deaf], "nccl", 0.1
    with pytest.raises(DeadlineError, match=r"receive weights over nccl.*cluster\.publish_deadline_s"):
        learner._call_receivers("receive", [{}])
    ray.kill(deaf)


@pytest.mark.parametrize("found", [-1.01, float("nan")])
def test_a_probe_that_disagrees_is_refused(found, monkeypatch):
    engine, published = CountingEngine(), publication(NAMED)
    monkeypatch.setattr(engine, "score", lambda sequences: [np.array([-1.0, found])])
    with pytest.raises(PublicationError, match="log-probs of the probe"):
        install(engine, published, published.buckets, holder="generator-0")


def test_the_forward_pass_is_tried_until_it_agreed_and_whenever_tensors_are_hidden(monkeypatch):
    engine, published = CountingEngine(), publication(NAMED)
    monkeypatch.setattr(engine, "score", lambda sequences: [np.array([-1.0, -9.0])])
    assert install(engine, published, published.buckets, holder="generator-0", tried=True) == published.version
    engine.hidden = ("model.head",)
    with pytest.raises(PublicationError, match="log-probs of the probe"):
        install(engine, published, published.buckets, holder="generator-0", tried=True)


def moved(by):
    """Weights under which the log-probs of the probe are so much lower."""
    made = publication({name: tensor + by for name, tensor in NAMED.items()})
    return replace(made, probe=replace(made.probe, logprobs=tuple(value - by for value in made.probe.logprobs)))


def waiting(monkeypatch, engine):
    monkeypatch.setattr("actors.generator.build_engine", lambda kind: engine)
    generator = Waiting("generator-0", "counting", {})
    generator.gate = threading.Event()
    generator.gate.set()
    return generator


def test_a_generator_tries_weights_until_the_first_ones_would_have_been_found_out(monkeypatch):
    """Those are of its folder: an engine that never takes any agrees with them, and with what is much the same."""
    engine, scored = CountingEngine(), []
    first, like_it, others = moved(0), moved(2**-14), moved(1)
    (name, value), *_ = NAMED.items()

    def score(sequences):
        scored.append(sequences)
        by = float((engine.weights[name] - value).float().mean()) if len(scored) > 1 else 9.0
        return [np.array([-1.0 - by, -1.0 - by])]

    monkeypatch.setattr(engine, "score", score)
    generator = waiting(monkeypatch, engine)

    async def publish():
        with pytest.raises(PublicationError, match="log-probs of the probe"):
            await generator.update_weights(first, 20.0)
        for each, tries in ((first, 2), (first, 3), (like_it, 4), (others, 5), (others, 5), (first, 5)):
            assert await generator.update_weights(each, 20.0) == each.version
            assert len(scored) == tries

    asyncio.run(publish())


def test_a_generator_whose_engine_computes_with_what_it_began_with_is_found_out(monkeypatch):
    """Though every tensor that can be read back has arrived."""
    generator = waiting(monkeypatch, CountingEngine())

    async def publish():
        assert await generator.update_weights(moved(0), 20.0)
        with pytest.raises(PublicationError, match="log-probs of the probe"):
            await generator.update_weights(moved(1), 20.0)

    asyncio.run(publish())


def test_buckets_respect_their_size():
    _, buckets = pack({f"t{i}": torch.zeros(16) for i in range(10)}, bucket_bytes=128)
    assert [bucket.nbytes for bucket in buckets] == [128] * 5
    assert all(bucket.dtype == np.uint8 for bucket in buckets)
