"""Text to token ids and back: an HF folder's tokenizer or a SentencePiece file, one interface.

Finding and checking a tokenizer imports neither transformers nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megafork.config import GenerateConfig, ScoreConfig, TrainConfig
from megafork.errors import UserError

SENTENCEPIECE_FILE = "tokenizer.model"
_VOCABULARIES = ("tokenizer.json", SENTENCEPIECE_FILE, "vocab.json")
_HF_CONFIG = "tokenizer_config.json"
Turns = list[dict[str, str]]
"""A chat: {"role": ..., "content": ...} each."""
_ANSWER = "zqxjkv"
"""An assistant's turn that no template says of itself"""
WithTokenizer = TrainConfig | ScoreConfig | GenerateConfig
_READ_BY_TRANSFORMERS = ("tokenizer.json", "vocab.json", _HF_CONFIG)


class Tokenizer(Protocol):
    """Text to token ids and back."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text alone, as of a response: no bos, no eos."""

    def encode_prompt(self, prompt: str | Turns) -> list[int]:
        """Return the ids that the model reads before its response.

        With a chat template the prompt is rendered as a user's turn, or as several turns; only
        there may it be turns. Without one, the text follows the tokens that the tokenizer begins
        every text with, as transformers and vLLM have it: Llama's bos, nothing for Qwen. A text
        that is written with the bos gets no second one.
        """

    def template_ends(self) -> tuple[int, ...]:
        """The special tokens that the chat template puts behind the assistant's last turn."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of a response, without special tokens and without ids that no token has.

        Models pad their vocabulary, so a policy can sample an id that its tokenizer lacks.
        """

    def name(self, token_id: int) -> str:
        """Return a token as text, a special one too; the text of an id that no token has is
        empty."""

    def show(self, ids: Sequence[int]) -> str:
        """Return the text of a prompt with the special tokens that are in it."""


@dataclass(frozen=True)
class TokenizerSource:
    """The path of a run's tokenizer, and the library that reads it."""

    setting: str
    """key=value, for messages."""
    path: Path
    sentencepiece_file: Path | None
    """None: transformers reads the folder `path`."""


def find_tokenizer(config: WithTokenizer) -> TokenizerSource:
    """Return tokenizer.path, or model.path where it is unset. Raises UserError when nothing reads
    it.

    A folder with tokenizer.model and no file of transformers' own is read by sentencepiece:
    transformers would take the class from config.json and give other ids without a word.
    """
    is_own = config.tokenizer.path is None
    path = Path(config.model.path if config.tokenizer.path is None else config.tokenizer.path)
    setting = f"{'model' if is_own else 'tokenizer'}.path={path}"
    if path.is_file() and path.suffix == ".model":
        return TokenizerSource(setting, path, path)
    if not path.is_dir():
        fault = "is neither a folder nor a .model file" if path.exists() else "does not exist"
        raise UserError(
            f"{setting} {fault}: give the HF folder that holds the tokenizer, or a SentencePiece "
            ".model file"
        )
    if not any((path / name).is_file() for name in _VOCABULARIES):
        raise UserError(
            f"{setting} holds no tokenizer ({', '.join(_VOCABULARIES)}): copy the model's "
            "tokenizer files into the folder, or set tokenizer.path to a folder or .model file"
        )
    if not any((path / name).is_file() for name in _READ_BY_TRANSFORMERS):
        return TokenizerSource(setting, path, path / SENTENCEPIECE_FILE)
    if not is_own and not (path / _HF_CONFIG).is_file():
        raise UserError(
            f"{setting} holds no {_HF_CONFIG}, so transformers would choose the tokenizer's class "
            "by the config.json beside it, which is another one in the final checkpoint: add one "
            'that names the class, {"tokenizer_class": "PreTrainedTokenizerFast"} for a '
            "tokenizer.json"
        )
    return TokenizerSource(setting, path, None)


def load_tokenizer(
    config: WithTokenizer, *, chat_template: bool, enable_thinking: bool | None = None
) -> Tokenizer:
    """Load the run's tokenizer. Raises UserError that names the setting, the cause and the fix."""
    source = find_tokenizer(config)
    if source.sentencepiece_file is None:
        return HfTokenizer(
            source.path,
            setting=source.setting,
            chat_template=chat_template,
            enable_thinking=enable_thinking,
        )
    _refuse_chat_template(source, chat_template)
    return SentencePieceTokenizer(
        source.sentencepiece_file,
        setting=source.setting,
        bos_id=_llamas_bos(Path(config.model.path)),
    )


def check_tokenizer(config: WithTokenizer, vocab_size: int, *, chat_template: bool) -> int | None:
    """Return the id that ends a text by the tokenizer's own files, None where they name none.

    Raises UserError for a tokenizer that cannot be read or has ids that the model has not.
    """
    source = find_tokenizer(config)
    if source.sentencepiece_file is not None:
        _refuse_chat_template(source, chat_template)
        tokenizer = SentencePieceTokenizer(source.sentencepiece_file, setting=source.setting)
        largest, end = tokenizer.num_pieces - 1, tokenizer.eos_id
    elif (source.path / "tokenizer.json").is_file():
        largest, end = _largest_id_and_end(source)
    else:  # only transformers knows what it adds to a vocab.json; the scorer checks the ids
        return None
    if largest >= vocab_size:
        raise UserError(
            f"{source.setting}: the tokenizer has ids up to {largest}, but the model in model.path="
            f"{config.model.path} has vocab_size={vocab_size}, so ids 0 to {vocab_size - 1}: give "
            "the tokenizer that the model was made with"
        )
    return end


class HfTokenizer:
    """A folder's tokenizer, as transformers reads it.

    It takes no transformers and no torch where hf_tokenizer.py can read the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        chat_template: bool = False,
        enable_thinking: bool | None = None,
        setting: str = "",
    ) -> None:
        from megafork.data.hf_tokenizer import read_folder

        self._tokenizer: Any = read_folder(folder)
        if self._tokenizer is None:
            self._tokenizer = _read_with_transformers(folder, setting)
        if chat_template and not self._tokenizer.chat_template:
            raise UserError(
                f"data.chat_template=true, but the tokenizer of {folder} has no chat template"
            )
        self._chat_template = chat_template
        self._template_options: dict[str, bool] = {}
        if enable_thinking is not None:
            if "enable_thinking" not in str(self._tokenizer.chat_template):
                raise UserError(
                    f"data.enable_thinking={str(enable_thinking).lower()}, but the chat template "
                    f"of {folder} does not know enable_thinking: leave it unset"
                )
            self._template_options["enable_thinking"] = enable_thinking
        self._where = setting or str(folder)

    def encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError:
            raise UserError(
                f"{self._where}: this text is not Unicode, it holds half a surrogate pair: "
                f"{text[:200]!r}"
            ) from None

    def encode_prompt(self, prompt: str | Turns) -> list[int]:
        if self._chat_template:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return self.encode(self._through_template(turns, add_generation_prompt=True))
        assert isinstance(prompt, str)
        bos, plain = self._tokenizer.bos_token, self.encode(prompt)
        if bos and prompt.startswith(bos):
            return plain
        ids = self._tokenizer.encode(prompt)
        if ids[len(ids) - len(plain) :] != plain:  # some of embedding models put an end behind it
            raise UserError(
                f"{self._where}: its tokenizer ends every text with {self.name(ids[-1])!r}, and no "
                "response follows an end: set add_eos_token to false in its tokenizer_config.json, "
                "or take the end out of the post_processor of its tokenizer.json"
            )
        return ids

    def template_ends(self) -> tuple[int, ...]:
        if not self._chat_template:
            return ()
        turns = [("user", "1"), ("assistant", _ANSWER)]
        try:
            text = self._through_template(
                [{"role": role, "content": content} for role, content in turns]
            )
        except UserError:  # one that takes no assistant's turn ends none
            return ()
        _, found, tail = text.rpartition(_ANSWER)
        added = self._tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special}
        special -= {self._tokenizer.unk_token_id, self._tokenizer.bos_token_id}
        ids = self.encode(tail) if found else []
        return tuple(dict.fromkeys(i for i in ids if i in special))

    def _through_template(self, turns: Turns, **options: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                turns, tokenize=False, **options, **self._template_options
            )
        except Exception as error:  # a template is a program: it may fail of anything
            raise UserError(
                f"{self._where}: its chat template cannot take the turns of "
                f"{', '.join(str(turn.get('role')) for turn in turns)} ({error}): correct "
                "chat_template in the tokenizer's files, or set data.chat_template=false"
            ) from None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def name(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)

    def show(self, ids: Sequence[int]) -> str:
        ids = np.asarray(ids).tolist()
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _read_with_transformers(folder: str | Path, setting: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the files make transformers and tokenizers trip over
        raise UserError(
            f"{setting or folder}: its tokenizer cannot be loaded ({error}): copy the model's "
            "tokenizer files again"
        ) from None


class SentencePieceTokenizer:
    """A SentencePiece .model file: byte fallback and whitespace are the file's own.

    bos_id: a prompt begins with it, where it is the file's bos. The file does not say whether it
    does: the model's config.json has to.
    """

    def __init__(self, file: str | Path, *, setting: str = "", bos_id: int | None = None) -> None:
        where = setting or str(file)
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise UserError(
                f"{where} is read by sentencepiece, which cannot be imported ({error}): "
                "pip install sentencepiece"
            ) from None
        try:
            self._processor: Any = SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{where}: sentencepiece cannot read {Path(file).name} ({error}): copy it again; "
                "if it is of another kind, as Llama 3's is tiktoken's, give the HF folder "
                "with the tokenizer.json"
            ) from None
        self._bos = [bos_id] if bos_id is not None and bos_id == self._processor.bos_id() else []

    @property
    def num_pieces(self) -> int:
        return self._processor.get_piece_size()

    @property
    def eos_id(self) -> int | None:
        """The piece that ends a text; None where the file was made without one."""
        found = self._processor.eos_id()
        return found if found >= 0 else None

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text, add_bos=False, add_eos=False)

    def encode_prompt(self, prompt: str | Turns) -> list[int]:
        assert isinstance(prompt, str)
        return self._bos + self.encode(prompt)

    def template_ends(self) -> tuple[int, ...]:
        return ()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        # Control pieces have no text for sentencepiece; beyond the last piece it would raise.
        known = self.num_pieces
        return self._processor.decode([i for i in np.asarray(ids).tolist() if i < known])

    def name(self, token_id: int) -> str:
        if token_id >= self.num_pieces:
            return ""
        # Decoding one piece alone would drop the blank that it begins with.
        return self._processor.id_to_piece(token_id).replace("\u2581", " ")

    def show(self, ids: Sequence[int]) -> str:
        runs = groupby(ids, self._processor.is_control)
        return "".join(
            "".join(map(self.name, run)) if control else self.decode(list(run))
            for control, run in runs
        )


def _refuse_chat_template(source: TokenizerSource, chat_template: bool) -> None:
    if chat_template:
        raise UserError(
            f"data.chat_template=true, but {source.setting} is a SentencePiece file, which has no "
            "chat template: write the turns into the prompts and set data.chat_template=false, or "
            "give an HF folder whose tokenizer has one"
        )


def _largest_id_and_end(source: TokenizerSource) -> tuple[int, int | None]:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(source.path / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(
            f"{source.setting}: tokenizer.json cannot be read ({error}): copy the model's "
            "tokenizer files again"
        ) from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    end = _named_end(source.path)
    return largest, None if end is None else tokenizer.token_to_id(end)


def _named_end(folder: Path) -> str | None:
    """eos_token of the tokenizer's own files, which hold it as text or with its properties."""
    for name in (_HF_CONFIG, "special_tokens_map.json"):
        raw = _json_object(folder / name).get("eos_token")
        end = raw.get("content") if isinstance(raw, dict) else raw
        if isinstance(end, str):
            return end
    return None


def _llamas_bos(folder: Path) -> int | None:
    """Return the bos that a Llama's prompts begin with, by its config.json; None for other models:
    Qwen's name a bos and do not use it."""
    raw = _json_object(folder / "config.json")
    return raw.get("bos_token_id", 1) if raw.get("model_type") == "llama" else None


def _json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object of an optional file; it is empty where there is no file. Raises
    UserError naming the file."""
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy the model again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a JSON object: copy the model again")
    return raw
