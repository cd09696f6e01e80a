"""Plug-ins by import path: how they are found, and what is said of those that do wrong."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import torch

from megafork.algorithms.advantages import check_advantages
from megafork.algorithms.losses import policy_loss
from megafork.algorithms.objectives import LossOutputs, load_objective
from megafork.algorithms.rules import Tokens, credit_weights, load_rule
from megafork.config import AlgorithmConfig, PromptConfig, TrainConfig
from megafork.config.load import load_config
from megafork.data.prompts import read_rows
from megafork.errors import UserError
from megafork.metrics.writers import Writers
from megafork.system.plugins import load_plugin
from megafork.trainer.preflight import check_plugins
from tests.helpers.loss_rows import rows_of

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart" / "config.toml"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Writes mine.py into the working directory; its names are new at every call."""
    monkeypatch.chdir(tmp_path)

    def write(source, name="mine"):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))

    return write


def tokens_of(num_tokens):
    ones = torch.ones(num_tokens)
    return Tokens(
        entropy_T=ones,
        logprobs_T=-ones,
        rollout_logprobs_T=-ones,
        ref_logprobs_T=None,
        token_T=ones.long(),
        advantages_T=ones,
        loss_mask_T=ones.bool(),
        key_T2=torch.stack([ones.long(), torch.arange(num_tokens)], 1),
        length_T=torch.full((num_tokens,), num_tokens),
        reward_T=ones,
        sequence_T=torch.zeros(num_tokens, dtype=torch.int64),
        num_sequences=1,
        groups=(),
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.objective=gpso", r"'gpso' is unknown: did you mean gspo\? There are ppo, gspo"),
        ("algorithm.advantages=grup", r"did you mean group\? There are group, gae, and any funct"),
        ("forking.select=topp", r"did you mean top\? There are top, bottom, random, all"),
        ('algorithm.credit=["weights"]', r"'weights' is unknown: It takes any function as MODULE"),
        (
            'logging.writers=["wandbb"]',
            r"'wandbb' is unknown: did you mean wandb\? There are tensorb",
        ),
        ("data.reader=csv", r"data.reader='csv' is unknown: It takes any function"),
    ],
)
def test_an_unknown_name_names_the_nearest(override, message):
    with pytest.raises(UserError, match=message):
        load_config(TrainConfig, QUICKSTART, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.objective=mine:lost", "'mine:lost' cannot be imported: module 'mine' has no"),
        ("algorithm.advantages=nowhere:x", "cannot be imported: No module named 'nowhere'"),
        ("forking.select=mine:number", "forking.select='mine:number' is a int, no function"),
        ('algorithm.credit=["mine:loss", "broken:x"]', "'broken:x' cannot be imported: division"),
        ('logging.writers=["mine:Writer"]', "logging.writers='mine:Writer' cannot be imported"),
    ],
)
def test_a_plug_in_that_cannot_be_loaded_is_told_before_anything_starts(mine, override, message):
    mine("number = 3\ndef loss(inputs): ...")
    mine("1 / 0", "broken")
    config = load_config(TrainConfig, QUICKSTART, [override])
    with pytest.raises(UserError, match=message):
        check_plugins(config)


def test_settings_without_a_meaning_for_a_plug_in_are_refused():
    for overrides, message in (
        (["algorithm.advantages=mine:a", "algorithm.normalize_advantage=false"], "leave it unset"),
        (["forking.select=mine:s", "forking.compare_every=2"], "does not select by them"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(TrainConfig, QUICKSTART, overrides)


def test_a_package_offers_a_name_by_an_entry_point(mine, tmp_path):
    mine("def rule(tokens): return tokens.entropy_T")
    info = tmp_path / "own-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[megafork.forking.select]\nown = mine:rule\n")
    assert load_rule("forking.select", "own").function.__module__ == "mine"
    config = load_config(TrainConfig, QUICKSTART, ["forking.select=own"])
    assert config.forking.by_plugin
    with pytest.raises(UserError, match=r"did you mean own\?"):
        load_plugin("forking.select", "owm", {})


def test_what_a_rule_returns_is_checked(mine):
    mine(
        """
        import torch
        short = lambda tokens, *step: tokens.entropy_T[1:]
        listed = lambda tokens, *step: tokens.entropy_T.tolist()
        nothing = lambda tokens, *step: tokens.entropy_T * torch.nan
        negative = lambda tokens, step: -tokens.entropy_T
        infinite = lambda tokens, step: tokens.entropy_T / 0
        half = lambda tokens, step: tokens.entropy_T / 2
        first = lambda tokens, step: tokens.position_T == 0
        """
    )
    tokens = tokens_of(3)
    for name, message in (
        ("short", r"returned \[2\], where \[3\] was due, one a token \(step 7, rank 0\)"),
        ("listed", r"returned list, where \[3\] was due"),
        ("nothing", r"'mine:nothing' returned NaN for 3 tokens \(step 7, rank 0\)"),
    ):
        with pytest.raises(UserError, match=message):
            load_rule("forking.select", f"mine:{name}")(tokens, step=7)
    rules = [load_rule("algorithm.credit", f"mine:{name}") for name in ("half", "first", "half")]
    assert credit_weights(rules, tokens, step=7).tolist() == [0.25, 0.0, 0.0]
    for name in ("negative", "infinite"):
        with pytest.raises(UserError, match=r"a weight that is negative or infinite \(step 7"):
            credit_weights([load_rule("algorithm.credit", f"mine:{name}")], tokens, step=7)


def test_what_a_rule_or_an_objective_asks_for_is_checked(mine):
    mine(
        """
        from megafork.algorithms.objectives import needs_rows
        from megafork.algorithms.rules import needs
        some = needs_rows("some")(lambda inputs: None)
        text = needs("entropy", "text")(lambda tokens: None)
        """
    )
    with pytest.raises(UserError, match="needs_rows='some': it is one of gradient, sequence, all"):
        load_objective("mine:some")
    with pytest.raises(UserError, match="needs text: what a rule can need is entropy, logprobs"):
        load_rule("forking.select", "mine:text")


def test_what_an_objective_returns_is_checked():
    rows, config = rows_of([1.0, 2.0], [True, True]), AlgorithmConfig(objective="mine:loss")
    counts = {"denominator": 2, "num_sequences": 1}
    for outputs, message in (
        (LossOutputs(torch.zeros(())), r"'mine:loss' returned terms_N of shape \[\] for 2 rows"),
        (LossOutputs(torch.zeros(2), {"a/b": torch.zeros(3)}), r"returned a/b of shape \[3\]"),
    ):
        with pytest.raises(UserError, match=message):
            policy_loss(torch.zeros(2), rows, config, lambda inputs, o=outputs: o, **counts)


def test_what_advantages_return_is_checked():
    assert check_advantages("mine:a", torch.tensor([1, 2]), 2).dtype == torch.float32
    for returned, message in (
        (torch.zeros(3), r"'mine:a' returned \[3\], where \[2\] was due, one for each row"),
        ([0.0, 1.0], "returned list, where"),
        (torch.tensor([0.0, torch.inf]), "an advantage that is not finite"),
    ):
        with pytest.raises(UserError, match=message):
            check_advantages("mine:a", returned, 2)


def test_a_reader_gives_rows_and_its_failure_names_the_row(mine, tmp_path):
    (tmp_path / "d.tsv").write_text("prompt\tanswer\n1 + 1\t2\nhalf\t0.5\n")
    mine((ROOT / "examples/plugins/reader.py").read_text(), "reader")
    rows = read_rows(tmp_path / "d.tsv", PromptConfig(reader="reader:rows"))
    assert [(row.prompt, row.answer) for row in rows] == [("1 + 1", "2"), ("half", "0.5")]
    assert rows[1].where == f"{tmp_path / 'd.tsv'}, row 2"
    mine(
        """
        def rows(path):
            yield {"prompt": "x", "answer": 0.00005}
            raise OSError("gone")
        """
    )
    with pytest.raises(UserError, match=r"'mine:rows' failed on .*after 1 rows \(OSError: gone\)"):
        read_rows("any", PromptConfig(reader="mine:rows"))
    mine('rows = lambda path: [{"prompt": "x", "answer": {"n": [0.00005]}}]')
    [row] = read_rows("any", PromptConfig(reader="mine:rows", answer_key="answer.n"))
    assert row.answer == "0.00005"


def test_writers_get_every_step_and_a_failing_one_is_left_out(mine, tmp_path):
    mine((ROOT / "examples/plugins/writer.py").read_text(), "writer")
    mine(
        """
        class Fails:
            def __init__(self, run_dir, config, steps_done):
                self.calls = 0
            def write(self, step, metrics):
                raise RuntimeError(f"no network at {step}")
            def close(self):
                raise AssertionError("it was left out")
        """
    )
    notes = []
    names = ["mine:Fails", "writer:Table"]
    writers = Writers(names, tmp_path, {}, steps_done=0, note=notes.append)
    for step in (1, 2):
        row = {"reward/mean": step / 4, "entropy/mean": 0.5, "forking/kept_fraction": 0.2}
        writers.write(step, row)
    writers.close()
    assert (tmp_path / "metrics.tsv").read_text() == "1\t0.25\t0.5\t0.2\n2\t0.5\t0.5\t0.2\n"
    [note] = notes
    assert note.startswith("warning: logging.writers='mine:Fails' failed (RuntimeError: no network")


def test_a_writer_that_hangs_holds_nothing_up(mine, tmp_path):
    """What it does not take is told at the end; the controller's loop never waits for it."""
    mine(
        """
        import threading
        entered, released, taken = threading.Event(), threading.Event(), []
        class Hangs:
            def __init__(self, run_dir, config, steps_done): ...
            def write(self, step, metrics):
                entered.set()
                released.wait()
                taken.append(step)
            def close(self): ...
        """
    )
    import mine as module

    notes = []
    writers = Writers(["mine:Hangs"], tmp_path, {}, steps_done=0, note=notes.append)
    for step in (1, 2):
        writers.write(step, {"reward/mean": 0.5})
    assert module.entered.wait(60)
    writers.close(patience_s=0.1)
    assert module.taken == []
    assert notes == [
        "warning: logging.writers was not done within 0.1 s of the run's end; metrics.jsonl has "
        "every step"
    ]
    module.released.set()


def test_the_settings_are_saved_with_the_run(tmp_path):
    overrides = ["algorithm.objective=a:b", 'algorithm.credit=["c:d", "e:f"]', "data.reader=g:h"]
    config = load_config(TrainConfig, QUICKSTART, overrides)
    saved = json.loads(json.dumps(config.model_dump(mode="json")))
    assert saved["algorithm"]["credit"] == ["c:d", "e:f"]
    assert (saved["algorithm"]["clip_low"], saved["algorithm"]["clip_high"]) == (0.2, 0.28)
