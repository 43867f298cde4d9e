"""What is said of a remote failure is what went wrong, never the address of a manual."""

import os
import signal
import time

import pytest
import ray
from ray.exceptions import ActorDiedError

from orchestrator.errors import LostObjectError
from orchestrator.remote import fetch, last_words

DIED = "The actor died because of an error raised in its creation task, ray::Learner.__init__() (pid=7)"
VALIDATION = """  File "engine.py", line 7, in __init__
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, The checkpoint has model type `llamma` [type=value_error, input_value=ArgsKwargs(())]
    For further information visit https://errors.pydantic.dev/2.13/v/value_error"""


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (f"{DIED}\nTraceback (most recent call last):\nValueError: no such head", "ValueError: no such head"),
        (f"KeyError: 'a'\n{DIED}\norchestrator.errors.ModelError: cut short\n", "ModelError: cut short"),
        (f"{DIED}\n{VALIDATION}", "ValidationError: 1 validation error for ModelConfig Value error, The checkpoint"),
        ("The actor is dead: its node died.\n\nhttps://docs.ray.io/x", "its node died."),
    ],
)
def test_the_last_words_are_what_went_wrong(told, said):
    error = ActorDiedError.__new__(ActorDiedError)
    Exception.__init__(error, told)
    error.error_msg = told
    found = last_words(error)
    assert said in found
    assert "http" not in found
    assert "Traceback" not in found


class Owner:
    def ready(self):
        return os.getpid()

    def make(self):
        """A reference to what nobody but this process will ever have."""
        return [ray.remote(num_cpus=0)(lambda: time.sleep(600)).remote()]


class Reader:
    def read(self, refs):
        return fetch(refs[0], what="reader: its input", deadline_s=30, knob="x")

    def take(self, value):
        return value


@pytest.fixture(scope="module")
def gone(ray_cluster):
    """A reference whose owner is dead."""
    owner = ray.remote(num_cpus=0)(Owner).remote()
    (ref,) = ray.get(owner.make.remote())
    os.kill(ray.get(owner.ready.remote()), signal.SIGKILL)
    with pytest.raises(ActorDiedError):
        ray.get(owner.ready.remote(), timeout=30)
    return ref


@pytest.mark.parametrize("way", ["directly", "inside an actor", "as an argument"])
def test_bytes_that_died_with_their_owner_are_named(gone, way):
    reader = ray.remote(num_cpus=0)(Reader).remote()
    ref = {
        "directly": lambda: gone,
        "inside an actor": lambda: reader.read.remote([gone]),
        "as an argument": lambda: reader.take.remote(gone),
    }[way]()
    named = "taking it: an argument" if way == "as an argument" else f"object {gone.hex()}"
    with pytest.raises(LostObjectError, match=f"{named} died with the process or node that owned it"):
        fetch(ref, what="taking it", deadline_s=60, knob="x")
