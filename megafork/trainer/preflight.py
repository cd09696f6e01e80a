"""Checks of files and layout, done once, before any rank or server starts.

What needs no torch comes first, so that most mistakes are told without its import.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megafork.cluster.launch import tells, under_torchrun
from megafork.config import ScoreConfig, TrainConfig
from megafork.config.learning import ADVANTAGES, OBJECTIVES, SELECTIONS
from megafork.data.prompts import encode_rows, read_both
from megafork.data.row_reader import Row
from megafork.data.tokenizer import check_tokenizer, load_tokenizer
from megafork.data.unchanged import check_unchanged, identity
from megafork.errors import UserError
from megafork.metrics.writers import load_writers
from megafork.model.hf_config import read_json
from megafork.model.shape import ModelShape
from megafork.rollout.ends import check_ends
from megafork.rollout.engine import check_server
from megafork.system.disk import refuse_links
from megafork.system.lock import refuse_held
from megafork.system.plugins import load_plugin
from megafork.trainer.run_dir import refuse_other_run, refuse_unwritable
from megafork.verifiers.names import check_answers, check_verifiers, columns_of

_TRUNCATING = {"top_k": (None, 0, -1), "top_p": (None, 1, 1.0), "min_p": (None, 0, 0.0)}


def check_train(config: TrainConfig, *, resume: bool = False) -> None:
    """Raise UserError for what can be known to fail before anything is started.

    resume: the run in run.dir is to go on; otherwise there must not be one.
    """
    run_dir = Path(config.run.dir)
    refuse_links(run_dir, "run.dir")
    if not under_torchrun():
        refuse_held(run_dir, "run.dir")
    if not resume:
        refuse_other_run(run_dir)
    refuse_unwritable(run_dir)
    shape = ModelShape.from_folder(config.model.path)
    shape.check(config.model, config.parallel)
    if config.kl.reference is not None:
        shape.check_same_build(config.kl.reference, setting="kl.reference")
    if config.algorithm.uses_critic:
        check_critic(config, shape)
    check_length(config, shape)
    end = check_tokenizer(config, shape.vocab_size, chat_template=config.data.chat_template)
    check_verifiers(config.reward.verifiers)
    rows = read_both(config.data, columns_of(config.reward.verifiers))
    for part in rows:
        check_answers(part, config.reward)
    check_plugins(config)
    check_server(config.rollout)
    check_ends(config, shape, end, tell=tells())
    if tells():
        _tell_ignored_sampling(Path(config.model.path))
        kept = _check_lengths(config, rows)
        if resume:
            check_unchanged(run_dir, config.data, identity(config.data, *kept))


def _check_lengths(
    config: TrainConfig, rows: tuple[list[Row], list[Row]]
) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and the held-out ones that are not left out for their length.

    Raises UserError for a prompt that is too long, unless such rows are to be left out.
    """
    data = config.data
    tokenizer = load_tokenizer(
        config, chat_template=data.chat_template, enable_thinking=data.enable_thinking
    )
    train, held_out = rows
    return (
        encode_rows(train, data, tokenizer.encode_prompt, _note)[0],
        encode_rows(held_out, data, tokenizer.encode_prompt, _note)[0],
    )


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check_plugins(config: TrainConfig) -> None:
    """Raise UserError for a plug-in of the training that cannot be loaded.

    Built-in ones are not loaded: they take torch to import.
    """
    algorithm, select = config.algorithm, config.forking.select
    named = [("algorithm.objective", algorithm.objective, OBJECTIVES)]
    named += [("algorithm.advantages", algorithm.advantages, ADVANTAGES)]
    named += [("forking.select", select, SELECTIONS)]
    named += [("algorithm.credit", name, {}) for name in algorithm.credit]
    for setting, name, built_ins in named:
        if name not in built_ins:
            load_plugin(setting, name, built_ins)
    load_writers(config.logging.writers)


def check_folders(config: TrainConfig, *, may_lack_weights: bool = False) -> list[str]:
    """The weights of every folder that the run reads; a line for each, for the user to know.

    Raises UserError for a folder whose weights are not what would be computed. may_lack_weights: a
    folder with a config.json alone is told and not refused. Imports torch.
    """
    folders = [("model.path", config.model.path, False)]
    if config.kl.reference is not None:
        folders.append(("kl.reference", config.kl.reference, False))
    if config.algorithm.uses_critic and config.critic.path is not None:
        folders.append(("critic.path", config.critic.path, True))
    from megafork.model.hf_model import check_folder, has_weights

    lines = []
    for setting, path, value_head in folders:
        if may_lack_weights and not has_weights(path):
            lines.append(f"{setting}: not in {path} yet: fetch them before the run")
            continue
        model = check_folder(path, setting=setting, value_head=value_head)
        lines.append(f"{setting}: {len(model.weights.names)} tensors in {path}")
    return lines


def check_length(config: TrainConfig, shape: ModelShape) -> None:
    """Raise UserError where the longest sequence has no positions."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > shape.max_positions:
        raise UserError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest} exceeds the model's "
            f"max_position_embeddings={shape.max_positions}: lower one of them"
        )


def check_critic(config: TrainConfig, policy: ModelShape) -> None:
    """Raise UserError for a critic that lacks the policy's tokens or positions, or its layout."""
    path = config.critic.path
    if path is None:
        return
    shape = ModelShape.from_folder(path, setting="critic.path")
    try:
        shape.check_layout(config.parallel)
    except UserError as error:
        raise UserError(f"the model of critic.path={path}: {error}") from None
    for name in ("vocab_size", "max_positions"):
        ours, needed = getattr(shape, name), getattr(policy, name)
        if ours < needed:
            raise UserError(
                f"the model of critic.path={path} has {name}={ours}, but that of model.path="
                f"{config.model.path} has {needed}: take a critic of the same family"
            )


def check_score(config: ScoreConfig, input_path: Path, output_path: Path) -> None:
    """Raise UserError for a bad layout, a missing input, or an output that cannot be written."""
    shape = ModelShape.from_folder(config.model.path)
    shape.check(config.model, config.parallel)
    if config.tokenizer.path is not None:  # rows of token ids need none
        check_tokenizer(config, shape.vocab_size, chat_template=False)
    if not input_path.is_file():
        raise UserError(f"--input {input_path} does not exist")
    if not output_path.parent.is_dir():
        raise UserError(f"--output {output_path}: the folder {output_path.parent} does not exist")
    if tells():
        from megafork.model.hf_model import check_folder

        check_folder(config.model.path)


def _tell_ignored_sampling(folder: Path) -> None:
    """Published models truncate sampling in generation_config.json; training must not."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    raw = read_json(path)
    found = [f"{k}={raw[k]}" for k, neutral in _TRUNCATING.items() if raw.get(k) not in neutral]
    if found:
        _note(
            f"note: {path} sets {', '.join(found)}; rollouts ignore it and sample the whole "
            "distribution at rollout.temperature"
        )
