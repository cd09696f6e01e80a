"""A small random Qwen3 that reads bytes and has a chat template like the published ones'."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers import reference, tokenizer_folders

TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


def save_byte_model(folder: Path, max_position_embeddings: int) -> Path:
    tokenizer = tokenizer_folders.byte_level()
    sizes = {
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": max_position_embeddings,
    }
    reference.save_model(folder, tied=True, layers=2, **sizes)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
