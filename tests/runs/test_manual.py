"""Every command of the README, docs/ and the examples' pages, as a reader runs it.

In a copy of the repository whose `.venv/bin/megafork` adds settings that make a run short.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.byte_model import save_byte_model
from tests.helpers.commands import ROOT, environment, left_over, tiny_engine
from tests.helpers.manual import PAGES, Block, blocks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("manual")]

RUN = {page: [b for b in blocks(page) if b.language == "bash" and not b.not_run] for page in PAGES}
README, OWN_DATA = ROOT / "README.md", ROOT / "docs" / "howto" / "own_data.md"
FROM_ITS_FOLDER = "from this folder"
"""A page of an example says so where its commands are not run from the repository's root"""
ON_VLLM = ("training.steps=3", "eval.prompts=64")
"""The README's quickstart, of which a step stays as it is"""
SHORT = (
    *("training.steps=2", "rollout.prompts_per_step=8", "rollout.group_size=8"),
    *("training.prompts_per_minibatch=4", "eval.prompts=32", "rollout.max_response_tokens=24"),
    *("rollout.dynamic_sampling=false", "algorithm.overlong_filtering=false"),
)
MODELS = {"models/Qwen3-0.6B": 40_960, "models/Qwen3-8B": 1024}
"""Small ones in their place, and the positions that they take"""


class Copy:
    """A copy of the repository, in which the manual's commands are run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._done = folder, set()
        files = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in files.stdout.split("\0")[:-1]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
        self._make_venv()
        for name, positions in MODELS.items():
            save_byte_model(folder / name, positions)
        (folder / "examples/reasoning_gym/models").symlink_to(folder / "models")
        for name, count in (("train", 32), ("heldout", 8)):
            rows = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(count)]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        for name in ("train", "eval"):
            (folder / f"{name}.tsv").write_text("prompt\tanswer\n2 + 2\t4\n3 + 3\t6\n" * 8)
        self.write_files(OWN_DATA)

    def _make_venv(self) -> None:
        real, copy = Path(sys.executable).parent, self.folder / ".venv"
        (copy / "bin").mkdir(parents=True)
        for path in real.parent.iterdir():
            if path.name != "bin":
                (copy / path.name).symlink_to(path)
        for path in real.iterdir():
            if path.name != "megafork":
                (copy / "bin" / path.name).symlink_to(path)
        self._engine = str(tiny_engine(self.folder))
        script = copy / "bin" / "megafork"
        script.write_text(f"""#!/bin/sh
case "$*" in
  *gpu_24gb.toml*) set -- "$@" data.max_prompt_tokens=1024 ;; # the small models read bytes
  *--dry-run*) ;;
  "train --resume "*) set -- "$@" training.steps=3 ;;
  "train "*)
    if [ "$ENGINE" ]; then set -- "$@" {" ".join(SHORT)} rollout.python="$ENGINE"
    else set -- "$@" {" ".join(ON_VLLM)}; fi ;;
  "eval "* | "generate "*)
    set -- "$@" rollout.samples=2 rollout.max_response_tokens=24 rollout.python="$ENGINE" ;;
esac
exec {real}/megafork "$@"
""")
        script.chmod(0o755)

    def write_files(self, page: Path) -> None:
        """Write what the page shows as a file, and remove what another page's runs left."""
        for block in blocks(page):
            if block.file_name is not None:
                (self.folder / block.file_name).write_text(block.text)
        for run in self.folder.glob("runs/*"):
            if not run.name.startswith("quickstart-"):
                shutil.rmtree(run)

    def run(self, block: Block, *, vllm: bool = False) -> None:
        """Run a block, unless one of the same text was run. vllm: instead of the tiny engine."""
        if block.text in self._done:
            return
        self._done.add(block.text)
        whole = block.page.read_text()
        parent = block.page.parent if FROM_ITS_FOLDER in whole else ROOT
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=self.folder / parent.relative_to(ROOT),
            env=environment(self.folder)
            | {"PATH": f"{self.folder}/.venv/bin:/usr/local/bin:/usr/bin:/bin"}
            | {"ENGINE": "" if vllm else self._engine},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        said = f"{block.place} ended with {done.returncode}\n{block.text}\n{done.stdout[-3000:]}"
        assert done.returncode == 0, said + done.stderr[-3000:]
        assert left_over(self.folder) == []


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The copy, after the README's first commands, on vLLM: other pages go on with those runs."""
    copy = Copy(tmp_path_factory.mktemp("manual"))
    copy.run(RUN[README][0], vllm=True)
    return copy


@pytest.mark.parametrize(
    "page",
    sorted(filter(RUN.get, PAGES), key=lambda page: page.stem != "quickstart"),
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_commands_of_the_page(copy, page):
    copy.write_files(page)
    for block in RUN[page]:
        copy.run(block)


def test_the_readme_trains():
    """Were no command found, the tests above would hold whatever the pages say."""
    assert len(RUN[README]) == 3
    assert any("megafork train mine.toml\n" in block.text for block in RUN[README])
    assert sum(map(len, RUN.values())) > 20
