"""Composition: where values come from, what is refused and how, and that a resolved config reads back."""

import dataclasses
import fnmatch
from contextlib import suppress
from typing import get_args

import pytest
import yaml

from conf.compose import compose, compose_resumed, explain, resolved_yaml
from conf.judging import has_own_judge, own_language_model
from conf.layers import FOLDER, groups, knobs
from conf.reads import RULES
from conf.schema import Config
from conf.validate import problems, validate
from launch.guide import annotated, guide
from orchestrator.errors import ConfigError

# What each choice needs beside it to be a whole configuration.
COMPANIONS = {
    "model=hf": ["model.path=/models/some"],
    "task=prompts": ["task.path=prompts.jsonl"],
    "task=gsm8k": ["task.path=train.jsonl"],
    "loss=gpo": ["scorer=preference_model", "judge.score=mean_logit"],
    "judge=pairwise": ["scorer=llm_judge"],
    "reference=none": ["loss=simpo"],
    "scorer=step_judge": ["model.tiny.judge_steps=200"],
}


def refusal(*overrides, config_file=None):
    with pytest.raises(ConfigError) as caught:
        compose(overrides, config_file)
    return str(caught.value)


def sources(*overrides, config_file=None):
    return {key: source for key, _, source in explain(overrides, config_file)}


# -- composition --


@pytest.mark.parametrize("choice", [f"{group}={name}" for group, names in groups().items() for name in names])
def test_every_choice_composes(choice):
    group, _, name = choice.partition("=")
    found = sources(choice, *COMPANIONS.get(choice, []))
    assert any(source.startswith(f"conf/{group}/{name}.yaml:") for source in found.values()), "the file takes part"


def test_iterative_dpo_has_the_published_defaults():
    """Those of RLHFlow's run_loop.sh, where the file of measured settings for the tiny model does not apply."""
    config = compose(["model=/models/some", "recipe=iterative_dpo"])
    assert (config.loss.beta, config.loss.label_smoothing, config.learner.lr) == (0.1, 0.0, 5e-7)
    assert (config.learner.schedule, config.learner.batch_pairs, config.learner.epochs) == ("cosine", 128, 2)
    assert (config.generator.samples_per_prompt, config.generator.temperature) == (8, 1.0)
    assert (config.pipeline.iterations, config.pairing.policy, config.reference.kind) == (3, "best_worst", "previous")


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_groups():
    assert compose(["model=/m/x", "learner.lr=1e-6"]).learner.lr == 1e-6
    assert compose(["model=/m/x", "loss=rpo"]).loss.sft_weight == 0.005
    assert compose(["loss=rpo", "loss.beta=0.3", "seed=4"]).loss.beta == 0.3
    assert compose(["seed=4"]).model.tiny.seed == 4, "an interpolation follows the key it names"


def test_a_part_that_was_asked_for_wins_over_the_recipe_and_the_tuned_file():
    assert sources()["loss.beta"].startswith("conf/tuned/iterative_dpo_tiny.yaml:")
    assert compose(["pairing=all"]).pairing.policy == "all"
    assert compose(["loss=rpo"]).loss.beta == 0.01
    assert compose(["recipe=iterative_dpo", "model=tiny"]) == compose([]), "these two choose the tuned file"


@pytest.mark.parametrize("path", ["org/name", "/models/with space=and[brackets]", "."])
def test_a_model_is_named_by_its_folder_or_hub_id(path):
    config = compose([f"model={path}"])
    assert (config.model.kind, config.model.path) == ("hf", path)


def test_texts_need_no_quoting():
    config = compose(["scorer.marker=####", "run_dir=/a b/c=[d]", "generator.stop=['\\n', END]", "tracking.group='x'"])
    assert config.scorer.marker == "####"
    assert config.run_dir == "/a b/c=[d]"
    assert config.generator.stop == ["\\n", "END"]
    assert config.tracking.group == "x"
    assert compose(["task.answer_field=null"]).task.answer_field is None


# -- refusals --


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.lrr=1", ["learner.lrr: no such key", "did you mean learner.lr?", "weight_decay"]),
        ("beta=1", ["beta: no such key", "did you mean loss.beta?"]),
        ("resume=runs/one", ["resume: an option, not a key: --resume RUN"]),
        ("optimiser.lr=1", ["no such key", "learner.lr"]),
        ("model.tiny=3", ["a group of keys", "model.tiny.hidden_size"]),
        ("loss=dpoo", ["loss=dpoo: no such loss", "did you mean dpo? choices: aft, aot"]),
        ("model=tinny", ["did you mean tiny?", "hf, tiny", "folder or hub id"]),
        ("learner.lr=fast", ["learner.lr: expected a number, found 'fast'"]),
        ("learner.lr=null", ["learner.lr: expected a number, found null"]),
        ("learner.epochs=1.5", ["learner.epochs: expected a whole number, found 1.5"]),
        ("filter.drop_identical=maybe", ["expected true or false, found 'maybe'"]),
        ("filter.max_length_ratio=big", ["expected a number or null"]),
        ("generator.stop=3", ["expected a list of texts"]),
        ("run_dir=${nowhere}", ["run_dir", "nowhere"]),
        ("just_a_word", ["`just_a_word`: expected key=value"]),
        ("model.dtype=float16", ["did you mean bfloat16?", "choices: float32, bfloat16"]),
        ("generator.samples_per_prompt=1", ["generator.samples_per_prompt=1: must be at least 2"]),
        ("loss.beta=0", ["loss.beta=0.0: must be above 0"]),
        ("loss.label_smoothing=0.6", ["loss.label_smoothing=0.6: must be at most 0.5"]),
        ("learner.lr=nan", ["learner.lr=nan: must be a finite number"]),
        ("learner.lr=.inf", ["learner.lr=inf: must be a finite number"]),
    ],
)
def test_a_wrong_override_is_refused_with_what_would_be_right(override, expected):
    message = refusal(override)
    for part in expected:
        assert part in message
    assert "\n" not in message, "one problem, one line; none of Hydra's own text"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["generator.max_tokens=200"], "generator.max_tokens"),
        (["model=hf"], "model.path"),
        (["model.path=/m/x"], "model.path"),
        (["model.tiny.hidden_size=130"], "model.tiny.hidden_size"),
        (["task=prompts"], "task.path"),
        (["task.path=p.jsonl"], "task.path"),
        (["task=gsm8k", "task.path=p.jsonl", "task.test_fraction=0"], "task.test_fraction"),
        (["task=prompts", "task.path=p.jsonl", "task.answer_field=null"], "scorer.verifier"),
        (["scorer.verifier=function"], "scorer.function"),
        (["scorer.verifier=tests"], "scorer.verifier"),
        (["task=prompts", "task.path=p.jsonl", "task.answer_field=null", "scorer.verifier=tests"], "scorer.verifier"),
        (["scorer.function=a.b"], "scorer.function"),
        (["pairing.max_pairs=5"], "pairing.max_pairs"),
        (["reference.kind=none"], "reference.kind"),
        (["loss=simpo", "reference.kind=none", "loss.kl_weight=0.1"], "reference.kind"),
        (["loss=nca", "loss.label_smoothing=0.1"], "loss.label_smoothing"),
        (["loss=pro", "loss.labels=soft"], "loss.labels"),
        (["loss=copg", "loss.weighting=wpo"], "loss.weighting"),
        (["loss=robust", "loss.label_smoothing=0.5"], "loss.label_smoothing"),
        (["loss.labels=posterior"], "loss.label_smoothing"),
        (["loss=aot", "loss.labels=soft", "scorer=preference_model"], "loss.labels"),
        (["loss=spa", "loss.name=aot_unpaired"], "loss.labels"),
        (["loss=wpo", "loss.name=aot"], "loss.weighting"),
        (["loss=p3o", "reference=initial"], "reference.kind"),
        (["loss.name=p3o_separate", "reference=ema"], "reference.kind"),
        (["loss=sppo", "scorer=reward_model", "judge.model=/judge"], "loss.name"),
        (["learner.replay_sequences=8"], "learner.replay_sequences"),
        (["scorer=step_judge"], "scorer.kind"),
        (["loss=gpo", "scorer=preference_model"], "loss.name"),
        (["loss=sppo", "scorer=preference_model", "judge.score=mean_logit"], "judge.score"),
        (["scorer=ensemble", "judge.members=[step_judge, majority]"], "scorer.kind"),
        (["scorer=ensemble", "judge.members=[foo, bar]"], "judge.members"),
        (["scorer=preference_model", "evaluation.scorer=judge"], "evaluation.scorer"),
        (["scorer=majority", "evaluation.scorer=judge"], "evaluation.scorer"),
        (["scorer=ensemble", "judge.members=[ensemble, majority]"], "judge.members"),
        (["scorer=ensemble", "judge.members=[majority]"], "judge.members"),
        (["scorer=ensemble", "judge.members=[majority, majority]"], "judge.members"),
        (["scorer=ensemble", "judge.members=[preference_model, reward_model, majority]"], "judge.members"),
        (["loss=cream", "judge.consistency=mean"], "scorer.kind"),
        (["scorer=implicit", "judge.consistency=mean"], "loss.labels"),
        (["loss=cream", "scorer=implicit", "judge.consistency=mean", "reference=initial"], "reference.kind"),
        (
            ["loss=cream", "scorer=implicit", "judge.consistency=mean", "pipeline.wave_prompts=8"],
            "pipeline.wave_prompts",
        ),
        (["pipeline.mode=semi_online"], "pipeline.wave_prompts"),
        (["pipeline.mode=semi_online", "pipeline.wave_prompts=32", "learner.schedule=linear"], "learner.schedule"),
        (["pipeline.mode=semi_online", "pipeline.wave_prompts=32", "loss=spa"], "loss.labels"),
        (["pipeline.mode=semi_online", "pipeline.wave_prompts=32", "scorer=implicit"], "pipeline.mode"),
        (["pipeline.mode=async", "scorer=majority", "scorer.verifier=math"], "pipeline.mode"),
        (["pipeline.mode=async", "loss=p3o"], "pipeline.mode"),
        (["pipeline.mode=async", "scorer=implicit"], "pipeline.mode"),
        (["pipeline.mode=async", "loss=nca"], "loss.importance_clip"),
        (["pipeline.mode=async", "loss=aot"], "loss.importance_clip"),
        (["pipeline.mode=async", "loss.include_prompt=true"], "loss.importance_clip"),
        (["recipe=mcts_dpo", "scorer=majority"], "scorer.kind"),
        (["recipe=mcts_dpo", "scorer=llm_judge", "judge=pairwise"], "scorer.kind"),
        (["recipe=mcts_dpo", "loss=nca"], "loss.name"),
        (["recipe=mcts_dpo", "search.show_answer=true"], "search.show_answer"),
        (["recipe=mcts_dpo", "search.depth_penalty=true"], "search.depth_penalty"),
        (["recipe=mcts_dpo", "search.separator=''"], "search.separator"),
        (["generator.tensor_parallel_size=2"], "generator.tensor_parallel_size"),
        (["learner.gpus=1.5"], "learner.gpus"),
        (["cluster.weight_transport=nccl"], "cluster.weight_transport"),
        (["cluster.num_cpus=1"], "cluster.num_cpus"),
        (["cluster.address=auto", "cluster.num_cpus=64"], "cluster.num_cpus"),
    ],
)
def test_values_that_do_not_go_together_are_refused(overrides, key):
    message = refusal(*overrides)
    assert message.startswith(key)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["loss.gamma=1"], "loss.gamma=1.0: not read with loss.name=dpo, but with loss.name=slic, simpo"),
        (["loss=rebel", "loss.beta=7"], "loss.beta=7.0: not read with loss.name=rebel"),
        (["loss=slic", "loss.beta_scaling=margin"], "not read with loss.name=slic"),
        (["loss=nca", "loss.tail_weight=0.5"], "not read with loss.name=nca"),
        (["loss.beta_scale=0.5"], "loss.beta_scaling=none, but with loss.beta_scaling=margin or implicit"),
        (["loss=beta_dpo", "loss.beta_slope=2"], "loss.beta_scaling=implicit, but with loss.beta_scaling=margin"),
        (["loss=f_dpo", "loss.divergence_alpha=0.3"], "loss.divergence=js"),
        (["loss.exploration_weight=1"], "loss.exploration=none, but with loss.exploration=selm or xpo"),
        (["model=/m/x", "loss.sft_target=best"], "loss.sft_weight=0.0, but with one above 0"),
        (["loss=irepo", "loss.label_smoothing=0.1"], "not read with loss.name=irepo"),
        (["loss.labels=soft"], "scorer.kind=verifier, but with a judge that compares"),
        (["scorer=llm_judge", "loss.labels=soft"], "judge.style=pairwise"),
        (["reference.ema_decay=0.5"], "reference.kind=previous, but with reference=ema"),
        (["learner.replay_weight=2"], "learner.replay_sequences=0, but with one above 0"),
        (["recipe=mcts_dpo", "pairing=all"], "pairing=all: not read with search.kind=mcts, but with search=none"),
        (["recipe=mcts_dpo", "pairing.min_margin=1"], "search.kind=mcts"),
        (["recipe=mcts_dpo", "generator.samples_per_prompt=16"], "search.kind=mcts"),
        (["search.breadth=3"], "search.kind=none, but with search=mcts"),
        (["judge.votes=5"], "scorer.kind=verifier, but with llm_judge"),
        (["judge=pairwise"], "judge=pairwise: not read with scorer.kind=verifier"),
        (
            ["promotion.gate=off", "promotion.min_win_rate=0.3"],
            "promotion.min_win_rate=0.3: not read with promotion.gate",
        ),
        (["evaluation.scorer=none", "promotion.gate=reject"], "promotion.gate=reject: not read with evaluation.scorer"),
        (["evaluation.scorer=none", "promotion.max_length_ratio=2"], "not read with evaluation.scorer=none"),
        (["promotion.max_judge_drop=0.2"], "promotion.max_judge_drop=0.2: not read with scorer.kind=verifier"),
        (
            ["scorer=llm_judge", "judge=pairwise", "judge.votes=5"],
            "judge.verdict=probability, but with judge.verdict=words",
        ),
        (["scorer=llm_judge", "judge.temperature=0", "judge.votes=5"], "judge.temperature=0.0, but with one above 0"),
        (["scorer=reward_model", "judge.num_actors=2"], "judge.engine=policy, but with judge.engine=own"),
        (["scorer=llm_judge", "evaluation.scorer=judge", "scorer.marker=x"], "scorer.kind=llm_judge"),
        (["scorer=llm_judge", "evaluation.scorer=judge", "scorer.num_actors=2"], "scorer.kind=llm_judge"),
        (["scorer.call_timeout_s=3"], "scorer.verifier=final_answer, but with scorer.verifier=function or tests"),
        (["evaluation.anchors=8"], "scorer.kind=verifier, but with another judge"),
        (["scorer=llm_judge", "evaluation.scorer=judge", "evaluation.anchors=8"], "evaluation.scorer=judge"),
        (["model=/m/x", "model.tiny.max_steps=3"], "model.kind=hf, but with model=tiny"),
        (["pipeline.max_staleness=2"], "pipeline.mode=sync, but with pipeline.mode=async"),
        (["loss.importance_clip=4"], "pipeline.mode=sync, but with pipeline.mode=async"),
    ],
    ids=str,
)
def test_what_a_person_sets_without_effect_is_refused(overrides, why):
    message = refusal(*overrides)
    assert why in message
    assert message.endswith(": leave it out")
    assert "\n" not in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["recipe=self_rewarding", "scorer=verifier"],  # the recipe's own judge.votes and replay are moot
        ["recipe=mcts_dpo", "search=none", "model=/m/x"],  # as is its loss.labels=soft
        ["recipe=sppo", "loss=dpo", "scorer=verifier"],
        ["loss=simpo", "loss.name=cpo"],
        ["loss.gamma=0", "judge.votes=3", "pairing=best_worst"],  # what it would be anyway
        ["scorer=implicit", "loss=rebel", "loss.beta=7"],  # in the judge's scores
        ["loss=asft", "loss.exploration=selm", "loss.beta=7"],
        ["scorer=majority", "evaluation.scorer=none", "scorer.marker=x"],
        ["scorer=preference_model", "evaluation.scorer=none", "scorer.marker=x"],  # by which the tiny judge is taught
        ["task=prompts", "task.path=p.jsonl", "task.digits=3"],  # of the tiny model's warm start
        ["scorer=ensemble", "judge.votes=5", "judge.length_normalized=true"],
    ],
    ids=str,
)
def test_what_another_choice_makes_moot_may_stand_in_files(overrides):
    compose(overrides)


def test_every_rule_of_what_is_read_names_keys_there_are():
    for rule in RULES:
        assert rule.decider in knobs()
        for pattern in rule.keys.split():
            assert fnmatch.filter(knobs(), pattern), pattern


def test_a_member_that_does_not_exist_is_refused_with_the_nearest():
    message = refusal("scorer=ensemble", "judge.members=[majority, prefrence_model]")
    assert "judge.members=['majority', 'prefrence_model']: prefrence_model: did you mean preference_model?" in message


@pytest.mark.parametrize(
    ("overrides", "own", "model"),
    [
        (["scorer=llm_judge"], False, None),
        (["scorer=llm_judge", "judge.engine=own"], True, None),
        (["scorer=llm_judge", "judge.model=/m"], True, "/m"),
        (["scorer=step_judge", "judge.model=/m"], True, "/m"),
        (["scorer=implicit"], True, None),
        (["scorer=preference_model", "judge.model=/m"], False, None),
        (["scorer=ensemble", "judge.members=[preference_model, llm_judge]", "judge.model=/m"], False, None),
        (["scorer=ensemble", "judge.members=[preference_model, implicit]", "judge.model=/m"], True, None),
    ],
    ids=str,
)
def test_a_judge_that_is_named_has_engines_of_its_own(overrides, own, model):
    config = compose(overrides)
    assert (has_own_judge(config), own_language_model(config)) == (own, model)


def test_all_problems_are_reported_together():
    message = refusal("loss.beta=-1", "generator.samples_per_prompt=0", "generator.max_tokens=500", "model.dtype=int8")
    for key in ("loss.beta", "generator.samples_per_prompt", "generator.max_tokens", "model.dtype"):
        assert f"\n{key}=" in f"\n{message}"
    message = refusal("loss.bta=1", "learner.lr=x", "loss=none")
    for part in ("loss.bta", "learner.lr", "loss=none"):
        assert part in message


def test_validate_takes_a_config_from_anywhere():
    config = compose([])
    validate(config)
    broken = dataclasses.replace(config, loss=dataclasses.replace(config.loss, beta=0.0))
    assert [problem.key for problem in problems(broken)] == ["loss.beta"]
    with pytest.raises(ConfigError, match=r"loss\.beta=0\.0: must be above 0"):
        validate(broken)


# -- provenance --


def test_every_value_says_where_it_comes_from():
    found = sources("model=/models/some", "loss=rpo", "learner.epochs=7", "generator.max_tokens=49")
    assert list(found) == list(knobs()), "every key, in the order of the schema"
    assert found["learner.epochs"] == "command line"
    assert found["model.path"] == "command line"
    assert found["generator.max_tokens"] == "command line"
    assert found["generator.deadline_s"] == "schema default"
    name, line = found["loss.sft_weight"].split(":")
    assert name == "conf/loss/rpo.yaml"
    assert (FOLDER / "loss" / "rpo.yaml").read_text().splitlines()[int(line) - 1] == "sft_weight: 0.005"
    assert found["learner.lr"].startswith("conf/recipe/iterative_dpo.yaml:")


def test_a_refused_value_from_a_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "config.yaml"
    text = resolved_yaml(compose(["model=/models/some"])).replace("beta: 0.1\n", "beta: 0.0\n")
    path.write_text(text)
    line = text.splitlines().index("  beta: 0.0") + 1
    assert f"loss.beta=0.0: must be above 0 ({path}:{line})" in refusal(config_file=path)


# -- resolved configs --


def test_a_resolved_config_reads_back_equal(tmp_path):
    path = tmp_path / "config.yaml"
    config = compose(["seed=3", "loss=rpo", 'generator.stop=["a: #b", "\\n"]', "run_dir=null", "tracking.group=no"])
    path.write_text(resolved_yaml(config))
    assert compose([], path) == config
    assert compose(["loss.beta=0.7"], path) == dataclasses.replace(
        config, loss=dataclasses.replace(config.loss, beta=0.7)
    )
    odd = ["seed=3", 'generator.stop=["a: #b", "\\n"]', "scorer.marker=yes", "tracking.group=one\n\n# two: 'three'"]
    path.write_text(annotated(explain(odd)))
    assert compose([], path) == compose(odd)


def test_a_config_file_is_read_strictly(tmp_path):
    path = tmp_path / "config.yaml"
    whole = resolved_yaml(compose([]))
    path.write_text(whole + "learner_rate: 3\n")
    message = refusal(config_file=path)
    assert message.startswith("learner_rate: no such key: did you mean learner.lr?")
    assert message.endswith(f"({path}:{len(whole.splitlines()) + 1})")
    path.write_text(whole.replace("  lr: 5.0e-07", "  lr: fast").replace("seed: 0", "seed: zero", 1))
    assert f"seed: expected a whole number, found 'zero' ({path}:1)" in refusal(config_file=path)
    path.write_text("seed: 1\n")
    assert "recipe.name: no value" in refusal(config_file=path)
    path.write_text("seed: [1\n")
    assert f"{path}:2: not YAML" in refusal(config_file=path)
    path.write_text("- seed\n")
    assert f"{path}:1: expected `key: value`" in refusal(config_file=path)
    assert "cannot be read" in refusal(config_file=tmp_path / "absent.yaml")


def test_a_config_file_holds_the_result_of_its_groups(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(resolved_yaml(compose([])))
    message = refusal("loss=rpo", config_file=path)
    assert "loss=rpo: chooses a group" in message
    assert "loss.name=..." in message


def test_a_resumed_run_starts_from_its_own_config(tmp_path):
    (tmp_path / "config.yaml").write_text(resolved_yaml(compose(["seed=5", "run_dir=elsewhere"])))
    config = compose_resumed(tmp_path, ["learner.step_deadline_s=9"])
    assert (config.seed, config.run_dir, config.learner.step_deadline_s) == (5, str(tmp_path), 9.0)
    with pytest.raises(ConfigError, match="holds no run"):
        compose_resumed(tmp_path / "absent", [])


# -- the schema --


def test_a_number_without_end_is_accepted_or_refused():
    for key, knob in knobs().items():
        if {int, float} & {knob.type, *get_args(knob.type)}:
            with suppress(ConfigError):
                compose([f"{key}={'9' * 400}"])


def test_every_key_has_a_meaning_and_a_default_within_its_limits():
    for key, knob in knobs().items():
        assert knob.meaning, key
    assert not problems(compose([]))
    assert yaml.safe_load(resolved_yaml(compose([]))).keys() == {field.name for field in dataclasses.fields(Config)}


def test_the_guide_names_every_group():
    text = guide()
    for group, choices in groups().items():
        assert group in text
        assert all(choice in text for choice in choices)


@pytest.mark.parametrize(
    "choice", [["loss.include_prompt=true"], ["loss=nca"], ["loss=p3o"], ["scorer=implicit"]], ids=str
)
def test_what_needs_fresh_pairs_goes_with_async_where_none_grows_old(choice):
    compose(["pipeline.mode=async", "pipeline.max_staleness=0", *choice])
