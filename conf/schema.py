"""The typed configuration: every key, its default, its meaning and its limits.

`conf/<group>/<choice>.yaml` sets values of these; the command line overrides them. Unknown keys are refused by the
structured schema, values by the limits beside each field (`conf/validate.py`). One file, though a long one: it is the
list of all keys. Loads neither ray, torch nor vllm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from conf.objectives import OBJECTIVES


def knob(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field with its meaning and limits: `low` and `high` are allowed values, `above` is not."""
    limits = {"meaning": meaning, "choices": choices, "low": low, "above": above, "high": high}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=limits)
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class RecipeConfig:
    """Which published method this is. Choosing one sets the groups below."""

    name: str = knob(MISSING, "short name, part of the run folder's name")
    title: str = knob(MISSING, "one line for people")
    source: str = knob(MISSING, "the paper or report it follows")


@dataclass(frozen=True)
class TinyConfig:
    """The model that is made and warm-started here when no other is given."""

    hidden_size: int = knob(128, "width", low=16)
    intermediate_size: int = knob(352, "width of the MLP", low=16)
    num_layers: int = knob(4, "decoder layers", low=1)
    num_heads: int = knob(4, "attention heads", low=1)
    demonstrations: int = knob(4000, "worked solutions it is warm-started on", low=64)
    batch_size: int = knob(32, "demonstrations in one warm-start step", low=1)
    lr: float = knob(2e-3, "warm-start peak learning rate", above=0)
    target_accuracy: float = knob(0.28, "sampled accuracy on tuning problems at which warm start stops", low=0, high=1)
    max_steps: int = knob(400, "give up after so many warm-start steps", low=1)
    judge_steps: int = knob(0, "steps that teach it to judge, for recipes in which the policy does; 0: none", low=0)
    seed: int = knob("${seed}", "seed of its weights and demonstrations")


@dataclass(frozen=True)
class ModelConfig:
    """The policy. On the command line `model=<folder or hub id>` is short for `model=hf model.path=...`."""

    kind: str = knob("tiny", "made here, or a Hugging Face model", choices=("tiny", "hf"))
    path: str | None = knob(None, "folder or hub id of a causal language model (kind=hf)")
    dtype: str = knob("float32", "weights of generators and the learner's forward", choices=("float32", "bfloat16"))
    max_length: int = knob(128, "context in tokens: prompt and completion together", low=8)
    tiny: TinyConfig = field(default_factory=TinyConfig)


@dataclass(frozen=True)
class TaskConfig:
    """Where prompts and reference answers come from."""

    kind: str = knob("addition", "generated column addition, or files", choices=("addition", "prompts", "gsm8k"))
    digits: int = knob(4, "digits of each summand (kind=addition)", low=1, high=9)
    path: str | None = knob(None, "training prompts, .jsonl or .parquet (kind=prompts or gsm8k)")
    test_path: str | None = knob(None, "held-out prompts; None: `test_fraction` of `path` is held out")
    test_fraction: float = knob(0.05, "share of `path` held out when `test_path` is None", low=0, high=0.9)
    prompt_field: str = knob("prompt", "field with a text or a list of chat messages ({role, content})")
    answer_field: str | None = knob(None, "field with the reference answer; None: there is none")
    id_field: str | None = knob(None, "field with a unique id; None: the line number")
    template: str = knob(
        "auto",
        "chat: the tokenizer's chat template; text: as it stands; auto: chat where the tokenizer has one",
        choices=("auto", "chat", "text"),
    )
    system_prompt: str | None = knob(None, "put before chats that have no system message")
    on_too_long: str = knob("error", "prompts that leave no room for `generator.max_tokens`", choices=("error", "drop"))


@dataclass(frozen=True)
class GeneratorConfig:
    """The pool of actors that sample completions."""

    kind: str = knob("vllm", "engine inside each actor", choices=("vllm", "transformers"))
    num_actors: int = knob(2, "engines, each with its own copy of the weights", low=1, high=100_000)
    cpus_per_actor: float = knob(1, "CPU cores of one engine", above=0)
    gpus_per_actor: float = knob(0, "GPUs of one engine", low=0)
    tensor_parallel_size: int = knob(1, "GPUs that share one copy of the weights", low=1)
    max_num_seqs: int = knob(256, "requests one engine decodes together", low=1)
    kv_cache_mb: int = knob(128, "KV cache of one engine on a CPU, MiB", low=8)
    gpu_memory_utilization: float = knob(0.9, "share of a GPU one engine may fill", above=0, high=1)
    samples_per_prompt: int = knob(8, "K: completions of each prompt", low=2)
    temperature: float = knob(1.0, "sampling temperature", above=0)
    top_p: float = knob(1.0, "nucleus", above=0, high=1)
    max_tokens: int = knob(64, "longest completion, tokens", low=1)
    stop: list[str] = knob([], "strings that end a completion")  # noqa: RUF009
    restarts: int = knob(10, "actor deaths the pool mends before it gives up", low=0)
    start_deadline_s: float = knob(300, "an actor must be ready after so long", above=0)
    deadline_s: float = knob(600, "one wave of requests must be done after so long", above=0)


JUDGES = (
    *("verifier", "llm_judge", "step_judge", "preference_model", "reward_model"),
    *("implicit", "majority"),
)
"""Scorers that judge alone, and can be members of an ensemble."""


@dataclass(frozen=True)
class ScorerConfig:
    """Who judges completions."""

    kind: str = knob(
        "verifier",
        "verifier: a rule with a reference answer; llm_judge, step_judge: a language model that reads the "
        "completion whole or step by step; preference_model, reward_model: trained with `agon train-judge`; "
        "implicit: the policy's own log-ratio to the initial model; majority: agreement of the final answers",
        choices=(*JUDGES, "ensemble"),
    )
    verifier: str = knob(
        "final_answer",
        "final_answer: text after the last marker; exact: the whole text; math: mathematical equality; "
        "tests: the reference answer is Python that tests the completion's code; function: your own",
        choices=("final_answer", "exact", "math", "tests", "function"),
    )
    marker: str = knob("#", "what the final answer follows (verifier=final_answer)")
    function: str | None = knob(None, "module.name of `f(prompt, completion, answer) -> float | None`")
    num_actors: int = knob(1, "scorer actors", low=1, high=100_000)
    cpus_per_actor: float = knob(0.1, "CPU cores of one scorer", low=0)
    restarts: int = knob(10, "actor deaths the pool mends before it gives up", low=0)
    start_deadline_s: float = knob(300, "an actor must be ready after so long", above=0)
    deadline_s: float = knob(120, "one wave must be scored after so long, beside call_timeout_s for each call", above=0)
    call_timeout_s: float = knob(10, "your function, or one completion's tests, must answer after so long", above=0)
    call_memory_mb: int = knob(1024, "memory your function, or the code under test, may take, MiB", low=64)


@dataclass(frozen=True)
class JudgeConfig:
    """Scorers that are models (scorer.kind other than verifier and majority)."""

    engine: str = knob(
        "policy",
        "llm_judge, step_judge: policy: served by the generators themselves, unless judge.model names another model; "
        "own: a pool of its own with the weights of judge.model",
        choices=("policy", "own"),
    )
    model: str | None = knob(
        None,
        "folder or hub id of the judge, which gets a pool of its own; None: the initial policy, or a tiny judge made "
        "here; in an ensemble with a preference or reward model it is that one's",
    )
    style: str = knob("pointwise", "llm_judge: a score each, or comparisons", choices=("pointwise", "pairwise"))
    verdict: str = knob(
        "words",
        "read the verdict from the judge's words, or from the probability of the verdict tokens",
        choices=("words", "probability"),
    )
    rubric: str | None = knob(None, "text file with the judge's instructions; None: the packaged one of its style")
    principles: str | None = knob(None, "text file put into the rubric, such as a list of what a good answer does")
    head: str = knob("J", "text put before the question that a step_judge reads")
    derive: str = knob("=#", "characters behind which a step's result stands, which a step_judge writes itself first")
    yes: str = knob("Y", "what a step_judge writes behind a right step")
    no: str = knob("N", "what a step_judge writes behind a wrong step")
    votes: int = knob(
        3, "judgements sampled for each completion or each order of a comparison (verdict=words), averaged", low=1
    )
    temperature: float = knob(0.7, "of sampled judgements", low=0)
    top_p: float = knob(0.9, "of sampled judgements", above=0, high=1)
    max_tokens: int = knob(256, "longest judgement, tokens", low=1)
    max_failed_fraction: float = knob(
        0.95, "an iteration in which the judge said nothing usable more often than this stops the run", low=0, high=1
    )
    length_normalized: bool = knob(False, "implicit: mean over the completion's tokens instead of their sum")
    consistency: str = knob(
        "none",
        "implicit: labels are how far this policy and the one before rank the completions alike (CREAM), in each prompt"
        " or in the mean of the iteration's prompts; loss.labels=soft trains on them",
        choices=("none", "prompt", "mean"),
    )
    members: list[str] = knob(  # noqa: RUF009
        ["llm_judge", "implicit", "majority"], "kinds of scorers in an ensemble, two or more", choices=JUDGES
    )
    min_agreement: float = knob(
        0.6,
        "ensemble: share of all members that must be on one side, or the comparison is left undecided",
        low=0,
        high=1,
    )
    win_probability: str = knob(
        "pairwise",
        "preference_model: P(one beats another) from the comparison of the two, or aggregated: from the difference of"
        " their mean scores, as the released code of SPPO has it",
        choices=("pairwise", "aggregated"),
    )
    score: str = knob(
        "win_rate",
        "preference_model: a completion's score is its mean probability of winning, or its mean logit of winning, which"
        " loss=gpo regresses to",
        choices=("win_rate", "mean_logit"),
    )
    num_actors: int = knob(1, "engines of the judge's own pool", low=1, high=100_000)
    gpus_per_actor: float = knob(0, "GPUs of one engine of its own pool, or of one preference or reward model", low=0)
    deadline_s: float = knob(600, "one wave of judgements must be done after so long", above=0)


@dataclass(frozen=True)
class SearchConfig:
    """Step-level search instead of independent samples (kind=mcts)."""

    kind: str = knob(
        "none",
        "none: generator.samples_per_prompt independent completions; mcts: a tree of steps for each prompt",
        choices=("none", "mcts"),
    )
    simulations: int = knob(16, "rollouts, and visits of finished solutions, for each prompt", low=2)
    max_tokens: int | None = knob(None, "a tree that has sampled so many tokens starts no rollout", low=1)
    in_flight: int = knob(4, "rollouts of one tree that are under way at once", low=1)
    breadth: int = knob(2, "rollouts started at each state; equal steps are one child", low=2)
    depth: int | None = knob(None, "states so many steps down are not branched any more; None: all are", low=1)
    separator: str = knob("\n", "text that ends a step")
    exploration: float = knob(1.0, "w: weight of the prior in PUCT", low=0)
    discount: float = knob(1.0, "gamma", low=0, high=1)
    length_exponent: float = knob(1.25, "of the prior's length normalization", low=0)
    states: str = knob(
        "path", "where pairs are made: along the best path, or in the whole tree", choices=("path", "tree")
    )
    negative: str = knob("worst", "against the best step: the worst, or any other", choices=("worst", "random"))
    min_gap: float = knob(0.0, "smallest difference of Q of a pair, in units of score", low=0)
    max_pairs: int = knob(8, "pairs of one tree at most", low=1)
    evaluation_weight: float = knob(
        0.0,
        "w of a finished solution's value, score + w P(its last step is right), by the word of the judge's model"
        " (judge.engine); with discount below 1 the states before it have the value w P too; 0: nobody is asked",
        low=0,
    )
    rubric: str | None = knob(None, "text file that asks about the last step; None: the packaged one")
    show_answer: bool = knob(
        False, "the evaluation is shown the reference answer, as in the released code: no longer free of labels"
    )
    depth_penalty: bool = knob(False, "P is divided by depth - 3 of deeper states, as in the released code")
    min_score: float | None = knob(
        None, "trees whose own solution scores less make no pair (the released code's filter, off there)"
    )
    span: str = knob(
        "step", "what is compared: the step with what always followed, or the whole rest", choices=("step", "rollout")
    )


@dataclass(frozen=True)
class PairingConfig:
    """Which comparisons are made of a scored group."""

    policy: str = knob(
        "best_worst",
        "best_worst: highest against lowest score, then the next ones inwards; all: every pair that differs; "
        "length_controlled: the shortest of the near-best against the longest of the near-worst, one pair; "
        "best_random: highest against a random lower score, one pair",
        choices=("best_worst", "all", "length_controlled", "best_random"),
    )
    length_control: float = knob(
        0.1, "rho: share of the range of scores that counts as near-best and as near-worst", low=0, high=0.4
    )
    max_pairs: int = knob(1, "pairs of one prompt at most", low=1)
    min_margin: float = knob(0.0, "pairs whose scores differ by no more than this are ties and dropped", low=0)


@dataclass(frozen=True)
class FilterConfig:
    """Which pairs are kept. Reasons of those dropped are counted in the metrics."""

    drop_truncated_chosen: bool = knob(True, "drop pairs whose chosen completion ran out of tokens")
    drop_identical: bool = knob(True, "drop pairs whose two completions have the same tokens")
    max_length_ratio: float | None = knob(None, "drop pairs whose longer side exceeds this times the other", above=1)


@dataclass(frozen=True)
class LossConfig:
    """The objective: a preference term, what its labels are taken for, how pairs are weighted, and added terms."""

    name: str = knob("dpo", "preference term", choices=tuple(OBJECTIVES))
    beta: float = knob(0.1, "strength of the pull towards the reference; orpo: weight of the odds ratio", above=0)
    labels: str = knob(
        "hard",
        "hard: as the judge said, wrong with label_smoothing; robust: the same, unbiased; soft: the judge's own "
        "probability; posterior: believed as far as the policy bears them out (LCPO); denoised: smoothed where the "
        "policy is unsure (SPA)",
        choices=("hard", "robust", "soft", "posterior", "denoised"),
    )
    label_smoothing: float = knob(0.0, "probability that a label is wrong (cDPO)", low=0, high=0.5)
    noise_decay: float = knob(
        0.9, "share of the old running mean kept at each step (labels=posterior, beta_scaling=implicit)", low=0, high=1
    )
    weighting: str = knob("none", "wpo: pairs by how likely the policy is to sample them", choices=("none", "wpo"))
    beta_scaling: str = knob(
        "none",
        "margin: beta grows with the margin of the scores (MM-RLHF); implicit: with that of the policy (beta-DPO)",
        choices=("none", "margin", "implicit"),
    )
    beta_scale: float = knob(0.1, "w: how much beta grows (beta_scaling)", low=0)
    beta_slope: float = knob(1.0, "k: how fast it does, per unit of score (beta_scaling=margin)", above=0)
    tail_weight: float = knob(
        1.0, "weight of tokens behind the length that both completions have (LD-DPO)", low=0, high=1
    )
    include_prompt: bool = knob(False, "the prompt's tokens are scored as well (DOVE); they cancel in terms of Delta")
    gamma: float = knob(0.0, "target margin in units of beta times log-prob (simpo), nats (slic)", low=0)
    penalty: float = knob(50.0, "lambda: of a chosen completion that has become rarer (dpop)", low=0)
    score_scale: float = knob(
        1.0, "multiplies scores: eta (rebel), 1 / alpha (nca, infonca), 1 / beta_r (exo); gpo, copg, p3o, pro", above=0
    )
    floor: float = knob(1e-3, "smallest probability of a target (exo_pair) or of a label (irepo)", above=0, high=0.499)
    desirable_weight: float = knob(1.0, "lambda_D: of chosen completions (kto)", low=0)
    undesirable_weight: float = knob(1.0, "lambda_U: of rejected completions (kto)", low=0)
    divergence: str = knob("js", "towards the reference (f_dpo)", choices=("forward_kl", "js", "alpha"))
    divergence_alpha: float = knob(0.5, "of divergence=alpha (f_dpo)", above=0, high=0.999)
    negative_weight: float = knob(0.1, "alpha: of the worst completion (d2o)", low=0)
    clip: float = knob(0.2, "most a likelihood ratio may move (p3o)", above=0, high=0.999)
    anisotropy: float = knob(2.5, "a: how much more a completion with score 1 counts (trpa)", above=0)
    importance_clip: float = knob(
        2.0,
        "pipeline.mode=async: c; a completion of older weights counts as often as the learner's would give it, at most "
        "c and at least 1/c times; 1: as if it were new",
        low=1,
        high=1e6,
    )
    exploration: str = knob(
        "none", "selm, xpo: away from what the policy would say anyway", choices=("none", "selm", "xpo")
    )
    exploration_weight: float = knob(1e-5, "alpha: of the exploration term", low=0)
    kl_weight: float = knob(0.0, "of KL(policy || reference) per token (the trust region of TRPA)", low=0)
    sft_weight: float = knob(0.0, "weight of the token-mean negative log-likelihood (RPO)", low=0)
    sft_target: str = knob(
        "chosen", "whose likelihood: the chosen completion, or the best of its prompt (TPO)", choices=("chosen", "best")
    )


@dataclass(frozen=True)
class ReferenceConfig:
    """The policy the loss is anchored to."""

    kind: str = knob(
        "previous",
        "previous: the policy at the start of the iteration; initial: the model given; ema: a running average; "
        "none: for losses that need no reference, which then is never computed",
        choices=("previous", "initial", "ema", "none"),
    )
    ema_decay: float = knob(0.4, "share of the old average kept at each iteration (kind=ema)", low=0, high=1)
    logprobs: str = knob(
        "auto",
        "sampled: those that generators noted as they sampled, where the reference is what sampled, which saves a "
        "forward pass; learner: computed by the learner; auto: sampled in float32, learner in bfloat16, where two "
        "engines round a token's log-prob 0.1 nats apart",
        choices=("auto", "sampled", "learner"),
    )


@dataclass(frozen=True)
class LearnerConfig:
    """The update."""

    cpus: float = knob(1, "CPU cores", above=0)
    gpus: float = knob(0, "GPUs", low=0)
    num_threads: int = knob(2, "threads of its matrix products on a CPU", low=1)
    lr: float = knob(5e-7, "peak learning rate (AdamW)", above=0)
    adam_beta1: float = knob(0.9, "AdamW", low=0, high=0.999999)
    adam_beta2: float = knob(0.999, "AdamW", low=0, high=0.999999)
    weight_decay: float = knob(0.0, "AdamW", low=0)
    reset_optimizer: bool = knob(
        False, "forget Adam's moments at each iteration, as methods do whose iterations are separate training runs"
    )
    schedule: str = knob("constant", "after warm-up, within one iteration", choices=("constant", "linear", "cosine"))
    warmup_steps: int = knob(0, "optimizer steps of linear warm-up in each iteration", low=0)
    max_grad_norm: float = knob(1.0, "gradient clipping", above=0)
    batch_pairs: int = knob(128, "pairs in one optimizer step (the global batch)", low=1)
    epochs: int = knob(1, "passes over an iteration's pairs", low=1)
    micro_batch_tokens: int = knob(8192, "tokens in one forward pass; more pairs are accumulated", low=16)
    replay_path: str | None = knob(
        None,
        "seed data gone over again in every step, .jsonl; None: what the tiny model was taught to judge with, if so",
    )
    replay_sequences: int = knob(0, "sequences of seed data in one optimizer step", low=0)
    replay_weight: float = knob(1.0, "of their token-mean loss beside the preference loss", low=0)
    vocab_chunk: int = knob(4096, "columns of the vocabulary whose logits are held at once", low=1)
    logits_mb: int = knob(
        128, "logits of a forward pass that are kept for the backward pass, MiB; more are computed again", low=0
    )
    activation_checkpointing: str = knob(
        "none",
        "compute layers again in the backward pass instead of storing them: all of each, or all but matrix products",
        choices=("none", "selective", "full"),
    )
    flex_attention: bool = knob(
        False,
        "on a GPU: attention of a prompt for all its completions at once (torch's FlexAttention), if it proves right; "
        "on a CPU it is so anyway",
    )
    checkpoint_steps: int = knob(100, "optimizer steps after which an iteration's training is saved on the way", low=1)
    spike_factor: float = knob(
        100, "a batch whose gradient norm exceeds the median of recent ones so many times is skipped", above=1
    )
    max_skipped: int = knob(3, "batches of one iteration skipped before the iteration is rolled back", low=0)
    restarts: int = knob(3, "learner deaths that are mended before the run gives up", low=0)
    start_deadline_s: float = knob(300, "the learner must be ready after so long", above=0)
    step_deadline_s: float = knob(600, "one optimizer step must be done after so long", above=0)


@dataclass(frozen=True)
class PipelineConfig:
    """The loop."""

    mode: str = knob(
        "sync",
        "sync: in turns, strictly on-policy, deterministic; semi_online: the same, but the learner is "
        "trained on the pairs of a wave while the next one is collected; async: while it is trained on an iteration's "
        "pairs, the next ones are collected",
        choices=("sync", "semi_online", "async"),
    )
    max_staleness: int = knob(
        1,
        "async: updates that the weights which sample a pair may be behind the learner's; 0: as sync",
        low=0,
        high=1000,
    )
    over_issue: float = knob(
        0.05,
        "async: share of a wave's completions that idle generators may be asked for as well, where the generator that "
        "has them takes twice as long as most; what comes first counts; 0: none",
        low=0,
        high=1,
    )
    iterations: int = knob(3, "collect, train, publish, evaluate, promote: so many times", low=1)
    prompts_per_iteration: int = knob(128, "prompts of one iteration", low=1)
    queue_capacity: int = knob(8, "batches the queue holds before producers wait", low=1, high=100_000)
    wave_prompts: int = knob(512, "prompts sampled, judged and written together: what a crash may cost", low=1)
    keep_checkpoints: int = knob(2, "newest checkpoints kept; beside them, the one that evaluated best", low=1)


@dataclass(frozen=True)
class ClusterConfig:
    """Where actors run."""

    address: str | None = knob(None, "Ray address; None: a Ray of this run's own on this machine")
    num_cpus: int | None = knob(None, "logical CPUs of this run's own Ray; None: all, at least what the plan needs")
    weight_transport: str = knob(
        "object_store",
        "how published weights travel: Ray objects; NCCL broadcast; CUDA IPC on one GPU",
        choices=("object_store", "nccl", "ipc"),
    )
    object_store_mb: int = knob(512, "object store of this run's own Ray, MiB", low=80)
    publish_deadline_s: float = knob(300, "all generators must hold new weights after so long", above=0)
    stall_s: float = knob(60, "a wait that lasts longer is reported, with what it waits for", above=0)


@dataclass(frozen=True)
class TrackingConfig:
    """What is logged where. `metrics.jsonl` and the Parquet files are always written."""

    wandb: str = knob(
        "auto",
        "auto: online with a key, else offline",
        choices=("auto", "online", "offline", "disabled"),
    )
    project: str = knob("agon", "wandb project")
    group: str | None = knob(None, "wandb group")
    console: str = knob(
        "auto", "auto: a live view on a terminal, else lines", choices=("auto", "live", "lines", "quiet")
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out problems, answered by the current policy; none of them ever tunes anything."""

    problems: int = knob(256, "test problems after each iteration, final_problems at most", low=1)
    final_problems: int = knob(1024, "test problems before the first and after the last iteration", low=1)
    every: int = knob(1, "iterations between evaluations", low=1)
    temperature: float = knob(1.0, "of the sampled figure; the other one is greedy", above=0)
    scorer: str = knob(
        "verifier",
        "who scores the answers. verifier: the task's own rule, whatever judge trains; judge: the judge that trains, "
        "which then grades itself; none: nobody, and nothing is evaluated",
        choices=("verifier", "judge", "none"),
    )
    anchors: int = knob(
        32,
        "test problems with four answers each on which the judge is measured against the verifier in each iteration; "
        "0: off",
        low=0,
    )
    kl_prompts: int = knob(64, "completions on which KL to the initial model is estimated; 0: off", low=0)


@dataclass(frozen=True)
class PromotionConfig:
    """What is looked at before the policy of an iteration that was evaluated becomes the next data policy."""

    gate: str = knob(
        "alarm",
        "what follows from an alarm. off: nobody looks; alarm: it is reported; reject: the run also goes back to the "
        "last policy that was promoted, and on to the next prompts",
        choices=("off", "alarm", "reject"),
    )
    min_win_rate: float = knob(
        0.45,
        "alarm: greedy answers win less often than this (ties count half) over those of the last promoted policy, by "
        "the whole 95 % interval",
        low=0,
        high=1,
    )
    max_length_ratio: float = knob(
        1.5, "alarm: sampled answers are on average longer than this times those of the last promoted policy", above=1
    )
    max_judge_drop: float = knob(
        0.1, "alarm: judge/accuracy is this much lower than the highest of earlier iterations", above=0, high=1
    )


@dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = knob(0, "seeds everything", low=0, high=2**31 - 1)
    run_dir: str | None = knob(None, "run folder; None: runs/<date>-<recipe>-<seed>")
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    pairing: PairingConfig = field(default_factory=PairingConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    promotion: PromotionConfig = field(default_factory=PromotionConfig)
