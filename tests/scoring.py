"""Scores for runs whose models know nothing: any function of the text will do, as long as it tells texts apart."""


def variety(prompt, completion, answer):
    """Share of distinct characters among the first forty, in [0, 1]."""
    head = completion[:40]
    return len(set(head)) / max(1, len(head))


def constant(prompt, completion, answer):
    return 0.5
