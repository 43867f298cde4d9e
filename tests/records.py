"""Records for tests: short builders, and hypothesis strategies for any of them."""

from hypothesis import strategies as st

from orchestrator.types import (
    Completion,
    FinishReason,
    PolicyVersion,
    PreferencePair,
    Prompt,
    RolloutGroup,
    Score,
    ScoredGroup,
)

V0 = PolicyVersion(number=0, digest="0" * 16)
V1 = PolicyVersion(number=1, digest="1" * 16)
PROMPT = Prompt(id="task/train/17", text="1+1\n", token_ids=(1, 5, 6), answer="2")


def completion(*token_ids, finish=FinishReason.EOS, policy=V1):
    return Completion(
        token_ids=token_ids,
        text=" ".join(map(str, token_ids)),
        logprobs=(-0.1,) * len(token_ids),  # no float32 holds it exactly
        finish_reason=finish,
        policy=policy,
    )


def scored(*values, completions=None, seed=7, prompt=PROMPT):
    """A group with these scores; by default completion k is the one token 10 + k."""
    completions = completions or tuple(completion(10 + k) for k in range(len(values)))
    group = RolloutGroup(prompt=prompt, completions=tuple(completions), iteration=1, seed=seed)
    scores = tuple(Score(value=v, reason="" if v is not None else "no answer found") for v in values)
    return ScoredGroup(group=group, scores=scores, scorer="verifier:test@1")


def pair(chosen, rejected, chosen_score=1.0, rejected_score=0.0):
    return PreferencePair(
        id="1/task/train/17/0>1",
        prompt=PROMPT,
        chosen=chosen,
        rejected=rejected,
        chosen_score=chosen_score,
        rejected_score=rejected_score,
        iteration=1,
        reference=V0,
        scorer="verifier:test@1",
    )


# Anything the records may hold: all of Unicode, empty texts, -0.0, infinities in log-probs.
_token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
_figures = st.floats(allow_nan=False)
_versions = st.builds(PolicyVersion, number=st.integers(0, 2**31 - 1), digest=st.text(max_size=3))
_prompts = st.builds(Prompt, id=st.text(), text=st.text(), token_ids=_token_ids, answer=st.none() | st.text())
_completions = st.builds(
    Completion,
    token_ids=_token_ids,
    text=st.text(),
    logprobs=st.lists(_figures, max_size=4).map(tuple),
    finish_reason=st.sampled_from(FinishReason),
    policy=_versions,
)
any_pair = st.builds(
    PreferencePair,
    id=st.text(),
    prompt=_prompts,
    chosen=_completions,
    rejected=_completions,
    chosen_score=_figures,
    rejected_score=_figures,
    iteration=st.integers(0, 1000),
    reference=_versions,
    scorer=st.text(),
    label=st.floats(0, 1),
    weight=_figures,
)


@st.composite
def any_scored_group(draw):
    completions = draw(st.lists(_completions, min_size=1, max_size=3).map(tuple))
    group = draw(
        st.builds(
            RolloutGroup,
            prompt=_prompts,
            completions=st.just(completions),
            iteration=st.integers(0, 1000),
            seed=st.integers(0, 2**31 - 1),
        )
    )
    score = st.builds(Score, value=st.none() | _figures, reason=st.text())
    scores = tuple(draw(score) for _ in completions)
    row = st.tuples(*(st.none() | st.floats(0, 1) for _ in completions))
    preferences = draw(st.none() | st.tuples(*(row for _ in completions)))
    return ScoredGroup(group=group, scores=scores, scorer=draw(st.text()), preferences=preferences)
