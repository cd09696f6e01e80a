"""Of all that failed, who started the ranks tells the cause; words that cannot be left are said."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from megafork.cluster import exits, launch
from megafork.controller.handle import Controller
from megafork.errors import USER_ERROR, PeerError, UserError
from megafork.rollout.messages import Silent
from megafork.system import failure_file
from megafork.system.signals import INTERRUPTED

KILL, TERM, ABORT = -signal.SIGKILL, -signal.SIGTERM, -signal.SIGABRT


@pytest.mark.parametrize(
    ("ranks", "first"),
    [
        # (words, are they its own, when they were left) or (exit status, when it ended)
        ([("here", True, 10.9), ("earlier", True, 10.2)], 1),
        ([("of another", False, 10.1), ("own", True, 10.2)], 1),
        ([("of another", False, 10.1), (KILL, 10.0)], 1),
        ([("own", True, 10.1), (ABORT, 10.2)], 0),
        ([("own", True, 12.1), (ABORT, 10.2)], 1),
        ([(TERM, 10.3), ("of another", False, 10.2)], 1),
        ([("of another", False, 10.1), (KILL, 40.1)], 0),  # it hung, and the agent ended it
        ([("of another", False, 10.1), (INTERRUPTED, 10.2)], 1),
        ([(INTERRUPTED, 10.0), (3, 10.1)], 1),
        ([("one", False, 10.1), ("two", False, 10.0)], 1),
        ([(TERM, 10.0), (TERM, 10.1)], 0),  # by somebody else
    ],
    ids=str,
)
def test_the_earliest_own_failure_or_death_is_told(tmp_path, monkeypatch, ranks, first):
    assert told_first(tmp_path, monkeypatch, ranks) == first


def told_first(tmp_path, monkeypatch, ranks, unseen=None):
    failures, times = {}, {}
    for rank, what in enumerate(ranks):
        path, status, ended = tmp_path / f"{rank}.json", USER_ERROR, what[-1]
        if isinstance(what[0], str):
            monkeypatch.setenv(failure_file.VARIABLE, str(path))
            monkeypatch.setattr(failure_file.time, "time", lambda ended=ended: ended)
            assert failure_file.leave(what[0], status=USER_ERROR, own=what[1])
        else:
            status = what[0]
        failures[rank] = SimpleNamespace(
            error_file=str(path), exitcode=status, timestamp=int(ended), pid=1000 + rank
        )
        if rank != unseen:
            times[1000 + rank] = ended
    return launch.first_end(failures, times).rank


def test_a_rank_that_ends_while_the_agent_waits_for_it_was_not_the_first(tmp_path, monkeypatch):
    """Whose end is known to the second alone."""
    ranks = [("of another", False, 10.8), (KILL, 10.7)]
    assert told_first(tmp_path, monkeypatch, ranks, unseen=0) == 1


def ended_with(error):
    def command():
        raise error

    with pytest.raises(SystemExit) as caught:
        exits.run(command)
    return caught.value.code


def test_a_rank_says_itself_what_it_cannot_leave(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for folder, told in ((tmp_path, ""), (tmp_path / "none", "error (rank 3): x is 3\n  more\n")):
        monkeypatch.setenv(failure_file.VARIABLE, str(folder / "words"))
        assert ended_with(UserError("x is 3\n  more")) == USER_ERROR
        assert capsys.readouterr().err == told
    words = failure_file.read(tmp_path / "words")
    assert (words.message, words.line, words.own) == ("x is 3\n  more", "x is 3", True)


def test_a_peers_failure_is_silent_and_its_words_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(failure_file.VARIABLE, str(tmp_path / "words"))
    assert ended_with(PeerError("rank 0 failed")) == USER_ERROR
    assert failure_file.leave("later", status=1)
    words = failure_file.read(tmp_path / "words")
    assert (words.message, words.own, words.status) == ("rank 0 failed", False, USER_ERROR)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [Silent("nothing was heard of it for 10 s"), EOFError("ended")])
def test_a_lost_controller_is_rank_zeros_to_tell(error):
    """All ranks notice it at once: what another one says must not be taken for the first cause."""

    def ask(*arguments, **options):
        raise error if isinstance(error, OSError) else OSError(str(error))

    rank = Controller(SimpleNamespace(rank=1), SimpleNamespace(ask=ask))
    with pytest.raises(PeerError, match=f"the controller .*: {error}"):
        rank.ask("batch", step=1)
