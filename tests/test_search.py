"""Tree search: worked by hand, by properties, and against games that are solved exhaustively."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.search.mcts import cancel, grow, puct, revisit, select
from actors.search.pairs import best_path, continuation, step_pairs
from actors.search.steps import split_steps
from actors.search.tree import Step, Tree
from conf.schema import SearchConfig
from orchestrator.types import Completion, FinishReason, PolicyVersion

CONFIG = SearchConfig(kind="mcts", simulations=100, breadth=2, in_flight=1)


def steps(*tokens, logprob=0.0):
    return [Step(tokens=(token,), logprobs=(logprob,)) for token in tokens]


def simulate(tree, tokens, value, config=CONFIG):
    """A rollout from the root, whatever selection would have said."""
    tree.root.pending += 1
    return grow(tree, tree.root, steps(*tokens), value, config)


# By hand


def hand_made():
    """Four rollouts: 1-3 scored 1, 1-4 scored 0, 2-5 scored 0, and 1-3 once more."""
    tree = Tree()
    for tokens, value in (((1, 3), 1.0), ((1, 4), 0.0), ((2, 5), 0.0), ((1, 3), 1.0)):
        simulate(tree, tokens, value)
    return tree


def test_visits_and_action_values_by_hand():
    tree = hand_made()
    by_token = {node.step.tokens[0]: node for node in tree.nodes[1:]}
    assert [by_token[token].visits for token in (1, 2, 3, 4, 5)] == [3, 1, 2, 1, 1]
    assert tree.root.visits == tree.simulations == 4
    # Q(3) = 1, Q(4) = 0, V(1) = (2 * 1 + 1 * 0) / 3.
    assert [by_token[token].action_value for token in (1, 2, 3, 4, 5)] == pytest.approx([2 / 3, 0, 1, 0, 0])
    assert tree.tokens == 8
    assert [node.terminal for node in tree.nodes] == [not node.children for node in tree.nodes]


def test_action_values_are_gains_of_value_and_what_follows():
    """v(1) = 0.25: taking 1 gains 0.25, taking 3 then 1 - 0.25; with gamma = 0.5, Q(1) = 0.25 + 0.5 * 0.75."""
    tree, config = Tree(), replace(CONFIG, discount=0.5)
    simulate(tree, (1, 3), 1.0, config)
    tree.nodes[1].value = 0.25
    tree.root.pending += 1
    for node in (tree.root, tree.nodes[1], tree.nodes[2]):
        node.pending = 1
    revisit(tree, tree.nodes[2], config)
    assert tree.nodes[2].action_value == pytest.approx(0.75)
    assert tree.nodes[1].action_value == pytest.approx(0.25 + 0.5 * 0.75)


def test_values_of_states_between_count_where_the_future_is_discounted():
    """v = 0.4 after 1, 1.2 at the end; gamma = 0.5: Q(3) = 0.8, Q(1) = 0.4 + 0.5 * 0.8. What is known stays."""
    tree, config = Tree(), replace(CONFIG, discount=0.5)
    for between in ([0.4], [0.9]):
        tree.root.pending += 1
        grow(tree, tree.root, steps(1, 3), 1.2, config, between)
        assert [node.value for node in tree.nodes] == [0.0, 0.4, 1.2]
        assert [node.action_value for node in tree.nodes[1:]] == pytest.approx([0.8, 0.8])


def test_without_a_discount_values_between_change_no_difference_of_siblings():
    lots = random.Random(0)
    plain, valued = Tree(), Tree()
    for tokens in ((1, 3, 5), (1, 3, 6), (1, 4, 5), (2, 5, 5), (1, 3, 5)):
        score = random.Random(str(tokens)).random()
        simulate(plain, tokens, score)
        valued.root.pending += 1
        grow(valued, valued.root, steps(*tokens), score, CONFIG, [lots.random(), lots.random()])
    for one in plain.nodes:
        siblings = [[tree.nodes[child].action_value for child in one.children] for tree in (plain, valued)]
        gaps = [[value - values[0] for value in values] for values in siblings]
        assert gaps[0] == pytest.approx(gaps[1])


def test_puct_by_hand():
    """p = exp(-1 / 2^1.25) of a step of two tokens, each with a log-prob of -0.5; N(root) = 4, N = 3, one of it out."""
    tree = hand_made()
    first = tree.nodes[1]
    first.step = Step(tokens=(1, 1), logprobs=(-0.5, -0.5))
    first.visits, first.pending = 2, 1
    expected = 2 / 3 + 0.7 * math.exp(-1 / 2**1.25) * 2 / 4
    assert puct(tree, first, replace(CONFIG, exploration=0.7)) == pytest.approx(expected)


def test_selection_tries_each_state_so_often_and_then_follows_the_bound():
    tree, config = Tree(), replace(CONFIG, exploration=0.5)
    taken = []
    for tokens, value in (((1, 3), 1.0), ((2, 5), 0.0)):
        node = select(tree, config)
        taken.append(node.index)
        grow(tree, node, steps(*tokens), value, config)
    assert taken == [0, 0], "breadth 2"
    # PUCT of 1 is 1 + 0.5 sqrt(2) / 2, of 2 the same without the 1.
    node = select(tree, config)
    assert node.step.tokens == (1,)
    assert (tree.root.pending, node.pending, node.attempts) == (1, 1, 1)
    # The first being in flight counts as a visit, but 1 + 0.5 sqrt(3) / 3 is still above 0.5 sqrt(3) / 2.
    again = select(tree, config)
    assert again is node
    assert node.attempts == 2
    # Both attempts at 1 are out: below it only its finished child is left.
    assert select(tree, config).terminal


def test_what_is_in_flight_turns_the_others_elsewhere():
    tree, config = Tree(), replace(CONFIG, exploration=2.0)
    for tokens in ((1, 3), (2, 5)):
        grow(tree, select(tree, config), steps(*tokens), 0.5, config)
    first, second = select(tree, config), select(tree, config)
    assert {first.step.tokens, second.step.tokens} == {(1,), (2,)}


def test_nothing_is_selected_while_all_attempts_at_the_root_are_out():
    tree = Tree()
    out = [select(tree, CONFIG), select(tree, CONFIG)]
    assert select(tree, CONFIG) is None
    cancel(tree, out[0], tokens=7)
    assert (tree.simulations, tree.tokens, tree.root.pending) == (1, 7, 1)
    grow(tree, out[1], steps(1), 1.0, CONFIG)
    assert select(tree, CONFIG).terminal


def test_pairs_by_hand():
    tree = hand_made()
    of_tree, ties = step_pairs(tree, replace(CONFIG, states="tree"), seed=0)
    assert ties == 0
    node = {on.step.tokens[0]: on.index for on in tree.nodes[1:]}
    assert [(pair.state, pair.chosen, pair.rejected) for pair in of_tree] == [
        (node[1], node[3], node[4]),
        (0, node[1], node[2]),
    ]
    assert [pair.gap for pair in of_tree] == pytest.approx([1.0, 2 / 3])
    assert [pair.label for pair in of_tree] == pytest.approx([2 / 3, 3 / 4])
    assert step_pairs(tree, replace(CONFIG, states="path"), seed=0)[0] == of_tree, "both lie on the best path"
    assert [on.index for on in best_path(tree)] == [0, node[1], node[3]]
    assert step_pairs(tree, replace(CONFIG, states="tree", min_gap=0.9), seed=0) == (of_tree[:1], ties + 1)
    assert step_pairs(tree, replace(CONFIG, states="tree", max_pairs=1), seed=0) == (of_tree[:1], ties)


def test_a_better_step_that_was_visited_less_is_no_less_likely_than_a_coin():
    tree = Tree()
    for tokens, value in (((1,), 0.4), ((1,), 0.4), ((1,), 0.4), ((2,), 0.9)):
        simulate(tree, tokens, value)
    ((pair,), _) = step_pairs(tree, CONFIG, seed=0)
    assert (tree.nodes[pair.chosen].step.tokens, pair.label) == ((2,), 0.5)


def test_the_other_step_may_be_any_but_the_best():
    tree = Tree()
    for token, value in ((1, 0.9), (2, 0.5), (3, 0.1)):
        simulate(tree, (token,), value)
    config = replace(CONFIG, negative="random")
    found = {step_pairs(tree, config, seed=seed)[0][0].rejected for seed in range(30)}
    assert found == {2, 3}
    assert {step_pairs(tree, CONFIG, seed=seed)[0][0].rejected for seed in range(30)} == {3}


def test_what_always_followed_belongs_to_the_step():
    """1-2-3 with 4 and 5 behind; the rest goes to the more visited 4."""
    tree = Tree()
    for tokens in ((1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3, 4)):
        simulate(tree, tokens, 1.0)

    def taken(span):
        return [node.step.tokens[0] for node in continuation(tree, tree.nodes[1], span)]

    assert taken("step") == [1, 2, 3]
    assert taken("rollout") == [1, 2, 3, 4]


def test_a_completion_is_cut_behind_each_separator():
    completion = Completion(
        token_ids=(5, 9, 9, 6, 7, 9),
        text="",
        logprobs=(-1.0, -2.0, -3.0, -4.0, -5.0, -6.0),
        finish_reason=FinishReason.EOS,
        policy=PolicyVersion(number=0, digest="0" * 16),
    )
    found = split_steps(completion, {9})
    assert [step.tokens for step in found] == [(5, 9), (9,), (6, 7, 9)]
    assert [step.logprobs for step in found] == [(-1.0, -2.0), (-3.0,), (-4.0, -5.0, -6.0)]


# Properties


@st.composite
def searches(draw):
    """A configuration, and a game: what is sampled at a state and what the ends are worth come from a seed."""
    config = SearchConfig(
        kind="mcts",
        simulations=draw(st.integers(2, 40)),
        max_tokens=draw(st.none() | st.integers(1, 60)),
        in_flight=draw(st.integers(1, 6)),
        breadth=draw(st.integers(2, 4)),
        depth=draw(st.none() | st.integers(1, 3)),
        exploration=draw(st.floats(0, 3)),
        states=draw(st.sampled_from(["path", "tree"])),
        negative=draw(st.sampled_from(["worst", "random"])),
        min_gap=draw(st.floats(0, 0.5)),
    )
    return config, draw(st.integers(0, 10_000)), draw(st.floats(0, 0.5))


def play(config, lots, play_out):
    """Waves of up to `in_flight` selections, answered in any order by `play_out(tree, node)`, until the budget ends."""
    tree = Tree()
    while True:
        wave = []
        while len(wave) < config.in_flight and (node := select(tree, config)) is not None:
            if node.terminal:
                revisit(tree, node, config)
            else:
                wave.append(node)
        if not wave:
            return tree
        lots.shuffle(wave)
        for node in wave:
            play_out(tree, node)


def run(config, seed, failing=0.0):
    """A game of chance in which some rollouts have no value."""
    lots = random.Random(seed)

    def play_out(tree, node):
        rest = [lots.randrange(3) for _ in range(max(1, 4 - node.depth))]
        if lots.random() < failing:
            cancel(tree, node, len(rest))
        else:
            grow(tree, node, steps(*rest, logprob=-1.1), random.Random(str(rest)).random(), config)

    return play(config, lots, play_out)


@given(searches())
def test_books_balance(search):
    config, seed, failing = search
    tree = run(config, seed, failing)
    assert tree.simulations <= config.simulations
    if config.max_tokens is not None:
        assert tree.tokens < config.max_tokens + 4 * config.in_flight, "what was out when the budget ended"
    assert [node.pending for node in tree.nodes] == [0] * len(tree.nodes)
    for node in tree.nodes:
        children = tree.children(node)
        assert node.terminal == (not children) or node is tree.root
        if children:
            assert node.visits == sum(child.visits for child in children)
        assert len({child.step.tokens for child in children}) == len(children)
        assert node.attempts <= config.breadth
        for child in children:
            assert 0 <= child.action_value <= 1


@given(searches())
def test_pairs_are_of_siblings_and_keep_their_distance(search):
    config, seed, failing = search
    tree = run(config, seed, failing)
    pairs, ties = step_pairs(tree, config, seed)
    assert ties >= 0
    assert len(pairs) <= config.max_pairs
    assert len({pair.state for pair in pairs}) == len(pairs)
    for pair in pairs:
        chosen, rejected = tree.nodes[pair.chosen], tree.nodes[pair.rejected]
        assert chosen.parent == rejected.parent == pair.state
        assert pair.gap == chosen.action_value - rejected.action_value >= max(config.min_gap, 1e-300)
        assert 0.5 <= pair.label < 1
    if config.states == "path":
        assert {pair.state for pair in pairs} <= {node.index for node in best_path(tree)}


@given(searches())
def test_the_same_seed_gives_the_same_tree(search):
    config, seed, failing = search
    once, again = run(config, seed, failing), run(config, seed, failing)
    assert once == again
    assert step_pairs(once, config, seed) == step_pairs(again, config, seed)


# Against exhaustive search

WIDTH, DEPTH, GAP = 3, 4, 0.08


def game(seed):
    """Three moves, four deep: each move gains something, and a path is worth the mean of its gains.

    The mean of all paths is the same behind each first move, so that trying them evenly says nothing about the best
    path, which is known from all 81 and clear of those of other first moves by 0.08 (a gain is in [0, 1]).
    """
    paths = list(itertools.product(range(WIDTH), repeat=DEPTH))
    for attempt in itertools.count():
        lots = random.Random(f"{seed}/{attempt}")
        prefixes = [path for depth in range(1, DEPTH + 1) for path in itertools.product(range(WIDTH), repeat=depth)]
        gains = {path: lots.random() for path in prefixes}
        worth = {path: sum(gains[path[:depth]] for depth in range(1, DEPTH + 1)) / DEPTH for path in paths}
        means = [sum(worth[path] for path in paths if path[0] == move) * WIDTH / len(paths) for move in range(WIDTH)]
        payoff = {path: worth[path] - means[path[0]] for path in paths}
        best = sorted(max(value for path, value in payoff.items() if path[0] == move) for move in range(WIDTH))
        if best[-1] - best[-2] >= GAP:
            return payoff
    raise AssertionError


def found_best(config, games):
    """In how many games the most visited first move is the one with which the best of all paths begins."""
    right = 0
    for seed in range(games):
        payoff, lots = game(seed), random.Random(seed)

        def play_out(tree, node, payoff=payoff, lots=lots):
            rest = [lots.randrange(WIDTH) for _ in range(DEPTH - node.depth)]
            value = payoff[(*tree.tokens_to(node), *rest)]
            grow(tree, node, steps(*rest, logprob=-math.log(WIDTH)), value, config)

        best_move = max(payoff, key=payoff.get)[0]
        right += best_path(play(config, lots, play_out))[1].step.tokens == (best_move,)
    return right


BUDGET = SearchConfig(kind="mcts", simulations=400, breadth=12, in_flight=4, exploration=1.5)


def test_the_best_first_move_is_found():
    """In at least 95 % of 200 games within 400 simulations; one at random is right in a third of them."""
    assert found_best(BUDGET, 200) >= 190


def test_it_is_the_search_that_finds_it():
    """With visits spread by the prior alone, the same number of rollouts is right as often as a guess."""
    assert found_best(replace(BUDGET, exploration=1e6), 60) <= 30
