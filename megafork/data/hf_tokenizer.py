"""Reads an HF folder's tokenizer.json as transformers 5 does, without transformers or torch.

transformers changes what tokenizer.json says: it adds tokens of the other files, and some of its
classes build the tokenizer anew from the vocabulary and the merges. `read_folder` follows it for
the plain class and for Qwen's. A folder with anything else in it (another class, an unknown
setting, a damaged file) is left to transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from megafork.data.chat_template import render

Token = str | AddedToken

NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
PLAIN = "TokenizersBackend"
QWEN = "Qwen2Tokenizer"
_NAMES_OF_PLAIN = {PLAIN, "PythonBackend", "PreTrainedTokenizer", "PreTrainedTokenizerFast"}
_NAMES_OF_QWEN = {QWEN, "Qwen2TokenizerFast"}
CLASS_OF_MODEL = {"qwen2": QWEN, "qwen3": QWEN, "llama": PLAIN, None: PLAIN}
"""By config.json's model_type, None where there is none: the class of a folder that names none"""
OVERRULED = {"qwen2"}
"""Models whose folders name wrong classes: transformers takes that of the model"""
_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_DEFAULTS = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
_CLEANED_UP = {
    **{f" {mark}": mark for mark in ".?!,"},
    " ' ": "'",
    **{f" {ending}": ending for ending in ("n't", "'m", "'s", "'ve", "'re")},
}


class FolderTokenizer:
    """A folder's tokenizer with those methods of transformers' own that `HfTokenizer` calls."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        named: Mapping[str, Token],
        chat_template: str | dict[str, str] | None,
        *,
        cleans_up: bool,
    ) -> None:
        """named: special tokens by their names in the settings."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self.chat_template = tokenizer, chat_template
        self._named = {name: str(token) for name, token in named.items()}
        # transformers takes no space out of what BPE decoded, whatever the settings say.
        self._cleans_up = cleans_up and not isinstance(tokenizer.model, BPE)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return self._tokenizer.get_added_tokens_decoder()

    @property
    def bos_token(self) -> str | None:
        return self._named.get("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._id_of("unk_token")

    def _id_of(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(self._named[name]) if name in self._named else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text. Raises TypeError for one that is not Unicode."""
        # A batch, for `encode` of one text would hold the GIL; so would `decode`.
        [encoding] = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(
        self,
        ids: Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        [text] = self._tokenizer.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        cleans_up = self._cleans_up and clean_up_tokenization_spaces is not False
        return _cleaned_up(text) if cleans_up else text

    def apply_chat_template(
        self, turns: list[dict[str, str]], *, tokenize: bool, **options: bool
    ) -> str:
        """Return the turns as one text. Raises whatever the template raises."""
        assert not tokenize and self.chat_template is not None
        template = self.chat_template
        if isinstance(template, dict):
            if "default" not in template:
                raise ValueError(
                    "This model has multiple chat templates with no default specified! Please "
                    "either pass a chat template or the name of the template you wish to use to "
                    "the `chat_template` argument. Available template names are "
                    f"{sorted(template)}."
                )
            template = template["default"]
        if not turns:
            raise ValueError(
                "Cannot apply chat template to an empty conversation. Provide at least one message."
            )
        return render(template, turns, **(self._named | options))


def _cleaned_up(text: str) -> str:
    """The text without the spaces that WordPiece puts before punctuation."""
    for spaced, joined in _CLEANED_UP.items():
        text = text.replace(spaced, joined)
    return text


class _LeftToTransformers(Exception):
    """The folder holds what this module does not follow."""


def read_folder(folder: str | Path) -> FolderTokenizer | None:
    """The tokenizer of a folder with a tokenizer.json; None: transformers has to read it."""
    if not (Path(folder) / "tokenizer.json").is_file():
        return None
    try:
        return _read(Path(folder))
    except Exception:  # transformers reads it, or says better what is wrong
        return None


def _read(folder: Path) -> FolderTokenizer:
    settings = _settings(folder)
    kind = _class_of(_object(folder / "config.json"), settings.pop("tokenizer_class", None))
    template = _chat_template(folder, settings.pop("chat_template", None))
    file = folder / "tokenizer.json"
    raw: dict[str, Any] = {}
    if kind == QWEN or "added_tokens_decoder" not in settings:
        raw = json.loads(file.read_text(encoding="utf-8"))
    _move_additional(settings)
    added = _added_tokens(folder, settings, raw.get("added_tokens"))
    settings = {key: _as_token(value) for key, value in settings.items()}
    by_text = {str(token): token for _, token in added}
    named, extra = _special_tokens(settings, by_text, _QWEN_DEFAULTS if kind == QWEN else {})
    if kind == QWEN:
        tokenizer = _qwen(raw, prefix_space=settings.get("add_prefix_space") or False)
    else:
        tokenizer = Tokenizer.from_file(str(file))
        _need(tokenizer.padding is None)  # transformers would take its pad_token
    tokenizer.encode_special_tokens = settings.get("split_special_tokens", False)
    _add_tokens(tokenizer, dict(added), named, extra)
    if kind == QWEN:
        texts = dict.fromkeys(map(str, (*named.values(), *extra)))
        tokenizer.add_tokens([AddedToken(text, special=True) for text in texts])
    _need(all(tokenizer.token_to_id(str(token)) is not None for token in named.values()))
    cleans_up = settings.get("clean_up_tokenization_spaces", False)
    return FolderTokenizer(tokenizer, named, template, cleans_up=cleans_up)


# ---- the files ----


def _object(path: Path) -> dict[str, Any]:
    """Read the JSON object of an optional file; it is empty where there is no file."""
    if not path.is_file():
        return {}
    raw = json.loads(path.read_text(encoding="utf-8"))
    _need(isinstance(raw, dict))
    return raw


def _need(condition: bool) -> None:
    """Leave the folder to transformers unless this is so."""
    if not condition:
        raise _LeftToTransformers


def _is_any_of(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kinds)


def _are_texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


_IS_ANYTHING, _IS_FLAG = _is_any_of(object), _is_any_of(bool)
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "clean_up_tokenization_spaces": _IS_FLAG,
    "split_special_tokens": _IS_FLAG,
    "add_prefix_space": _is_any_of(bool, NoneType),
    "model_max_length": _is_any_of(int, float, NoneType),
    "padding_side": {"left", "right"}.__contains__,
    "truncation_side": {"left", "right"}.__contains__,
    "backend": {"tokenizers"}.__contains__,
    "model_input_names": lambda names: isinstance(names, list) and _are_texts(names),
    **dict.fromkeys((*NAMED, "additional_special_tokens", "extra_special_tokens"), _IS_ANYTHING),
    **dict.fromkeys(("tokenizer_class", "chat_template", "added_tokens_decoder"), _IS_ANYTHING),
    # Without effect: overruled by tokenizer.json, or read by classes that are not followed here.
    **dict.fromkeys(("add_bos_token", "add_eos_token", "legacy", "sp_model_kwargs"), _IS_ANYTHING),
    **dict.fromkeys(("errors", "use_default_system_prompt", "use_fast"), _IS_ANYTHING),
    **dict.fromkeys(("name_or_path", "is_local", "local_files_only"), _IS_ANYTHING),
    **dict.fromkeys(("processor_class", "special_tokens_map_file"), _IS_ANYTHING),
    # Of padding and cutting, which is not asked for.
    **dict.fromkeys(("max_length", "stride", "truncation_strategy"), _IS_ANYTHING),
    **dict.fromkeys(("pad_to_multiple_of", "pad_token_type_id"), _IS_ANYTHING),
}
"""Of tokenizer_config.json: the keys that are followed, and what their values have to be"""


def _settings(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json; a folder with an unknown setting in it is left to
    transformers."""
    raw = _object(folder / "tokenizer_config.json")
    _need(all(key in _CHECKS and _CHECKS[key](value) for key, value in raw.items()))
    return raw


def _as_token(value: Any) -> Any:
    """The token, or the list with tokens, that a value of the settings stands for."""
    if isinstance(value, list):
        return [_as_token(item) for item in value]
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return AddedToken(**{key: part for key, part in value.items() if key != "__type"})
    return value


def _class_of(config: dict[str, Any], named: object) -> str:
    """PLAIN or QWEN. config: config.json. named: the tokenizer_class beside the vocabulary."""
    model = config.get("model_type")
    _need("model_type" not in config or isinstance(model, str))
    _need(not {"tokenizer_class", "model_name", "auto_map"} & config.keys())
    _need(model in CLASS_OF_MODEL)
    if named is None or model in OVERRULED:
        return CLASS_OF_MODEL[model]
    _need(named in _NAMES_OF_PLAIN | _NAMES_OF_QWEN)
    return PLAIN if named in _NAMES_OF_PLAIN else QWEN


def _chat_template(folder: Path, of_settings: object) -> str | dict[str, str] | None:
    """The template or templates by name; files of their own go before the settings'."""
    paths = {"default": folder / "chat_template.jinja"}
    others = folder / "additional_chat_templates"
    paths |= {path.name.removesuffix(".jinja"): path for path in others.glob("*.jinja")}
    found = {n: path.read_text(encoding="utf-8") for n, path in paths.items() if path.is_file()}
    if found:
        return found["default"] if found.keys() == {"default"} else found
    if isinstance(of_settings, list):
        of_settings = {template["name"]: template["template"] for template in of_settings}
    if isinstance(of_settings, dict):
        _need(_are_texts((*of_settings.keys(), *of_settings.values())))
        return of_settings
    _need(of_settings is None or isinstance(of_settings, str))
    return of_settings  # type: ignore[return-value]


# ---- its tokens ----


def _added_tokens(
    folder: Path, settings: dict[str, Any], of_tokenizer_json: list[dict[str, Any]] | None
) -> list[tuple[int, AddedToken]]:
    """Return the added tokens with their ids: added_tokens_decoder, or the older files where it is
    missing.

    Of these files special_tokens_map.json goes into the settings.
    """
    if "added_tokens_decoder" in settings:
        raw = settings["added_tokens_decoder"]
        return [(int(i), AddedToken(**token)) for i, token in raw.items()]
    for key, value in _object(folder / "special_tokens_map.json").items():
        _need(key in NAMED or key == "additional_special_tokens")
        if isinstance(value, dict):
            rest = {name: part for name, part in value.items() if name != "special"}
            value = AddedToken(**rest, special=True)
        settings[key] = value
    special = {str(settings[key]) for key in NAMED if settings.get(key)}
    special.update(map(str, settings.get("extra_special_tokens") or ()))
    added = []
    for text, index in _object(folder / "added_tokens.json").items():
        is_special = text in special
        added.append((index, AddedToken(text, normalized=not is_special, special=is_special)))
    assert of_tokenizer_json is not None
    for token in of_tokenizer_json:
        properties = {key: part for key, part in token.items() if key != "id"}
        added.append((token["id"], AddedToken(**properties)))
    return added


def _move_additional(settings: dict[str, Any]) -> None:
    """additional_special_tokens is the older name of extra_special_tokens."""
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    if settings.get("extra_special_tokens") == {}:
        del settings["extra_special_tokens"]


def _special_tokens(
    settings: dict[str, Any], added: Mapping[str, AddedToken], defaults: Mapping[str, str]
) -> tuple[dict[str, Token], list[Token]]:
    """The special tokens with names, in the order of NAMED, and the others.

    added: the added tokens by their text; a special token has their properties.
    """
    # special_tokens_map.json may have brought the older name again.
    extra = settings.get("extra_special_tokens", settings.get("additional_special_tokens"))
    extra = [] if extra is None else extra
    _need(isinstance(extra, list))
    named = {}
    for key in NAMED:
        token = settings.get(key, defaults.get(key))
        if token is not None:
            named[key] = added.get(str(token), token) if key in settings else token
    _need(all(isinstance(token, Token) for token in (*named.values(), *extra)))
    return named, extra


def _add_tokens(
    tokenizer: Tokenizer,
    added: Mapping[int, AddedToken],
    named: Mapping[str, Token],
    extra: Sequence[Token],
) -> None:
    """Add the tokens that tokenizer.json lacks, and again those that it has.

    They get the properties that they have in the other files, and are special if they are named.
    """
    new: list[Token] = [token for _, token in sorted(added.items())]
    present = tokenizer.get_added_tokens_decoder().values()
    texts = {token.content for token in present} | {str(token) for token in new}
    for token in (*named.values(), *extra):
        if str(token) not in texts and token not in new:
            new.append(token)
    names = {str(token) for token in named.values() if token}
    objects = []
    for token in new:
        if isinstance(token, str):
            token = AddedToken(token, special=True)
        elif not token.special and str(token) in names:
            token.special = True
        objects.append(token)
    if objects:
        tokenizer.add_tokens(objects)


def _qwen(raw: dict[str, Any], *, prefix_space: bool) -> Tokenizer:
    """Build Qwen2Tokenizer of tokenizer.json's vocabulary, merges and post-processor alone."""
    model = raw["model"]
    _need(model["type"] == "BPE" and isinstance(model["vocab"], dict))
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model.get("merges", ())]
    tokenizer = Tokenizer(
        BPE(
            vocab=model["vocab"],
            merges=merges,
            dropout=None,
            unk_token=None,
            continuing_subword_prefix="",
            end_of_word_suffix="",
            fuse_unk=False,
            byte_fallback=False,
        )
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False),
        ]
    )
    empty = model | {"vocab": {}, "merges": []}
    shell = Tokenizer.from_str(json.dumps(raw | {"model": empty, "added_tokens": []}))
    if shell.post_processor is not None:
        tokenizer.post_processor = shell.post_processor
    return tokenizer
