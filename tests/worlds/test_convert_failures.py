"""A conversion that cannot be ended: what is told, and that nothing of it stays."""

from __future__ import annotations

import resource

import pytest

from megafork.errors import UserError
from tests.helpers.conversion import make, to_hf, to_megatron
from tools.benchmarks.ranks import run_ranks

pytestmark = pytest.mark.slow


def test_an_output_is_never_overwritten_nor_left_half_done(tmp_path):
    source = make(tmp_path / "m")
    megatron = to_megatron(source, tmp_path / "megatron")
    for convert in (lambda: to_megatron(source, megatron), lambda: to_hf(megatron, source)):
        with pytest.raises(UserError, match="exists: remove it or name another folder"):
            convert()
    last = sorted(megatron.glob("*.distcp"))[-2]
    last.write_bytes(last.read_bytes()[:5000])
    with pytest.raises(UserError, match=f"{last.name} cannot be read"):
        to_hf(megatron, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "megatron"]


def convert_without_room(convert, source, target, room):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    with pytest.raises(UserError, match=f"{target} could not be written .*: make room or name"):
        convert(source, target)


@pytest.mark.parametrize("room", [0, 50_000])
def test_a_full_disk_is_told_and_nothing_stays(tmp_path, room):
    source = make(tmp_path / "m")
    megatron = to_megatron(source, tmp_path / "megatron")
    for convert, folder in ((to_megatron, source), (to_hf, megatron)):
        run_ranks(1, convert_without_room, convert, folder, tmp_path / "out", room)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        to_megatron(source, tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "m", "megatron"]


def test_what_a_killed_conversion_left_is_not_taken_over(tmp_path):
    source = make(tmp_path / "m")
    left = tmp_path / "megatron.partial"
    left.mkdir()
    (left / "__0_9.distcp").write_text("half a tensor")
    files = {path.name for path in to_megatron(source, tmp_path / "megatron").iterdir()}
    assert "__0_9.distcp" not in files and not left.exists()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link exists"):
        to_megatron(source, tmp_path / "link")
