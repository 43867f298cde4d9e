"""Code that nobody vouches for: what it may do, what it cannot do, and that it never makes up a score."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.judges import build_scorer
from actors.judges.unit_tests import code_of
from actors.sandbox import process as sandbox
from actors.sandbox.process import Confined, Limits, Stopped
from conf.schema import ScorerConfig
from orchestrator.errors import ConfigError
from orchestrator.types import FinishReason
from tests.test_verifiers import group

SECRET = "marker-of-a-secret-7f3a"
RIGHT = "def f(x):\n    return x + 1\n"
WRONG = "def f(x):\n    return x\n"
ASSERTS = "assert f(1) == 2\nassert f(-1) == 0\n"
NO_NAMESPACES = (
    "import sys; sys.path.insert(0, sys.argv[1]); from actors.sandbox import confinement;"
    "confinement._own_namespaces = lambda *_: 'no namespaces';"
    "from actors.sandbox.worker import main; del sys.path[0]; main()"
)


@pytest.fixture
def function(tmp_path, monkeypatch):
    """Builds the scorer of a function with this body."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.syspath_prepend(tmp_path)

    def build(body, **settings):
        (tmp_path / "confined_rewards.py").write_text(f"def f(prompt, completion, answer):\n    {body}\n")
        settings = {"call_timeout_s": 2, "call_memory_mb": 512} | settings
        return build_scorer(ScorerConfig(verifier="function", function="confined_rewards.f", **settings))

    return build


@pytest.fixture(scope="module")
def judge():
    """Scores one program by tests: (value, reason)."""
    scorer = build_scorer(ScorerConfig(verifier="tests", call_timeout_s=2, call_memory_mb=512))

    def one(text, tests=ASSERTS, finish=FinishReason.EOS):
        [score] = scorer.score(group(text, answer=tests, finish=finish)).scores
        return score.value, score.reason

    return one


def outcomes(scorer, *texts):
    return [(score.value, score.reason) for score in scorer.score(group(*texts)).scores]


# A function of the user's


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("import time; time.sleep(60)", "ran out of time (scorer.call_timeout_s=2"),
        ("import os; os._exit(0)", "left with exit code 0"),
        ("import ctypes; ctypes.string_at(0)", "ended by SIGSEGV"),
        ("return 'x' * (1 << 40)", "raised MemoryError"),
        ("raise SystemExit(0)", "raised SystemExit"),
        ("class E(Exception): __str__ = lambda self: 1 / 0\n    raise E", "raised E, which raised ZeroDivisionError"),
        ("return 10**5000", "raised OverflowError"),
        ("return '1.0'", "no finite number"),
        ("return 1e300", "beyond 1e+30"),
        ("raise ValueError('half a pair: \\udcff')", "half a pair: \\udcff"),
        ("return 'x' * 10**6", "no finite number"),
        (
            "import os; [os.write(n, b'\\0\\0\\0\\x02{}' * 9) for n in range(3, 999) if w(n)]",
            "pipe that is not its own",
        ),
        ("import os; [os.write(n, b'{' * 9) for n in range(3, 999) if w(n)]", "pipe that is not its own"),
    ],
)
def test_a_function_that_goes_astray_costs_one_score(function, bad, words):
    opened = "import fcntl\n    w = lambda n: __import__('os').path.exists(f'/proc/self/fd/{n}') and"
    opened += " fcntl.fcntl(n, fcntl.F_GETFL) & 3 == 1\n    "
    scorer = function(
        f"{opened}if completion == 'bad':\n        {bad.replace(chr(10), chr(10) + '    ')}\n    return 0.5"
    )
    first, second, third = outcomes(scorer, "good", "bad", "good")
    assert first == third == (0.5, "")
    assert second[0] is None
    assert words in second[1]
    assert len(second[1]) < 600
    assert outcomes(scorer, "good") == [(0.5, "")]


def test_what_a_function_prints_goes_nowhere(function):
    scorer = function("import sys; print('x' * 10**5); sys.stderr.write('y'); return len(completion)")
    assert outcomes(scorer, "a", "bcd") == [(1.0, ""), (3.0, "")]


def test_calls_share_a_process_until_one_ends_it(function):
    scorer = function("import os\n    if completion == 'end': os._exit(3)\n    return os.getpid()")
    (a, _), (b, _), (c, why), (d, _), (e, _) = outcomes(scorer, "1", "2", "end", "3", "4")
    assert a == b != d == e
    assert (c, "exit code 3" in why) == (None, True)


def test_a_process_that_holds_all_that_it_may_is_replaced(function):
    """It keeps 8 MiB a call, and comes to its limit again and again."""
    body = "f.kept = getattr(f, 'kept', []) + [bytearray(8 << 20)]\n    return len(f.kept)"
    scorer = function(body, call_memory_mb=256)
    found = [outcome for _ in range(6) for outcome in outcomes(scorer, *["x"] * 16)]
    silent = [why for value, why in found if value is None]
    assert 1 <= len(silent) <= 96 // 8  # 256 MiB take more than seven
    assert all("MemoryError" in why for why in silent)


def test_a_function_is_another_when_any_file_of_its_package_is(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "confined_package"
    package.mkdir()
    (package / "__init__.py").write_text("from confined_package.inner import f\n")
    names = []
    for value in (1.0, -1.0):
        (package / "inner.py").write_text(f"def f(prompt, completion, answer):\n    return {value}\n")
        names.append(build_scorer(ScorerConfig(verifier="function", function="confined_package.f")).name)
    assert names[0] != names[1]


def test_a_function_that_changes_during_a_run_is_refused(function):
    scorer = function("import os; os._exit(0) if completion == 'end' else 0; return 1")
    function("return 2")
    assert outcomes(scorer, "1", "end")[0] == (1.0, "")
    with pytest.raises(ConfigError, match="changed while the run goes on"):
        scorer.score(group("1"))


def test_a_function_that_hangs_when_it_is_imported_is_refused(tmp_path, monkeypatch):
    (tmp_path / "slow_rewards.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = ScorerConfig(verifier="function", function="slow_rewards.f", start_deadline_s=1)
    with pytest.raises(ConfigError, match=r"importing 'slow_rewards' ran out of time.*scorer\.start_deadline_s=1"):
        build_scorer(config)


def test_a_function_is_not_imported_where_the_secrets_are(function):
    scorer = function("import os; raise RuntimeError(sorted({'HOME', 'OPENAI_API_KEY'} & set(os.environ)))")
    assert "confined_rewards" not in sys.modules
    [(_, reason)] = outcomes(scorer, "x")
    assert "['HOME']" in reason


# Generated code and its tests


@pytest.mark.parametrize(
    ("text", "value", "words"),
    [
        (f"Here:\n```python\n{RIGHT}```\nDone.", 1.0, ""),
        (f"```\n{WRONG}```\nNo, rather\n```py\n{RIGHT}```", 1.0, ""),
        (f"```python\n{RIGHT}", 1.0, ""),
        (RIGHT, 1.0, ""),
        (WRONG, 0.0, "the tests raised AssertionError"),
        ("", 0.0, "the tests raised NameError"),
        ("def f(x:", 0.0, "the code raised SyntaxError"),
        ("Sorry, I cannot.", 0.0, "SyntaxError"),
        ("```python\n```\nprose only", 0.0, "NameError"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    a: 'int'\ndef f(x): return A(x + 1).a", 1.0, ""),
        ("import threading\nt = threading.Thread(target=int); t.start(); t.join()\n" + RIGHT, 1.0, ""),
    ],
)
def test_code_is_right_where_its_tests_hold(judge, text, value, words):
    found, reason = judge(text)
    assert (found, words in reason) == (value, True)


SKIP_ASSERTS = """
import sys
def jump(frame, event, arg):
    if frame.f_code.co_filename == "<tests>" and event == "line" and frame.f_lineno == 1:
        frame.f_lineno = 3
    return jump
sys.settrace(jump)
f = int
"""
GUESS = """
import os
def f(x):
    for n in range(3, 999):
        try:
            os.write(n, b'\\0\\0\\0\\x0e{"token": "x"}')
        except OSError:
            pass
    os._exit(0)
"""
ATTACKS = {
    "leaves with success": ("import sys; sys.exit(0)", "SystemExit"),
    "leaves at once": ("import os; os._exit(0)", "exit code 0"),
    "leaves within the tests": ("import os\ndef f(x): os._exit(0)", "exit code 0"),
    "raises leaving within the tests": ("def f(x): raise SystemExit(0)", "SystemExit"),
    "prints success": ("print('{\"token\": true}')\nf = int", "AssertionError"),
    "guesses the token": (GUESS, "pipe that is not its own"),
    "skips asserts by tracing": (SKIP_ASSERTS, "AssertionError"),
    "patches builtins": ("import builtins as b\nb.compile = b.exec = b.len = lambda *a: 2\nf = int", "AssertionError"),
    "patches AssertionError": ("import builtins\nclass A(Exception): pass\nbuiltins.AssertionError = A\nf = int", ""),
    "closes everything": ("import os\nos.closerange(0, 999)\ndef f(x): return x + 1", "exit code"),
    "loops": ("while True: pass", "ran out of"),
    "hogs memory": ("x = [0] * (1 << 40)", "MemoryError"),
    "hogs memory slowly": ("x = []\nwhile True: x.append(bytes(1 << 20))", "MemoryError"),
    "takes memory that is not counted": (
        "import os\nfd = os.memfd_create('x')\nos.ftruncate(fd, 1 << 20)\ndef f(x): return x + 1",
        "PermissionError",
    ),
    "takes memory that outlives it": (
        "import ctypes\nif ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) < 0: raise MemoryError\ndef f(x): return x + 1",
        "MemoryError",
    ),
    "recurses": ("def f(x): return f(x)", "RecursionError"),
    "forks": ("import os\nwhile True: os.fork()", "PermissionError"),
    "starts programs": ("import subprocess; subprocess.run(['true'])", "PermissionError"),
    "becomes a program": ("import os; os.execv('/bin/true', ['true'])", "PermissionError"),
    "starts threads without end": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
        "can't start new thread",
    ),
    "writes a big file": ("with open('big', 'wb') as f: f.write(bytes(32 << 20))", "File too large"),
    "fills the disk": (
        "for n in range(99):\n  with open(str(n), 'wb') as f: f.write(bytes(16 << 20))",
        "No space left",
    ),
    "opens a thousand files": ("x = [open('/dev/null') for _ in range(1000)]", "Too many open files"),
    "opens a socket": ("import socket; socket.create_connection(('127.0.0.1', 1))", "PermissionError"),
    "opens a local socket": ("import socket; socket.socket(socket.AF_UNIX)", "PermissionError"),
    "kills its parent": ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
    "kills everybody": ("import os; os.kill(-1, 9)", "PermissionError"),
    "lets the kernel kill": ("import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())", "PermissionError"),
    "limits its parent": ("import os, resource as r; r.prlimit(os.getppid(), r.RLIMIT_CPU, (1, 1))", "PermissionError"),
    "lifts its limits": ("import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40))", "not allowed to raise"),
    "makes namespaces": (
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n"
        "assert c.unshare(0x10000000), 'got in'\nassert ctypes.get_errno() == 1, 'other'\nf = int",
        "the tests raised",
    ),
    "reads a secret": (f"import os; assert '{SECRET}' not in str(os.environ)\nf = int", "the tests raised"),
    "raises an endless message": ("raise Exception('x' * 10**7)", "xxx..."),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_code_scores_nothing(judge, attack, monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", SECRET)
    text, words = ATTACKS[attack]
    value, reason = judge(text)
    assert value == 0.0
    assert words in reason
    assert reason
    assert len(reason) < 600


def test_hostile_code_finds_other_files_read_only_and_other_processes_closed(judge, tmp_path):
    if Confined(Limits(time_s=2, memory_mb=512), 10, path=[]).lacking:
        pytest.skip("the kernel gives no namespaces here")
    theirs = tmp_path / "ledger"
    theirs.write_text("before")
    for code in (f"open({str(theirs)!r}, 'w')", f"import os; os.unlink({str(theirs)!r})"):
        assert "Read-only file system" in judge(code)[1]
    assert theirs.read_text() == "before"
    for name in ("environ", "mem", "fd/0"):
        assert "Permission" in judge(f"import os; open(f'/proc/{{os.getppid()}}/{name}', 'rb').read(1)")[1]


def test_nothing_is_handed_on_from_one_completion_to_the_next(judge):
    leave = "import builtins, os\nbuiltins.left = 1\nopen('left', 'w').close()\n" + RIGHT
    look = "import builtins, os\nassert not hasattr(builtins, 'left') and not os.listdir('.')\n" + RIGHT
    assert [judge(text)[0] for text in (leave, look)] == [1.0, 1.0]


def test_only_tests_that_can_be_asked_make_a_score(judge):
    assert judge(RIGHT, tests=None) == (None, "the prompt has no tests as its reference answer")
    assert judge(RIGHT, finish=FinishReason.ABORTED) == (None, "the completion was aborted")
    assert judge(RIGHT, finish=FinishReason.LENGTH) == (0.0, "the completion was cut off")
    value, reason = judge(RIGHT, tests="assert f(1 ==")
    assert (value, "the tests cannot be compiled: SyntaxError" in reason) == (None, True)


@pytest.mark.timeout(20)
def test_code_that_closes_its_pipes_and_stays_has_no_more_time_than_others(judge):
    value, reason = judge("import os, time\nos.closerange(3, 999)\ntime.sleep(600)")
    assert (value, reason) == (0.0, "the code closed the pipe that is not its own")


def test_what_a_process_said_before_it_left_is_heard():
    child = Confined(Limits(time_s=2, memory_mb=512), 10, path=[])
    deadline = time.monotonic() + 10
    child.send({"code": "def f(x:"}, deadline)
    while "Z" not in Path(f"/proc/{child.pid}/stat").read_text():
        time.sleep(0.01)
    child.send({"tests": "assert True"}, deadline)
    assert "SyntaxError" in child.receive(deadline)["failed"]
    with pytest.raises(Stopped, match="left with exit code 0"):
        child.receive(deadline)
    child.close()


def test_no_process_is_an_abstention(judge, monkeypatch):
    monkeypatch.setattr(sandbox, "_START", "import os; os._exit(7)")
    assert judge(RIGHT) == (None, "the process for the tests left with exit code 7 when it was started")
    with pytest.raises(ConfigError, match="exit code 7"):
        build_scorer(ScorerConfig(verifier="tests"))


@pytest.mark.parametrize(
    ("text", "code"),
    [("a", "a"), ("```\na\n```", "a\n"), ("```\na\n```\n```py\nb\n", "b\n"), ("x `` ` y", "x `` ` y")],
)
def test_the_code_of_a_text_is_its_last_block(text, code):
    assert code_of(text) == code


# Where the kernel gives less, and when the parent goes


def test_without_namespaces_the_rest_still_holds(judge, monkeypatch, caplog, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.write_text("before")
    monkeypatch.setattr(sandbox, "_START", NO_NAMESPACES)
    sandbox._warn_once.cache_clear()
    for attack in ("opens a socket", "forks", "kills its parent", "writes a big file"):
        value, reason = judge(ATTACKS[attack][0])
        assert (value, ATTACKS[attack][1] in reason) == (0.0, True)
    assert judge(RIGHT)[0] == 1.0
    for path in (theirs, *(f"/proc/{os.getpid()}/{name}" for name in ("mem", "environ"))):
        assert "PermissionError" in judge(f"open('{path}', 'rb' if 'environ' in '{path}' else 'r+b')")[1]
    assert "PermissionError" in judge(f"import os\nos.unlink('{theirs}')")[1]
    assert theirs.read_text() == "before"
    assert caplog.text.count("weaker here than it should be: no namespaces") == 1
    sandbox._warn_once.cache_clear()


def test_a_confined_process_ends_with_its_parent():
    code = (
        "import os, time\nfrom actors.sandbox.process import Confined, Limits\n"
        "child = Confined(Limits(time_s=600, memory_mb=512), 10, path=[])\n"
        "child.send({'code': 'import time; time.sleep(600)'}, time.monotonic() + 9)\n"
        "print(child.pid, flush=True)\ntime.sleep(600)"
    )
    root = Path(__file__).parent.parent
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait(30)
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, "the confined process is still there"
        time.sleep(0.02)


def test_a_process_leaves_no_folder_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    child = Confined(Limits(time_s=2, memory_mb=512), 10, path=[])
    assert list(tmp_path.iterdir())
    child.close()
    assert not list(tmp_path.iterdir())


def test_folders_of_owners_that_were_killed_are_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lives = Confined(Limits(time_s=2, memory_mb=512), 10, path=[])
    [used] = tmp_path.iterdir()
    (tmp_path / "agon-sandbox-abandoned" / "inside").mkdir(parents=True)
    for folder in tmp_path.iterdir():
        os.utime(folder, (0, 0))
    (tmp_path / "agon-sandbox-just-made").mkdir()
    Confined(Limits(time_s=2, memory_mb=512), 10, path=[]).close()
    assert {folder.name for folder in tmp_path.iterdir()} == {used.name, "agon-sandbox-just-made"}
    lives.close()
