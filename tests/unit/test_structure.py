"""The order of the rooms, names that occur once, functions that fit a page, light imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "megafork"
ROOMS = (
    *("answers", "errors", "ops", "system", "config", "parallel", "data", "algorithms", "model"),
    *("checkpoint", "verifiers", "rollout", "cluster", "weights", "vllm_plugin", "metrics"),
    *("evaluation", "controller", "trainer", "train", "plan", "analysis", "cli"),
    *("__init__", "__main__"),
)
"""A module may import from its own room and from those before it; docs/design.md has the table."""
LIGHT = [
    "__init__",
    "config",
    "data.chat_template",
    "data.hf_tokenizer",
    "data.prompts",
    "data.sample",
    "data.tokenizer",
    "data.unchanged",
    "evaluation.heldout",
    "metrics.log",
    "metrics.page",
    "metrics.tensorboard_events",
    "metrics.trackers",
    "metrics.writers",
    "model.shape",
    "parallel.addresses",
    "controller.agent",
    "controller.process",
    "rollout.batch_metrics",
    "rollout.collector",
    "rollout.ends",
    "rollout.engine",
    "rollout.fleet",
    "rollout.journal",
    "rollout.judging",
    "rollout.messages",
    "rollout.placement",
    "rollout.sampling",
    "rollout.step_journals",
    "rollout.supervisor",
    "rollout.tally",
    "system.extras",
    "system.plugins",
    "system.signals",
    "trainer.preflight",
    "trainer.run_dir",
    "verifiers.countdown",
    "verifiers.verifier",
    "cli",
]
"""Modules that a command needs before it has found its mistake, a process for each response, or the
controller."""
MOST_PARAMETERS = 7
COMMAND = "a command: typer makes an option of each parameter"
KERNEL = "a Triton kernel: it takes pointers, strides and sizes one by one"
PUBLIC = "the public API, whose signature is kept"
MANY_PARAMETERS = {
    "algorithms.surrogates.clipped_policy_loss": PUBLIC,
    "analysis.commands.run_command": COMMAND,
    "analysis.commands.tokens": COMMAND,
    "cluster.__main__.run": COMMAND,
    "ops.kernels.linear_head._forward_kernel": KERNEL,
    "ops.kernels.linear_head._gradient_kernel": KERNEL,
    "ops.kernels.linear_head._logits": KERNEL,
    "ops.vocab_parallel.forward": "an autograd Function's: tensors are its own arguments",
    "ops.vocab_parallel.linear_logprob_and_entropy": PUBLIC,
    "plan.command.plan": COMMAND,
}
"""Functions that may have more parameters, and why"""


def name_of(path: Path) -> str:
    """The module's name without the package's, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}


def room(module: str) -> int:
    return ROOMS.index(module.split(".")[0] or "__init__")


def imported(tree: ast.AST) -> list[str]:
    """Modules of the package that a file imports, without the package's name.

    `from megafork.a import b` imports a.b where there is such a file, and a otherwise.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megafork"):
            module = (node.module or "").removeprefix("megafork").lstrip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                found.append(inner if inner in TREES else module)
        if isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            found += [n.removeprefix("megafork.") for n in names if n.startswith("megafork.")]
    return found


def test_rooms_import_those_before_them():
    upwards = [
        f"{importer} imports {module}"
        for importer, tree in TREES.items()
        for module in imported(tree)
        if room(module) > room(importer)
    ]
    assert upwards == []
    assert {name.split(".")[0] or "__init__" for name in TREES} == set(ROOMS)


def test_a_module_name_occurs_once():
    """A folder's name apart: weights/ and model/weights.py are told apart by the dot."""
    names = Counter(path.stem for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


def test_imports_make_no_circle():
    """Of files, wherever in a file the import stands."""
    needs = {name: set(imported(tree)) - {name} for name, tree in TREES.items()}

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        todo = [start]
        while todo:
            new = needs[todo.pop()] - found
            found |= new
            todo += new
        return found

    reached = {name: reachable(name) for name in TREES}
    circles: list[set[str]] = []
    for name in TREES:
        circle = {other for other in reached[name] if name in reached[other]}
        if circle and circle not in circles:
            circles.append(circle)
    assert circles == []


def test_functions_fit_a_page():
    too_large = [
        f"{name}.{node.name}: {lines} lines"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := node.end_lineno - node.lineno + 1) > 60
    ]
    assert too_large == []


def test_functions_have_few_parameters():
    """Parameters beside self and cls."""
    many = {
        f"{name}.{node.name}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and num_parameters(node.args) > MOST_PARAMETERS
    }
    assert many - set(MANY_PARAMETERS) == set()


def num_parameters(arguments: ast.arguments) -> int:
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(each.arg not in ("self", "cls") for each in every)


def test_light_modules_stay_light():
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module('megafork.' + name)\n"
        "    heavy = {'torch', 'vllm', 'megatron', 'transformers'} & sys.modules.keys()\n"
        "    assert not heavy, f'{name} imports {heavy}'"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *LIGHT], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
