"""Preference and reward models: what holds by construction, what they can express, how they are trained and used."""

import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaModel
from typer.testing import CliRunner

from actors.judges.preference_model import PreferenceScorer
from actors.judges.reward_model import RewardScorer
from actors.judges.win_rates import aggregated, mean_scores, win_matrix, win_rates
from conf.compose import compose
from conf.judging import has_own_judge, pooled_kinds
from launch import judge_models, warm_start
from launch.cli import app
from launch.judge_models import check_judge_model, prepare_judge_model
from launch.model_files import inspect_model
from launch.preflight import preflight
from launch.resources import LEARNER_OVERHEAD, memory_plan
from launch.tiny import make_model as make_tiny
from launch.tiny import make_tokenizer
from learners.preference.config import KINDS, HeadConfig, model_kind
from learners.preference.data import Answer, LabelledPair, hold_out, make_groups, read_labelled_pairs
from learners.preference.folder import load_model, new_model, save_model
from learners.preference.model import PreferenceModel, skew_score, unit
from learners.preference.records import Comparison, Group
from learners.preference.training import TrainingConfig, measure, train
from orchestrator.errors import AgonError, ConfigError, DataError, ModelError
from orchestrator.store import Store
from orchestrator.tasks.addition import AdditionTask, worked_solution
from orchestrator.types import Completion, FinishReason, PolicyVersion, Prompt, RolloutGroup
from tests.learning import make_pairs
from tests.models import make_model

VOCAB = 24
TOKENS = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=6).map(tuple)
RPS = (Comparison(first=0, second=1), Comparison(first=1, second=2), Comparison(first=2, second=0))
"""Rock beats scissors, scissors beat paper, paper beats rock."""


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("base") / "model")


def tiny(kind, seed=0, **head):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = PreferenceModel(LlamaModel(config), HeadConfig(kind=kind, **head)).eval()
    torch.nn.init.normal_(model.readout.weight)
    return model


def group(prompt, answers, comparisons=None):
    pairs = comparisons or tuple(Comparison(first=i, second=j) for i, j in combinations(range(len(answers)), 2))
    return Group(prompt=prompt, answers=tuple(answers), comparisons=pairs)


def rollouts(*texts, prompt="Is it?", reason=FinishReason.EOS):
    completions = tuple(
        Completion(
            token_ids=(5, 2), text=text, logprobs=(-1.0, -1.0), finish_reason=finish,
            policy=PolicyVersion(number=1, digest="d"),
        )
        for text, finish in ((text, reason) if isinstance(text, str) else text for text in texts)
    )  # fmt: skip
    return RolloutGroup(
        prompt=Prompt(id="p", text=prompt, token_ids=(1, 5)), completions=completions, iteration=1, seed=0
    )


# By construction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 5), prompt=TOKENS, first=TOKENS, second=TOKENS)
def test_a_comparison_turned_round_is_its_opposite(kind, seed, prompt, first, second):
    model = tiny(kind, seed)
    with torch.inference_mode():
        one = model([group(prompt, (first, second))])
        other = model([group(prompt, (second, first))])
        same = model([group(prompt, (first, first))])
    assert one.item() == pytest.approx(-other.item(), abs=1e-5)
    assert (one.sigmoid() + other.sigmoid()).item() == pytest.approx(1, abs=1e-6)
    assert same.item() == pytest.approx(0, abs=1e-5)
    if first != second:
        assert one.item() != 0


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(groups=st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=2, max_size=3)), min_size=2, max_size=3))
def test_what_is_read_beside_it_changes_nothing(kind, groups):
    model = tiny(kind)
    records = [group(prompt, answers) for prompt, answers in groups]
    with torch.inference_mode():
        together = model(records)
        alone = torch.cat([model([record]) for record in records])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_a_context_matters_to_the_model_that_reads_both_answers():
    """It would else be a reward model that costs twice as much."""
    model = tiny("preference_model")
    with torch.inference_mode():
        matrix = [model([group((4,), (a, b))]).item() for a, b in [((5,), (6,)), ((6,), (7,)), ((5,), (7,))]]
    assert abs(matrix[0] + matrix[1] - matrix[2]) > 1e-3


def test_gpm_scores_are_of_unit_vectors():
    """Two-dimensional: s = sin of the angle from the first to the second vector."""
    angles = torch.tensor([0.3, 1.1])
    vectors = torch.stack([angles.cos(), angles.sin()], dim=-1) * torch.tensor([[5.0], [0.1]])
    assert skew_score(*unit(vectors)).item() == pytest.approx(math.sin(0.8), abs=1e-6)


# What they can express ------------------------------------------------------------------------------------------------


def fit_the_cycle(kind):
    model = tiny(kind, dim=4)  # in two dimensions it can be caught with the three vectors in the wrong order
    groups = [group((prompt,), ((10, 2), (11, 2), (12, 2)), RPS) for prompt in range(4, 8)]
    train(model, groups, TrainingConfig(lr=1e-2, epochs=100, batch_prompts=4), lambda *_: None)
    return measure(model, groups)


@pytest.mark.parametrize("kind", ["gpm", "preference_model"])
def test_a_preference_model_can_say_that_rock_scissors_and_paper_beat_each_other_in_turn(kind):
    quality = fit_the_cycle(kind)
    assert quality.accuracy == 1
    assert quality.loss < 0.1


def test_a_reward_cannot_do_better_than_a_coin_flip_on_a_cycle():
    """The three differences add up to 0, and -log sigmoid is convex: the mean loss is at least log 2."""
    quality = fit_the_cycle("reward_model")
    assert quality.loss >= math.log(2) - 1e-6
    assert quality.accuracy <= 2 / 3 + 1e-6


# From comparisons to win rates ----------------------------------------------------------------------------------------

C = np.array([[0, 1.2, -0.4], [-0.9, 0, 0.3], [0.6, -0.1, 0]])
"""Raw outputs of a pairwise ranker for (row, column), not antisymmetric; what this project's models give is C - C^T."""


def test_averages_of_a_win_matrix_against_numbers_worked_out_by_hand():
    logits = C - C.T
    np.testing.assert_allclose(mean_scores(logits), [0.366667, -0.566667, 0.2], atol=1e-6)
    np.testing.assert_allclose(win_rates(win_matrix(logits)), [0.553282, 0.402595, 0.544124], atol=1e-6)
    np.testing.assert_allclose(win_rates(win_matrix(aggregated(logits))), [0.586441, 0.366483, 0.547076], atol=1e-6)


@given(
    st.lists(st.floats(-1e4, 1e4), min_size=6, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_a_win_matrix_adds_up_to_one_across_its_diagonal(values, known):
    logits = np.zeros((4, 4))
    logits[np.triu_indices(4, 1)] = np.where(known, values, np.nan)
    logits = logits - logits.T
    wins = win_matrix(logits)
    found = np.isfinite(wins)
    np.testing.assert_allclose((wins + wins.T)[found], 1)
    assert (found == np.isfinite(logits)).all()
    assert (np.diag(wins) == 0.5).all()
    rates = win_rates(wins)
    assert ((rates >= 0) & (rates <= 1)).all()


# Data -----------------------------------------------------------------------------------------------------------------


def pair(prompt, chosen, rejected, label=1.0):
    return LabelledPair(prompt=prompt, chosen=Answer(text=chosen), rejected=Answer(text=rejected), label=label)


def test_a_prompt_is_held_out_with_all_its_pairs():
    pairs = [pair(f"q{i % 40}", f"a{i}", f"b{i}") for i in range(120)]
    training, held = hold_out(pairs, 0.3)
    assert len(training) + len(held) == 120
    assert training
    assert held
    assert not {p.prompt for p in training} & {p.prompt for p in held}
    assert {p.prompt for p in hold_out(pairs[::-1], 0.3)[1]} == {p.prompt for p in held}


def test_answers_of_a_prompt_are_read_once_and_long_pairs_are_counted(base):
    encoder = new_model(base, HeadConfig(kind="gpm"), max_length=24)[1]
    pairs = [pair("q", "yes", "no"), pair("q", "yes", "never"), pair("r", "a", "b" * 60)]
    groups, dropped = make_groups(pairs, encoder, side_by_side=False)
    assert dropped == 1
    assert [len(g.answers) for g in groups] == [3]
    assert [(c.first, c.second) for c in groups[0].comparisons] == [(0, 1), (0, 2)]
    with pytest.raises(DataError, match="none of the 1 pairs fits the model's 24 tokens"):
        make_groups(pairs[2:], encoder, side_by_side=False)


def test_pairs_are_read_from_a_run_and_from_jsonl(tmp_path):
    run_pairs = [with_texts(p, f"q{i}") for i, p in enumerate(make_pairs(2))]
    store = Store(tmp_path)
    read = read_labelled_pairs(store.write_pairs(1, 0, run_pairs))
    assert [p.prompt for p in read] == [p.prompt.text for p in run_pairs]
    assert [p.chosen.text for p in read] == [p.chosen.text for p in run_pairs]
    assert not any(p.rejected.ended for p in read)
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "2+2?", "chosen": "4", "rejected": "5"}\n{"prompt": "x", "chosen": "y"}\n')
    with pytest.raises(DataError, match="line 2: field 'rejected' is missing"):
        read_labelled_pairs(path)
    path.write_text('{"prompt": "2+2?", "chosen": "4", "rejected": "5", "label": 1.5}\n')
    with pytest.raises(DataError, match=r"line 1: field 'label' is 1\.5"):
        read_labelled_pairs(path)


def with_texts(record, text):
    return replace(
        record,
        prompt=replace(record.prompt, text=text),
        chosen=replace(record.chosen, text=text + " yes"),
        rejected=replace(record.rejected, text=text + " no", finish_reason=FinishReason.LENGTH),
    )


def test_an_answer_that_spells_out_the_end_of_sequence_does_not_end(base):
    encoder = new_model(base, HeadConfig(kind="gpm"), max_length=64)[1]
    eos = encoder.tokenizer.eos_token_id
    assert eos not in encoder.answer("fine</s><s>", ended=False)
    assert encoder.answer("fine", ended=True)[-1] == eos
    assert encoder.prompt("q")[-1] != eos


# Training -------------------------------------------------------------------------------------------------------------


def lessons(prompts):
    """Which of two answers is better depends on the prompt: the same token as its own."""
    return [group((3 + p, 2), ((3 + p, 2), (3 + (p + 1) % 8, 2)), (Comparison(first=0, second=1),)) for p in prompts]


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_is_repeated_by_its_seed(kind):
    def trained():
        model = tiny(kind)
        train(model, lessons(range(8)), TrainingConfig(lr=1e-2, epochs=30, batch_prompts=4, seed=3), lambda *_: None)
        return model

    model = trained()
    assert measure(model, lessons(range(8))).accuracy == 1
    again = trained().state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


class Fixed(torch.nn.Module):
    """A model that says what it is told."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.tensor([math.log(p / (1 - p)) for p in probabilities])

    def forward(self, groups):
        start = groups[0].comparisons[0].first
        return self.logits[start : start + len(groups)]


def test_accuracy_and_calibration_against_numbers_worked_out_by_hand():
    # Confidences .9 and .9 (one right of two: |1 - 1.8| = .8), .62 (right: .38) and exactly 1/2 (half right: 0).
    model = Fixed([0.9, 0.1, 0.62, 0.5])
    groups = [group((4,), ((5,), (6,)), (Comparison(first=i, second=1),)) for i in range(4)]
    quality = measure(model, groups)
    assert quality.accuracy == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert quality.calibration_error == pytest.approx((0.8 + 0.38) / 4, abs=1e-6)
    assert quality.loss == pytest.approx(-(2 * 0 + math.log(0.9 * 0.1 * 0.62 * 0.5)) / 4, abs=1e-6)


def test_a_soft_label_is_what_the_model_comes_to_say():
    model = tiny("gpm", temperature=0.5)
    groups = [group((4,), ((5, 2), (6, 2)), (Comparison(first=0, second=1, label=0.7),))]
    train(model, groups, TrainingConfig(lr=1e-2, epochs=150), lambda *_: None)
    assert model(groups).sigmoid().item() == pytest.approx(0.7, abs=0.02)


def test_nothing_to_learn_from_is_an_error():
    with pytest.raises(DataError, match="nothing to train a preference model on"):
        train(tiny("gpm"), [], TrainingConfig(lr=1e-3), lambda *_: None)


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_says_the_same(kind, likelihood, base, tmp_path):
    model, encoder = new_model(base, HeadConfig(kind=kind, likelihood=likelihood), max_length=64)
    digest = save_model(model, encoder, tmp_path / "judge")
    loaded = load_model(tmp_path / "judge")
    record = group(encoder.prompt("q"), (encoder.answer("yes"), encoder.answer("no")))
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model([record]), model.eval()([record]))
    assert (loaded.digest, loaded.encoder.max_length, loaded.model.head) == (digest, 64, model.head)
    assert model_kind(tmp_path / "judge") == kind


def test_weights_of_another_model_are_refused(base, tmp_path):
    model, encoder = new_model(base, HeadConfig(kind="gpm"), max_length=64)
    save_model(model, encoder, tmp_path / "judge")
    model.readout.weight.data += 1
    save_model(model, encoder, tmp_path / "other")
    (tmp_path / "judge" / "readout.safetensors").write_bytes((tmp_path / "other" / "readout.safetensors").read_bytes())
    with pytest.raises(ModelError, match="files of two models are mixed"):
        load_model(tmp_path / "judge")


def test_a_plain_language_model_is_no_judge(base):
    with pytest.raises(ModelError, match="neither a model of agon train-judge nor a sequence classifier"):
        load_model(base)


def test_a_reward_model_of_transformers_gives_its_own_rewards(base, tmp_path):
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    classifier.config.pad_token_id = 0
    encoder = new_model(base, HeadConfig(kind="gpm"), max_length=64)[1]
    classifier.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    scored = RewardScorer(loaded).score(rollouts("yes", "certainly not"))
    for completion, score in zip(scored.group.completions, scored.scores, strict=True):
        ids = torch.tensor([[*encoder.prompt("Is it?"), *encoder.answer(completion.text)]])
        assert score.value == pytest.approx(classifier(ids).logits.item(), abs=1e-5)
    assert scored.preferences is None


# Scorers --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judges(base, tmp_path_factory):
    found = {}
    for kind in KINDS:
        torch.manual_seed(1)
        model, encoder = new_model(base, HeadConfig(kind=kind), max_length=40)
        torch.nn.init.normal_(model.readout.weight)
        folder = tmp_path_factory.mktemp(kind) / "judge"
        save_model(model, encoder, folder)
        found[kind] = load_model(folder)
    return found


@pytest.mark.parametrize("win_probability", ["pairwise", "aggregated"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_the_mean_of_its_row(kind, win_probability, judges):
    scorer = PreferenceScorer(judges[kind], win_probability=win_probability)
    scored = scorer.score(rollouts("yes", "no", "perhaps"))
    matrix = np.array(scored.preferences, dtype=float)
    np.testing.assert_allclose(matrix + matrix.T, 1)
    np.testing.assert_allclose(np.diag(matrix), 0.5)
    np.testing.assert_allclose([score.value for score in scored.scores], matrix.mean(axis=1))
    assert scored.scorer.startswith(f"preference_model:{kind}@{judges[kind].digest[:8]}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_logit_is_the_mean_of_the_logits_of_its_row(kind, judges):
    scored = PreferenceScorer(judges[kind], score="mean_logit").score(rollouts("yes", "no", "perhaps"))
    matrix = np.array(scored.preferences, dtype=float)
    means = np.log(matrix / (1 - matrix)).mean(axis=1)
    np.testing.assert_allclose([score.value for score in scored.scores], means, atol=1e-6)
    assert sum(means) == pytest.approx(0, abs=1e-6)
    assert scored.scorer.endswith("+mean_logit")


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_read_is_left_out_and_changes_nothing_else(kind, judges):
    scorer = PreferenceScorer(judges[kind])
    whole = scorer.score(rollouts("yes", "no"))
    scored = scorer.score(rollouts("yes", ("cut off", FinishReason.ABORTED), "no", "b" * 60))
    assert [score.value is None for score in scored.scores] == [False, True, False, True]
    assert scored.scores[1].reason == "the completion was aborted"
    assert "the judge reads 40" in scored.scores[3].reason
    assert [scored.scores[i].value for i in (0, 2)] == pytest.approx([score.value for score in whole.scores])
    for i, row in enumerate(scored.preferences):
        assert [value is None for value in row] == [i in (1, 3) or j in (1, 3) for j in range(4)]


def test_a_completion_without_a_rival_gets_no_score(judges):
    scored = PreferenceScorer(judges["gpm"]).score(rollouts("yes", ("no", FinishReason.ABORTED)))
    assert [score.value for score in scored.scores] == [None, None]
    assert scored.scores[0].reason == "there is no other completion that it could be compared with"


def test_an_answer_that_was_cut_off_is_not_read_as_one_that_ended(judges):
    scorer = RewardScorer(judges["reward_model"])
    ended, cut = (
        scorer.score(rollouts(("yes", reason))).scores[0] for reason in (FinishReason.EOS, FinishReason.LENGTH)
    )
    assert ended.value != cut.value


def test_a_model_that_only_compares_is_no_reward_model(judges):
    with pytest.raises(ModelError, match="has no reward"):
        RewardScorer(judges["gpm"])


# The command and the configuration ------------------------------------------------------------------------------------


def write_lessons(path, prompts=24):
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_writes_a_judge_and_says_how_good_it_is(kind, base, tmp_path):
    pairs, out = write_lessons(tmp_path / "pairs.jsonl"), tmp_path / "judge"
    options = ["--kind", kind, "--lr", "1e-2", "--epochs", "8", "--batch-prompts", "8", "--held-out", "0.2"]
    arguments = [str(pairs), "--model", str(base), "--out", str(out), "--max-length", "64", *options]
    result = CliRunner().invoke(app, ["train-judge", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "accuracy        1.000" in result.output
    assert load_model(out).digest[:8] in result.output
    with pytest.raises(ModelError, match="exists"):
        CliRunner().invoke(app, ["train-judge", *arguments], catch_exceptions=False)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--kind", "oracle"), "'oracle' is no kind of preference model"),
        (("--dim", "3"), "choose an even number"),
        (("--held-out", "0"), "none is left to measure on"),
        (("--max-length", "8"), "raise max_length"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_its_mend(option, message, base, tmp_path):
    pairs = write_lessons(tmp_path / "pairs.jsonl")
    arguments = [str(pairs), "--model", str(base), "--out", str(tmp_path / "out"), *option]
    with pytest.raises(AgonError, match=message):
        CliRunner().invoke(app, ["train-judge", *arguments], catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_a_run_without_the_judge_it_asks_for_is_refused(base, tmp_path):
    model, encoder = new_model(base, HeadConfig(kind="gpm"), max_length=64)
    save_model(model, encoder, tmp_path / "judge")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Is it?"}\n{"prompt": "Is it not?"}\n')
    files = [f"model={base}", "task=prompts", f"task.path={prompts}", "evaluation.scorer=none"]
    with pytest.raises(ConfigError, match=r"judge\.model: scorer\.kind=preference_model needs one"):
        check_judge_model(compose(["scorer=preference_model", *files]))
    with pytest.raises(ConfigError, match="a gpm has no reward"):
        check_judge_model(compose(["scorer=reward_model", f"judge.model={tmp_path / 'judge'}", *files]))
    check_judge_model(compose(["scorer=preference_model", f"judge.model={tmp_path / 'judge'}", *files]))
    together = ["scorer=ensemble", "judge.members=[preference_model, llm_judge]"]
    with pytest.raises(ConfigError, match=r"judge\.members=\['preference_model', 'llm_judge'\] needs one"):
        check_judge_model(compose([*together, *files]))
    check_judge_model(compose([*together, f"judge.model={tmp_path / 'judge'}", *files]))


@pytest.mark.parametrize("likelihood", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_train_judge_writes_passes_the_checks_before_a_run(kind, likelihood, base, tmp_path):
    model, encoder = new_model(base, HeadConfig(kind=kind, likelihood=likelihood), max_length=64)
    save_model(model, encoder, tmp_path / "judge")
    scorer = "reward_model" if kind == "reward_model" else "preference_model"
    assert judge_bytes(tmp_path, base, scorer) == 4 * sum(p.numel() for p in model.backbone.parameters())


def test_a_sequence_classifier_passes_the_checks_before_a_run(base, tmp_path):
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    classifier.save_pretrained(tmp_path / "judge")
    assert judge_bytes(tmp_path, base, "reward_model") >= 4 * sum(p.numel() for p in classifier.parameters())


def judge_bytes(folder, base, kind):
    """What preflight plans for the judge beside the process itself."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Is it {number}?"}}\n' for number in range(192)))
    settings = [f"scorer={kind}", f"judge.model={folder / 'judge'}", "evaluation.scorer=none"]
    settings += ["model.max_length=128", "generator.max_tokens=32", "task.answer_field=null"]
    config = compose([*settings, f"model={base}", "task=prompts", f"task.path={prompts}", f"run_dir={folder / 'run'}"])
    check_judge_model(config)
    preflight(config)
    (need,) = (need for need in memory_plan(config, inspect_model(base)) if kind in need.what)
    return need.bytes - LEARNER_OVERHEAD


# The tiny judge ----------------------------------------


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """A run on a tiny policy, and pairs that any judge can learn to tell: one digit against another."""
    config = compose(
        ["scorer=preference_model", "model.tiny.hidden_size=32", "model.tiny.num_layers=1", "model.tiny.num_heads=2"]
    )
    policy = tmp_path / "policy"
    policy.mkdir()
    warm_start.save(make_tiny(config.model), make_tokenizer(config.model.max_length), policy)
    pairs = [pair(f"{i:04d}+0000\n", "1+1", "2+2") for i in range(200)]
    monkeypatch.setattr(judge_models, "sample_pairs", lambda *_: pairs)
    monkeypatch.setattr(judge_models, "flawed_pairs", lambda *_: [])
    monkeypatch.setattr(judge_models, "TINY", replace(judge_models.TINY, lr=1e-2))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return config, policy


def test_a_tiny_judge_is_made_once_and_copied_into_each_run(tiny_run, tmp_path):
    config, policy = tiny_run
    steps = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        prepared = prepare_judge_model(config, tmp_path / name, policy, lambda *step: steps.append(step))
        assert prepared.judge.model == str(tmp_path / name / "judge_model")
        assert model_kind(prepared.judge.model) == "gpm"
        taken = len(steps)
    assert steps[-1][:2] == (taken, taken)
    assert len(list((tmp_path / "cache" / "agon" / "models").iterdir())) == 1
    other = replace(config, seed=1)
    (tmp_path / "three").mkdir()
    prepare_judge_model(other, tmp_path / "three", policy, lambda *_: None)
    assert len(list((tmp_path / "cache" / "agon" / "models").iterdir())) == 2


def test_a_tiny_judge_is_made_for_an_ensemble_as_well(tiny_run, tmp_path):
    config, policy = tiny_run
    config = replace(
        config,
        scorer=replace(config.scorer, kind="ensemble"),
        judge=replace(config.judge, members=["preference_model", "majority"]),
    )
    check_judge_model(config)
    prepared = prepare_judge_model(config, tmp_path, policy, lambda *_: None)
    assert prepared.judge.model == str(tmp_path / "judge_model")
    assert pooled_kinds(prepared) == ("preference_model", "verifier")
    assert not has_own_judge(prepared)


def test_a_tiny_judge_that_knows_too_little_is_refused_and_not_kept(tiny_run, tmp_path, monkeypatch):
    config, policy = tiny_run
    monkeypatch.setattr(judge_models, "LOWEST_ACCURACY", 1.1)
    with pytest.raises(ModelError, match="is the least it may"):
        prepare_judge_model(config, tmp_path, policy, lambda *_: None)
    assert list((tmp_path / "cache" / "agon" / "models").iterdir()) == []


def test_the_pairs_of_a_tiny_judge_are_right_against_wrong_and_of_no_other_split(monkeypatch, tmp_path):
    config = compose(["scorer=preference_model"])
    tokenizer = make_tokenizer(128)
    policy = tmp_path / "policy"
    policy.mkdir()
    warm_start.save(make_tiny(config.model), tokenizer, policy)
    monkeypatch.setattr(judge_models, "TINY", replace(judge_models.TINY, problems=3, samples=3))
    task = AdditionTask()

    def answers(model, prompts, **_):
        rows = []
        for index, row in enumerate(prompts):
            a, b = tokenizer.decode(row, skip_special_tokens=True).strip().split("+")
            right = f"#{int(a) + int(b):05d}"
            rows.append([right + "</s>", right + "<pad>", "#0</s>"][index % 3])
        return tokenizer(
            rows, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
        ).input_ids

    monkeypatch.setattr(warm_start, "sample", answers)
    pairs = judge_models.sample_pairs(config, policy)
    assert len(pairs) == 3 * 2
    for found in pairs:
        a, b = map(int, found.prompt.strip().split("+"))
        assert task.split_of(a, b) == "demonstrations"
        assert found.chosen == Answer(text=f"#{a + b:05d}")
        assert found.rejected in (Answer(text=f"#{a + b:05d}", ended=False), Answer(text="#0"))


def test_flawed_pairs_set_the_right_solution_against_slips(monkeypatch):
    config, task = compose(["scorer=preference_model"]), AdditionTask()
    monkeypatch.setattr(judge_models, "TINY", replace(judge_models.TINY, flawed=20, samples=4, slips=0.3))
    pairs = judge_models.flawed_pairs(config)
    assert pairs == judge_models.flawed_pairs(config)
    assert 40 < len(pairs) <= 80
    for found in pairs:
        a, b = map(int, found.prompt.strip().split("+"))
        assert task.split_of(a, b) == "demonstrations"
        assert found.chosen.text == worked_solution(a, b, 4) != found.rejected.text
