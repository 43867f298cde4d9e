"""The trained judge of a run: the folder the user named, or a tiny one that is made and cached here.

    tiny policy --samples--> answers to demonstration problems --verifier, once--> pairs --train--> preference model
                             solutions with slips and without ------------------->

The labels stand in for a person's: a run with `scorer.kind=preference_model` never asks the verifier about what it
trains on. The problems are of a split that no run trains or tests on.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import xxhash

from conf.judging import trained_kind
from launch.model_cache import made_once
from launch.model_files import find_model
from learners.preference.config import HeadConfig, model_kind
from orchestrator.errors import ConfigError, ModelError
from orchestrator.seeds import derive_seed
from orchestrator.tasks import addition
from orchestrator.tasks.addition import AdditionTask

if TYPE_CHECKING:
    from typing import Any

    from conf.schema import Config
    from learners.preference.data import LabelledPair
    from learners.preference.training import Progress, Quality

FOLDER = "judge_model"
"""Of a run: its own copy of the tiny judge."""
LOWEST_ACCURACY = 0.85
"""Of a tiny judge on held-out comparisons; one that knows less would teach little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyJudgeConfig:
    """How the tiny judge is made."""

    problems: int = 768
    """Problems that the policy answers."""
    samples: int = 8
    flawed: int = 1024
    """Problems more whose right solution stands against `samples` solutions with slips: what the policy does not do
    wrong today it may be taught to do by a judge that never saw it."""
    slips: float = 0.25
    """Share of flawed lines in those."""
    held_out: float = 0.1
    lr: float = 3e-4
    batch_prompts: int = 16
    temperature: float = 0.1


TINY = TinyJudgeConfig()


def check_judge_model(config: Config) -> None:
    """Refuses a judge that is missing or of the wrong kind, from its config.json alone.

    Raises:
        UserError: says what to set.
    """
    kind = trained_kind(config)
    if kind is None:
        return
    if config.judge.model is None:
        who = f"judge.members={config.judge.members}" if config.scorer.kind == "ensemble" else f"scorer.kind={kind}"
        if config.model.kind != "tiny" or config.task.kind != "addition":
            raise ConfigError(
                f"judge.model: {who} needs one: a folder that agon train-judge wrote, or a reward model of"
                " transformers; only for the tiny model on the addition task is one made here"
            )
        return
    found = model_kind(find_model(config.judge.model, "judge.model"))
    if kind == "reward_model" and found != "reward_model":
        raise ConfigError(f"judge.model={config.judge.model}: a {found} has no reward: choose preference_model")


def prepare_judge_model(config: Config, run_dir: Path, model_dir: Path, progress: Progress) -> Config:
    """The configuration with the folder of the judge in `judge.model`; a tiny one is made and copied into the run.

    Args:
        config: of the run, checked by `check_judge_model`.
        run_dir: its folder.
        model_dir: of the initial policy, which a tiny judge starts from.
        progress: called after each step of a judge's training.

    Raises:
        ModelError: the tiny judge did not become good enough.
    """
    kind = trained_kind(config)
    if kind is None:
        return config
    if config.judge.model is not None:
        folder = find_model(config.judge.model, "judge.model")
    else:
        folder = run_dir / FOLDER
        if not folder.is_dir():
            partial = run_dir / f".{FOLDER}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(ensure_tiny_judge(kind, config, model_dir, progress), partial)
            partial.rename(folder)
    return replace(config, judge=replace(config.judge, model=str(folder.absolute())))


def ensure_tiny_judge(
    kind: str, config: Config, model_dir: Path, progress: Progress, *, cache: Path | None = None
) -> Path:
    """The cached folder of the tiny judge, made on first use; whole or absent whatever dies."""
    head = _head(kind)

    def make(folder: Path) -> None:
        quality = make_tiny_judge(head, config, model_dir, folder, progress)
        if quality.accuracy < LOWEST_ACCURACY:
            raise ModelError(
                f"the tiny {head.kind} tells {quality.accuracy:.2f} of held-out comparisons right, and"
                f" {LOWEST_ACCURACY} is the least it may: raise model.tiny.max_steps, or give a judge in judge.model"
            )

    return made_once(_fingerprint(head, config, model_dir), make, cache=cache)


def make_tiny_judge(head: HeadConfig, config: Config, model_dir: Path, out: Path, progress: Progress) -> Quality:
    """Samples, labels, trains and saves; returns how good the judge is on prompts that it was not trained on."""
    import torch

    from learners.preference.data import hold_out, make_groups
    from learners.preference.folder import new_model, save_model
    from learners.preference.training import TrainingConfig, measure, train

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pairs = sample_pairs(config, model_dir) + flawed_pairs(config)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model, encoder = new_model(model_dir, head, max_length=config.model.max_length)
        training, held = (make_groups(part, encoder, side_by_side=False)[0] for part in hold_out(pairs, TINY.held_out))
        settings = TrainingConfig(lr=TINY.lr, batch_prompts=TINY.batch_prompts, seed=config.seed)
        train(model, training, settings, progress)
        quality = measure(model, held)
        save_model(model, encoder, out)
    finally:
        torch.set_num_threads(before)
    return quality


def sample_pairs(config: Config, model_dir: Path) -> list[LabelledPair]:
    """Every right against every wrong answer of the policy to the same problem, as the verifier has it."""
    import torch

    from actors.judges.verifier import final_answer
    from launch.tiny import EOS, PAD
    from launch.warm_start import sample
    from learners.policy import load_model
    from learners.preference.data import Answer, LabelledPair
    from learners.preference.folder import load_tokenizer

    task, tokenizer = AdditionTask(digits=config.task.digits), load_tokenizer(model_dir)
    seed = derive_seed(config.seed, "tiny judge")
    problems = [problem for problem, _ in task.demonstrations(TINY.problems, seed)]
    prompts = torch.tensor([tokenizer(str(problem.content)).input_ids for problem in problems])
    longest = len(tokenizer(addition.worked_solution(0, 0, task.digits)).input_ids)  # its BOS makes room for the EOS
    model: Any = load_model(model_dir)
    generator = torch.Generator().manual_seed(seed)
    drawn = sample(
        model, prompts.repeat_interleave(TINY.samples, dim=0), max_tokens=longest, temperature=1.0, generator=generator
    )
    texts = [tokenizer.decode(row).split(PAD)[0] for row in drawn.tolist()]
    answers = [Answer(text=text.removesuffix(EOS), ended=text.endswith(EOS)) for text in texts]
    pairs = []
    for index, problem in enumerate(problems):
        group = answers[index * TINY.samples : (index + 1) * TINY.samples]
        right = [a for a in group if a.ended and final_answer(a.text, str(problem.answer), marker=config.scorer.marker)]
        wrong = [a for a in group if a not in right]
        pairs += [
            LabelledPair(prompt=str(problem.content), chosen=chosen, rejected=rejected)
            for chosen, rejected in product(right, wrong)
        ]
    return pairs


def flawed_pairs(config: Config) -> list[LabelledPair]:
    """Right solutions against ones with slips, of demonstration problems."""
    from learners.preference.data import Answer, LabelledPair

    task, seed = AdditionTask(digits=config.task.digits), derive_seed(config.seed, "flawed pairs")
    random, pairs = Random(seed), []
    for problem, solution in task.demonstrations(TINY.flawed, seed):
        a, b = map(int, str(problem.content).split("+"))
        flawed = {_flawed(a, b, task.digits, random) for _ in range(TINY.samples)} - {solution}
        pairs += [
            LabelledPair(prompt=str(problem.content), chosen=Answer(text=solution), rejected=Answer(text=text))
            for text in sorted(flawed)
        ]
    return pairs


def _flawed(a: int, b: int, digits: int, random: Random) -> str:
    steps = addition.flawed_solution(a, b, digits, rate=TINY.slips, random=random)
    return "\n".join(step.line for step in steps)


def _head(kind: str) -> HeadConfig:
    """A general preference model reads each answer once, a pairwise one every two of them in both orders."""
    model = "gpm" if kind == "preference_model" else "reward_model"
    return HeadConfig(kind=model, temperature=TINY.temperature, likelihood=True)


def _fingerprint(head: HeadConfig, config: Config, model_dir: Path) -> str:
    """Changes with the settings, the policy it starts from and the code that it is made by."""
    from learners.preference import config as head_code
    from learners.preference import data, encoding, folder, model, training

    settings = [asdict(head), asdict(TINY), config.seed, config.model.max_length, config.task.digits]
    digest = xxhash.xxh3_64(json.dumps(settings, sort_keys=True).encode())
    made_by: list[Path] = [Path(str(code.__file__)) for code in (head_code, data, encoding, folder, model, training)]
    for path in [Path(__file__), Path(addition.__file__), *made_by, *sorted(model_dir.glob("*.safetensors"))]:
        digest.update(path.read_bytes())
    return f"judge-{head.kind}-{digest.hexdigest()}"
