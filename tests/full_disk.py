"""`python -m tests.full_disk RUN MOUNT`: resumes a run on a small disk, which is full when training starts.

Prints an object a line for each attempt: the exit code, what was said, what `agon audit` finds. Puts the run back into
RUN in the end.
"""

import errno
import io
import json
import os
import shutil
import sys
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from launch.audit import audit
from orchestrator.context import Context
from tests import faults


def fill(path, *, room):
    """Leaves so many bytes of a disk."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        file.truncate(max(0, file.tell() - room))


def attempt(run_dir, ballast, room):
    stage = Context.stage

    @contextmanager
    def filled(self, name, iteration, **options):
        with stage(self, name, iteration, **options) as found:
            if name == "train" and room is not None:
                fill(ballast, room=room)
            yield found

    said = io.StringIO()
    Context.stage = filled
    try:
        with redirect_stderr(said):
            code = faults.resume(run_dir)
    finally:
        Context.stage = stage
        ballast.unlink(missing_ok=True)
    print(json.dumps({"code": code, "said": said.getvalue(), "findings": audit(run_dir).findings}), flush=True)


def main():
    source, mount = map(Path, sys.argv[1:])
    run_dir = shutil.copytree(source, mount / "run")
    for room in (0, 1 << 20, None):
        attempt(run_dir, mount / "ballast", room)
    shutil.rmtree(source)
    shutil.copytree(run_dir, source)


if __name__ == "__main__":
    os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    main()
