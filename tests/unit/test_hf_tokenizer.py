"""The light reader of HF folders does what transformers does, or leaves the folder to it."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from megafork.data.hf_tokenizer import CLASS_OF_MODEL, OVERRULED, PLAIN, QWEN, read_folder
from megafork.data.tokenizer import HfTokenizer
from megafork.errors import UserError
from tests.helpers.commands import QUICKSTART, ROOT
from tests.helpers.damage import documents
from tests.helpers.tokenizer_folders import KINDS, SPECIAL, write

TEXTS = (
    "",
    " ",
    "the sum of two numbers is even.",
    "  the  sum\t of\r\n\r\ntwo  \n",
    "We don't , do n't ' we ' 's ! ?",
    "6*4=24;2*24=48. 12345678",
    "naïve café e\u0301 \u212b \u0130ı ﬁ 漢字かな 한국어 العربية हिन्दी ไทย",
    "🙂\U0001f469\u200d\U0001f469\u200d\U0001f467 𝔘\u200b\u2028\ufeff\x00",
    "<s>the</s> <unk><|im_start|>user\nso <|im_end|>\n<mid>  <end> sumsum sum",
    "<|endoftext|> <new> <other><pad><eos> <|im_end|",
)
LONG = "we try 12 + 34 = 46 . " * 300
TURNS = (
    [{"role": "user", "content": " the sum? "}],
    [
        {"role": "system", "content": "né\n"},
        {"role": "user", "content": "<s>1</s>"},
        {"role": "assistant", "content": "two & <b>"},
        {"role": "user", "content": "so"},
    ],
)
OPTIONS = ({}, {"add_generation_prompt": True}, {"enable_thinking": False})
QWEN_TEMPLATE = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}{% if loop.index > 9 %}{% break %}{% endif %}{%- endfor %}
{% for message in messages %}
    {% if message.role == 'assistant' %}
{% generation %}
<|im_start|>assistant
{{ message.content | trim }}<|im_end|>
{% endgeneration %}
    {% elif message.role == "user" %}
        {%- if loop.last and loop.index0 == ns.last %}{{ bos_token }}{% endif %}
<|im_start|>user
{{ message | tojson }}{{ message | tojson(indent=2, sort_keys=true) }}<|im_end|>
    {% endif %}
{% endfor %}
{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ tools is none }}{{ documents is none }}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{% endif %}"""


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return KINDS[kind]()


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory):
    """A function that names a folder that is not there yet."""
    root, numbers = tmp_path_factory.mktemp("folders"), itertools.count()
    return lambda: root / str(next(numbers))


def assert_same(ours, theirs, texts=TEXTS) -> None:
    """Everything that HfTokenizer asks for."""
    for name in ("bos_token", "bos_token_id", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.chat_template == theirs.chat_template
    added = [{i: repr(t) for i, t in t.added_tokens_decoder.items()} for t in (ours, theirs)]
    assert added[0] == added[1]
    for text in texts:
        for special in (False, True):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
        assert_same_text(ours, theirs, ids)
    size = len(theirs)
    everything = range(0, size + 3, max(1, size // 997))
    assert_same_text(ours, theirs, [*everything, 10**9])
    for i in (*everything, *range(max(0, size - 30), size + 3)):
        plain = {"clean_up_tokenization_spaces": False}
        assert ours.decode([i], **plain) == theirs.decode([i], **plain)
    if theirs.chat_template:
        for turns, options in itertools.product((*TURNS, []), OPTIONS):
            through = partial(rendered, turns=turns, options=options)
            assert through(ours) == through(theirs)


def rendered(tokenizer, turns, options) -> Any:
    """The text, or the kind and text of what the template raises."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:
        return type(error).__name__, str(error)


def assert_same_text(ours, theirs, ids: list[int]) -> None:
    for skip in (False, True):
        for options in ({}, {"clean_up_tokenization_spaces": False}):
            ours_text = ours.decode(ids, skip_special_tokens=skip, **options)
            assert ours_text == theirs.decode(ids, skip_special_tokens=skip, **options)


def by_transformers(folder: Path):
    return AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )


def token(content: str, **properties: bool) -> dict[str, Any]:
    off = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, "special": True} | off | properties


def object_token(content: str, **properties: bool) -> dict[str, Any]:
    return {"__type": "AddedToken"} | token(content, **properties)


# ---- folders as they are published ----


QWEN_3 = {
    "tokenizer_config.json": {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            "3": token("<|im_start|>"),
            "4": token("<|im_end|>"),
            "400": token("<|endoftext|>"),
            "401": token("<think>", special=False),
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": QWEN_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    },
    "config.json": {"model_type": "qwen3"},
}
DEEPSEEK_DISTILLED = {  # names Llama's class, which transformers knows to be wrong
    "tokenizer_config.json": {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": object_token("<s>"),
        "clean_up_tokenization_spaces": False,
        "eos_token": object_token("</s>", normalized=True),
        "legacy": True,
        "model_max_length": 16384,
        "pad_token": object_token("</s>"),
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
    },
    "config.json": {"model_type": "qwen2"},
}
LLAMA_3 = {
    "tokenizer_config.json": {
        "added_tokens_decoder": {"0": token("<s>"), "400": token("<new>"), "402": token("<other>")},
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|im_end|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
    "special_tokens_map.json": {"eos_token": "</s>"},  # not read beside added_tokens_decoder
    "config.json": {"model_type": "llama"},
    "chat_template.jinja": QWEN_TEMPLATE,
}
OLD_FILES = {
    "tokenizer_config.json": {
        "eos_token": "</s>",
        "additional_special_tokens": [object_token("<new>", rstrip=True), "<|im_end|>"],
        "chat_template": [
            {"name": "default", "template": "{{ messages[0].content }}"},
            {"name": "tool_use", "template": "{{ tools }}"},
        ],
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
    "special_tokens_map.json": {
        "bos_token": {"content": "<s>", "lstrip": False, "normalized": True, "rstrip": False},
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "additional_special_tokens": ["<|im_end|>"],
    },
    "added_tokens.json": {"<new>": 520, "<other>": 521},
}
CLEANED = {
    "tokenizer_config.json": {
        "clean_up_tokenization_spaces": True,
        "split_special_tokens": True,
        "unk_token": "<unk>",
        "eos_token": "</s>",
        "extra_special_tokens": {},
    }
}
TEMPLATES = {
    "tokenizer_config.json": {"chat_template": "overruled", "tokenizer_class": PLAIN},
    "additional_chat_templates/rag.jinja": "rag",
}
FOLDERS = {
    "Qwen 3": ("byte_level", QWEN_3),
    "Qwen 2 over another split": ("llama_3", QWEN_3 | {"config.json": {"model_type": "qwen2"}}),
    "Qwen by its model": ("with_odd_tokens", {"config.json": {"model_type": "qwen3"}}),
    "DeepSeek distilled": ("llama_3", DEEPSEEK_DISTILLED),
    "Llama 3": ("llama_3", LLAMA_3),
    "old files": ("pieces", OLD_FILES),
    "WordPiece": ("word_piece", CLEANED),
    "unigram": ("unigram", CLEANED),
    "templates without a default": ("characters", TEMPLATES),
    "templates": ("characters", TEMPLATES | {"chat_template.jinja": "{{ pad_token }}"}),
    "vocabulary alone": ("with_odd_tokens", {}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_published_kinds(new_folder, name):
    kind, files = FOLDERS[name]
    folder = write(new_folder(), tokenizer_of(kind), files)
    ours = read_folder(folder)
    assert ours is not None
    assert_same(ours, by_transformers(folder), (*TEXTS, LONG))


def test_the_quickstart_s(tmp_path):
    model = QUICKSTART / "model"
    assert_same(read_folder(model), by_transformers(model))


LEFT = {
    "another class": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast"}},
    "another model": {"config.json": {"model_type": "mistral"}},
    "a class in config.json": {"config.json": {"tokenizer_class": "GPT2Tokenizer"}},
    "a setting": {"tokenizer_config.json": {"fix_mistral_regex": True}},
    "a token of a model's own": {"tokenizer_config.json": {"image_token": "<image>"}},
    "a token that is none": {"tokenizer_config.json": {"eos_token": {"content": "</s>"}}},
    "code": {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["a.B", None]}}},
    "damage": {"tokenizer_config.json": b"{"},
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_followed_is_left_to_transformers(new_folder, name):
    folder = write(new_folder(), tokenizer_of("byte_level"), LEFT[name])
    assert read_folder(folder) is None


def test_the_tables_are_transformers():
    for model, ours in CLASS_OF_MODEL.items():
        assert ours == TOKENIZER_MAPPING_NAMES.get(model, PLAIN)
    assert CLASS_OF_MODEL.keys() & MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS == OVERRULED


# ---- folders as hypothesis thinks of them ----

CONTENTS = st.sampled_from([*SPECIAL, "<new>", "<other>", "sum", " the", "É", "<mid>"])
FLAGS = {name: st.booleans() for name in ("lstrip", "normalized", "rstrip", "single_word")}


def token_strategy(make) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(make, CONTENTS, special=st.booleans(), **FLAGS)


NAMED_TOKENS = st.none() | CONTENTS | token_strategy(object_token)
TOKEN_LISTS = st.none() | st.lists(CONTENTS | token_strategy(object_token), max_size=3)
BARE = token_strategy(token)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        **{name: NAMED_TOKENS for name in ("bos_token", "eos_token", "unk_token", "pad_token")},
        **{name: NAMED_TOKENS for name in ("mask_token", "cls_token")},
        "additional_special_tokens": TOKEN_LISTS,
        "extra_special_tokens": TOKEN_LISTS | st.just({}),
        "added_tokens_decoder": st.dictionaries(st.integers(0, 420).map(str), BARE, max_size=4),
        "tokenizer_class": st.sampled_from([PLAIN, QWEN, "PreTrainedTokenizerFast"]),
        "clean_up_tokenization_spaces": st.booleans(),
        "split_special_tokens": st.booleans(),
        "add_prefix_space": st.booleans() | st.none(),
        "add_bos_token": st.booleans(),
        "add_eos_token": st.booleans(),
        "chat_template": st.just(QWEN_TEMPLATE),
    },
)
MAPS = st.dictionaries(
    st.sampled_from(["bos_token", "eos_token", "unk_token", "pad_token"]), CONTENTS | BARE
)
FILES = st.fixed_dictionaries(
    {"tokenizer_config.json": SETTINGS},
    optional={
        "config.json": st.sampled_from([{"model_type": m} for m in CLASS_OF_MODEL if m] + [{}]),
        "special_tokens_map.json": MAPS,
        "added_tokens.json": st.dictionaries(CONTENTS, st.integers(0, 420), max_size=3),
    },
)
MANY = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@MANY
@given(kind=st.sampled_from(sorted(KINDS)), files=FILES)
def test_any_settings(new_folder, kind, files):
    folder = write(new_folder(), tokenizer_of(kind), files)
    ours = read_folder(folder)
    if ours is not None:
        assert_same(ours, by_transformers(folder))
    else:  # what transformers refuses, and Qwen's class over what is no BPE
        with contextlib.suppress(Exception):
            assert type(by_transformers(folder)).__name__ == QWEN
            assert kind in ("unigram", "word_piece", "characters")
    shutil.rmtree(folder)


@MANY
@given(content=documents(QWEN_3["tokenizer_config.json"]))
def test_any_damage(new_folder, content):
    files = QWEN_3 | {"tokenizer_config.json": content}
    folder = write(new_folder(), tokenizer_of("byte_level"), files)
    ours = read_folder(folder)
    if ours is not None:
        assert_same(ours, by_transformers(folder), TEXTS[-3:])
    shutil.rmtree(folder)


@MANY
@given(text=st.text(max_size=40), ids=st.lists(st.integers(0, 450), max_size=40))
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_any_text(pairs, kind, text, ids):
    ours, theirs = pairs[kind]
    for special in (False, True):
        expected = theirs.encode(text, add_special_tokens=special)
        assert ours.encode(text, add_special_tokens=special) == expected
    assert_same_text(ours, theirs, ids)


@pytest.fixture(scope="module")
def pairs(new_folder):
    """Both readers' tokenizers of each kind."""
    found = {}
    for kind in KINDS:
        folder = write(new_folder(), tokenizer_of(kind), CLEANED)
        found[kind] = read_folder(folder), by_transformers(folder)
    return found


# ---- behind the interface ----


def test_errors_are_told_as_before(new_folder):
    files = LLAMA_3 | {"chat_template.jinja": "{{ raise_exception('my cause') }}"}
    light = write(new_folder(), tokenizer_of("llama_3"), files)
    tokenizer = HfTokenizer(light, chat_template=True)
    with pytest.raises(UserError, match=r"cannot take the turns of user \(my cause\)"):
        tokenizer.encode_prompt("the sum")
    for folder in (light, write(new_folder(), tokenizer_of("llama_3"), LEFT["another class"])):
        with pytest.raises(UserError, match="is not Unicode, it holds half a surrogate pair"):
            HfTokenizer(folder).encode("a\ud800b")


@pytest.mark.parametrize("template", ["{{", "{{ ''.__class__.__mro__ }}", "{{ messages.pop() }}"])
def test_templates_are_confined_and_fail_as_in_transformers(new_folder, template):
    files = LLAMA_3 | {"chat_template.jinja": template}
    folder = write(new_folder(), tokenizer_of("llama_3"), files)
    ours, theirs = read_folder(folder), by_transformers(folder)
    [kind, _] = told = rendered(ours, TURNS[0], {})
    assert told == rendered(theirs, TURNS[0], {})
    assert kind in ("TemplateSyntaxError", "SecurityError")


def test_a_date_in_a_template(new_folder):
    files = LLAMA_3 | {"chat_template.jinja": "{{ strftime_now('%Y, %B') }}"}
    folder = write(new_folder(), tokenizer_of("llama_3"), files)
    tokenizers = read_folder(folder), by_transformers(folder)
    assert len({t.apply_chat_template(TURNS[0], tokenize=False) for t in tokenizers}) == 1


def test_neither_transformers_nor_torch_is_needed(new_folder):
    folders = [write(new_folder(), tokenizer_of(k), f) for k, f in FOLDERS.values()]
    program = (
        "import sys\n"
        "from megafork.data.tokenizer import HfTokenizer\n"
        "for folder in sys.argv[1:]:\n"
        "    tokenizer = HfTokenizer(folder)\n"
        "    ids = tokenizer.encode_prompt('the sum')\n"
        "    tokenizer.decode(ids), tokenizer.name(ids[0]), tokenizer.show(ids)\n"
        "tokenizer = HfTokenizer(sys.argv[1], chat_template=True, enable_thinking=False)\n"
        "tokenizer.encode_prompt('the sum'), tokenizer.template_ends()\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, folders)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
