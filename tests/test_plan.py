"""A plan says what a run takes, by role and in the end the same as preflight adds up, and starts nothing."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.compose import compose
from conf.roles import cpus_needed, gpus_needed, roles
from launch.devices import find_gpu
from launch.estimate import estimate
from launch.model_files import ModelShape, inspect_model
from launch.plan import layout, plan, planned_shape
from launch.resources import memory_plan
from orchestrator.errors import ConfigError, ModelError

SHAPE = ModelShape(
    num_parameters=10**9,
    num_layers=10,
    hidden_size=1000,
    intermediate_size=4000,
    kv_width=500,
    vocab_size=50_000,
    context=4096,
)
USUAL = compose([])
SCORERS = ("verifier", "llm_judge", "preference_model", "implicit", "majority")


def of(path):
    """A run from the model in a folder."""
    return replace(USUAL, model=replace(USUAL.model, kind="hf", path=str(path)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of GPT-2's kind, whose embedding and head are one matrix."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from launch.tiny import make_tokenizer

    path = tmp_path_factory.mktemp("model")
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, vocab_size=64, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(path)
    make_tokenizer(256).save_pretrained(path)
    return path


@given(
    scorer=st.sampled_from(SCORERS),
    engine=st.sampled_from(("policy", "own")),
    generators=st.integers(1, 9),
    gpus=st.sampled_from((0, 1)),
    judges=st.integers(1, 3),
)
def test_its_rows_add_up_to_what_preflight_compares_with_the_machine(scorer, engine, generators, gpus, judges):
    config = replace(
        USUAL,
        scorer=replace(USUAL.scorer, kind=scorer),
        judge=replace(USUAL.judge, engine=engine, num_actors=judges),
        generator=replace(USUAL.generator, num_actors=generators, gpus_per_actor=gpus),
        learner=replace(USUAL.learner, gpus=gpus),
    )
    needs = memory_plan(config, SHAPE)
    rows = layout(config, needs)
    assert sum(row.actors * (row.host_bytes + row.gpu_bytes) for row in rows) == sum(need.bytes for need in needs)
    assert sum(row.actors * row.cpus for row in rows) == pytest.approx(cpus_needed(config))
    assert sum(row.actors * row.gpus for row in rows) == gpus_needed(config) == gpus * (generators + 1)
    assert [row.role for row in rows if row.role == "generator"] == ["generator"]


def test_roles_are_those_that_the_config_asks_for():
    config = compose(["scorer=llm_judge", "judge.engine=own", "judge.num_actors=3", "generator.num_actors=4"])
    assert {role.name: role.count for role in roles(config)} == {
        "learner": 1,
        "generator": 4,
        "verifier": 1,
        "judge": 3,
    }


def test_a_config_alone_is_a_model_to_plan_with(folder, tmp_path):
    """Before 140 GB of weights are fetched; a matrix that is used twice is counted once, as it is stored."""
    shutil.copy(folder / "config.json", tmp_path)
    described = planned_shape(of(tmp_path))
    assert described == inspect_model(folder)


def test_a_hub_id_is_not_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(ModelError, match=r"hf download some/model config\.json --local-dir DIR"):
        planned_shape(of("some/model"))


def test_a_config_that_no_model_is_made_of(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of", "architectures": ["XForCausalLM"]}))
    with pytest.raises(ModelError, match=r"config\.json: transformers makes no model of it: .*unheard_of"):
        planned_shape(of(tmp_path))


def test_it_writes_nothing_and_says_what_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = compose(["cluster=one_node", "pipeline.prompts_per_iteration=2000"])
    found, text = json.loads(plan(config, gpu="h100", as_json=True)), plan(config, gpu="h100")
    assert list(tmp_path.iterdir()) == []
    slowest = max(found["iteration"], key=lambda work: work["seconds"])
    assert found["bottleneck"] == slowest["role"]
    assert f"bottleneck: {slowest['role']}" in text
    assert {row["role"]: row["gpus"] for row in found["layout"]} == {
        "ray": 0,
        "controller": 0,
        "learner": 1,
        "generator": 1,
        "verifier": 0,
    }


def test_what_a_gpu_cannot_hold_is_told(tmp_path):
    """A billion parameters take 18 B each with gradients, moments and a bfloat16 copy, and twice 4 B of snapshots."""
    billion = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 19, "num_attention_heads": 16}
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32_000}
    (tmp_path / "config.json").write_text(json.dumps(billion | llama))
    on_gpus = compose(["cluster=one_node"])
    config = replace(on_gpus, model=replace(on_gpus.model, kind="hf", path=str(tmp_path)))
    found = re.search(r"too large: learner needs ([\d.]+) GiB, 1 x RTX4090 have 24.0 GiB", plan(config, gpu="RTX4090"))
    assert found
    assert 0 < float(found[1]) - 1_107_376_128 * 26 / 2**30 < 2, "and activations"
    assert "too large" not in plan(config, gpu="H100")


def test_bad_input_is_refused_with_what_would_be_right():
    with pytest.raises(ConfigError, match=r"--gpu H1000: nothing is known of it; known are A100-40GB, .*B200"):
        plan(compose([]), gpu="H1000")
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        plan(compose(["generator.tensor_parallel_size=2"]), gpu="H100")


def reckoned(*overrides):
    config = compose(
        [
            *("cluster=one_node", "model.dtype=bfloat16", "model.max_length=300", "generator.max_tokens=200"),
            *("pipeline.prompts_per_iteration=8", "generator.samples_per_prompt=4", "learner.batch_pairs=8"),
            *("generator.max_num_seqs=32", "learner.activation_checkpointing=none", "reference=none"),
            *("loss=simpo", "evaluation.kl_prompts=0", "pairing.max_pairs=1", *overrides),
        ]
    )
    return {work.role: work.seconds for work in estimate(config, SHAPE, find_gpu("H100"))}


def test_the_estimate_is_the_arithmetic_of_its_docstring():
    """By hand: H100 has 989e12 operations and 3.35e12 bytes a second; a billion parameters are 2e9 bytes."""
    found = reckoned()
    # 32 at once: a step reads 2e9 B of weights and, of 200 tokens of each on average, 2 x 10 x 500 x 2 B of cache.
    step = (2e9 + 32 * 200 * 20_000) / (0.6 * 3.35e12)
    prompts = 2 * 1e9 * 100 * 8 / (0.5 * 989e12)
    assert found["generator"] == pytest.approx(prompts + 200 * step)
    # 8 pairs of two completions of 200 tokens, 8 prompts of 100, 6 operations each
    assert found["learner"] == pytest.approx(6 * 1e9 * (8 * 2 * 200 + 8 * 100) / (0.4 * 989e12))


def test_the_estimate_follows_the_settings():
    plain = reckoned()
    assert reckoned("generator.num_actors=2")["generator"] < plain["generator"]
    assert reckoned("generator.max_num_seqs=16")["generator"] > 1.9 * plain["generator"] - 0.1
    assert reckoned("learner.activation_checkpointing=full")["learner"] == pytest.approx(plain["learner"] * 8 / 6)
    assert reckoned("model.dtype=float32")["learner"] == pytest.approx(2 * plain["learner"])
