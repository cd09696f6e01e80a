"""A run that goes on is not given other data without a word."""

from __future__ import annotations

import json

import pytest

from megafork.config import DataConfig
from megafork.data.prompts import encode_rows, read_both
from megafork.data.unchanged import check_unchanged, identity
from megafork.errors import UserError

ROWS = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(6)]


@pytest.fixture
def data(tmp_path):
    """Makes a config with these rows to train on and these held out."""

    def make(train, heldout=None, **settings):
        paths = {}
        for name, rows in (("train", train), ("eval", heldout)):
            if rows is not None:
                paths[name] = str(tmp_path / f"{name}.jsonl")
                (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return DataConfig(**paths, **settings)

    return make


def found(data):
    return identity(data, *read_both(data))


def save(run_dir, step, state):
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state))


CHANGES = {
    "a row removed": lambda: (ROWS[1:], ROWS[:2], {}),
    "a row added": lambda: ([*ROWS, ROWS[0]], ROWS[:2], {}),
    "another order": lambda: (ROWS[::-1], ROWS[:2], {}),
    "another answer": lambda: ([*ROWS[:5], ROWS[5] | {"answer": "11"}], ROWS[:2], {}),
    "another prompt": lambda: ([*ROWS[:5], ROWS[5] | {"prompt": "5+5="}], ROWS[:2], {}),
    "another seed": lambda: (ROWS, ROWS[:2], {"seed": 1}),
    "other held-out rows": lambda: (ROWS, ROWS[1:3], {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_is_refused(change, data, tmp_path):
    save(tmp_path, 10, {"data": found(data(ROWS, ROWS[:2]))})
    train, heldout, settings = CHANGES[change]()
    changed = data(train, heldout, **settings)
    with pytest.raises(UserError, match=r"step_000010 was trained on other data.*allow_changed"):
        check_unchanged(tmp_path, changed, found(changed))
    allowed = data(train, heldout, **settings, allow_changed=True)
    check_unchanged(tmp_path, allowed, found(allowed))


def test_the_same_data_in_another_place_is_the_same(data, tmp_path):
    """Held-out rows may come to a run that had none, and columns that nobody reads may change."""
    save(tmp_path, 9, {"data": found(data(ROWS[1:]))})
    save(tmp_path, 10, {"data": found(data(ROWS))})
    (tmp_path / "checkpoints" / "step_000011.partial").mkdir()
    more = data([row | {"source": "by hand"} for row in ROWS], ROWS[:2])
    check_unchanged(tmp_path, more, found(more))


def test_rows_that_are_left_out_are_no_part_of_the_data(data, tmp_path):
    """Another data.max_prompt_tokens is the same data as long as it leaves the same rows."""

    def of_length(most):
        settings = data([*ROWS, {"prompt": "100 + 100 =", "answer": "200"}], too_long="drop")
        settings = settings.model_copy(update={"max_prompt_tokens": most})
        train, _ = encode_rows(read_both(settings)[0], settings, list)  # a token a character
        return settings, identity(settings, train, [])

    save(tmp_path, 10, {"data": of_length(8)[1]})
    check_unchanged(tmp_path, *of_length(10))
    with pytest.raises(UserError, match=r"has 7 rows of digest .*, the run had 6 rows"):
        check_unchanged(tmp_path, *of_length(11))


@pytest.mark.parametrize("state", ["{}", "[", "[1]", '{"data": {}}', None])
def test_a_checkpoint_that_says_nothing_of_its_data_is_no_obstacle(state, data, tmp_path):
    """One of an older version, and a damaged one, which the search for a whole one tells of."""
    save(tmp_path, 10, {})
    path = tmp_path / "checkpoints" / "step_000010" / "state.json"
    path.unlink() if state is None else path.write_text(state)
    check_unchanged(tmp_path, data(ROWS), found(data(ROWS)))
