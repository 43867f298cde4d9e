"""What is said of a remote failure is what went wrong, never the address of a manual."""

import pytest
from ray.exceptions import ActorDiedError

from orchestrator.remote import last_words

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
