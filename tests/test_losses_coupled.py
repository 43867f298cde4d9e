"""The same step however the global batch is cut and whoever has the parts, also where items depend on each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing

from conf.objectives import OBJECTIVES, is_coupled
from conf.schema import LearnerConfig, LossConfig, ReferenceConfig
from learners.losses import LossState
from learners.policy import Policy, load_model
from learners.step import optimizer_step
from learners.trainer import Trainer
from orchestrator.batching import batches, pack, split
from tests.learning import make_model, make_pairs
from tests.ranks import free_port

COUPLED = [
    {"name": "kto"},
    {"name": "bco"},
    {"name": "aot"},
    {"name": "aot_unpaired"},
    {"name": "dpo", "labels": "posterior", "label_smoothing": 0.2},
    {"name": "dpo", "labels": "denoised", "label_smoothing": 0.2},
    {"name": "dpo", "beta_scaling": "implicit", "beta_scale": 0.6},
]
ALONE = [
    {"name": "dpo", "weighting": "wpo", "sft_weight": 0.1},
    {"name": "ipo", "kl_weight": 0.2},
    {"name": "copg"},
    {"name": "simpo", "sft_weight": 0.5, "sft_target": "best"},
    {"name": "dpo", "include_prompt": True},
]
STATE = LossState(reward_mean=0.3, rewards_seen=20, noise=0.25, margins=(-1.0, 0.5) * 9, margin_mean=0.2, progress=0.5)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama").save_pretrained(folder)
    return folder


def weighable(pairs, name):
    """The pairs, weighing the same where their weights would have no pair to belong to."""
    return [replace(pair, weight=1.0) for pair in pairs] if OBJECTIVES[name].by_rank else pairs


def make_batch(config):
    """Groups of one to three pairs, half of them with unequal weights, the reference a little off the policy."""
    pairs = make_pairs(4, pairs_per_prompt=3) + make_pairs(7, pairs_per_prompt=1, seed=5)[4:]
    pairs = weighable(pairs, config.name)
    scored = np.random.default_rng(1).uniform(size=len(pairs))
    pairs = [
        replace(pair, chosen_score=2.0, rejected_score=float(low)) for pair, low in zip(pairs, scored, strict=True)
    ]
    batch = pack(pairs, mismatched=OBJECTIVES[config.name].mismatched, include_prompt=config.include_prompt)
    noise = np.random.default_rng(2).normal(size=batch.num_completion_tokens)
    return replace(batch, reference_logprobs=(-4 + noise).astype(np.float32))


def step(model_dir, batch, config, *, micro_batch_tokens=10_000, most=10_000):
    """Metrics, state, and the gradient that a step of plain descent makes where memory holds `most` tokens."""
    torch.set_num_threads(1)
    policy = Policy(load_model(model_dir), dtype="float32", vocab_chunk=64)
    scores = policy.scores

    def scarce(columns, **options):
        if len(columns.tokens) > most:
            raise MemoryError
        return scores(columns, **options)

    policy.scores = scarce
    before = {name: parameter.detach().clone() for name, parameter in policy.parameters_by_name().items()}
    taken = optimizer_step(
        policy,
        torch.optim.SGD(policy.parameters(), lr=1.0),
        batch,
        loss=config,
        learner=LearnerConfig(micro_batch_tokens=micro_batch_tokens, max_grad_norm=1e9),
        lr=1.0,
        version=1,
        state=STATE,
    )
    return (
        taken.metrics,
        taken.state,
        {name: before[name] - p.detach() for name, p in policy.parameters_by_name().items()},
    )


def assert_same(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4, abs=1e-5)
    for name in LossState.__slots__:
        ours_value, theirs_value = getattr(ours[1], name), getattr(theirs[1], name)
        assert ours_value == pytest.approx(theirs_value, rel=1e-4, abs=1e-5), name
    scale = max(float(gradient.abs().max()) for gradient in theirs[2].values())
    for name, gradient in theirs[2].items():
        assert float((ours[2][name] - gradient).abs().max()) < 1e-5 * max(1, scale), name


@pytest.mark.parametrize("settings", [*COUPLED, *ALONE], ids=str)
def test_accumulation_is_exact(model_dir, settings):
    config = LossConfig(beta=0.3, **settings)
    batch = make_batch(config)
    whole = step(model_dir, batch, config)
    assert whole[0]["grad_norm"] > 1e-3
    assert (whole[1] == STATE) == (settings["name"] in ("kto", "aot", "aot_unpaired") or not is_coupled(config))
    assert_same(step(model_dir, batch, config, micro_batch_tokens=16), whole)


def on_rank(number, model_dir, parts, configs, port, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=len(parts[0])
    )
    found = []
    for mine, config in zip(parts, configs, strict=True):
        most = max(part.num_tokens for part in split(mine[1], 32)) if number == 1 else 10_000
        assert most < max(part.num_tokens for part in split(mine[1], 64)) or number == 0
        found.append(step(model_dir, mine[number], config, micro_batch_tokens=64, most=most))
    torch.save(found, results / f"{number}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_take_the_step_of_one(model_dir, tmp_path):
    """Each has whole prompts of the batch, unequally many, and the second too little memory; both end with the same."""
    configs = [LossConfig(beta=0.3, **settings) for settings in [*COUPLED, *ALONE]]
    wholes = [make_batch(config) for config in configs]
    parts = [halves(batch) for batch in wholes]
    assert all(first.num_pairs != second.num_pairs for first, second in parts)
    multiprocessing.spawn(on_rank, (model_dir, parts, configs, free_port(), tmp_path), nprocs=2)
    ours = [torch.load(tmp_path / f"{number}.pt", weights_only=False) for number in (0, 1)]
    for index, (batch, config) in enumerate(zip(wholes, configs, strict=True)):
        alone = step(model_dir, batch, config)
        for found in ours:
            assert_same(found[index], alone)


def halves(batch):
    """The batch in two of whole groups, the first the larger."""
    sizes = [part.num_tokens for part in split(batch, 1)]
    first, *rest = split(batch, sum(sizes[: len(sizes) // 2 + 1]))
    assert len(rest) == 1
    return first, rest[0]


@pytest.mark.parametrize("settings", COUPLED, ids=str)
def test_what_an_objective_remembers_is_saved(model_dir, tmp_path, settings):
    def trainer():
        return Trainer(
            model_dir,
            loss=LossConfig(beta=0.3, **settings),
            reference=ReferenceConfig(kind="initial"),
            learner=LearnerConfig(lr=1e-2, num_threads=1, vocab_chunk=64),
        )

    mismatched = OBJECTIVES[settings["name"]].mismatched
    made = [
        pack(pairs, mismatched=mismatched)
        for pairs in batches(
            weighable(make_pairs(12), settings["name"]), batch_pairs=6, seed=0, epoch=0, whole_groups=True
        )
    ]
    straight, stopped, resumed = trainer(), trainer(), trainer()
    for one in (straight, stopped):
        one.begin_iteration(1, len(made))
    for batch in made[:2]:
        stopped.update(stopped.annotate(batch))
    stopped.save(tmp_path / "saved")
    resumed.load(tmp_path / "saved")
    expected = [straight.update(straight.annotate(batch)).metrics for batch in made]
    assert [resumed.update(resumed.annotate(batch)).metrics for batch in made[2:]] == expected[2:]


def test_mismatched_completions_answer_the_next_prompt():
    pairs = make_pairs(3, pairs_per_prompt=2)
    batch = pack(pairs, mismatched=True)
    ends = batch.completion_starts + batch.completion_lengths
    for group, index in enumerate(batch.mismatched.tolist()):
        assert batch.completion_groups[index] == group
        tokens = tuple(batch.tokens[batch.completion_starts[index] : ends[index]].tolist())
        assert tokens == pairs[(2 * group + 2) % 6].chosen.token_ids
    assert not set(batch.mismatched.tolist()) & {*batch.chosen.tolist(), *batch.rejected.tolist()}
    for part, index in zip(split(batch, 1), range(3), strict=True):
        assert len(part.mismatched) == 1
        first = part.completion_starts[part.mismatched[0]]
        again = tuple(part.tokens[first : first + part.completion_lengths[part.mismatched[0]]].tolist())
        assert again == pairs[(2 * index + 2) % 6].chosen.token_ids
    assert len(pack(pairs[:2], mismatched=True).mismatched) == 0


def test_prompt_tokens_are_scored_when_asked(model_dir):
    """DOVE: log pi of prompt and completion together, all but the first token."""
    pairs = make_pairs(2, pairs_per_prompt=1)
    batch = pack(pairs, include_prompt=True)
    assert batch.prompt_lengths.tolist() == [1, 1]
    policy = Policy(load_model(model_dir), dtype="float32", vocab_chunk=64)
    with torch.no_grad():
        scored = np.split(policy(batch).numpy(), np.cumsum(batch.completion_lengths)[:-1])
        for pair, index in zip(pairs, batch.chosen.tolist(), strict=True):
            row = torch.tensor([[*pair.prompt.token_ids, *pair.chosen.token_ids]])
            logprobs = policy.model(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
            assert scored[index].sum() == pytest.approx(float(logprobs.sum()), rel=1e-5)


def test_token_weights_travel_with_their_pairs():
    pairs = make_pairs(3, pairs_per_prompt=2)
    weighted = [
        replace(pair, chosen_token_weights=tuple(float(index) for _ in pair.chosen.token_ids)) if index % 2 else pair
        for index, pair in enumerate(pairs)
    ]
    batch = pack(weighted)
    assert batch.rejected_token_weights is None
    expected = [float(index) if index % 2 else 1.0 for index, pair in enumerate(pairs) for _ in pair.chosen.token_ids]
    assert batch.chosen_token_weights.tolist() == expected
    assert np.concatenate([part.chosen_token_weights for part in split(batch, 1)]).tolist() == expected
    short = replace(pairs[0], rejected_token_weights=(1.0,) * (len(pairs[0].rejected.token_ids) + 1))
    with pytest.raises(ValueError, match="token weights for the"):
        pack([short])


def test_groups_stay_whole_when_asked():
    pairs = make_pairs(5, pairs_per_prompt=3)
    made = batches(pairs, batch_pairs=7, seed=3, epoch=0, whole_groups=True)
    assert [len(part) for part in made] == [6, 6, 3]
    assert all(len({pair.prompt.id for pair in part}) == len(part) // 3 for part in made)
    assert sorted(pair.id for part in made for pair in part) == sorted(pair.id for pair in pairs)
    assert [len(part) for part in batches(pairs, batch_pairs=2, seed=3, epoch=0, whole_groups=True)] == [3] * 5
