"""The command line as a user meets it: exit codes, what goes to stdout and what to stderr, and that help is light."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from conf.schema import TaskConfig
from launch import cli
from launch.run import _ask
from launch.tiny import make_tokenizer
from learners.policy import load_model
from orchestrator.errors import DeadlineError
from orchestrator.prompts import Renderer
from orchestrator.tasks.addition import AdditionTask
from tests.models import make_model

ROOT = Path(__file__).parent.parent
PLAIN = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "CLICOLOR_FORCE")}


def agon(*arguments, cwd, code="from launch.cli import main; main()"):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=PLAIN, capture_output=True, text=True, timeout=120
    )


def test_help_says_what_there_is(tmp_path):
    result = agon("--help", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    for command in ("run", "config", "recipes", "status", "export", "generate"):
        assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize("command", ["run", "config"])
def test_help_of_run_and_config_is_worth_reading(tmp_path, command):
    result = agon(command, "--help", cwd=tmp_path)
    assert result.returncode == 0
    for part in ("Examples:", "agon run --resume", "addition*, gsm8k, prompts", "loss.beta", "conf/schema.py"):
        assert part in result.stdout
    assert "\x1b" not in result.stdout, "no colours in a pipe"


def test_help_and_config_load_nothing_heavy(tmp_path):
    code = (
        "import atexit, sys; heavy = ('ray', 'torch', 'vllm', 'transformers', 'wandb', 'pyarrow')\n"
        "atexit.register(lambda: print([m for m in heavy if m in sys.modules], file=sys.stderr))\n"
        "from launch.cli import main; main()"
    )
    for arguments in (["--help"], ["run", "--help"], ["config"], ["recipes"], ["run", "loss.bta=1"]):
        assert agon(*arguments, cwd=tmp_path, code=code).stderr.endswith("[]\n"), arguments


def test_version_and_recipes(tmp_path):
    assert agon("--version", cwd=tmp_path).stdout.startswith("agon 0.")
    recipes = agon("recipes", cwd=tmp_path).stdout
    assert recipes.startswith("iterative_dpo\n")
    assert "arXiv:2405.07863" in recipes


def test_folders_of_the_user_hide_nothing_of_ours(tmp_path):
    for name in ("conf", "launch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('of the user')")
    command = f"import sys; sys.path[0] = {str(ROOT)!r}; from launch.cli import main; main()"
    assert agon("config", cwd=tmp_path, code=command).returncode == 0


def test_config_is_yaml_that_can_be_given_back(tmp_path):
    first = agon("config", "loss=rpo", "seed=7", cwd=tmp_path)
    assert first.returncode == 0
    assert yaml.safe_load(first.stdout)["loss"]["sft_weight"] == 0.005
    assert any("# conf/loss/rpo.yaml:" in line for line in first.stdout.splitlines())
    (tmp_path / "mine.yaml").write_text(first.stdout)
    second = agon("config", "--config", "mine.yaml", "--json", "loss.beta=0.2", cwd=tmp_path)
    settings = {entry["key"]: entry for entry in json.loads(second.stdout)}
    assert settings["seed"]["value"] == 7
    assert settings["loss.beta"] == {"key": "loss.beta", "value": 0.2, "source": "command line"}
    assert settings["loss.sft_weight"]["source"].startswith("mine.yaml:")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run", "learner.lrr=1"], "learner.lrr: no such key: did you mean learner.lr?"),
        (["run", "task=prompts", "task.path=absent.jsonl"], "absent.jsonl: there is no such file"),
        (["run", "model=./absent"], "model.path=./absent: no such folder"),
        (["run", "--resume", "absent"], "absent: holds no run"),
        (["run", "--resume", "a", "--config", "b"], "give one of the two"),
        (["config", "--config", "absent.yaml"], "absent.yaml: cannot be read"),
        (["status", "absent"], "absent"),
        (["export", "absent", "out"], "absent"),
        (["generate", "absent", "hello"], "absent"),
    ],
)
def test_what_the_user_can_mend_ends_in_exit_code_2(tmp_path, arguments, part):
    result = agon(*arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_an_unknown_option_is_refused(tmp_path):
    result = agon("run", "--foo", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "No such option: --foo" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DeadlineError("learner: not up within 300 s"), 1, "error: learner: not up within 300 s\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes_of_what_happens_later(monkeypatch, capsys, error, code, said):
    def stop(config, resume):
        raise error

    monkeypatch.setattr("launch.run.run", stop)
    monkeypatch.setattr(sys, "argv", ["agon", "run"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == code
    assert capsys.readouterr() == ("", said)


def test_the_exit_code_of_a_run_is_that_of_the_command(monkeypatch):
    seen = []
    monkeypatch.setattr("launch.run.run", lambda config, resume: seen.append((config.seed, resume)) or 1)
    monkeypatch.setattr(sys, "argv", ["agon", "run", "seed=11"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert (left.value.code, seen) == (1, [(11, None)])


def test_the_command_that_is_printed_asks_what_the_run_asked(tmp_path):
    """Typed into a shell, with the tokens put out instead of an answer."""
    make_tokenizer(64).save_pretrained(tmp_path / "model")
    task = AdditionTask(digits=4)
    (tmp_path / "show").write_text(
        f"#!{sys.executable}\n"
        "import sys; from launch.generate import prompt_tokens; from transformers import AutoTokenizer\n"
        "assert sys.argv[1] == 'generate' and sys.argv[3] == '-'\n"
        "print(list(prompt_tokens(AutoTokenizer.from_pretrained(sys.argv[2]), sys.stdin.read())))\n"
    )
    (tmp_path / "show").chmod(0o755)
    command = _ask("./show", Path("model"), task)
    fed = subprocess.run(
        ["sh", "-c", command],
        cwd=tmp_path,
        env=PLAIN | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    render = Renderer(make_tokenizer(64), TaskConfig())
    assert json.loads(fed.stdout) == list(render(task.test(1)[0]).token_ids), fed.stderr


@pytest.mark.parametrize("prompt", ["Is 12 + 30 = 42?", "-"])
def test_generate_answers(tmp_path, prompt):
    model = make_model("llama", tmp_path / "model")
    result = CliRunner().invoke(
        cli.app, ["generate", str(model), prompt, "--max-tokens", "6"], input="Is 12 + 30 = 42?"
    )
    assert result.exit_code == 0, result.output
    policy, tokenizer = load_model(model), AutoTokenizer.from_pretrained(model)
    chat = "<s><user>Is 12 + 30 = 42?\n<assistant>"
    tokens = tokenizer.encode(chat, add_special_tokens=False)
    for _ in range(6):
        tokens.append(int(policy(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    start = len(tokenizer.encode(chat, add_special_tokens=False))
    assert result.stdout == tokenizer.decode(tokens[start:], skip_special_tokens=True).strip() + "\n"
