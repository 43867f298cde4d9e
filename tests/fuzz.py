"""Damaged inputs without end for everything that reads what others wrote: ``python -m tests.fuzz --inputs 1000000``.

Valid inputs are cut, repeated, spliced and changed by bytes and by values, by a seeded generator. Each reader must
refuse with an error of the project's own (`UserError`) or give what satisfies its properties, within five seconds.
Ends with a line for each target; what failed is kept in the folder --keep.

    prompts   records of a prompt file        verdicts    replies of judges, in every style
    configs   command lines and YAML files    checkpoints JSON and headers of safetensors
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from orchestrator.errors import UserError
from tests.fuzz_targets import TARGETS

HANG_S = 5
CHECKED_EVERY = 256


@dataclass
class Tally:
    """What became of the inputs of one target."""

    inputs: int = 0
    found: Counter = field(default_factory=Counter)

    def line(self, name):
        crashes, hangs, wrong = (self.found[kind] for kind in ("crash", "hang", "wrong"))
        accepted = f"{self.found['accepted']} accepted"
        return f"fuzz {name}: {self.inputs} inputs, {crashes} crashes, {hangs} hangs, {wrong} wrong, {accepted}"


class Hang(BaseException):
    """The alarm; a `BaseException`, so that no reader takes it for a fault of the input."""


def ring(*_):
    raise Hang


def attempt(run, case, tally, keep):
    """One case, which may hold several inputs; `run` gives how many of them were accepted."""
    signal.alarm(HANG_S)
    try:
        tally.found["accepted"] += run(case)
        return
    except UserError:
        return
    except Hang:
        kind, trace = "hang", traceback.format_exc()
    except AssertionError:
        kind, trace = "wrong", traceback.format_exc()
    except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
        kind, trace = "crash", traceback.format_exc()
    finally:
        signal.alarm(0)
    tally.found[kind] += 1
    keep.mkdir(parents=True, exist_ok=True)
    number = sum(tally.found[each] for each in ("crash", "hang", "wrong"))
    (keep / f"{run.__name__}-{kind}-{number}.txt").write_text(f"{case!r}\n\n{trace}")


def fuzz(inputs, seed, keep, minutes=math.inf):
    """Tallies by target; fewer inputs where the time runs out."""
    before = signal.signal(signal.SIGALRM, ring)
    deadline = time.monotonic() + 60 * minutes
    tallies = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, target in TARGETS.items():
                tally = tallies[name] = Tally()
                cases = target.cases(Random(f"{seed}/{name}"), Path(folder))
                wanted = math.ceil(inputs * target.share)
                while tally.inputs < wanted and (tally.inputs % CHECKED_EVERY or time.monotonic() < deadline):
                    attempt(target.run, next(cases), tally, keep)
                    tally.inputs += target.inputs_a_case
    finally:
        signal.signal(signal.SIGALRM, before)
    return tallies


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for inputs that failed")
    given = parser.parse_args()
    tallies = fuzz(given.inputs, given.seed, given.keep, given.minutes)
    for name, tally in tallies.items():
        print(tally.line(name))
    sys.exit(any(tally.found[kind] for tally in tallies.values() for kind in ("crash", "hang", "wrong")))


if __name__ == "__main__":
    main()
