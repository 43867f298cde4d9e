"""Self-play preference optimization on games that are solved by hand, with the real loss, step and win matrix."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.judges.win_rates import win_matrix, win_rates
from conf.compose import compose
from conf.schema import LearnerConfig, LossConfig
from learners.logprobs import TokenScores
from learners.losses import LossState
from learners.step import optimizer_step
from orchestrator.batching import pack
from orchestrator.types import Completion, FinishReason, PolicyVersion, PreferencePair, Prompt

VERSION = PolicyVersion(number=0, digest="0" * 16)
PROMPT = Prompt(id="game", text="", token_ids=(0,))
PAIRS = [(0, 1), (1, 2), (2, 0)]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Table(torch.nn.Module):
    """A policy over three answers of one token each: what the learner's step needs of one, and nothing else."""

    device = torch.device("cpu")

    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, columns):
        return self.logits.log_softmax(0)[torch.tensor(columns.tokens[columns.completion_starts], dtype=torch.int64)]

    def scores(self, columns, *, collision):
        assert not collision
        return TokenScores(logprobs=self(columns), log_collision=None, states=None)

    def probabilities(self):
        return self.logits.detach().softmax(0).double().numpy()


def completion(token):
    return Completion(
        token_ids=(token,), text="", logprobs=(0.0,), finish_reason=FinishReason.EOS, policy=VERSION
    )  # fmt: skip


def batch_of(rates, policy):
    """The three answers as pairs, the better one chosen, annotated with the policy as the reference."""
    pairs = []
    for i, j in PAIRS:
        chosen, rejected = (i, j) if rates[i] > rates[j] else (j, i)
        pairs.append(
            PreferencePair(
                id=f"{chosen}>{rejected}",
                prompt=PROMPT,
                chosen=completion(chosen),
                rejected=completion(rejected),
                chosen_score=rates[chosen],
                rejected_score=rates[rejected],
                iteration=1,
                reference=VERSION,
                scorer="game",
            )
        )
    batch = pack(pairs)
    with torch.no_grad():
        return replace(batch, reference_logprobs=policy(batch).numpy())


def play(logits, *, start, eta, iterations, samples=256, seed=0):
    """SPPO from `start`; the policy [iterations + 1, 3] before each iteration and after the last."""
    random = np.random.default_rng(seed)
    policy = Table(start)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    loss, learner = LossConfig(name="sppo", beta=1 / eta), LearnerConfig(max_grad_norm=1e9)
    history = [policy.probabilities()]
    for _ in range(iterations):
        drawn = random.choice(3, size=samples, p=history[-1] / history[-1].sum())
        drawn[:3] = 0, 1, 2  # each answer is judged, however rare it has become
        rates = win_rates(win_matrix(logits[np.ix_(drawn, drawn)]))[:3]
        batch = batch_of(rates, policy)
        for _ in range(6):
            optimizer_step(policy, optimizer, batch, loss=loss, learner=learner, lr=0.6, version=0, state=LossState())
        history.append(policy.probabilities())
    return np.array(history)


def distance(one, other):
    """Total variation."""
    return np.abs(np.asarray(one) - np.asarray(other)).sum() / 2


def cycle(a, b, c):
    """Logits of a game in which 0 beats 1 with probability 1/2 + a, 2 beats 0 with 1/2 + b and 1 beats 2 with 1/2 + c.

    Nobody can be exploited under the mixture (c, b, a) / (a + b + c): against it each answer wins half of the time.
    """
    margins = np.array([[0, a, -b], [-a, 0, c], [b, -c, 0]])
    return np.log((0.5 + margins) / (0.5 - margins))


@pytest.mark.parametrize(
    ("margins", "nash"), [((0.4, 0.4, 0.4), (1 / 3, 1 / 3, 1 / 3)), ((0.2, 0.3, 0.4), (4 / 9, 3 / 9, 2 / 9))]
)
def test_on_a_cycle_the_average_policy_is_the_nash_mixture(margins, nash):
    logits = cycle(*margins)
    np.testing.assert_allclose(win_matrix(logits) @ nash, 0.5)
    history = play(logits, start=[0.6, 0.25, 0.15], eta=0.4, iterations=300)
    assert distance(history[0], nash) > 0.15
    assert distance(history.mean(axis=0), nash) <= 0.05


def test_a_reward_fitted_to_the_same_comparisons_knows_nothing():
    """Bradley-Terry by maximum likelihood on the symmetric cycle: all rewards are equal, every P is 1/2."""
    labels = win_matrix(cycle(0.4, 0.4, 0.4))
    rewards = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([rewards], lr=1.0)
    for _ in range(200):
        differences = rewards[:, None] - rewards[None, :]
        loss = -(torch.from_numpy(labels) * torch.nn.functional.logsigmoid(differences)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(win_matrix((rewards[:, None] - rewards[None, :]).detach().numpy()), 0.5, atol=1e-4)


def test_where_one_answer_beats_all_others_it_wins():
    rewards = np.array([0.0, 2.0, 1.0])
    history = play(rewards[:, None] - rewards[None, :], start=[0.6, 0.1, 0.3], eta=1.0, iterations=60)
    assert history[-1][1] > 0.95
    assert history[-1][0] < history[-1][2]


def test_one_iteration_is_a_step_of_multiplicative_weights():
    """pi' is proportional to pi exp(eta P(y beats pi)) up to eta^2: the closed form that the square loss stands for."""
    logits, start, eta = cycle(0.2, 0.3, 0.4), np.array([0.1, 0.1, 0.8]), 0.5
    found = play(logits, start=start.tolist(), eta=eta, iterations=1, samples=2000)[-1]
    expected = start * np.exp(eta * win_matrix(logits) @ start)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=3e-3)
    assert distance(found, start) > 0.01


def test_the_recipe_has_the_constants_of_the_authors_scripts():
    config = compose(["recipe=sppo", "model=some/model", "task=prompts", "task.path=x.jsonl", "judge.model=judge"])
    assert (config.scorer.kind, config.loss.name, config.loss.beta) == ("preference_model", "sppo", 1e-3)
    assert (config.generator.samples_per_prompt, config.generator.temperature, config.generator.top_p) == (5, 0.7, 0.9)
    assert (config.learner.lr, config.learner.batch_pairs, config.learner.epochs) == (5e-7, 64, 1)
    assert (config.reference.kind, config.pipeline.iterations) == ("previous", 3)
