"""A checkpoint is whole or absent, says what is wrong with it, and loads on any number of ranks."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from learners.checkpoint import Checkpoint, State, write_folder
from learners.manifest import manifest_digest
from learners.saving import Saver
from orchestrator.errors import DeadlineError, ModelError
from tests.ranks import free_port


def make_state(seed=0):
    random = torch.Generator().manual_seed(seed)
    weights = {f"layer.{i}.weight": torch.randn(6, 5, generator=random) for i in range(3)} | {"norm": torch.ones(7)}
    moments = {"step.norm": torch.tensor(float(seed)), "exp_avg.norm": torch.full((7,), float("nan"))}
    keys = torch.arange(48, dtype=torch.uint8).view(3, 16)
    return State(tensors={"weights": weights, "optimizer": moments, "known": {"keys": keys}}, facts={"step": seed})


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def assert_holds(folder, state):
    found = Checkpoint(folder)
    assert found.facts == state.facts
    for entry, tensors in state.tensors.items():
        read = found.read(entry)
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(bits(read[name]), bits(tensor)), name


@pytest.mark.parametrize("file_bytes", [1, 200, 1 << 30])
def test_what_is_written_is_read_in_however_many_files(tmp_path, file_bytes):
    digest = write_folder(tmp_path / "saved", make_state(), file_bytes=file_bytes)
    assert_holds(tmp_path / "saved", make_state())
    assert Checkpoint(tmp_path / "saved").names("reference") == []
    # Files of 200: a layer (120 bytes), a layer, a layer with norm (28), step (4) and moment (28), keys (48).
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == {1: 7, 200: 4, 1 << 30: 1}[file_bytes]
    manifest = (tmp_path / "saved" / "manifest.json").read_bytes()
    assert digest == manifest_digest(tmp_path / "saved") == xxhash.xxh3_64_hexdigest(manifest)
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert json.loads(manifest)["files"].keys() == files - {"manifest.json"}
    for name, record in json.loads(manifest)["files"].items():
        content = (tmp_path / "saved" / name).read_bytes()
        assert record == {"size": len(content), "digest": xxhash.xxh3_64_hexdigest(content)}


def test_any_byte_that_is_lost_or_turned_is_told_with_its_file(tmp_path):
    folder = tmp_path / "saved"
    write_folder(folder, make_state(), file_bytes=200)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        cases = [(None, "is missing"), (whole[:-2], "is truncated|is damaged"), (whole + b"x", "is damaged")]
        for place in (0, len(whole) // 2, len(whole) - 1):
            turned = bytearray(whole)
            turned[place] ^= 1
            cases.append((bytes(turned), "is damaged"))
        if path.name == "manifest.json":  # its own content is what the ledger's digest is for
            cases = [*cases[:2], (b"{}", "is damaged"), (b'{"files": {"../../x": {}}}', "is damaged")]
        for content, said in cases:
            path.unlink() if content is None else path.write_bytes(content)
            with pytest.raises(ModelError, match=f"{path.name} ({said})"):
                Checkpoint(folder)
            path.write_bytes(whole)
    Checkpoint(folder)
    (folder / "more.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"more\.safetensors is not in manifest\.json"):
        Checkpoint(folder)


RECORDS = st.dictionaries(st.sampled_from(["size", "digest", "x"]), st.none() | st.integers() | st.text())
NAMED = st.dictionaries(st.text() | st.just("trainer.json"), st.none() | st.lists(st.integers()) | RECORDS)


@given(
    content=st.binary() | st.fixed_dictionaries({"files": NAMED | st.integers()}).map(lambda v: json.dumps(v).encode())
)
def test_a_manifest_that_is_anything_else_is_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("saved")
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(str(folder))):
        Checkpoint(folder)


def test_other_names_or_shapes_are_refused(tmp_path):
    write_folder(tmp_path / "saved", make_state())
    found = Checkpoint(tmp_path / "saved")
    for other in ({}, {"norm": torch.ones(7)}, found.read("weights") | {"norm": torch.ones(8)}):
        with pytest.raises(ModelError, match="another model: its weights"):
            found.load_into("weights", other)


def test_a_writer_killed_at_any_instant_leaves_the_old_the_new_or_none(tmp_path):
    """Killed at the n-th thing it asks of the file system, for every n, and the next writer is not in its way."""
    target = tmp_path / "saved"
    seen = set()
    for instant in range(1000):
        write_folder(target, make_state(1))
        child = os.fork()
        if child == 0:
            asked = iter(range(instant))

            def count(event, arguments, asked=asked):
                path = str(arguments[0]) if arguments else ""
                if event.split(".")[0] in ("open", "os", "shutil") and str(tmp_path) in path and next(asked, -1) < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            write_folder(target, make_state(2), file_bytes=200)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if target.exists():
            step = Checkpoint(target).facts["step"]
            assert_holds(target, make_state(step))
            seen.add(step)
        else:
            seen.add(None)
        if status == 0:
            break
    assert instant > 10
    assert os.WIFEXITED(status)
    assert seen == {1, 2, None}
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def with_largest_file(size, work):
    """Does `work` where files cannot grow beyond `size` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_leaves_the_old_folder_and_tells_who_waits(tmp_path):
    target = str(tmp_path / "saved")
    saver = Saver(60)
    saver.save(target, make_state(1).copy)
    assert saver.saved(target) == saver.saved(target) == manifest_digest(target)

    def fail():
        saver.save(target, make_state(2).copy)
        with pytest.raises(OSError, match="make room on that disk") as raised:
            saver.saved(target)
        assert raised.value.filename == target
        assert raised.value.errno is not None

    with_largest_file(500, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert_holds(target, make_state(1))
    with pytest.raises(RuntimeError, match="save comes first"):
        saver.saved(target)
    saver.save(target, make_state(2).copy)
    saver.saved(target)
    assert_holds(target, make_state(2))


def test_bytes_that_the_disk_gives_back_otherwise_are_no_checkpoint(tmp_path, monkeypatch):
    def spoil(path):
        if path.suffix == ".safetensors":
            path.write_bytes(path.read_bytes()[:-1] + b"!")
        return record_of(path)

    from learners import checkpoint

    record_of = checkpoint.record_of
    monkeypatch.setattr(checkpoint, "record_of", spoil)
    with pytest.raises(OSError, match="another content is read back"):
        write_folder(tmp_path / "saved", make_state())
    assert list(tmp_path.iterdir()) == []


def test_a_copy_is_written_while_training_goes_on_and_one_at_a_time(tmp_path, monkeypatch):
    """The second copy is not made before the first is written; what is trained meanwhile is in neither."""
    started, go_on, copied = threading.Event(), threading.Event(), []

    def slow(folder, state, *, group):
        started.set()
        assert go_on.wait(60)
        return write_folder(folder, state, group=group)

    monkeypatch.setattr("learners.saving.write_folder", slow)
    saver, live = Saver(60), make_state(1)
    saver.save(str(tmp_path / "first"), live.copy)
    assert started.wait(60)
    for tensor in live.tensors["weights"].values():
        tensor.add_(1)
    second = threading.Thread(target=saver.save, args=(str(tmp_path / "second"), lambda: copied.append(1) or live))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert copied == []
    impatient = Saver(0.01)
    impatient._writes = saver._writes
    with pytest.raises(DeadlineError, match=r"first not written within 0\.01 s\. Raise learner\.step_deadline_s"):
        impatient.saved(str(tmp_path / "first"))
    go_on.set()
    second.join(60)
    saver.saved(str(tmp_path / "second"))
    assert_holds(tmp_path / "first", make_state(1))
    assert_holds(tmp_path / "second", live)


def sharded(mesh, state):
    """The state with its matrices and vectors cut over the ranks."""
    from torch.distributed.tensor import Shard, distribute_tensor

    cut = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in state.tensors["weights"].items()}
    return State(tensors={**state.tensors, "weights": cut}, facts=state.facts)


def on_rank(number, folder, port):
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    from learners.ranks import new_group

    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    write_folder(folder / "two", sharded(mesh, make_state(2)), group=new_group(), file_bytes=200)

    blank = sharded(mesh, State(tensors={"weights": {k: v * 0 for k, v in weights().items()}}, facts={}))
    Checkpoint(folder / "one").load_into("weights", blank.tensors["weights"])
    for name, tensor in weights().items():
        assert torch.equal(blank.tensors["weights"][name].full_tensor(), tensor)

    model = nn.Linear(5, 6)
    fully_shard(model, mesh=mesh)
    model.load_state_dict({"weight": sharded_like(model.weight), "bias": model.bias})
    write_folder(folder / "fsdp", State(tensors={"weights": dict(model.named_parameters())}, facts={}))

    if number == 0:
        next((folder / "one").glob("*.safetensors")).write_bytes(b"")
    torch.distributed.barrier()
    with pytest.raises(ModelError, match=r"safetensors is truncated, 0 of"):
        Checkpoint(folder / "one")
    blocked = folder / "blocked" / "saved"
    with pytest.raises(OSError, match="could not be written") as raised:
        write_folder(blocked, make_state())
    assert raised.value.filename == str(blocked)
    torch.distributed.destroy_process_group()


def weights():
    return make_state(1).tensors["weights"]


def sharded_like(parameter):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(weights()["layer.0.weight"], parameter.device_mesh, parameter.placements)


def test_ranks_save_their_shards_and_others_load_them(tmp_path):
    """Two save and one loads; one saves and two load; both say what is wrong."""
    write_folder(tmp_path / "one", make_state(1))
    Path(tmp_path / "blocked").write_text("a file where a folder should be")
    multiprocessing.spawn(on_rank, (tmp_path, free_port()), nprocs=2)
    names = {path.name[:11] for path in (tmp_path / "two").glob("*.safetensors")}
    assert names == {"shard-00001", "shard-00002"}
    assert_holds(tmp_path / "two", make_state(2))
    assert torch.equal(Checkpoint(tmp_path / "fsdp").read("weights")["weight"], weights()["layer.0.weight"])
