"""Every reader of a model's folder, with any of its files damaged: as in test_damaged_files."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megafork.config import TrainConfig
from megafork.config.load import load_config
from megafork.data.tokenizer import check_tokenizer, load_tokenizer
from megafork.errors import UserError
from megafork.model.hf_model import check_folder
from megafork.model.shape import ModelShape
from megafork.rollout.ends import check_ends
from tests.helpers.commands import QUICKSTART
from tests.helpers.damage import documents, torn
from tests.unit.test_damaged_files import CASES, cases, reads_or_tells

pytestmark = pytest.mark.slow

MODEL = QUICKSTART / "model"
LOADS = max(10, CASES // 5)
"""of a reader that loads a tokenizer, which takes a tenth of a second"""
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HOSTILE_TEMPLATES = [
    "",
    "{{",
    "{% for m in messages %}",
    "{{ raise_exception('no') }}",
    "{{ messages[7]['content'] }}",
    "{{ messages.x.y.z }}",
    "{{ 1 / 0 }}",
    "{{ messages | nothing }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages[0]['content'] + 1 }}",
    "{% include 'x' %}",
    "\ud800",
    "plain text",
]


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(MODEL, tmp_path / "model")


def config_of(folder, *more):
    return load_config(TrainConfig, QUICKSTART / "config.toml", [f"model.path={folder}", *more])


def read_all(folder, *more):
    """As a run does before it starts anything."""
    config = config_of(folder, *more)
    shape = ModelShape.from_folder(folder)
    shape.check(config.model, config.parallel)
    check_folder(folder)
    end = check_tokenizer(config, shape.vocab_size, chat_template=config.data.chat_template)
    check_ends(config, shape, end)


def read_tokenizer(folder, *more):
    config = config_of(folder, *more)
    tokenizer = load_tokenizer(config, chat_template=config.data.chat_template)
    ids = tokenizer.encode_prompt("1 + 1 =")
    tokenizer.show(ids)
    tokenizer.template_ends()


def tried(folder, name, content, read, *more):
    reads_or_tells(folder / name, content, lambda path: read(folder, *more))


def whole(name):
    return json.loads((MODEL / name).read_text())


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_what_is_read_before_a_start(folder, name):
    @given(content=documents(whole(name)) | torn((MODEL / name).read_bytes()))
    @cases()
    def check(content):
        tried(folder, name, content, read_all)

    check()


def sharded(folder):
    """model.safetensors becomes the one file of an index."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    header = header_of((folder / "model-00001-of-00001.safetensors").read_bytes())
    names = dict.fromkeys(header.keys() - {"__metadata__"}, "model-00001-of-00001.safetensors")
    return {"metadata": {"total_size": 1}, "weight_map": names}


def header_of(content):
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size])


def test_an_index(folder):
    index = sharded(folder)
    name = "model.safetensors.index.json"

    @given(content=documents(index) | torn(json.dumps(index).encode()))
    @cases()
    def check(content):
        tried(folder, name, content, read_all)

    check()


def test_a_safetensors_header(folder):
    content = (MODEL / "model.safetensors").read_bytes()
    header, tensors = header_of(content), content[8 + struct.unpack("<Q", content[:8])[0] :]

    @given(damaged=documents(header), size=st.sampled_from([None, None, None, 0, 7, 1 << 40]))
    @cases()
    def check(damaged, size):
        length = struct.pack("<Q", len(damaged) if size is None else size)
        tried(folder, "model.safetensors", length + damaged + tensors, read_all)

    check()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer(folder, name):
    @given(content=documents(whole(name)) | torn((MODEL / name).read_bytes()))
    @cases(LOADS)
    def check(content):
        tried(folder, name, content, read_tokenizer)

    check()


def test_a_chat_template(folder):
    """Any program may stand there, and any text."""
    settings = whole("tokenizer_config.json")

    @given(template=st.sampled_from(HOSTILE_TEMPLATES) | torn(TEMPLATE.encode()).map(as_text))
    @cases(LOADS)
    def check(template):
        content = json.dumps(settings | {"chat_template": template}).encode()
        tried(folder, "tokenizer_config.json", content, read_tokenizer, "data.chat_template=true")

    check()


def as_text(content):
    return content.decode(errors="replace")


def test_a_template_that_fails_is_named(folder):
    content = whole("tokenizer_config.json") | {
        "chat_template": "{{ raise_exception('my cause') }}"
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"cannot take the turns of user \(my cause\)"):
        read_tokenizer(folder, "data.chat_template=true")
