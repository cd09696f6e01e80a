from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megafork.config import EvaluateConfig, GenerateConfig, ScoreConfig, TrainConfig
from megafork.config.counterparts import COUNTERPARTS
from megafork.config.load import load_config, save_config, settings_of
from megafork.config.rollouts import TemperaturesConfig
from megafork.config.settings import Setting, known_settings
from megafork.errors import UserError
from tests.helpers.commands import QUICKSTART, REQUIRED, ROOT


def load(*overrides, path=None):
    return load_config(TrainConfig, path, [*REQUIRED, *overrides])


def test_overrides_win_over_the_file_and_are_toml_values(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[forking]\nrho = 0.5\nselect = "bottom"\n[parallel]\ntp = 2\n')
    config = load("forking.rho=0.1", "parallel.pipeline_layers=[3, 1]", path=path)
    assert config.forking.rho == 0.1
    assert config.forking.select == "bottom"
    assert config.parallel.tp == 2
    assert config.parallel.pipeline_layers == (3, 1)
    assert config.run.dir == "out"


def test_a_folder_may_be_named_by_a_date():
    assert load("model.path=2024-06-01").model.path == "2024-06-01"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (r"\boxed{}", r"U+0008 before 'oxed{}': a TOML string in double .* (\\boxed{})"),
        (r"\frac{1}{2}", r"U+000C before 'rac{1}{2}': .* single quotes, .* (\\frac{1}{2})"),
        (r"\right)", r"U+000D before 'ight)': .* (\\right))"),
        (r"\text{it}", r"U+0009 before 'ext{it}': .* (\\text{it})"),
        (r"2 \times 3", r"U+0009 before 'imes 3': .* (\\times 3)"),
        (r"x \neq 3", r"U+000A before 'eq 3': .* (\\neq 3)"),
        (r"\u0000", "U+0000 before '': take it out"),
        (r"\u009b1m", "U+009B before '1m': take it out"),
    ],
)
def test_a_template_holds_no_control_characters(tmp_path, written, message):
    path = tmp_path / "c.toml"
    path.write_text(f'[data]\ntemplate = "{{problem}} {written}"\n')
    with pytest.raises(UserError, match=re.escape(message).replace(r"\.\*", ".*")):
        load(path=path)
    if not written.startswith(r"\u"):
        path.write_text(f"[data]\ntemplate = '{{problem}} {written}'\n")
        assert load(path=path).data.template == "{problem} " + written


@pytest.mark.parametrize(
    "template", ["{problem}\nequal or not?\n", "\t{problem}\textra", "A:\tB\t{problem} \\boxed{}"]
)
def test_a_template_may_have_lines_and_tabs(template):
    assert load(f"data.template={json.dumps(template)}").data.template == template


def test_the_papers_defaults():
    config = load()
    assert (config.forking.select, config.forking.rho) == ("top", 0.2)
    assert (config.forking.scope, config.forking.entropy_of) == ("minibatch", "old")
    assert (config.algorithm.clip_low, config.algorithm.clip_high) == (0.2, 0.28)
    assert (config.rollout.prompts_per_step, config.rollout.group_size) == (512, 16)
    assert config.training.prompts_per_minibatch == 32
    assert (config.training.lr, config.training.warmup_steps) == (1e-6, 10)


def test_a_saved_config_reads_back_equal(tmp_path):
    config = load("parallel.pipeline_layers=[3,1]", "sync.max_k3=0.1", "data.eval=e.jsonl")
    save_config(config, tmp_path / "c.toml")
    assert load_config(TrainConfig, tmp_path / "c.toml", []) == config


def test_the_settings_of_a_config_are_its_keys():
    found = dict(settings_of(load("forking.rho=0.3", "data.eval=e.jsonl")))
    assert found.keys() == {setting.key for setting in known_settings(TrainConfig)}
    some = [found[key] for key in ("forking.rho", "data.eval", "parallel.dp")]
    assert some == [0.3, "e.jsonl", None]


KINDS = (TrainConfig, ScoreConfig, GenerateConfig, EvaluateConfig, TemperaturesConfig)


def test_a_setting_is_told_in_words():
    found = {setting.key: setting for kind in KINDS for setting in known_settings(kind)}
    plugin = "MODULE:FUNCTION"
    verifiers = ("maths", "countdown", "exact", "reasoning-gym:TASK", plugin)
    for key, *facts in (
        ("forking.rho", "float", "0.2", (), "> 0, <= 1"),
        ("forking.compare_every", "int", "0", (), ">= 0"),
        ("forking.scope", "str", "minibatch", ("minibatch", "batch", "sequence"), ""),
        ("forking.select", "str", "top", ("top", "bottom", "random", "all", plugin), ""),
        ("run.silence_s", "float", "60.0", (), ">= 5"),
        ("training.steps", "int", "required", (), "> 0"),
        ("training.beta1", "float", "0.9", (), ">= 0, < 1"),
        ("parallel.sequence_parallel", "bool", "false", (), ""),
        ("parallel.pipeline_layers", "list[int]", "unset", (), "> 0"),
        ("algorithm.clip_low", "float", "unset", (), "> 0, <= 1"),
        ("algorithm.objective", "str", "ppo", ("ppo", "gspo", "cispo", plugin), ""),
        ("reward.verifier", "str or list[str]", "required", verifiers, "not empty"),
        ("reward.weights", "list[float]", "unset", (), ""),
        ("sweep.below", "list[float]", "[0.6, 0.8, 1.0, 1.2, 1.4]", (), ">= 0"),
    ):
        assert found[key] == Setting(key, *facts, found[key].meaning)
    assert all(setting.meaning for setting in found.values())


def test_a_default_that_is_told_is_the_default():
    told = [s for s in known_settings(TrainConfig) if s.default not in ("required", "unset")]
    assert len(told) > 80
    assert load(*(f"{setting.key}={setting.default}" for setting in told)) == load()


def test_a_bound_that_is_told_is_the_bound():
    """The nearest integer outside is refused."""
    checked = 0
    for setting in known_settings(TrainConfig):
        for sign, number in re.findall(r"([<>]=?) (\d+)", setting.bounds):
            outside = int(number) + {">": 0, ">=": -1, "<": 0, "<=": 1}[sign]
            value = f"[{outside}]" if setting.type.startswith("list") else outside
            with pytest.raises(UserError, match=rf"{setting.key}[.\d]*={outside}: "):
                load(f"{setting.key}={value}")
            checked += 1
    assert checked > 60


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("forking.roh=0.1", "unknown key forking.roh; did you mean forking.rho?"),
        ("paralel.tp=2", "unknown key paralel; did you mean parallel?"),
        ("training.tp=2", "unknown key training.tp"),
        ("forking.rho=1.5", "forking.rho=1.5"),
        ("forking.select=best", "forking.select='best'"),
        ("parallel.tp=two", "parallel.tp='two'"),
        ("parallel.tp=true", "parallel.tp=True"),
        ("training.lr=inf", "training.lr=inf"),
        ("parallel.tp", "is not of the form section.key=value"),
        ("run.dir.x=1", "dir is a value, not a section"),
        (
            "training.prompts_per_minibatch=48",
            "training.prompts_per_minibatch=48 must divide rollout.prompts_per_step=512",
        ),
        ("training.micro_batch_tokens=100", "raise it to at least 21504"),
        ("algorithm.objective=gpso", "algorithm.objective='gpso'"),
        ("algorithm.clip_dual=1.0", "algorithm.clip_dual=1.0"),
        ("algorithm.denominator=sequences", "algorithm.denominator='sequences'"),
        ("mismatch.max_weight=0.5", "mismatch.max_weight=0.5"),
        (
            "mismatch.min_weight=0.5",
            "mismatch.min_weight=0.5 is the lower end of mismatch.correction=mask, but "
            "mismatch.correction=none: leave it unset or set correction=mask",
        ),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(UserError) as caught:
        load(override)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.objective=grpo", "algorithm.objective=ppo, with algorithm.advantages=group"),
        ("objective=grpo", "did you mean algorithm.objective? GRPO clips each token's ratio"),
        ("algorithm.objective=Dr-GRPO", "algorithm.denominator=max_response_tokens"),
        ("algorithm.advantages=ppo", "algorithm.advantages=gae. There are group, gae, "),
        ("algorithm.denominator=token-mean", "(the mean over the mini-batch's tokens is tokens"),
        ("forking.select=entropy", "the tokens of highest entropy are top"),
        ("kl.estimator=low_var_kl", "is k3, the default"),
        ("mismatch.correction=tis", "is truncate)"),
        ("mismatch.correction=true", "is truncate; "),
        ("model.dtype=bf16", "(write bfloat16)"),
    ],
)
def test_a_value_of_other_trainers_names_its_counterpart(override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load(override)


def test_what_counterparts_say_to_write_is_accepted():
    """Every key=value in their text, and every one of their keys is a setting."""
    known = {setting.key for setting in known_settings(TrainConfig)}
    written = set()
    for key, texts in COUNTERPARTS.items():
        assert key in known
        for text in texts.values():
            written |= set(re.findall(r"\b[a-z]+\.[a-z_]+=[a-z_0-9.]*[a-z_0-9]", text))
    assert len(written) > 5
    for override in written:
        load(override)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("MEGAFORK_TRAINING__STEPS", "training.steps"),
        ("MEGAFORK_TRAINING_STEPS", "training.steps"),
        ("MEGAFORK_ENTROPY_BONUS_COEFFICIENT", "entropy_bonus.coefficient"),
        ("MEGAFORK_FORKING__ROH", "forking.rho"),
    ],
)
def test_a_variable_that_stands_for_a_setting_is_refused(monkeypatch, name, key):
    monkeypatch.setenv(name, "3 x")
    with pytest.raises(UserError, match=rf"{name}=3 x: .*; write {key}='3 x' behind.*unset {name}"):
        load()


def test_variables_that_the_project_reads_are_no_settings(monkeypatch):
    found = set()
    for path in [
        *ROOT.glob("megafork/**/*.py"),
        *ROOT.glob("slurm/*"),
        *ROOT.glob("tests/**/*.py"),
    ]:
        if path != Path(__file__):
            found |= set(re.findall(r"\bMEGAFORK_[A-Z_]+", path.read_text()))
    assert {"MEGAFORK_API_KEY", "MEGAFORK_STOP_FILE", "MEGAFORK_TRITON"} <= found
    for name in found:
        monkeypatch.setenv(name, "1")
    for kind, settings in (
        (TrainConfig, REQUIRED),
        (EvaluateConfig, ["model.path=m", "reward.verifier=a:b"]),
        (ScoreConfig, ["model.path=m"]),
    ):
        load_config(kind, None, settings)


def test_a_batch_threshold_cannot_wait_for_current_entropies():
    with pytest.raises(
        UserError, match=r"entropy_of=current has .*: use scope=minibatch or entropy_of=old"
    ):
        load("forking.scope=batch", "forking.entropy_of=current")


CLIP_DEFAULTS = {"ppo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}


@pytest.mark.parametrize("objective", CLIP_DEFAULTS)
def test_a_clip_that_is_not_set_is_the_objectives(objective):
    algorithm = load(f"algorithm.objective={objective}").algorithm
    assert (algorithm.clip_low, algorithm.clip_high) == CLIP_DEFAULTS[objective]


def test_a_saved_config_has_the_objectives_clip(tmp_path):
    config = load("algorithm.objective=gspo", "algorithm.clip_high=5e-4")
    save_config(config, tmp_path / "c.toml")
    text = (tmp_path / "c.toml").read_text()
    assert "clip_low = 0.0003" in text and "clip_high = 0.0005" in text
    assert load_config(TrainConfig, tmp_path / "c.toml", []) == config


@pytest.mark.parametrize(
    ("objective", "setting", "message"),
    [
        ("gspo", "clip_low=0.2", "clip_low=0.2 never acts on algorithm.objective=gspo"),
        ("gspo", "clip_low=1", "clip_low=1 never acts"),
        ("gspo", "clip_high=0.28", "clip_high=0.28 never acts"),
        ("gspo", "clip_high=0.28", "use about 0.0004 (its default) or objective=ppo"),
        ("cispo", "clip_low=0.2", "clip_low=0.2 bounds the ratio from below"),
        ("cispo", "clip_low=3e-4", "leave clip_low unset"),
        ("ppo", "clip_low=3e-4", "clip_low=0.0003 is the size of a whole response's ratio"),
        ("ppo", "clip_high=4e-4", "use about 0.28 (its default) or objective=gspo"),
    ],
)
def test_a_clip_of_another_objective_is_refused(objective, setting, message):
    with pytest.raises(UserError) as caught:
        load(f"algorithm.objective={objective}", f"algorithm.{setting}")
    assert message in str(caught.value)


def test_an_unknown_objective_is_one_mistake():
    with pytest.raises(UserError) as caught:
        load("algorithm.objective=gpso")
    assert "clip" not in str(caught.value)


def test_cispo_has_no_dual_clip():
    with pytest.raises(UserError, match=r"clip_dual=3 has no meaning for .*=cispo.*leave it unset"):
        load("algorithm.objective=cispo", "algorithm.clip_dual=3")


def test_a_selection_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"forking\.rho=1 leaves out, which is nothing"):
        load("forking.select=bottom", "forking.rho=1")

    with pytest.raises(UserError, match=r"forking\.rho_end=1 leaves out.*: lower rho_end"):
        load("forking.select=bottom", "forking.rho_end=1", "forking.rho_steps=5")


def test_rho_goes_from_its_start_to_its_end():
    schedule = load("forking.rho=0.2", "forking.rho_end=0.1", "forking.rho_steps=5").forking
    found = [schedule.rho_at(step) for step in (1, 2, 3, 4, 5, 6, 1000)]
    assert found == [0.2, 0.175, 0.15, 0.125, 0.1, 0.1, 0.1]
    assert [load().forking.rho_at(step) for step in (1, 1000)] == [0.2, 0.2]
    rising = load("forking.rho=0.1", "forking.rho_end=0.2", "forking.rho_steps=2").forking
    assert [rising.rho_at(step) for step in (1, 2)] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rho_end=0.1"], r"rho_end=0\.1 and forking\.rho_steps=None .*: set both or neither"),
        (["rho_steps=9"], r"rho_end=None and forking\.rho_steps=9 .*: set both or neither"),
        (["rho_end=0.1", "rho_steps=1"], r"forking\.rho_steps=1: .* greater than or equal to 2"),
        (["rho_end=0", "rho_steps=9"], r"forking\.rho_end=0: .* greater than 0"),
        (
            ["rho_end=0.1", "rho_steps=9", "select=all"],
            r"rho_end=0\.1 has no meaning for forking\.select=all.*: leave it unset",
        ),
        (
            ["population=response", "scope=sequence"],
            r"population=response has no meaning for forking\.scope=sequence.*: leave it at loss",
        ),
    ],
)
def test_mistakes_in_the_selection_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        load(*(f"forking.{override}" for override in overrides))


def test_context_parallel_ranks_share_a_sequence():
    """21,504 tokens in 4 chunks of 5,376, two on each rank."""
    assert load("parallel.cp=2", "training.micro_batch_tokens=10752").parallel.cp == 2
    with pytest.raises(UserError, match=r"on parallel.cp=2 ranks: raise it to at least 10752"):
        load("parallel.cp=2", "training.micro_batch_tokens=10751")


def test_a_missing_key_says_how_to_set_it():
    with pytest.raises(UserError, match=r"training\.steps is missing"):
        load_config(TrainConfig, None, REQUIRED[:-1])
    with pytest.raises(UserError, match=r"reward.verifier is missing: .* as reward.verifier=VALUE"):
        load_config(EvaluateConfig, None, ["model.path=m"])  # no key of the section
    with pytest.raises(UserError, match=r"reward.verifier is missing"):
        load_config(EvaluateConfig, None, ["model.path=m", "reward.timeout_s=3"])


@pytest.mark.parametrize("content", [None, b"[model\n", b"\xff\xfe"])
def test_an_unreadable_file_is_named(tmp_path, content):
    path: Path = tmp_path / "c.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"c.toml"):
        load(path=path)


def test_an_empty_list_of_servers_unsets_one():
    """TOML has no other way to."""
    path = QUICKSTART / "config.toml"
    named = ["rollout.url=http://a:1"]
    assert load_config(TrainConfig, path, named).rollout.urls == ["http://a:1"]
    assert load_config(TrainConfig, path, [*named, "rollout.url=[]"]).rollout.url is None
