"""Nothing of ours runs what a file or a socket holds: each call that could is found by name."""

from __future__ import annotations

import ast
import builtins
import io
import os
import pickle
import sys
from collections import OrderedDict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties

from megafork.data.sample import Group, Sample
from megafork.errors import PeerError
from megafork.parallel.unpickling import SafeUnpickler, guard_collectives, guarded_checkpoint

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for folder in ("megafork", "tools", "examples") for path in (ROOT / folder).rglob("*.py")
]
OF_PICKLES = {"load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "jsonpickle"}
REMOTE_CODE = {"from_pretrained", "from_config", "load_dataset"}
KNOWN = {
    ("tools/benchmarks/ranks.py", "pickle.loads"),  # of a fork's own pipe
    ("tools/benchmark_plan.py", "from_config"),  # of a config made there
}


def calls(tree):
    """(dotted name of what is called, the call)"""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def value_of(call, name):
    for keyword in call.keywords:
        if keyword.arg == name:
            return ast.unparse(keyword.value)
    return None


def findings(source):
    """What may run the data that it is given."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "pickle":
                yield "from pickle import"
        yield from (f"import {name}" for name in names if name.split(".")[0] in MODULES)
    for name, call in calls(tree):
        last = name.split(".")[-1]
        if name in RUNS_TEXT or (name.startswith("builtins.") and last in RUNS_TEXT):
            yield name
        if name in {f"pickle.{end}" for end in OF_PICKLES}:
            yield name
        if name == "torch.load" and value_of(call, "weights_only") != "True":
            yield name
        if name in ("numpy.load", "np.load") or value_of(call, "allow_pickle") == "True":
            yield name
        if value_of(call, "shell") == "True" or name in ("os.system", "os.popen"):
            yield name
        is_remote = last in REMOTE_CODE and not name.startswith("ModelShape")
        if is_remote and value_of(call, "trust_remote_code") != "False":
            yield last
        if value_of(call, "trust_remote_code") not in (None, "False"):
            yield f"{name}: trust_remote_code"


def test_nothing_runs_what_it_reads():
    found = {
        (str(path.relative_to(ROOT)), what)
        for path in SOURCES
        for what in findings(path.read_text())
    }
    assert found == KNOWN


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)",
        "exec(x)",
        "builtins.exec(x)",
        "pickle.load(f)",
        "pickle.Unpickler(f).load()",
        "from pickle import loads",
        "import yaml",
        "import joblib",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "numpy.load(f)",
        "x(allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "AutoTokenizer.from_pretrained(x)",
        "load_dataset(x)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=config.trust)",
    ],
)
def test_the_search_finds(source):
    assert list(findings(source))


# ------------------------------------------------------------------- the unpickler


class Calls:
    """Pickled, it is a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def unpickled(value):
    return SafeUnpickler(io.BytesIO(pickle.dumps(value))).load()


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "os.mkdir", "posix.system", "subprocess.Popen", "builtins.eval"),
        *("builtins.exec", "builtins.getattr", "builtins.open", "builtins.__import__"),
        *("importlib.import_module", "functools.partial", "operator.attrgetter"),
        *("torch.load", "torch.hub.load", "pickle.loads", "shutil.rmtree", "runpy.run_path"),
        "torch.distributed.checkpoint.filesystem.pickle",
        "torch.distributed.checkpoint.filesystem.FileSystemReader",
        "torch.distributed.checkpoint.metadata.os",
        "megafork.verifiers.pool.WorkerPool",
        "megafork.cluster.launch.launch_ranks",
        "megafork.errors.__builtins__",
        "megafork.__main__.main",
        "antigravity.fly",
    ],
)
def test_what_could_run_code_is_not_found(tmp_path, name):
    module, _, function = name.rpartition(".")
    imported_before = set(sys.modules)
    # As pickle writes it, whether there is such a function or not.
    text = f"c{module}\n{function}\n(V{tmp_path}/made\ntR."
    dotted = (
        pickle.PROTO
        + b"\x04"
        + b"".join(
            pickle.BINUNICODE + len(part).to_bytes(4, "little") + part.encode()
            for part in (module.split(".")[0], ".".join([*module.split(".")[1:], function]))
        )
    )
    for pickled in (text.encode(), dotted + pickle.STACK_GLOBAL + b")R."):
        with pytest.raises(pickle.UnpicklingError, match="nothing of ours writes"):
            SafeUnpickler(io.BytesIO(pickled)).load()
    assert set(sys.modules) == imported_before
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_may_not_carry_a_pickle(tmp_path):
    """torch's own function for storages loads whatever bytes it is given."""
    evil = io.BytesIO()
    torch.save(Calls(os.mkdir, str(tmp_path / "made")), evil)
    with pytest.raises(pickle.UnpicklingError):
        unpickled(Calls(torch.storage._load_from_bytes, evil.getvalue()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "x", b"y", (1,), {3}, frozenset({4})]},
        OrderedDict(a=1),
        deque([1]),
        Path("/a/b"),
        slice(1, 2),
        torch.Size([2, 3]),
        torch.bfloat16,
        PeerError,
        Group(1, [2, 3], 0, [Sample(0, [4], [-0.5], truncated=False)]),
        MetadataIndex("a", torch.Size([0])),
        TensorProperties(dtype=torch.float32),
        Metadata({}, storage_data={}),
    ],
    ids=str,
)
def test_what_ranks_say_to_each_other_comes_through(value):
    assert unpickled(value) == value


def test_an_array_may_not_carry_a_pickle(tmp_path):
    """One of objects holds whatever it is given."""
    evil = np.array([Calls(os.mkdir, str(tmp_path / "made"))], object)
    with pytest.raises(pickle.UnpicklingError):
        unpickled(evil)
    assert list(tmp_path.iterdir()) == []


def test_tensors_come_through():
    for tensor in (torch.arange(5), torch.randn(2, 3, dtype=torch.bfloat16).T):
        assert torch.equal(unpickled(tensor), tensor)


def test_errors_come_through():
    for error in (OSError(28, "No space left on device", "a"), PeerError("b"), KeyError("c")):
        found = unpickled(error)
        assert type(found) is type(error) and found.args == error.args


def test_collectives_are_guarded(monkeypatch):
    monkeypatch.setattr(distributed_c10d, "_unpickler", pickle.Unpickler)
    guard_collectives()
    tensor, size = distributed_c10d._object_to_tensor(Calls(builtins.print, 1), "cpu", None)
    with pytest.raises(pickle.UnpicklingError):
        distributed_c10d._tensor_to_object(tensor, size, None)


def test_torch_load_is_guarded_inside_and_as_before_outside(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    torch.save(Calls(os.mkdir, str(tmp_path / "made")), tmp_path / "evil.pt")
    with guarded_checkpoint(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "evil.pt", weights_only=False)
    assert not (tmp_path / "made").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "made").exists()
