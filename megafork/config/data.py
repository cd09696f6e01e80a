"""Prompts: which columns hold them, and how they become what the model reads."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from megafork.config.section import Positive, Section
from megafork.errors import UserError

PLACEHOLDER = "{problem}"
_ESCAPES = {"\b": "b", "\t": "t", "\n": "n", "\f": "f", "\r": "r", "\x1b": "e"}
"""Characters that TOML's strings in double quotes write with a backslash and a letter"""
_SWALLOWED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
    r"|\t(?=(ext(bf|it|tt|rm)?|heta|imes|frac|ilde|au|herefore|riangle)(?![a-z]))"
    r"|\n(?=(abla|eq|eg|otin|ewline)(?![a-z]))"
)
"""Control characters; a tab or new line that TOML made of \\text, \\times, \\neq and the like"""


class PromptConfig(Section):
    """Columns are looked up by their whole name first, then as a path through nested columns."""

    prompt_key: str = Field(
        "prompt", description="column with the prompt: text, or a list of {role, content} turns"
    )
    answer_key: str = Field(
        "answer", description="column for the verifier, as answer or reward_model.ground_truth"
    )
    template: str | None = Field(
        None,
        description="text around the prompt, which stands for {problem}, before the chat template; "
        "unset: none",
    )
    chat_template: bool = Field(
        False, description="wrap the prompt as a user turn of the tokenizer's chat template"
    )
    enable_thinking: bool | None = Field(
        None, description="handed to a chat template that knows it (Qwen3); unset: its own default"
    )
    max_prompt_tokens: Positive = Field(1024, description="longer prompts are an error")
    reader: str | None = Field(
        None,
        description="MODULE:FUNCTION that gives a file's rows as dicts, (path) -> rows; unset: by "
        "the kind of the file",
    )

    @field_validator("template")
    @classmethod
    def _holds_the_problem(cls, template: str | None) -> str | None:
        if template is not None and PLACEHOLDER not in template:
            raise ValueError(f"must contain {PLACEHOLDER}, where the prompt goes")
        return template

    @field_validator("template")
    @classmethod
    def _holds_no_control_characters(cls, template: str | None) -> str | None:
        if template is not None and (found := _SWALLOWED.search(template)):
            rest = template[found.end() : found.end() + 12]
            fix = "take it out"
            if letter := _ESCAPES.get(found[0]):
                fix = (
                    f"a TOML string in double quotes reads \\{letter} as that; write the "
                    f"template in single quotes, or double the backslash (\\\\{letter}{rest})"
                )
            raise ValueError(
                f"holds the control character U+{ord(found[0]):04X} before {rest!r}: {fix}"
            )
        return template

    def check(self, *, needs_answers: bool) -> None:
        """Raise UserError for settings that contradict each other or lack needed answers."""
        if needs_answers and not self.answer_key:
            raise UserError("data.answer_key is empty, but the verifier needs answers: name it")
        if self.enable_thinking is not None and not self.chat_template:
            raise UserError(
                f"data.enable_thinking={str(self.enable_thinking).lower()} is handed to the chat "
                "template: set data.chat_template=true too, or leave it unset"
            )


class DataConfig(PromptConfig):
    """`megafork train`. A file is .jsonl or .parquet, a folder of datasets' save_to_disk, or
    hf:owner/name[:split]."""

    train: str = Field(
        description="rows to train on: .jsonl, .parquet, a save_to_disk folder, hf:owner/name:split"
    )
    eval: str | None = Field(None, description="held-out rows, same columns")
    seed: int = Field(0, description="seed of the order of the prompts, new in every epoch")
    allow_changed: bool = Field(
        False, description="go on with a run although its rows or data.seed are not what they were"
    )


class BenchmarkConfig(PromptConfig):
    """`megafork generate | eval`."""

    prompt_key: str = Field(
        "problem", description="column with the problem: text, or a list of {role, content} turns"
    )
    id_key: str = Field(
        "id", description="column that tells the problems apart; empty: the number of the row"
    )
