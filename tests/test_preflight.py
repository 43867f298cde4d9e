"""Everything that can be refused is refused before Ray starts: exit code 2, its place, its mend, nothing written.

Every refusal runs through the command line's own entry point.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from conf.compose import compose
from launch import cli, machines
from launch.machines import Machine
from launch.model_files import ModelShape, find_model, inspect_model, read_header, read_shapes, tiny_shape
from launch.preflight import _check_run_dir, preflight
from launch.resources import GIB, check_resources, disk_plan, kv_bytes_per_token, memory_plan
from learners.loading import check_weights
from learners.policy import load_model
from learners.preference.config import HeadConfig
from learners.preference.folder import new_model
from orchestrator.errors import ModelError, ResourceError
from tests.models import KINDS, make_model

PROBLEMS = [{"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in range(40)]
LLAMA_7B = ModelShape(
    num_parameters=6_738_415_616,
    num_layers=32,
    hidden_size=4096,
    intermediate_size=11008,
    kv_width=4096,
    vocab_size=32000,
    context=4096,
)


@pytest.fixture(scope="module")
def made_model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("made") / "model")


@pytest.fixture(autouse=True)
def roomy(monkeypatch):
    """The same refusals on every machine that runs these tests."""
    monkeypatch.setattr("launch.preflight.this_machine", lambda: Machine(memory=64 * GIB, gpus=()))
    monkeypatch.setattr(machines.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000 * GIB}))


@pytest.fixture
def place(tmp_path, monkeypatch, made_model):
    """A working directory with a model and prompts that are right; each test breaks one thing."""
    shutil.copytree(made_model, tmp_path / "model")
    write_lines(tmp_path / "prompts.jsonl", PROBLEMS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


USUAL = (
    *("model=./model", "task=prompts", "task.path=prompts.jsonl", "model.max_length=128", "generator.max_tokens=32"),
    *("pipeline.prompts_per_iteration=16", "evaluation.final_problems=8"),
)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def edit_json(path, **values):
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def listing(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def refused(place, monkeypatch, capsys, *overrides, usual=USUAL):
    """What `agon run` says; asserts the exit code, a silent stdout and that nothing was written."""
    before = listing(place)
    monkeypatch.setattr("launch.run.Run", None)  # what is not refused fails here, before Ray
    monkeypatch.setattr(sys, "argv", ["agon", "run", *usual, *overrides])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    assert left.value.code == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert listing(place) == before, "nothing is written"
    return err


@pytest.fixture
def refusal(place, monkeypatch, capsys):
    return lambda *overrides, **kwargs: refused(place, monkeypatch, capsys, *overrides, **kwargs)


def expect(message, *parts):
    for part in parts:
        assert part in message, message


def test_what_is_right_passes_and_is_handed_on(place):
    before = listing(place)
    inputs = preflight(compose(USUAL))
    assert listing(place) == before
    assert inputs.run_dir.parent == place / "runs"
    assert inputs.model_dir.resolve() == place / "model"
    assert inputs.task.has_answers
    assert inputs.tokenizer.eos_token == "</s>"
    assert len(inputs.prompts.take(16)) == 16
    assert 1 <= len(inputs.test_prompts) <= 8


def test_the_tiny_model_needs_no_files(place):
    inputs = preflight(compose([]))
    assert inputs.model_dir is None
    assert inputs.prompts.take(1)[0].text.endswith("\n")


# -- configuration --


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("learner.lrr=1", ["learner.lrr: no such key", "learner.lr"]),
        ("learner.epochs=two", ["learner.epochs: expected a whole number", "'two'"]),
        ("generator.samples_per_prompt=1", ["generator.samples_per_prompt=1", "at least 2"]),
        ("loss.beta=0", ["loss.beta=0.0", "above 0"]),
        ("loss.beta=-0.1", ["loss.beta=-0.1", "above 0"]),
        ("task.answer_field=null", ["scorer.verifier=math", "task.answer_field"]),
        ("scorer.verifier=function", ["scorer.function"]),
        (
            ("scorer.verifier=function", "scorer.function=nowhere.judge"),
            ["scorer.function", "nowhere"],
        ),
        (
            ("scorer=llm_judge", "judge.max_tokens=32", "judge.rubric=absent.txt"),
            ["judge.rubric=absent.txt: cannot be"],
        ),
        (("scorer=llm_judge", "judge.max_tokens=9999"), ["judge.max_tokens=9999", "model.max_length"]),
        (("scorer=majority", "scorer.verifier=function", "scorer.function=math.hypot"), ["no final answer"]),
    ],
)
def test_configuration(refusal, override, parts):
    expect(refusal(*([override] if isinstance(override, str) else override)), *parts)


# -- prompts --


def test_a_missing_prompt_file(refusal):
    expect(refusal("task.path=absent.jsonl"), "absent.jsonl", "no such file")


def test_a_broken_line(refusal, place):
    lines = (place / "prompts.jsonl").read_text().splitlines()
    (place / "prompts.jsonl").write_text("\n".join([*lines[:6], '{"prompt": ', *lines[6:]]))
    expect(refusal(), "prompts.jsonl, line 7: not JSON")


def test_an_empty_file(refusal, place):
    (place / "prompts.jsonl").write_text("")
    expect(refusal(), "prompts.jsonl", "no records")


def test_a_missing_field(refusal, place):
    write_lines(place / "prompts.jsonl", [*PROBLEMS, {"question": "?", "answer": "1"}])
    expect(refusal(), "prompts.jsonl, line 41", "'prompt' is missing", "'question'")


def test_prompts_longer_than_the_context(refusal, place):
    long = {"prompt": "12 + 30 = 42 " * 40, "answer": "1"}
    longer = {"prompt": "12 + 30 = 42 " * 80, "answer": "1"}
    write_lines(place / "prompts.jsonl", [*PROBLEMS, long, longer])
    expect(refusal("task.test_path=prompts.jsonl"), "same prompt")
    write_lines(place / "test.jsonl", [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "2 + 0 =", "answer": "2"}])
    write_lines(place / "prompts.jsonl", [*PROBLEMS[2:], long, longer])
    message = refusal("task.test_path=test.jsonl")
    expect(message, "2 of 40 prompts", "prompts.jsonl, line 40", "model.max_length", "task.on_too_long=drop")
    kept = preflight(compose([*USUAL, "task.test_path=test.jsonl", "task.on_too_long=drop"]))
    assert len(kept.prompts.take(38)) == 38


def test_all_that_are_too_long_are_counted(refusal, place, monkeypatch):
    """Also beyond those that are rendered anyway; the longest is told by its tokens, of which a sign may have four."""
    monkeypatch.setattr("launch.preflight.MAX_RENDERED", 4)
    rows = [{"prompt": f"{n} + 1 = " + "x" * 200, "answer": "1"} for n in range(39)]
    write_lines(place / "prompts.jsonl", [*rows, {"prompt": "\N{SNOWMAN}" * 150, "answer": "1"}])
    write_lines(place / "test.jsonl", PROBLEMS[:8])
    expect(refusal("task.test_path=test.jsonl"), "40 of 40 prompts", "prompts.jsonl, line 40")


def test_fewer_prompts_than_one_iteration_takes(refusal):
    expect(refusal("pipeline.prompts_per_iteration=500"), "pipeline.prompts_per_iteration=500", "prompts.jsonl")


# -- model --


def test_no_such_model(refusal):
    expect(refusal("model=./absent"), "model.path=./absent", "no such folder")
    expect(refusal("model=someone/some-model"), "someone/some-model", "cache", "hf download")
    expect(refusal("model=./prompts.jsonl"), "a file; name the folder")


def test_a_cached_hub_model_is_found_without_a_network(place, monkeypatch):
    from huggingface_hub import constants

    cached = place / "hub" / "models--someone--some-model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    shutil.move(place / "model", cached / "snapshots" / "abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
    inputs = preflight(compose(["model=someone/some-model", *USUAL[1:]]))
    assert inputs.model_dir == cached / "snapshots" / "abc"


def test_a_run_where_a_model_belongs(refusal, place):
    (place / "model").rename(place / "trained")
    (place / "model").mkdir()
    (place / "trained").rename(place / "model" / "model")
    (place / "model" / "ledger.sqlite").touch()
    expect(refusal(), "model: a run folder; the model that it ended with is", "model/model")


def test_no_tokenizer(refusal, place):
    for path in (place / "model").glob("*token*"):
        path.unlink()
    expect(refusal(), "model: no tokenizer", "tokenizer.json", "save_pretrained")


def test_a_separator_that_ends_no_step(refusal, place):
    expect(refusal("recipe=mcts_dpo", "search.separator=\n\n##"), "search.separator='\\n\\n##'", "no token")
    preflight(compose([*USUAL, "recipe=mcts_dpo"]))


def test_a_judge_that_cannot_tell_its_verdicts_apart(refusal, place):
    shutil.copytree(place / "model", place / "judge")
    same = {"type": "Replace", "pattern": {"String": "B"}, "content": "A"}
    edit_json(place / "judge" / "tokenizer.json", normalizer=same)
    pairwise = ("scorer=llm_judge", "judge=pairwise")
    expect(refusal(*pairwise, "judge.model=judge"), "judge.verdict=probability", "A, B apart")
    search = ("recipe=mcts_dpo", "search.evaluation_weight=1", "generator.max_tokens=32")
    expect(refusal(*search, "judge.model=judge"), "A, B apart")
    preflight(compose([*USUAL, *search]))
    preflight(compose([*USUAL, *pairwise]))
    preflight(compose([*USUAL, "scorer=llm_judge", "judge.model=judge", "judge.max_tokens=32"]))


@pytest.mark.parametrize("kind", ["llm_judge", "step_judge"])
def test_a_named_judge_that_is_not_there(refusal, kind):
    expect(refusal(f"scorer={kind}", "judge.model=./absent"), "judge.model=./absent")


def test_no_weights(refusal, place):
    (place / "model" / "model.safetensors").unlink()
    expect(refusal(), "no weights", "model.safetensors")
    (place / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    expect(refusal(), "only as pickle (pytorch_model.bin)", "Convert once", "save_pretrained")


def test_weights_that_are_damaged(refusal, place):
    weights = place / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    expect(refusal(), "model.safetensors", "cut short")
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    expect(refusal(), "git-lfs pointer", "git lfs pull")
    weights.write_bytes(b"\x08" + b"\0" * 7 + b"not json" + whole)
    expect(refusal(), "header is damaged")
    weights.unlink()
    (place / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    expect(refusal(), "index.json", "part-1.safetensors")


def edit_weights(folder, *, drop=(), **replaced):
    tensors = load_file(folder / "model.safetensors") | replaced
    save_file({name: tensor for name, tensor in tensors.items() if name not in drop}, folder / "model.safetensors")


def test_weights_that_do_not_fill_the_model(refusal, place):
    """Transformers would make up what is missing; told from the headers, in the words of its own loader."""
    edit_weights(place / "model", drop=["model.layers.1.mlp.up_proj.weight"])
    expect(refusal(), "model.layers.1.mlp.up_proj.weight is missing", "config.json asks for", "fetch the folder again")
    edit_weights(place / "model", **{"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 64)})
    expect(refusal(), "model.layers.1.mlp.up_proj.weight is [3, 64] instead of [96, 64]")


@pytest.mark.parametrize("kind", KINDS)
def test_whole_models_of_every_kind_pass(kind, tmp_path):
    """Tied weights are stored once, and GPT-2's names lack a prefix: nothing of that is missing."""
    folder = make_model(kind, tmp_path)
    shapes = {name.removeprefix("transformer."): shape for name, shape in read_shapes(folder).items()}
    check_weights(AutoModelForCausalLM, folder, shapes)


def test_experts_that_are_merged_on_loading_are_counted(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    MixtralForCausalLM(
        MixtralConfig(**sizes, num_key_value_heads=1, vocab_size=50, num_local_experts=4)
    ).save_pretrained(tmp_path)
    shapes = read_shapes(tmp_path)
    check_weights(AutoModelForCausalLM, tmp_path, shapes)
    shapes.pop(next(name for name in shapes if ".experts.1." in name))
    with pytest.raises(ModelError, match="are missing or differ in size"):
        check_weights(AutoModelForCausalLM, tmp_path, shapes)


def test_loading_makes_up_no_weights(place):
    edit_weights(place / "model", drop=["model.norm.weight"])
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing"):
        load_model(place / "model")
    with pytest.raises(ModelError, match=r"norm\.weight is missing"):
        new_model(place / "model", HeadConfig(kind="gpm"), max_length=64)


def test_a_model_that_was_loaded_does_not_change_with_its_file(place):
    """Weights that are mapped from it would, as long as nobody writes to them."""
    model = load_model(place / "model")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = place / "model" / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"model_type": "llamma"}, ["llamma", "does not recognize"]),
        ({"architectures": ["LlamaaForCausalLM"]}, ["LlamaaForCausalLM", "does not know", "LlamaForCausalLM: write"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures is 'LlamaForCausalLM', expected a list of names"]),
        ({"hidden_size": "abc"}, ["hidden_size is 'abc', expected a whole number"]),
        ({"num_attention_heads": 0}, ["num_attention_heads is 0"]),
        ({"text_config": "none"}, ["text_config is 'none'"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps"]),
    ],
)
def test_a_config_that_describes_no_model(refusal, place, values, parts):
    edit_json(place / "model" / "config.json", **values)
    expect(refusal(), *parts)


def test_a_hub_that_is_silent(tmp_path):
    """It takes the connection and never answers; the deadline is in the code, this one only ends a failing test."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        result = subprocess.run(
            [sys.executable, "-c", "from launch.cli import main; main()", "run", "model=org/absent"],
            cwd=tmp_path,
            env=os.environ | hub | {"HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert result.returncode == 2, result.stderr
    expect(result.stderr, "error: model.path=org/absent", "the hub does not give it (timed out)", "hf download")


def test_a_tokenizer_without_eos(refusal, place):
    edit_json(place / "model" / "tokenizer_config.json", eos_token=None)
    (place / "model" / "special_tokens_map.json").unlink(missing_ok=True)
    expect(refusal(), "tokenizer_config.json", "no end-of-sequence token", "set eos_token")


def test_a_tokenizer_of_another_model(refusal, place):
    edit_json(place / "model" / "config.json", vocab_size=100)
    expect(refusal(), "vocab_size in config.json is 100", "not of one model")


def test_a_broken_tokenizer(refusal, place):
    (place / "model" / "tokenizer.json").write_text('{\n "a": \n')
    expect(refusal(), "tokenizer.json, line 3", "not JSON")
    (place / "model" / "tokenizer.json").write_text("{}")
    expect(refusal(), "model: its tokenizer cannot be loaded")


def test_a_config_of_another_kind(refusal, place):
    edit_json(place / "model" / "config.json", architectures=["LlamaForSequenceClassification"])
    expect(refusal(), "config.json", "not a causal language model")
    (place / "model" / "config.json").write_text('{"a":\n')
    expect(refusal(), "config.json, line 2: not JSON")
    (place / "model" / "config.json").unlink()
    expect(refusal(), "config.json: no such file")


def test_a_context_longer_than_the_model_has(refusal):
    expect(refusal("model.max_length=100000"), "model.max_length=100000", "config.json", "1024")


def test_parameters_are_counted_without_loading_them(made_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made_model)
    shape = inspect_model(made_model)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.num_layers, shape.hidden_size, shape.kv_width, shape.context) == (2, 64, 32, 1024)
    assert read_header(made_model / "model.safetensors")["model.embed_tokens.weight"] == [shape.vocab_size, 64]
    assert find_model(str(made_model)) == made_model


def test_the_shape_of_the_tiny_model_is_that_of_the_model_that_is_made():
    from launch.tiny import VOCABULARY
    from launch.tiny import make_model as make_tiny

    config = compose([]).model
    made = make_tiny(config)
    assert tiny_shape(config, len(VOCABULARY)).num_parameters == sum(p.numel() for p in made.parameters())


# -- run folder --


def test_a_folder_that_holds_another_run(refusal, place):
    (place / "taken").mkdir()
    (place / "taken" / "config.yaml").write_text("seed: 0\n")
    expect(refusal("run_dir=taken"), f"run_dir={place / 'taken'}", "another run", "agon run --resume")
    (place / "begun").mkdir()
    for name in ("run.lock", ".ledger.sqlite.partial", "ledger.sqlite", "ledger.sqlite-wal", ".config.yaml.partial"):
        (place / "begun" / name).touch()
    _check_run_dir(place / "begun", None)  # of a run that was killed before it was one
    (place / "full").mkdir()
    (place / "full" / "notes.txt").write_text("mine")
    expect(refusal("run_dir=full"), "is not empty")
    expect(refusal("run_dir=prompts.jsonl/run"), "prompts.jsonl is a file")


def test_a_folder_that_cannot_be_written(refusal, monkeypatch):
    monkeypatch.setattr("launch.preflight.os.access", lambda path, mode: False)
    expect(refusal("run_dir=closed/run"), "not writable")


# -- resources --


def test_too_little_memory(refusal):
    message = refusal("generator.num_actors=5000")
    expect(message, "too little memory", "64.0 GiB free", "5000 x generator: process", "generator.num_actors")


def test_too_little_disk(refusal, monkeypatch):
    monkeypatch.setattr(machines.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    expect(refusal(), "too little disk", "checkpoints", "pipeline.keep_checkpoints")


def test_more_gpus_than_there_are(refusal):
    expect(refusal("cluster=one_node"), "needs 2 GPUs", "this machine has 0", "cluster.address")


def test_free_memory_is_what_the_machine_and_its_container_leave(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 3 * GIB}))
    monkeypatch.setattr(machines, "_container_memory", lambda: 2 * GIB)
    assert machines.this_machine().memory == 2 * GIB
    monkeypatch.setattr(machines, "_container_memory", lambda: 1 << 62)
    assert machines.this_machine().memory == 3 * GIB


def test_stores_that_cannot_hold_what_goes_through_them(place):
    config = compose(["model=/m/x", "generator.max_tokens=100", "model.max_length=2048"])
    with pytest.raises(ResourceError) as caught:
        check_resources(config, LLAMA_7B, place, Machine(memory=10**13, gpus=()))
    # 2 (keys and values) x 32 layers x 4096 x 4 B = 1 MiB a token; 2048 tokens and one block of 128 that stays empty
    assert kv_bytes_per_token(config, LLAMA_7B) == 1 << 20
    expect(str(caught.value), "generator.kv_cache_mb=128", "set it to 2176", "cluster.object_store_mb=512", "25.1 GiB")


def test_gpu_memory_is_compared_role_by_role(place):
    config = compose(["model=/m/x", "cluster=one_node", "cluster.object_store_mb=40000"])
    check_resources(config, LLAMA_7B, place, Machine(memory=200 * GIB, gpus=(400 * GIB,) * 2))
    with pytest.raises(ResourceError) as caught:
        check_resources(config, LLAMA_7B, place, Machine(memory=200 * GIB, gpus=(24 * GIB,) * 2))
    expect(str(caught.value), "the learner role needs", "24.0 GiB")
    assert "the generator role" not in str(caught.value), "14 GB of weights fit into 90 % of 24 GiB"


def by_role(needs):
    sums = {}
    for need in needs:
        sums[need.role] = sums.get(need.role, 0) + need.bytes
    return sums


def test_the_memory_plan_adds_up():
    """fp32 training: weights, gradients and two moments are 16 B a parameter, each snapshot 4 B."""
    config = compose(["model=/m/x", "evaluation.kl_prompts=0", "learner.micro_batch_tokens=16"])
    base, larger = replace(LLAMA_7B, num_parameters=7 * 10**9), replace(LLAMA_7B, num_parameters=8 * 10**9)
    before, after = by_role(memory_plan(config, base)), by_role(memory_plan(config, larger))
    assert after["learner"] - before["learner"] == 20 * 10**9
    assert after["generator"] - before["generator"] == config.generator.num_actors * 4 * 10**9
    with_kl = compose(["model=/m/x", "learner.micro_batch_tokens=16"])
    assert by_role(memory_plan(with_kl, base))["learner"] - before["learner"] == 28 * 10**9
    three = compose(
        ["model=/m/x", "evaluation.kl_prompts=0", "learner.micro_batch_tokens=16", "generator.num_actors=3"]
    )
    assert by_role(memory_plan(three, base))["generator"] * 2 == by_role(memory_plan(config, base))["generator"] * 3


def test_a_judge_of_its_own_takes_memory_like_a_generator():
    """One engine beside two."""
    usual = compose(["model=/m", "generator.num_actors=2"])
    own = compose(["model=/m", "generator.num_actors=2", "scorer=llm_judge", "judge.engine=own"])
    needs = by_role(memory_plan(own, LLAMA_7B))
    assert needs["judge"] * 2 == needs["generator"] == by_role(memory_plan(usual, LLAMA_7B))["generator"]
    served = compose(["model=/m", "scorer=llm_judge"])
    assert "judge" not in by_role(memory_plan(served, LLAMA_7B))


def test_unusable_seed_data(refusal, place):
    """Read before anything starts, with the line that cannot be used."""
    write_lines(place / "seeds.jsonl", [{"prompt": "Is it right?", "completion": "Y"}, {"prompt": "Is it right?"}])
    said = refusal("learner.replay_path=seeds.jsonl", "learner.replay_sequences=4")
    for part in ("seeds.jsonl", "line 2", "completion"):
        assert part in said


def test_the_disk_plan_adds_up():
    config = compose(["model=/m/x", "pipeline.iterations=5", "pipeline.keep_checkpoints=2"])
    checkpoints, rollouts = disk_plan(config, LLAMA_7B)
    assert checkpoints.bytes == 3 * 16 * LLAMA_7B.num_parameters, "two kept and the new one; weights, Adam, reference"
    assert rollouts.bytes == 5 * 128 * 8 * 1024 * 12


def test_several_problems_are_told_at_once(refusal, place):
    (place / "model" / "model.safetensors").unlink()
    (place / "taken").mkdir()
    (place / "taken" / "config.yaml").write_text("seed: 0\n")
    expect(refusal("run_dir=taken", "task.path=absent.jsonl"), "another run", "absent.jsonl", "no weights")


def test_a_model_error_is_an_error_of_the_model(place):
    (place / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        preflight(compose(USUAL))
