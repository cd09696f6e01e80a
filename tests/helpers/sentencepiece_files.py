"""SentencePiece files, trained in a moment from a corpus made here."""

from __future__ import annotations

import json
import random
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from tests.helpers.commands import QUICKSTART

TEXT = "the sum of two numbers is even so we try again and therefore it follows that"
ARITHMETIC = ["6*4=24;2*24=48.", "6 2 4>48:", "1+2-3=0", "7 5 9 8>35:"]
PIECES = 340
AS_WRITTEN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
"""Llama 2's settings: no character or space is changed."""
CONTROL = "<|im_end|>"


def train_sentencepiece(path: Path, kind: str, **settings) -> Path:
    """A small .model file; pieces of the corpus, a control symbol and, by default, bytes."""
    rng = random.Random(0)
    corpus = [" ".join(rng.choices(TEXT.split(), k=rng.randint(3, 12))) for _ in range(500)]
    defaults = {"vocab_size": PIECES, "byte_fallback": True, "control_symbols": [CONTROL]}
    SentencePieceTrainer.train(
        sentence_iterator=iter(corpus + ARITHMETIC * 50),
        model_prefix=str(path.with_suffix("")),
        model_type=kind,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **(defaults | settings),
    )
    return path


def train_quickstart_twin(path: Path) -> Path:
    """A .model with the ids of the quickstart's tokenizer: characters, ordered by frequency."""
    raw = json.loads((QUICKSTART / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    characters = sorted((c for c in raw if len(c) == 1), key=raw.__getitem__)
    corpus = []
    for rank, character in enumerate(reversed(characters), 1):
        corpus += ["0 0" if character == " " else character] * (3 * rank)
    SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(path.with_suffix("")),
        model_type="char",
        vocab_size=len(raw),
        **{"pad_id": raw["<pad>"], "eos_id": raw["<eos>"], "unk_id": raw["<unk>"], "bos_id": -1},
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=2,
        **AS_WRITTEN,
    )
    return path
