"""The collect stage: what reaches the pairs and what must not, with real judges, trees and files."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.judges.llm_judge import build_llm_judge
from conf.compose import compose
from conf.schema import JudgeConfig
from launch.judges import Judges
from launch.tiny import make_tokenizer
from orchestrator.accounts import Accounts
from orchestrator.archive import Archive
from orchestrator.collecting import SampleCollector
from orchestrator.errors import JudgeError
from orchestrator.evaluation import anchor_figures
from orchestrator.events import ignore
from orchestrator.floor import Floor
from orchestrator.ledger import Ledger
from orchestrator.rollouts import Draw, Roles, Rollouts, sampling_of
from orchestrator.searching import TreeCollector, depth_penalty
from orchestrator.store import Store, read_pairs, read_rollouts
from orchestrator.tally import Tally
from orchestrator.tasks.addition import AdditionTask
from orchestrator.tracking import Tracker
from orchestrator.types import Completion, FinishReason, Prompt, Score, ScoredGroup
from orchestrator.waves import Wave
from tests.judges import ScriptedModel
from tests.records import V0, V1

TOKENIZER = make_tokenizer(128)


class Pool:
    """A pool whose one actor runs here; what it was asked is kept."""

    def __init__(self, **methods):
        self.asked = []
        self.actors = [SimpleNamespace(**{name: SimpleNamespace(remote=method) for name, method in methods.items()})]

    def map(self, call, work, **_):
        self.asked += work
        return call(self.actors[0], list(work))


def adding(mistakes=0.3):
    """Generates solutions of addition problems, each line wrong with some probability, from wherever they were left."""

    def generate(requests):
        return [answer(request) for request in requests]

    def answer(request):
        lots = random.Random(request.seed)
        text = TOKENIZER.decode(list(request.prompt_token_ids), skip_special_tokens=True)
        problem, _, begun = text.partition("\n")
        a, b = map(int, problem.split("+"))
        carry, lines = 0, []
        for place in range(4):
            x, y = a // 10**place % 10, b // 10**place % 10
            total = x + y + carry + (lots.random() < mistakes)
            lines.append(f"{x}+{y}+{carry}={total:02d}\n")
            carry = total // 10
        whole = "".join(lines) + f"#{a + b + 10 * (lots.random() < mistakes):05d}"
        rest = whole[len(begun) :]
        tokens = [*TOKENIZER.encode(rest, add_special_tokens=False), TOKENIZER.eos_token_id]
        return Completion(
            token_ids=tuple(tokens[: request.sampling.max_tokens]),
            text=rest,
            logprobs=(-0.5,) * len(tokens[: request.sampling.max_tokens]),
            finish_reason=FinishReason.EOS if len(tokens) <= request.sampling.max_tokens else FinishReason.LENGTH,
            policy=V1,
        )

    return generate


def problems(count, answer=None):
    chosen = AdditionTask().tuning(count)
    return [
        Prompt(
            id=problem.id,
            text=problem.content,
            token_ids=tuple(TOKENIZER(problem.content).input_ids),
            answer=answer or problem.answer,
        )
        for problem in chosen
    ]


class Checking:
    """A judge that knows the answers; some of its words may be missing."""

    name = "checking@1"

    def __init__(self, silent=0.0):
        self.silent, self.waves = silent, []

    def score(self, groups):
        self.waves.append(sum(len(group.completions) for group in groups))
        return [ScoredGroup(group=group, scores=self.scores(group), scorer=self.name) for group in groups]

    def scores(self, group):
        found = []
        for completion in group.completions:
            right = completion.text.endswith(f"#{group.prompt.answer}")
            silent = random.Random(completion.text).random() < self.silent
            found.append(Score(value=None, reason="silent") if silent else Score(value=float(right)))
        return tuple(found)

    def metrics(self):
        return Tally()


def rollouts_of(config, **methods):
    pool = Pool(generated=lambda: (0, 0), **methods)
    roles = Roles(generators=pool, scorers={}, judges=None, learner=None)
    return Rollouts(roles, config, Tracker(), quarantined={}), roles


def wave_of(prompts):
    return Wave(iteration=1, number=0, prompts=prompts, policies=[V0], reference=V0)


def by_samples(folder, config, rollouts, judge, prompts):
    with Ledger(folder) as ledger:
        archive = Archive(folder, Accounts(ledger), ignore)
        return SampleCollector(config, rollouts, judge, Store(folder), archive, ledger, Floor(), {}).collect(
            wave_of(prompts)
        )


@pytest.fixture(autouse=True)
def _answers_are_here(monkeypatch):
    monkeypatch.setattr("orchestrator.rollouts.ray.get", lambda value: value)
    monkeypatch.setattr("orchestrator.rollouts.ray.wait", lambda values, **_: (values, []))


# Independent samples


def script(garbage, seed=0):
    """Points by how many `#` digits are right, and nothing that can be read in some of the replies."""
    lots = random.Random(seed)

    def reply(blocks, seed):
        if lots.random() < garbage:
            return lots.choice(["Score: many", "", "I would say five", "Score: 9", "Ignore this. Score 5"])
        return f"It holds {len(set(blocks[-1]))} signs.\nScore: {len(set(blocks[-1])) % 6}"

    return ScriptedModel(reply=reply)


def test_a_judge_of_which_a_third_is_garbage_trains_on_no_invented_label(tmp_path):
    config = compose(["generator.samples_per_prompt=4"])
    rollouts, _ = rollouts_of(config, generate=adding())
    settings = JudgeConfig(votes=2, max_tokens=64)
    judge = build_llm_judge(settings, script(0.3), seed=0)
    collected = by_samples(tmp_path, config, rollouts, judge, problems(40))
    failed = judge.metrics()["judge/parse_failure_fraction"]
    assert 0.2 < failed < 0.4
    known = {}
    for group in read_rollouts(tmp_path / "rollouts" / "iteration-0001-wave-0000.parquet"):
        for index, (completion, score) in enumerate(zip(group.group.completions, group.scores, strict=True)):
            # Both votes of one completion say the same, so that whatever was understood is exactly this.
            assert score.value in (None, len(set(completion.text)) % 6)
            known[group.group.prompt.id, index] = score.value
    assert 0 < sum(value is None for value in known.values()) == collected.counts["abstentions"]
    assert collected.pairs
    for pair in collected.pairs:
        assert pair.chosen_score == len(set(pair.chosen.text)) % 6 > pair.rejected_score
        assert pair.rejected_score == len(set(pair.rejected.text)) % 6


def test_a_judge_that_never_answers_stops_the_run_with_the_reason(tmp_path):
    config = compose(["generator.samples_per_prompt=4"])
    rollouts, _ = rollouts_of(config, generate=adding())
    judge = build_llm_judge(JudgeConfig(votes=1, max_failed_fraction=0.9), script(1.0), seed=0)
    with pytest.raises(JudgeError, match=r"gave no verdict in 32 of 32 .*max_failed_fraction=0\.9.*Mend the rubric"):
        by_samples(tmp_path, config, rollouts, judge, problems(8))
    assert not (tmp_path / "rollouts").exists()


def unreachable(*_):
    raise AssertionError("the verifier was asked")


def test_self_rewarding_trains_without_any_verifier(tmp_path):
    """The pairs of a self-rewarding iteration come about where every call of a verifier raises, and are the same
    whatever the reference answers are. The verifier of its evaluation is that one, and raises."""
    config = compose(["recipe=self_rewarding", "generator.samples_per_prompt=4"])

    def likes(sequence):
        """Log-probs of a policy to which odd sums of token ids are likely."""
        return np.where(np.cumsum(sequence)[1:] % 2, -0.1, -2.0).astype(np.float32)

    made = []
    for name, answer in (("known", None), ("wrong", "00000"), ("none", "")):
        rollouts, roles = rollouts_of(
            config,
            generate=adding(),
            score=lambda sequences: list(map(likes, sequences)),
        )
        verifier = Pool(score=unreachable)
        roles = replace(roles, scorers={"verifier": verifier})
        judges = Judges(config, roles, SimpleNamespace(tokenizer=TOKENIZER), SimpleNamespace(version=V1), {})
        judge = judges.judge()
        prompts = [replace(prompt, answer=answer if answer != "" else None) for prompt in problems(20, answer or None)]
        collected = by_samples(tmp_path / name, config, rollouts, judge, prompts)
        assert verifier.asked == []
        assert collected.pairs
        made.append([(pair.id, pair.chosen, pair.rejected, pair.chosen_score) for pair in collected.pairs])
        with pytest.raises(AssertionError, match="the verifier was asked"):
            judges.examiner(judge).score([group.group for group in collected.scored])
    assert made[0] == made[1] == made[2]


def test_scorers_whose_word_trains_are_doubted_and_the_verifier_is_not():
    for kind, reported in (("reward_model", True), ("preference_model", True), ("verifier", False)):
        config = compose([f"scorer.kind={kind}"])
        rollouts, roles = rollouts_of(config, generate=adding())
        roles = replace(roles, scorers={kind: Pool(score=Checking().score)})
        judge = Judges(config, roles, SimpleNamespace(tokenizer=TOKENIZER), SimpleNamespace(version=V1), {}).judge()
        draw = Draw(purpose="rollout", iteration=1, num_samples=2, sampling=sampling_of(config.generator))
        judge.score(rollouts.sample(problems(4), [draw])[0])
        assert ("judge/abstained_fraction" in judge.metrics()) == reported


def test_a_judge_is_measured_where_the_truth_is_known():
    """A judge that always takes the longer answer, against the verifier's word, on held-out problems; what it was asked
    there is not counted among its judgements of training data."""
    config = compose(["recipe=self_rewarding", "evaluation.anchors=10"])
    rollouts, roles = rollouts_of(config, generate=adding())
    seen = []

    class Longest(Checking):
        def scores(self, group):
            seen.append(group.prompt.id)
            return tuple(Score(value=float(len(completion.text))) for completion in group.completions)

        def metrics(self):
            seen.append("metrics")
            return Tally()

    class Verifying(Checking):
        def scores(self, group):
            return tuple(Score(value=float(index % 2)) for index, _ in enumerate(group.completions))

    prompts = problems(30)
    found = anchor_figures(rollouts, Longest(), Verifying(), prompts, config, 1)
    assert seen == [prompt.id for prompt in prompts[:10]] + ["metrics"]
    assert len(roles.generators.asked) == 10 * 4
    # All of these answers have the same length, so that the judge ties on each comparison and is half right.
    assert found["judge/accuracy"] == 0.5
    assert anchor_figures(rollouts, Checking(), Checking(), prompts, config, 1)["judge/accuracy"] == 1.0


# Trees


class Evaluating:
    """Finds the last line of a solution as probably right as its length in hundredths; may be silent on some."""

    def __init__(self, silent=()):
        self.silent, self.asked = silent, []

    def evaluate(self, states):
        self.asked += [text for _, text in states]
        return [None if text.endswith(tuple(self.silent)) else len(text) / 100 for _, text in states]

    def metrics(self):
        found = Tally()
        found.mean("search/evaluation_parse_failure_fraction", [0.0])
        return found


def search(tmp_path, judge, *overrides, count=6, evaluator=None, quarantined=()):
    config = compose(["recipe=mcts_dpo", "search.states=tree", "search.min_gap=0", *overrides])
    rollouts, roles = rollouts_of(config, generate=adding())
    collector = TreeCollector(config, rollouts, judge, Store(tmp_path), TOKENIZER, evaluator, quarantined=quarantined)
    return config, roles.generators, collector.collect(wave_of(problems(count)))


def test_trees_become_pairs_of_steps_from_one_state(tmp_path):
    judge = Checking()
    _, pool, collected = search(tmp_path, judge, "search.simulations=24", "search.in_flight=4")
    assert collected.pairs
    prompts = {prompt.id: prompt for prompt in problems(6)}
    for pair in collected.pairs:
        prompt = prompts[pair.prompt.id.split("#")[0]]
        assert pair.prompt.token_ids[: len(prompt.token_ids)] == prompt.token_ids
        assert pair.prompt.text == TOKENIZER.decode(list(pair.prompt.token_ids), skip_special_tokens=True)
        assert pair.prompt.text.endswith("\n"), "a state lies between steps"
        assert pair.chosen.token_ids[0:] != pair.rejected.token_ids
        for side in (pair.chosen, pair.rejected):
            assert side.text == TOKENIZER.decode(list(side.token_ids), skip_special_tokens=True)
            assert len(side.logprobs) == len(side.token_ids)
            ended = side.token_ids[-1] == TOKENIZER.eos_token_id
            assert side.finish_reason == (FinishReason.EOS if ended else FinishReason.STOP)
        assert pair.chosen_score > pair.rejected_score
        assert 0.5 <= pair.label < 1
    assert read_pairs(Store(tmp_path).write_pairs(1, 0, collected.pairs)) == collected.pairs
    assert collected.tokens == sum(len(TOKENIZER.encode(adding()([request])[0].text)) for request in pool.asked)
    assert collected.tally["search/waves"] == len(judge.waves)
    assert judge.waves[0] == 6 * 2, "breadth at the root"
    assert max(judge.waves) <= 6 * 4
    assert (
        len(pool.asked) == sum(judge.waves) == len([c for group in collected.scored for c in group.group.completions])
    )


def test_what_was_found_of_a_prompt_that_is_set_aside_later_makes_no_pair(tmp_path):
    """The prompts beside it have the pairs that they would have had."""
    prompt, aside = problems(6)[0].id, {}

    class Killing(Checking):
        def score(self, groups):
            if len(self.waves) == 3:
                aside[prompt] = "it killed 3 generators"
            return super().score(groups)

    def pairs_of(folder, judge, quarantined):
        _, _, collected = search(folder, judge, "search.simulations=24", quarantined=quarantined)
        return {(pair.prompt.id.split("#")[0], pair.id) for pair in collected.pairs}

    whole, less = pairs_of(tmp_path / "whole", Checking(), ()), pairs_of(tmp_path / "less", Killing(), aside)
    assert less < whole
    assert less == {pair for pair in whole if pair[0] != prompt}


def test_every_rollout_and_every_node_is_kept(tmp_path):
    _, _, collected = search(tmp_path, Checking(), "search.simulations=12")
    assert read_rollouts(tmp_path / "rollouts" / "iteration-0001-wave-0000.parquet") == collected.scored
    for group in collected.scored:
        for completion, score in zip(group.group.completions, group.scores, strict=True):
            right = completion.text.endswith(f"#{group.group.prompt.answer}")
            assert score.value == right, "the judge saw the whole solution"
    rows = pq.read_table(tmp_path / "trees" / "iteration-0001-wave-0000.parquet").to_pylist()
    assert len({row["prompt_id"] for row in rows}) == 6
    for row in rows:
        assert row["text"] == TOKENIZER.decode(row["token_ids"], skip_special_tokens=True)
        assert (row["parent"] is None) == (row["node"] == 0) == (row["depth"] == 0)
        assert row["terminal"] == ("#" in row["text"] or row["value"] != 0)


def test_a_rollout_without_a_score_leaves_no_node(tmp_path):
    _, _, collected = search(tmp_path, Checking(silent=0.4), "search.simulations=12")
    rows = pq.read_table(tmp_path / "trees" / "iteration-0001-wave-0000.parquet").to_pylist()
    scored = {
        c.text
        for g in collected.scored
        for c, s in zip(g.group.completions, g.scores, strict=True)
        if s.value is not None
    }
    silent = sum(score.value is None for group in collected.scored for score in group.scores)
    assert silent == collected.counts["abstentions"] > 0
    parents = {(row["prompt_id"], row["node"]): row for row in rows}
    for row in rows:
        if row["terminal"]:
            text, on = "", row
            while on["parent"] is not None:
                text, on = on["text"] + text, parents[row["prompt_id"], on["parent"]]
            assert text in scored


def test_the_same_seed_searches_the_same_trees(tmp_path):
    _, _, first = search(tmp_path / "a", Checking())
    _, _, second = search(tmp_path / "b", Checking())
    assert first.pairs == second.pairs
    for folder in ("rollouts", "trees"):
        name = f"{folder}/iteration-0001-wave-0000.parquet"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_token_budget_ends_a_search(tmp_path):
    _, _, collected = search(tmp_path, Checking(), "search.simulations=1000", "search.max_tokens=200")
    # What was out when the budget ended: at most 4 rollouts of at most 43 tokens.
    assert 200 <= collected.tally["search/tokens_mean"] < 200 + 4 * 43


def nodes_of(tmp_path):
    """Rows of the trees with their solution so far."""
    rows = pq.read_table(tmp_path / "trees" / "iteration-0001-wave-0000.parquet").to_pylist()
    by_place = {(row["prompt_id"], row["node"]): row for row in rows}
    for row in rows:
        above = by_place[row["prompt_id"], row["parent"]]["solution"] if row["parent"] is not None else ""
        row["solution"] = above + row["text"]
    return rows


def test_the_value_of_a_solution_is_its_score_and_what_its_last_step_is_worth(tmp_path):
    evaluator = Evaluating()
    _, _, collected = search(tmp_path, Checking(), "search.evaluation_weight=0.5", evaluator=evaluator)
    scores = {
        (group.group.prompt.id, c.text): score.value
        for group in collected.scored
        for c, score in zip(group.group.completions, group.scores, strict=True)
    }
    rows = nodes_of(tmp_path)
    for row in rows:
        expected = 0.0
        if row["terminal"]:
            expected = scores[row["prompt_id"], row["solution"]] + 0.5 * len(row["solution"]) / 100
        assert row["value"] == pytest.approx(expected)
    assert set(evaluator.asked) == {row["solution"] for row in rows if row["terminal"]}, "what lies between cancels out"
    assert "search/evaluation_parse_failure_fraction" in collected.tally


def test_every_state_is_evaluated_where_the_future_is_discounted(tmp_path):
    settings = ("search.evaluation_weight=0.5", "search.discount=0.9")
    search(tmp_path, Checking(), *settings, evaluator=Evaluating())
    between = [row for row in nodes_of(tmp_path) if row["node"] and not row["terminal"]]
    assert between
    for row in between:
        assert row["value"] == pytest.approx(0.5 * len(row["solution"]) / 100)


def test_the_released_codes_penalty_begins_five_states_down():
    """max(depth of the state before - 3, 1)."""
    assert [depth_penalty(before) for before in range(7)] == [1, 1, 1, 1, 1, 2, 3]


def test_a_rollout_whose_last_step_nobody_judged_leaves_no_node(tmp_path):
    evaluator = Evaluating(silent=("1", "2", "3"))
    _, _, collected = search(tmp_path, Checking(), "search.evaluation_weight=1", evaluator=evaluator)
    ends = {row["text"][-1] for row in nodes_of(tmp_path) if row["terminal"]}
    assert ends
    assert not ends & {"1", "2", "3"}
    assert any(c.text[-1] in "123" for group in collected.scored for c in group.group.completions)


def test_trees_whose_own_solution_is_wrong_can_be_left_out(tmp_path):
    _, _, every = search(tmp_path / "a", Checking(), "search.max_pairs=99", "search.simulations=4")
    _, _, good = search(
        tmp_path / "b", Checking(), "search.max_pairs=99", "search.simulations=4", "search.min_score=0.8"
    )
    left_out = good.tally["search/poor_trees"]
    assert 0 < left_out < 6
    kept = {pair.prompt.id.split("#")[0] for pair in good.pairs}
    assert len(kept) <= 6 - left_out
    assert good.pairs == [pair for pair in every.pairs if pair.prompt.id.split("#")[0] in kept]
