"""HF folders with tokenizers of every kind, trained in a moment from a corpus made here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.helpers.commands import QUICKSTART

TEXT = "the sum of two numbers is even so we don't try 12 + 34 = 46 . naïve café 漢字 🙂"
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _trained(tokenizer: Tokenizer, trainer: type, **settings: Any) -> Tokenizer:
    rng = random.Random(0)
    words = [*TEXT.split(), "\n\t"]
    corpus = [" ".join(rng.choices(words, k=rng.randint(2, 9))) for _ in range(300)]
    kept = {"special_tokens": SPECIAL, "show_progress": False, "vocab_size": 400} | settings
    tokenizer.train_from_iterator(corpus, trainer(**kept))
    return tokenizer


def _begins_with_bos(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )


def _bytes(pattern: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        plain = pre_tokenizers.Sequence([split, plain])
    tokenizer.pre_tokenizer, tokenizer.decoder = plain, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, trainers.BpeTrainer, initial_alphabet=alphabet)


def byte_level() -> Tokenizer:
    return _bytes(None)


def llama_3() -> Tokenizer:
    """Splits as Llama 3 does, begins with a bos, and takes whole words from the vocabulary."""
    tokenizer = _bytes(LLAMA_3)
    tokenizer.model.ignore_merges = True
    _begins_with_bos(tokenizer)
    return tokenizer


def pieces() -> Tokenizer:
    """As SentencePiece has it: a mark for each space, bytes for what is unknown, a bos."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    _trained(tokenizer, trainers.BpeTrainer, special_tokens=SPECIAL + fallback, vocab_size=500)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = raw["added_tokens"][: len(SPECIAL)]
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    _begins_with_bos(tokenizer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _trained(tokenizer, trainers.UnigramTrainer, unk_token="<unk>", vocab_size=200)


def word_piece() -> Tokenizer:
    """As BERT's: its decoder leaves spaces before punctuation, which may be cleaned up."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = _trained(tokenizer, trainers.WordPieceTrainer)
    tokenizer.enable_truncation(5)  # which transformers does not heed
    return tokenizer


def characters() -> Tokenizer:
    return Tokenizer.from_file(str(QUICKSTART / "model" / "tokenizer.json"))


def with_odd_tokens() -> Tokenizer:
    """Added tokens that take the spaces beside them, or only whole words, or are not special."""
    tokenizer = byte_level()
    odd = [AddedToken("<mid>", lstrip=True, rstrip=True), AddedToken("sum", single_word=True)]
    tokenizer.add_tokens([*odd, AddedToken("É", normalized=True)])
    tokenizer.add_special_tokens([AddedToken("<end>", rstrip=True)])
    return tokenizer


KINDS = {
    make.__name__: make
    for make in (
        *(byte_level, llama_3, pieces, unigram, word_piece, characters),
        *(with_odd_tokens,),
    )
}


def write(folder: Path, tokenizer: Tokenizer, files: dict[str, Any]) -> Path:
    """A folder of tokenizer.json and `files`, which become JSON unless they are text or bytes."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not isinstance(content, bytes):
            text = content if isinstance(content, str) else json.dumps(content)
            content = text.encode()
        path.write_bytes(content)
    return folder
