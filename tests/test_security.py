"""Hostile inputs: refused with their place or kept as data, and never a path, a command, an escape or a leak."""

import io
import json
import os
import struct
import tracemalloc
import unicodedata
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from conf.compose import compose, resolved_yaml
from conf.schema import TaskConfig
from launch import cli
from launch.audit import Audit
from launch.console import LinesConsole, LiveConsole
from launch.model_files import find_model, read_header, read_json, read_shapes
from launch.tiny import make_tokenizer
from launch.tokenizers import load_tokenizer
from learners.loading import tokenizer_of
from orchestrator.errors import ConfigError, DataError, ModelError
from orchestrator.printable import printable
from orchestrator.tasks import build_task
from tests.fuzz import fuzz
from tests.runs import do_run, write_prompts

SECRETS = {
    name: f"marker-{name.lower()}-5e1f"
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "WANDB_API_KEY", "GITHUB_TOKEN")
}
ESCAPES = "\x1b[2J\x1b]0;title\x07\r\x08\x9b31m\u202eabc\ud800"


# A whole run


def test_a_run_keeps_no_secret_and_makes_no_path_of_an_id(tmp_path, monkeypatch):
    for name, marker in SECRETS.items():
        monkeypatch.setenv(name, marker)
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    path = write_prompts(folder / "prompts.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    strange = [
        "../../escaped",
        "/tmp/escaped",
        "..",
        ".",
        "~",
        "a/b",
        "-rf *",
        "\x1b[2Jescaped",
        "e" * 10_000,
        "${seed}",
    ]
    for row, name in zip(rows, strange, strict=False):
        row["id"] = name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    settings = {"pipeline__iterations": 1, "pipeline__prompts_per_iteration": 16, "evaluation__final_problems": 4}
    assert do_run(folder, folder / "run", engine="transformers", **settings) == 0

    assert {each.name for each in tmp_path.rglob("*") if "escaped" in each.name or len(each.name) > 200} == set()
    assert {each.name for each in tmp_path.iterdir()} == {"deep"}
    files = [each for each in (folder / "run").rglob("*") if each.is_file()]
    assert {".parquet", ".yaml", ".sqlite", ".jsonl", ".json", ".wandb"} <= {each.suffix for each in files}
    for file in files:
        content = file.read_bytes()
        if file.suffix == ".parquet":  # whose pages are compressed
            rows = pq.read_table(file).to_pylist()
            content += json.dumps(rows, default=str).encode()
        found = [name for name, marker in SECRETS.items() if marker.encode() in content]
        assert not found, f"{file} holds {found}"
    ids = pq.read_table(folder / "run" / "rollouts")["prompt_id"].to_pylist()
    assert set(ids) <= {f"prompts/{row}" for row in [*strange, *(f"q{n}" for n in range(len(rows) + 24))]}
    assert len(set(ids) & {f"prompts/{row}" for row in strange}) >= 3


# Configurations


@pytest.mark.parametrize(
    "override",
    [
        "tracking.project=${oc.env:MY_PASSWORD}",
        "model=${oc.env:MY_PASSWORD}",
        "seed=${oc.env:MY_PASSWORD}",
        "generator.stop=['${oc.env:MY_PASSWORD}']",
        "tracking.project=${oc.decode:${oc.env:MY_PASSWORD}}",
        "run_dir=runs/${oc.env:MY_PASSWORD,x}",
    ],
)
def test_a_configuration_is_not_filled_in_from_the_environment(override, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_PASSWORD", "17")
    with pytest.raises(ConfigError, match="may name another key") as caught:
        compose([override])
    assert "17" not in str(caught.value)
    key, value = override.split("=", 1)
    key, value = ("model.path", value) if key == "model" else (key, value)
    text = resolved_yaml(compose([])) + f"\n{key.partition('.')[0]}:"
    text += f" {{{key.partition('.')[2]}: {json.dumps(value)}}}" if "." in key else f" {json.dumps(value)}"
    (tmp_path / "c.yaml").write_text(text.replace("\"['", '["').replace("']\"", '"]'))
    with pytest.raises(ConfigError, match=r"may name another key.*c\.yaml"):
        compose([], tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learner.gpus=1e999", r"learner\.gpus=inf: must be a finite number"),
        ("loss.beta=" + "9" * 400, r"loss\.beta: expected a number"),
        ("loss.beta=" + "9" * 5000, r"loss\.beta=inf: must be a finite number"),
        ("seed=" + "9" * 400, r"seed=9+: must be at most"),
    ],
    ids=lambda text: text[:16],
)
def test_numbers_beyond_all_bounds_are_refused(override, words):
    with pytest.raises(ConfigError, match=words):
        compose([override])


def test_a_configuration_may_refer_to_its_own_keys():
    assert compose(["tracking.project=${recipe.name}"]).tracking.project == "iterative_dpo"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("model: {_target_: os.system}", "no such key"),
        ("model: {kind: os.system}", "choices: tiny, hf"),
        ("loss: {beta: .nan}", "finite"),
        ("loss: {beta: 1e999}", "loss.beta"),
        ("seed: " + "9" * 5000, "not usable YAML"),
        ("seed: !!timestamp 2001-99-99", "not usable YAML"),
        ("tracking: {project: !!bool x}", "not usable YAML"),
        ("{a: " * 3000, "not usable YAML"),
        ("? [a, b]\n: 1", "expected `key: value` lines"),
        ("seed: \0", "special characters are not allowed"),
        ("seed: &a [*a]", "recursive"),
    ],
)
def test_yaml_is_data(text, words, tmp_path):
    base = resolved_yaml(compose([])) if ":" in text and not text.startswith(("?", "{a")) else ""
    (tmp_path / "c.yaml").write_text(f"{base}\n{text}\n")
    with pytest.raises(ConfigError, match="(?s)" + words.replace("[", r"\[")) as caught:
        compose([], tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)


def test_aliases_that_multiply_cost_nothing(tmp_path):
    laughs = ["&l0 [x, x, x, x, x, x, x, x, x]"] + [f"&l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "c.yaml").write_text(resolved_yaml(compose([])) + f"\ngenerator: {{stop: [{', '.join(laughs)}]}}\n")
    with pytest.raises(ConfigError, match="expected a list of texts") as caught:
        compose([], tmp_path / "c.yaml")
    assert len(str(caught.value)) < 5000


# Prompt files


def read(path, content=None, **changes):
    if content is not None:
        path.write_bytes(content)
    return build_task(TaskConfig(kind="prompts", path=str(path), test_fraction=0.0, **changes), 0)


def test_a_line_without_end_is_refused_before_it_is_held(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n{"prompt": "')
    os.truncate(path, 100 << 20)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"p\.jsonl, line 2: is longer than 16 MiB"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 40 << 20, "of the 100 MiB, one part is held, and once more when joined"
    tracemalloc.stop()


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "device.jsonl").symlink_to("/dev/zero")
    (tmp_path / "folder.parquet").mkdir()
    for name, words in (("pipe.jsonl", "a pipe or device"), ("device.jsonl", "device"), ("folder.parquet", "a folder")):
        with pytest.raises(DataError, match=f"{name}: cannot be read: it is .*{words}"):
            read(tmp_path / name)
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        read(tmp_path / ("x" * 10_000 + ".jsonl"))


def test_what_people_of_other_systems_write_is_read(tmp_path):
    content = b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n{"prompt": "two\\n"}\r\n{"prompt": "last"}'
    task = read(tmp_path / "p.jsonl", content)
    assert {task.locate(each.id)[-6:]: each.content for each in (next(task.train(n)) for n in range(3))} == {
        "line 1": "one",
        "line 3": "two\n",
        "line 4": "last",
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": 1e999}', "a number"),
        (b'{"prompt": "x", "id": NaN}', "'id' is a number"),
        (b'{"prompt": "x", "id": ' + b"9" * 5000 + b"}", "not usable JSON"),
        (b'{"prompt": "x", "id": "\\ud800"}', "surrogate pair"),
        (b'{"prompt": [{"role": ' + b"[" * 900 + b"]" * 900 + b', "content": "x"}]}', "has the role a list"),
        ('{"prompt": {"\x9b31m\u202e": 1}}'.encode(), r"\\u009b31m\\u202e"),
    ],
)
def test_a_hostile_record_is_refused_with_its_place(tmp_path, line, words):
    with pytest.raises(DataError, match=words) as caught:
        read(
            tmp_path / "p.jsonl", b'{"prompt": "fine", "id": "a"}\n' + line, id_field="id" if b'"id"' in line else None
        )
    assert str(caught.value).startswith(f"{tmp_path / 'p.jsonl'}, line 2: ")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "column", [[1], [1.5], [None], [b"x"], [{"a": 1}], [[1]], [True], pa.array(["x"]).dictionary_encode().indices]
)
def test_a_parquet_file_of_other_types_is_refused_with_its_row(tmp_path, column):
    pq.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"p\.parquet, row 1: field 'prompt'"):
        read(tmp_path / "p.parquet")


# Models


@pytest.mark.parametrize(
    "name", ["../../etc", "/nonexistent/..", "a/../b", "a\0b", "x" * 10_000, "/dev/zero", "file:///x"]
)
def test_a_model_is_a_folder_or_a_hub_id(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    with pytest.raises(ModelError) as caught:
        find_model(name)
    assert len(str(caught.value)) < 1000
    assert compose([f"model={name}"]).model.path == name, "kept as it stands"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickled_weights_are_never_read(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ModelError, match=rf"only as pickle \({name}\)"):
        read_shapes(tmp_path)


def test_code_that_comes_with_a_tokenizer_is_never_run(tmp_path, monkeypatch):
    """Nobody is asked whether it may be: somebody might say yes."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    make_tokenizer(64).save_pretrained(folder)
    (folder / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        f"open({str(ran)!r}, 'w').close()\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (tokenizer_of, partial(load_tokenizer, vocab_size=64)):
        with pytest.raises(ModelError, match="tokenizer"):
            load(folder)
    assert not ran.exists()


@pytest.mark.parametrize("shard", ["../../secret.safetensors", "/etc/passwd", "a/b.safetensors", 7, None])
def test_an_index_names_files_of_its_own_folder(shard, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(ModelError, match="must lie in the folder itself"):
        read_shapes(tmp_path)


def header(path, table):
    table = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(table)) + table + b"0123")
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"data_offsets": [-4, 4]},
        {"data_offsets": [0, 4.0]},
        {"data_offsets": [4, 0]},
        {"data_offsets": [0, 1 << 62]},
        {"data_offsets": [0, True]},
        {"shape": [1000]},
        {"shape": [-1, -1]},
        {"shape": [1.0]},
        {"shape": "1"},
        {"dtype": []},
    ],
)
def test_tensors_that_do_not_lie_in_their_file_are_refused(changes, tmp_path):
    good = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    assert read_header(header(tmp_path / "w", {"a": good})) == {"a": [1]}
    for table in ({"a": good | changes}, {"a": good, "b": good | changes}, {"a": good, "b": good}):
        with pytest.raises(ModelError):
            read_header(header(tmp_path / "w", table))


def test_json_that_is_too_deep_or_too_long_is_refused(tmp_path):
    for text in (b'{"a": ' + b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"):
        (tmp_path / "c.json").write_bytes(text)
        with pytest.raises(ModelError, match="not usable JSON"):
            read_json(tmp_path / "c.json")
        with pytest.raises(ModelError, match="header is damaged"):
            read_header(header(tmp_path / "w", text))


# Terminals


@given(st.text(st.characters()))
def test_what_is_printable_moves_no_cursor(text):
    shown = printable(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    assert not [c for c in shown if unicodedata.bidirectional(c) in ("RLO", "LRO", "RLE", "LRE", "RLI", "LRI", "PDF")]
    assert json.loads(f'"{printable(ESCAPES)}"') == ESCAPES
    assert printable(shown) == shown


def silent(text):
    return not set(text) & set(ESCAPES) - set("\nabcdefghijklmnopqrstuvwxyz0123456789[];JTm")


def test_no_command_writes_escapes_of_others(tmp_path, monkeypatch, capsys):
    clean = ESCAPES.replace("\ud800", "")
    runner = CliRunner()
    assert silent(runner.invoke(cli.app, ["config", f"tracking.project={clean}"]).output)
    shown = runner.invoke(cli.app, ["config", "--json", f"tracking.project={clean}"]).output
    assert silent(shown)
    assert clean in [setting["value"] for setting in json.loads(shown)]
    monkeypatch.setattr("sys.argv", ["agon", "config", f"{clean}=1"])
    with pytest.raises(SystemExit):
        cli.main()
    assert silent(capsys.readouterr().err)
    monkeypatch.setattr("launch.model_files.inspect_model", lambda folder: None)
    monkeypatch.setattr("launch.generate.generate", lambda *_, **__: ESCAPES)
    answer = runner.invoke(cli.app, ["generate", str(tmp_path), "x"]).output
    assert silent(answer)
    assert "\\u001b[2J" in answer
    found = Audit(lost=[f"pair {clean}"])
    monkeypatch.setattr("launch.audit.audit", lambda *_: found)
    assert silent(runner.invoke(cli.app, ["audit", str(tmp_path)]).output)
    monkeypatch.setattr("launch.status.status", lambda *_, **__: f"error  {ESCAPES}")
    assert silent(runner.invoke(cli.app, ["status", str(tmp_path)]).output)


@pytest.mark.parametrize("make", [LinesConsole, lambda stream: LiveConsole(Console(file=stream, width=200))])
def test_no_console_writes_escapes_of_others(make):
    stream = io.StringIO()
    make(stream).message(f"the judge said {ESCAPES}")
    assert silent(stream.getvalue())
    assert "\\u001b[2J" in stream.getvalue()


# All of it at random


def test_damaged_inputs_are_refused_or_rightly_read(tmp_path):
    tallies = fuzz(3000, seed=1, keep=tmp_path / "failures")
    assert [str(each) for each in tmp_path.rglob("*.txt")] == []
    assert all(tally.inputs and tally.found["accepted"] for tally in tallies.values()), "each sees both kinds"
