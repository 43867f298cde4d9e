"""Each objective once more, written pair by pair and group by group, as a check on the real ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from conf.objectives import OBJECTIVES


def softplus(x):
    return torch.log(1 + torch.exp(x))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


@dataclass
class Answer:
    """One completion: log-probs under policy and reference, log-ratio, and the means per token."""

    lp: object
    lr: object
    length: int
    score: float = 0.0

    @property
    def h(self):
        return self.lp - self.lr

    @property
    def mean(self):
        return self.lp / self.length

    @property
    def mean_h(self):
        return self.h / self.length

    @property
    def odds(self):
        return torch.exp(self.mean) / (1 - torch.exp(self.mean))


def plain(name, inputs, config):
    """[P] or [G] values of an objective, without state."""
    ends = inputs.lengths.cumsum(0).tolist()
    runs = [(slice(end - length, end), length) for end, length in zip(ends, inputs.lengths.tolist(), strict=True)]
    answers = [Answer(inputs.logprobs[run].sum(), inputs.reference[run].sum(), length) for run, length in runs]
    chosen, rejected = inputs.chosen.tolist(), inputs.rejected.tolist()
    for index, score in zip(chosen + rejected, torch.cat([inputs.score_chosen, inputs.score_rejected]), strict=True):
        answers[index].score = float(score)
    if OBJECTIVES[name].unit == "group":
        members = [
            [a for a, of in zip(answers, inputs.groups, strict=True) if of == g] for g in range(inputs.num_groups)
        ]
        return torch.stack([plain_group(name, group, config) for group in members])
    pairs = [(answers[w], answers[x]) for w, x in zip(chosen, rejected, strict=True)]
    match name:
        case "aot":
            found = ranks([w.lp - x.lp for w, x in pairs], [w.lr - x.lr for w, x in pairs], config.beta)
        case "aot_unpaired":
            found = ranks([w.h for w, _ in pairs], [x.h for _, x in pairs], config.beta)
        case "kto":
            z = torch.stack([answers[i].h.detach() for i in inputs.mismatched.tolist()]).mean().clamp(min=0)
            found = [(sigmoid(config.beta * (z - w.h)) + sigmoid(config.beta * (x.h - z))) / 2 for w, x in pairs]
        case "bco":
            shift = sum(config.beta * a.h.detach() for pair in pairs for a in pair) / (2 * len(pairs))
            b = config.beta
            found = [(softplus(shift - b * w.h) + softplus(b * x.h - shift)) / 2 for w, x in pairs]
        case _:
            found = [plain_pair(name, w, x, float(p), config) for (w, x), p in zip(pairs, inputs.labels, strict=True)]
    return torch.stack(found)


def ranks(first, second, beta):
    return [softplus(-beta * (x - y)) for x, y in zip(sorted(first), sorted(second), strict=True)]


def plain_pair(name, w, x, p, config):
    """Of chosen `w` and rejected `x` with label `p`."""
    b, eta, d = config.beta, config.score_scale, w.h - x.h
    q, s, advantage = sigmoid(b * d), sigmoid(b * d / 0.05), eta * (w.score - x.score) / 2
    up, down = torch.tensor(1 + config.clip).log(), torch.tensor(1 - config.clip).log()
    power, e = config.divergence_alpha - 1, config.floor
    match name:
        case "dpo" | "trpa_sum":
            return softplus(-b * d)
        case "ln_dpo" | "trpa":
            return softplus(-b * (w.mean_h - x.mean_h))
        case "dpop":
            return softplus(-b * (d - config.penalty * torch.relu(-w.h)))
        case "ipo":
            return (w.mean_h - x.mean_h - 0.5 / b) ** 2
        case "ipo_sum":
            return (d - 0.5 / b) ** 2
        case "hinge":
            return torch.relu(1 - b * d)
        case "slic":
            return torch.relu(config.gamma - w.lp + x.lp)
        case "sppo":
            return ((w.h - (w.score - 0.5) / b) ** 2 + (x.h - (x.score - 0.5) / b) ** 2) / 2
        case "sppo_hard":
            return (w.h - 0.5 / b) ** 2 + (x.h + 0.5 / b) ** 2
        case "gpo":
            return ((w.h - eta * w.score / b) ** 2 + (x.h - eta * x.score / b) ** 2) / 2
        case "bco_pair":
            return softplus(-b * w.h) + softplus(b * x.h)
        case "simpo":
            return softplus(config.gamma - b * (w.mean - x.mean))
        case "cpo":
            return softplus(-b * (w.lp - x.lp))
        case "orpo":
            return b * softplus(torch.log(x.odds) - torch.log(w.odds))
        case "asft":
            return -w.mean - torch.log(1 - torch.exp(x.mean))
        case "apo_zero":
            return 1 - sigmoid(b * w.h) + sigmoid(b * x.h)
        case "apo_down":
            return sigmoid(b * w.h) + 1 - q
        case "nca_pair":
            return softplus(-b * w.h) + softplus(b * w.h) / 2 + softplus(b * x.h) / 2
        case "exo_pair":
            return q * torch.log(q / (1 - e)) + (1 - q) * torch.log((1 - q) / e)
        case "discopop":
            return (1 - s) * softplus(-b * d) + s * torch.exp(-b * d)
        case "f_dpo":
            return softplus(-b * (torch.exp(power * w.h) - torch.exp(power * x.h)) / power)
        case "rebel":
            return (d - eta * (w.score - x.score)) ** 2
        case "irepo":
            return (b * d - math.log(p / (1 - p))) ** 2
        case "p3o":
            return -advantage * torch.minimum(d, up)
        case "p3o_separate":
            return -advantage * (torch.minimum(w.h, up) - torch.maximum(x.h, down))


def plain_group(name, group, config):
    """Of all completions of a prompt."""
    b = config.beta
    r = [config.score_scale * a.score for a in group]
    share = [math.exp(x) / sum(map(math.exp, r)) for x in r]
    q = [torch.exp(b * a.h) / sum(torch.exp(b * other.h) for other in group) for a in group]
    match name:
        case "nca":
            terms = [s * softplus(-b * a.h) + softplus(b * a.h) / len(group) for s, a in zip(share, group, strict=True)]
            return sum(terms)
        case "infonca":
            return -sum(s * torch.log(x) for s, x in zip(share, q, strict=True))
        case "exo":
            return sum(x * torch.log(x / s) for s, x in zip(share, q, strict=True))
        case "copg":
            rewards = [x - b * a.h for x, a in zip(r, group, strict=True)]
            return sum((x - y) ** 2 for i, x in enumerate(rewards) for y in rewards[:i]) / (len(group) - 1)
        case "d2o":
            *others, worst = sorted(group, key=lambda a: -a.score)
            return softplus(config.negative_weight * worst.h - b * sum(a.h for a in others) / len(others))
        case "pro":
            value = 0.0
            for top, a in zip(r, group, strict=True):
                below = [(top - x, other.mean) for x, other in zip(r, group, strict=True) if top > x]
                if below:
                    own = max(gap for gap, _ in below) * a.mean
                    value = value - own + torch.log(torch.exp(own) + sum(torch.exp(gap * m) for gap, m in below))
            return value
        case "aft":
            value = 1.0
            for worse in group:
                above = [better.mean for better in group if better.score > worse.score]
                for mean in above:
                    edge = 2 * min(m.detach() for m in above) - b
                    value = value + torch.exp(worse.mean - mean) + torch.exp(edge - worse.mean)
            return torch.log(value)
