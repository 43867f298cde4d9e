"""The command line. Every command loads what it needs when it runs, so that help and refusals come at once."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from orchestrator.errors import AgonError, ConfigError, UserError
from orchestrator.printable import printable

app = typer.Typer(
    name="agon",
    help="Online, iterative alignment of language models by self-play, on Ray and vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: help and errors read the same in a terminal, a pipe and a log
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="OVERRIDES", help="key=value, group=choice, or model=<folder or hub id>.", show_default=False
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Start from a complete config, such as RUN/config.yaml."),
]


def echo(text: str, *, err: bool = False) -> None:
    """Prints a text that may hold words of others."""
    typer.echo(printable(text), err=err)


class Guided(TyperCommand):
    """A command whose help ends with the groups and keys of the configuration, read when it is asked for."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Writes the guide of `launch/guide.py` as it stands."""
        from launch.guide import guide

        formatter.write("\n" + guide())


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Handles what is not a command."""
    if show_version:
        typer.echo(f"agon {version('agon')}")
    if context.invoked_subcommand is None:
        raise typer.Exit


@app.command(cls=Guided)
def run(
    overrides: Overrides = None,
    config: ConfigFile = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with the run in this folder, with its own config.")
    ] = None,
) -> None:
    """Start a run, or go on with one.

    Without arguments a tiny model is made on this machine and learns column addition: no GPU, hub or account needed.
    Whatever can be refused is refused before anything starts, with exit code 2.
    """
    from conf.compose import compose, compose_resumed

    if resume is None:
        composed = compose(overrides or [], config)
    elif config is None:
        composed = compose_resumed(resume, overrides or [])
    else:
        raise ConfigError("--config and --resume: a resumed run has its own config: give one of the two")
    from launch.run import run as run_now

    raise typer.Exit(run_now(composed, resume))


@app.command("config", cls=Guided)
def show_config(
    overrides: Overrides = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One list of {key, value, source}.")] = False,
) -> None:
    """Print the config a run would have, and where each value comes from."""
    from conf.compose import explain
    from launch.guide import annotated

    settings = explain(overrides or [], config)
    if as_json:
        echo(json.dumps([setting._asdict() for setting in settings], indent=2, ensure_ascii=False))
    else:
        echo(annotated(settings))


@app.command(cls=Guided)
def plan(
    overrides: Overrides = None,
    config: ConfigFile = None,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="The GPU that roles with GPUs would use.")] = "H100",
    as_json: Annotated[bool, typer.Option("--json", help="One object.")] = False,
) -> None:
    """Print what a run would take of cores, devices and memory, and what it would wait for.

    Starts and writes nothing. A folder with nothing but a config.json will do for model.path.
    """
    from conf.compose import compose
    from launch.plan import plan as describe

    echo(describe(compose(overrides or [], config), gpu=gpu, as_json=as_json))


@app.command()
def recipes() -> None:
    """List the recipes with what they follow."""
    from launch.guide import list_recipes

    typer.echo(list_recipes())


@app.command()
def status(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="One object.")] = False,
) -> None:
    """Say how far a run is and what it achieved."""
    from launch.status import status as describe

    echo(describe(run_dir, as_json=as_json))


@app.command()
def profile(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="One object.")] = False,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all of it in Chrome's trace format, for Perfetto.")
    ] = None,
) -> None:
    """Show where each actor's time went: working at what, waiting in which stage."""
    from launch.profile import profile as describe

    echo(describe(run_dir, as_json=as_json, trace=trace))


@app.command()
def audit(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Check that a run lost nothing and did nothing twice. Exit code 1: it did."""
    from launch.audit import audit as check

    found = check(run_dir)
    for finding in found.findings:
        echo(finding)
    echo(str(found))
    if found.findings:
        raise typer.Exit(1)


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    iteration: Annotated[int | None, typer.Option(help="Which iteration's policy; the last one if not given.")] = None,
) -> None:
    """Write a policy as a Hugging Face folder, which transformers and vLLM load."""
    from conf.compose import compose_resumed

    compose_resumed(run_dir, [])  # refuses at once what holds no run; the next import takes seconds
    from launch.export import export as write

    echo(str(write(run_dir, out, iteration)))


@app.command()
def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder, such as `agon export` writes, or a cached hub id.")
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask; -: read it from stdin as it is.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Print a model's answer to one prompt."""
    from launch.model_files import find_model, inspect_model

    folder = find_model(model, "MODEL")
    inspect_model(folder)  # refuses at once what is no model; the next import takes seconds
    from launch.generate import generate as answer

    prompt = sys.stdin.read() if prompt == "-" else prompt
    echo(answer(str(folder), prompt, max_tokens=max_tokens, temperature=temperature, seed=seed))


@app.command("train-judge")
def train_judge(
    pairs: Annotated[
        list[Path],
        typer.Argument(
            metavar="PAIRS...", help="Files of pairs: RUN/pairs/*.parquet, or JSONL with prompt, chosen and rejected."
        ),
    ],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A causal language model to start from: folder or hub id.")
    ],
    out: Annotated[Path, typer.Option(metavar="OUT", help="A folder that does not exist yet.")],
    kind: Annotated[
        str,
        typer.Option(
            help="preference_model reads two answers side by side; gpm embeds each; reward_model gives each a scalar."
        ),
    ] = "preference_model",
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 1e-5,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pairs.")] = 1,
    batch_prompts: Annotated[int, typer.Option(min=1, help="Prompts of one step, with all their pairs.")] = 32,
    max_length: Annotated[int, typer.Option(min=8, help="Context, tokens; longer pairs are left out.")] = 2048,
    held_out: Annotated[float, typer.Option(min=0, max=1, help="Share of prompts to measure on.")] = 0.1,
    dim: Annotated[int, typer.Option(help="Width of a gpm's embedding, even.")] = 4,
    temperature: Annotated[float, typer.Option(help="Of a gpm's scores.")] = 0.1,
    likelihood: Annotated[
        bool, typer.Option("--likelihood", help="Also read how likely the model finds an answer; for tiny models.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the new weights and the order of the prompts.")] = 0,
) -> None:
    """Train a judge from pairs: a preference model or a reward model, for judge.model of a run.

    Prints how often it is right on prompts that it was not trained on, and how well it knows that.
    """
    from launch.model_files import find_model, inspect_model
    from learners.preference.config import HeadConfig

    head = HeadConfig(kind=kind, dim=dim, temperature=temperature, likelihood=likelihood)
    folder = find_model(model, "--model")
    inspect_model(folder)  # refuses at once what is no model; the next import takes seconds
    from launch.train_judge import train_judge as train_now
    from learners.preference.training import TrainingConfig

    training = TrainingConfig(lr=lr, epochs=epochs, batch_prompts=batch_prompts, seed=seed)
    typer.echo(
        train_now(pairs, out, model_dir=folder, head=head, training=training, max_length=max_length, held_out=held_out)
    )


def main() -> None:
    """Entry point. Exit code 2: the user can mend it; 1: the run failed; 130: interrupted."""
    # A console script, unlike `python -m`, does not look for modules (`scorer.function`) in the folder it is called in.
    # Last in line, so that a folder named `conf` or `tests` there hides nothing of ours.
    sys.path.append(os.getcwd())
    try:
        app()
    except AgonError as error:
        echo(f"error: {error}", err=True)
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()
