"""HF folders and SentencePiece files behind one interface, in every place that reads one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from megafork.checkpoint.hf_export import export_hf
from megafork.config import ModelConfig, ParallelConfig, ScoreConfig, TrainConfig
from megafork.config.load import load_config
from megafork.data.tokenizer import check_tokenizer, find_tokenizer, load_tokenizer
from megafork.errors import UserError
from megafork.model.scorer import Scorer
from megafork.model.shape import ModelShape
from megafork.parallel.mesh import initialize
from megafork.rollout.ends import stop_token_ids
from megafork.rollout.journal import Journal
from megafork.trainer.preflight import check_train
from tests.helpers import reference
from tests.helpers.commands import (
    QUICKSTART,
    ROOT,
    lines,
    megafork,
    small_run,
    tiny_run,
)
from tests.helpers.folders import Null, configure
from tests.helpers.sentencepiece_files import (
    ARITHMETIC,
    AS_WRITTEN,
    CONTROL,
    PIECES,
    train_quickstart_twin,
    train_sentencepiece,
)
from tools.benchmarks.ranks import run_ranks


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """.model files by name."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    return {
        "unigram": train_sentencepiece(folder / "unigram.model", "unigram"),
        "bpe": train_sentencepiece(folder / "bpe.model", "bpe"),
        "bpe as written": train_sentencepiece(folder / "as_written.model", "bpe", **AS_WRITTEN),
        "small": train_sentencepiece(
            folder / "small.model", "unigram", vocab_size=80, byte_fallback=False
        ),
        "twin": train_quickstart_twin(folder / "twin.model"),
    }


def score_config(tokenizer: object = None, model: object = QUICKSTART / "model") -> ScoreConfig:
    path = [] if tokenizer is None else [f"tokenizer.path={json.dumps(str(tokenizer))}"]
    return load_config(ScoreConfig, None, [f"model.path={json.dumps(str(model))}", *path])


def load(tokenizer: object = None, **where):
    return load_tokenizer(score_config(tokenizer, **where), chat_template=False)


@pytest.mark.parametrize("name", ["model.path", "hf", "unigram", "bpe", "bpe as written", "twin"])
def test_one_interface(files, name):
    hf = None if name == "model.path" else QUICKSTART / "model"
    tokenizer = load(files.get(name, hf))
    eos = SentencePieceProcessor(model_file=str(files[name])).eos_id() if name in files else 1
    for text in [*ARITHMETIC, "8", ""]:
        ids = tokenizer.encode(text)
        assert bool(ids) == bool(text)
        assert all(type(i) is int for i in ids)
        assert eos not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, eos]) == text
        # A response may begin with such an id, and end in the middle of a padded vocabulary.
        assert tokenizer.decode([151_935, *ids[:1], 10_000, *ids[1:], eos, 151_935]) == text


@pytest.mark.parametrize("name", ["unigram", "bpe", "bpe as written", "small"])
@pytest.mark.parametrize(
    "text",
    [
        "the sum is even",
        "  the  sum\t of\n\ntwo ",
        " 24",
        "é 漢字 🙂 naïve",
        f"so we </s> try {CONTROL} again",
        "unseen: Zebra_QUX",
    ],
)
def test_text_goes_there_and_back_as_sentencepiece_has_it(files, name, text):
    tokenizer, processor = load(files[name]), SentencePieceProcessor(model_file=str(files[name]))
    ids = tokenizer.encode(text)
    assert ids == processor.encode(text)
    assert tokenizer.decode(ids) == processor.decode(processor.encode(text))
    assert not any(processor.is_control(i) for i in ids)  # written in a text they are text
    if name == "bpe as written":
        assert tokenizer.decode(ids) == text
    if name != "small":  # it has no bytes to fall back on
        assert processor.unk_id() not in ids


def test_bytes_join_over_what_is_left_out(files):
    tokenizer, processor = load(files["bpe"]), SentencePieceProcessor(model_file=str(files["bpe"]))
    high, low = processor.piece_to_id("<0xC3>"), processor.piece_to_id("<0xA9>")
    assert tokenizer.decode([high, low]) == "é"
    assert tokenizer.decode([high, 10_000, low]) == "é"
    assert tokenizer.decode([high]) == "\ufffd"  # a response that was cut inside a character


def test_single_tokens_have_names(files):
    hf = load(QUICKSTART / "model")
    assert [hf.name(i) for i in (1, 15, 21)] == ["<eos>", "*", " "]
    assert hf.name(151_935) == ""
    tokenizer, processor = load(files["bpe"]), SentencePieceProcessor(model_file=str(files["bpe"]))
    assert [tokenizer.name(processor.piece_to_id(p)) for p in ("</s>", CONTROL, "<0xC3>")] == [
        "</s>",
        CONTROL,
        "<0xC3>",
    ]
    assert tokenizer.name(tokenizer.encode("the sum is")[-1]).startswith(" ")
    assert tokenizer.name(processor.get_piece_size()) == ""


def test_control_pieces_are_left_out(files):
    tokenizer, processor = load(files["bpe"]), SentencePieceProcessor(model_file=str(files["bpe"]))
    control = [processor.piece_to_id(piece) for piece in ("<s>", "</s>", CONTROL)]
    assert len(set(control)) == 3 and processor.unk_id() not in control
    ids = tokenizer.encode("the sum")
    assert tokenizer.decode([*control, *ids, *control]) == "the sum"
    assert tokenizer.decode(control) == ""


@pytest.mark.parametrize(
    ("name", "hf_class", "texts"),
    [
        # transformers 5 drops one leading space of Llama's, and T5 has no bytes.
        ("bpe as written", "LlamaTokenizer", ["the sum  is é 漢字\n 24", "6*4=24;2*24=48.", "Zq "]),
        ("unigram", "T5Tokenizer", ["the sum  is even", " so  we try", "6*4=24;2*24=48."]),
    ],
)
def test_transformers_reads_the_same_file_to_the_same_ids(files, tmp_path, name, hf_class, texts):
    """Its converters share no code with sentencepiece."""
    shutil.copyfile(files[name], tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": hf_class}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours, through_hf = load(files[name]), load(tmp_path)
    assert find_tokenizer(score_config(tmp_path)).sentencepiece_file is None
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False) == through_hf.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode([1, 2, *ids, 9999]) == through_hf.decode([1, 2, *ids, 9999])


def test_a_folder_with_a_model_file_alone_is_read_by_sentencepiece(files, tmp_path):
    """transformers would make a Qwen2Tokenizer of it, by config.json, that gives other ids."""
    shutil.copyfile(QUICKSTART / "model" / "config.json", tmp_path / "config.json")
    shutil.copyfile(files["bpe"], tmp_path / "tokenizer.model")
    ids = load(files["bpe"]).encode("the sum is")
    assert AutoTokenizer.from_pretrained(tmp_path).encode("the sum is") != ids
    assert load(tmp_path).encode("the sum is") == ids
    assert load(model=tmp_path).encode("the sum is") == ids


def copy_of(folder: Path, *names: str) -> Path:
    """The named files of the quickstart's model, in a new folder."""
    folder.mkdir()
    for name in names:
        shutil.copyfile(QUICKSTART / "model" / name, folder / name)
    return folder


def broken(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def broken_json(folder: Path) -> Path:
    copy_of(folder, "tokenizer_config.json")
    (folder / "tokenizer.json").write_text('{"any": "thing"}')
    return folder


MISTAKES = {
    "missing": (lambda p, _: p / "none.model", ["does not exist: give the HF folder"]),
    "no tokenizer": (
        lambda p, _: copy_of(p / "m", "config.json"),
        ["holds no tokenizer (tokenizer.json, tokenizer.model, vocab.json): copy"],
    ),
    "another file": (
        lambda *_: QUICKSTART / "model" / "tokenizer.json",
        ["is neither a folder nor a .model file: give the HF folder"],
    ),
    "no class": (
        lambda p, _: copy_of(p / "m", "tokenizer.json"),
        [
            "no tokenizer_config.json, so",
            "add one",
            '{"tokenizer_class": "PreTrainedTokenizerFast"}',
        ],
    ),
    "corrupt": (
        lambda p, _: broken(p / "x.model", b"junk"),
        ["sentencepiece cannot read x.model (", "could not parse", "): copy it again"],
    ),
    "empty": (lambda p, _: broken(p / "x.model", b""), ["sentencepiece cannot read x.model ("]),
    "cut": (
        lambda p, f: broken(p / "x.model", f["bpe"].read_bytes()[:3000]),
        ["sentencepiece cannot read x.model (", "): copy it again"],
    ),
    "tiktoken": (
        lambda p, _: broken(p / "x.model", b"IQ== 0\nIg== 1\nIw== 2\n"),
        ["sentencepiece cannot read x.model (", "as Llama 3's is tiktoken's, give the HF folder"],
    ),
    "corrupt json": (
        lambda p, _: broken_json(p / "m"),
        ["tokenizer.json cannot be read (", "): copy the model's tokenizer files again"],
    ),
    "too many pieces": (
        lambda _, f: f["bpe"],
        [f"has ids up to {PIECES - 1}, but the model in model.path=", "vocab_size=22", "give the"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(files, tmp_path, mistake):
    make, parts = MISTAKES[mistake]
    path = make(tmp_path, files)
    with pytest.raises(UserError) as caught:
        check_tokenizer(score_config(path), vocab_size=22, chat_template=False)
    told = str(caught.value)
    assert told.startswith(f"tokenizer.path={path}")
    for part in parts:
        assert part in told


def test_the_model_s_own_tokenizer_is_checked_too(tmp_path):
    check_tokenizer(score_config(), vocab_size=22, chat_template=False)
    with pytest.raises(UserError, match=r"model.path=.* ids up to 21, .* has vocab_size=21"):
        check_tokenizer(score_config(), vocab_size=21, chat_template=False)
    folder = copy_of(tmp_path / "m", "config.json")
    with pytest.raises(UserError, match=r"model.path=.* holds no tokenizer .* or set tokenizer.pa"):
        check_tokenizer(score_config(model=folder), vocab_size=22, chat_template=False)


def test_checking_loads_nothing_heavy(files):
    model = QUICKSTART / "model"
    code = (
        "import sys; from megafork.config import ScoreConfig;"
        "from megafork.config.load import load_config;"
        "from megafork.data.tokenizer import check_tokenizer;"
        "config = load_config(ScoreConfig, None, sys.argv[1:]);"
        f"check_tokenizer(config, vocab_size={PIECES}, chat_template=False);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    for path in (model, files["bpe"]):
        settings = [f"model.path={model}", f"tokenizer.path={path}"]
        assert subprocess.run([sys.executable, "-c", code, *settings], cwd=ROOT).returncode == 0


def test_a_chat_template_needs_an_hf_tokenizer(files):
    for act in (load_tokenizer, lambda c, **k: check_tokenizer(c, vocab_size=PIECES, **k)):
        with pytest.raises(UserError, match=r"chat_template=true, but tokenizer.path=.* is a Sent"):
            act(score_config(files["bpe"]), chat_template=True)


def test_a_chat_template_wraps_the_prompt(tmp_path):
    folder = copy_of(tmp_path / "m", "tokenizer.json", "tokenizer_config.json")
    template = "{% for m in messages %}1+{{ m.content }}=2;{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(score_config(folder), chat_template=True)
    assert tokenizer.encode_prompt("6*4") == load().encode("1+6*4=2;")
    assert tokenizer.encode("6*4") == load().encode("6*4")
    with pytest.raises(UserError, match="has no chat template"):
        load_tokenizer(score_config(), chat_template=True)


def test_sentencepiece_may_be_missing(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"tokenizer.path=.*: pip install sentencepiece"):
        load(files["bpe"])
    assert load().encode("8")


def train_config(tmp_path, *overrides: str) -> TrainConfig:
    _, file, *settings = small_run(tmp_path / "run", "parallel.tp=1", *overrides)
    return load_config(TrainConfig, file, settings)


def test_another_end_than_the_model_s_is_told(files, tmp_path, capsys):
    check_train(train_config(tmp_path, f"tokenizer.path={files['twin']}"))
    assert "ends a text with" not in capsys.readouterr().err
    model = copy_of(tmp_path / "m", "config.json")
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"eos_token_id": [5, 20]}))
    check_train(train_config(tmp_path, f"tokenizer.path={files['twin']}", f"model.path={model}"))
    told = capsys.readouterr().err
    assert f"tokenizer.path={files['twin']} ends a text with id 1, which is not among" in told
    assert "responses end at 5 or 20" in told


# ---- what a prompt begins with ----


def bos_tokenizer(folder: Path, **config) -> Path:
    """The quickstart's tokenizer as Llama 3's is: its post-processor puts a bos in front."""
    copy_of(folder, "tokenizer.json", "tokenizer_config.json")
    raw = json.loads((folder / "tokenizer.json").read_text())
    bos = {"id": 0, "content": "<pad>", "special": True}
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<pad>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<pad>": {"id": "<pad>", "ids": [bos["id"]], "tokens": ["<pad>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"bos_token": "<pad>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_prompt_begins_as_transformers_has_it(files, tmp_path):
    folder = bos_tokenizer(tmp_path / "m")
    theirs, ours = AutoTokenizer.from_pretrained(folder), load(folder)
    for text in (*ARITHMETIC, " 24", "8"):
        ids = ours.encode_prompt(text)
        assert ids == theirs(text)["input_ids"] == [0, *ours.encode(text)]
        assert ours.show(ids) == "<pad>" + text
    # Who writes the bos into the template means one.
    assert ours.encode_prompt("<pad>8") == [0, *ours.encode("8")]
    quickstart = load()
    assert quickstart.encode_prompt("8") == quickstart.encode("8")


@pytest.mark.parametrize("add_bos", [True, False])
def test_llama_s_own_class_begins_as_its_settings_say(files, tmp_path, add_bos):
    shutil.copyfile(files["bpe as written"], tmp_path / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": add_bos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the sum  is even", "6*4=24;"):
        ids = load(tmp_path).encode_prompt(text)
        assert ids == theirs(text)["input_ids"]
        assert ids[: len(ids) - len(load(tmp_path).encode(text))] == [1] * add_bos


def test_a_model_file_alone_begins_a_llama_s_prompts_with_its_bos(files, tmp_path):
    """Of the id that config.json names, 1 where it names none; null is for models without."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    def begin(**keys):
        configure(tmp_path, **keys)
        tokenizer = load(files["bpe"], model=tmp_path)
        ids = tokenizer.encode_prompt("the sum")
        assert (
            tokenizer.show(ids) == "<s>" * (len(ids) - len(tokenizer.encode("the sum"))) + "the sum"
        )
        return ids[: len(ids) - len(tokenizer.encode("the sum"))]

    assert begin() == [1]
    assert begin(bos_token_id=1) == [1]
    assert begin(bos_token_id=Null) == begin(bos_token_id=5) == []
    assert begin(bos_token_id=1, model_type="qwen2") == []


def test_a_tokenizer_that_ends_every_prompt_is_refused(files, tmp_path):
    shutil.copyfile(files["unigram"], tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    tokenizer = load(tmp_path)
    with pytest.raises(UserError, match="ends every text with '</s>', and no response follows"):
        tokenizer.encode_prompt("the sum")
    assert tokenizer.encode("the sum")


# ---- what a response ends with ----


IM_END = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<pad>;<unk>{% endif %}"
    "{% endfor %}"
)


def model_with(tmp_path: Path, template: str | None = None, **files: object) -> Path:
    """The quickstart's model without weights; eos_token_id by file, None: the file is not there."""
    folder = copy_of(tmp_path / "m", "config.json", "tokenizer.json", "tokenizer_config.json")
    for name, eos in files.items():
        path = folder / f"{name}.json"
        raw = json.loads(path.read_text()) if path.is_file() else {}
        raw.pop("eos_token_id", None)
        path.write_text(json.dumps(raw if eos is None else raw | {"eos_token_id": eos}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


ENDS = {
    "agree": ({"config": 1, "generation_config": 1}, False, (1,), []),
    "both stop": (
        {"config": 1, "generation_config": [5, 1]},
        False,
        (5, 1),
        ["generation_config.json ends at 5 or 1, config.json ends at 1: each of them ends a resp"],
    ),
    "config alone": ({"config": [1, 7]}, False, (1, 7), []),
    "generation alone": ({"config": None, "generation_config": 1}, False, (1,), []),
    "the template": (
        {"config": 1},
        True,
        (1, 0),
        ["config.json ends at 1, the chat template ends at 0: each of them ends a response"],
    ),
    "the template alone": ({"config": None}, True, (0,), ["ends a text with id 1", "end at 0"]),
    "the template is not used": ({"config": 1}, False, (1,), []),
    "beyond the vocabulary": (
        {"config": 1, "generation_config": [22, 1]},
        False,
        (1,),
        ["generation_config.json has the end 22, which the model cannot produce: its vocabulary"],
    ),
    "below it": ({"config": [-1, 1]}, False, (1,), ["config.json has the end -1, which the model"]),
    "the tokenizer's": (
        {"config": 5},
        False,
        (5,),
        ["ends a text with id 1, which is not among", "responses end at 5"],
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_who_ends_a_response(tmp_path, capsys, case):
    files, chat, expected, told = ENDS[case]
    folder = model_with(tmp_path, IM_END, **files)
    config = train_config(
        tmp_path, f"model.path={folder}", f"data.chat_template={str(chat).lower()}"
    )
    check_train(config)
    shape = ModelShape.from_folder(folder)
    tokenizer = load_tokenizer(config, chat_template=chat)
    assert stop_token_ids(shape, tokenizer) == expected
    notes = capsys.readouterr().err
    assert bool(notes) == bool(told)
    for part in told:
        assert part in notes


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),  # torchrun's, which somebody else started
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2", "MEGAFORK_LAUNCHER_PID": "1"}, False),
    ],
)
def test_one_process_tells(tmp_path, capsys, monkeypatch, variables, told):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    folder = model_with(tmp_path, config=[1, 22])
    check_train(train_config(tmp_path, f"model.path={folder}"))
    assert ("config.json has the end 22" in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    ("eos", "message"),
    [
        (None, "neither generation_config.json nor config.json names an eos_token_id"),
        (22, "config.json ends at 22, but its vocabulary has 22 tokens, so no response could end"),
        ([], "neither generation_config.json nor config.json names an eos_token_id"),
        ("<eos>", "config.json has eos_token_id='<eos>': it has to be an id or a list of ids"),
        ([1, None], "it has to be an id or a list of ids"),
        (True, "it has to be an id or a list of ids"),
    ],
)
def test_ends_that_are_none_are_refused(tmp_path, eos, message):
    folder = model_with(tmp_path, config=eos)
    with pytest.raises(UserError, match=re.escape(message)):
        check_train(train_config(tmp_path, f"model.path={folder}"))


def test_train_refuses_before_anything_starts(files, tmp_path):
    done = megafork(*small_run(tmp_path / "run", f"tokenizer.path={files['bpe']}"))
    assert done.returncode == 2
    assert f"error: tokenizer.path={files['bpe']}: the tokenizer has ids up to" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def load_and_export(source, target, tokenizer):
    parallel = ParallelConfig(tp=2)
    mesh = initialize(parallel)
    model = ModelConfig(path=str(source), dtype="float32")
    scorer = Scorer(model, parallel, mesh, micro_batch_tokens=64)
    export_hf(scorer, mesh, source, target, tokenizer)


@pytest.mark.parametrize("kind", ["file", "folder with the file", "hf"])
def test_an_export_carries_the_tokenizer_that_was_used(files, tmp_path, kind):
    """And none of model.path's, so that the folder can be used as model.path again."""
    source = reference.save_model(tmp_path / "m", tied=True)
    config = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": "never"}
    for name in ("vocab.json", "tokenizer.json", "chat_template.jinja"):
        (source / name).write_text('{"the source\'s": 0}')
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    expected = {"tokenizer.model"}
    if kind == "file":
        tokenizer = files["small"]
    elif kind == "hf":
        expected = {"tokenizer.json", "tokenizer_config.json"}
        tokenizer = copy_of(tmp_path / "t", *expected)
    else:
        tokenizer = copy_of(tmp_path / "t")
        shutil.copyfile(files["small"], tokenizer / "tokenizer.model")
    run_ranks(2, load_and_export, source, tmp_path / "out", tokenizer)
    names = {path.name for path in (tmp_path / "out").glob("*")}
    weights = {name for name in names if "safetensors" in name}
    assert names == weights | {"config.json", "generation_config.json"} | expected
    for text in ("6 2 4>48:", "1+2-3=0"):
        ids = load(tokenizer).encode(text)
        assert load(tmp_path / "out").encode(text) == ids
        assert load(model=tmp_path / "out").encode(text) == ids


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_score_takes_text_through_a_model_file(files, tmp_path, architecture):
    """Llama's prompts begin with the file's bos, as transformers has it."""
    folder = reference.save_model(tmp_path / "model", tied=False, architecture=architecture)
    configure(folder, bos_token_id=1)
    processor = SentencePieceProcessor(model_file=str(files["small"]))
    bos = [processor.bos_id()] if architecture == "llama" else []
    texts = [("the sum of two", "numbers is even."), ("6 2 4>48:", "6*4=24;2*24=48.")]
    by_text = [{"prompt": p, "response": r} for p, r in texts]
    by_ids = [
        {"prompt_ids": bos + processor.encode(p), "response_ids": processor.encode(r)}
        for p, r in texts
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in by_text + by_ids))
    done = megafork(
        *("score", "--model", folder, "--input", tmp_path / "in.jsonl"),
        *("--output", tmp_path / "out.jsonl", f"tokenizer.path={files['small']}"),
    )
    assert done.returncode == 0, done.stderr
    scored = lines(tmp_path / "out.jsonl")
    for text, ids in zip(scored[:2], scored[2:], strict=True):
        assert len(text["logprobs"]) == len(ids["response_ids"])
        assert text["logprobs"] == pytest.approx(ids["logprobs"], abs=1e-6)
        assert text["entropies"] == pytest.approx(ids["entropies"], abs=1e-6)


def test_score_names_a_tokenizer_that_is_not_there(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "6", "response": "2"}\n')
    done = megafork(
        *("score", "--model", QUICKSTART / "model", "--input", tmp_path / "in.jsonl"),
        *("--output", tmp_path / "out.jsonl", "tokenizer.path=none.model"),
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: tokenizer.path=none.model does not exist: give")


@pytest.mark.slow
def test_a_run_with_a_model_file(files, tmp_path):
    """The quickstart's characters from a .model: puzzles are read, solved and judged as before."""
    arguments = ["parallel.tp=1", "training.steps=1", f"tokenizer.path={files['twin']}"]
    done = megafork(*tiny_run(tmp_path / "run", *arguments))
    assert done.returncode == 0, done.stderr
    hf = AutoTokenizer.from_pretrained(QUICKSTART / "model")
    prompts = {row["prompt"] for row in lines(QUICKSTART / "data" / "train.jsonl")}
    groups = Journal.read(tmp_path / "run" / "rollouts" / "step_000001.journal")
    assert {hf.decode(group.prompt_ids) for group in groups} <= prompts
    assert any(sample.accuracy for group in groups for sample in group.samples)
    final = tmp_path / "run" / "checkpoints" / "final"
    assert (final / "tokenizer.model").read_bytes() == files["twin"].read_bytes()
    assert not list(final.glob("tokenizer*.json"))
    assert load(model=final).encode("6 2 4>48:") == hf.encode("6 2 4>48:")
