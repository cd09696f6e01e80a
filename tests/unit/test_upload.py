"""`megafork push`: what is sent to the hub, and what is said where it cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, errors

from megafork.checkpoint import upload as module
from megafork.checkpoint.model_card import model_card
from megafork.checkpoint.upload import check_access, upload
from megafork.config import TrainConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from tests.helpers.commands import QUICKSTART, megafork

CARD = model_card(load_config(TrainConfig, QUICKSTART / "config.toml", []), [])


class Hub:
    """Stands for `HfApi`: the hub's side of its calls, for one repository."""

    def __init__(self, folder: Path, *, card: str | None = None, private: bool = True) -> None:
        self.folder, self.card, self.private = folder, card, private
        self.sent: list[str] = []
        self.refusal: Exception | None = None

    def __call__(self, **_: object) -> Hub:
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        if self.refusal is not None:
            raise self.refusal
        assert exist_ok and private in (True, None)
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.private)

    def file_exists(self, repo_id, name):
        return self.card is not None

    def hf_hub_download(self, repo_id, name):
        (self.folder / name).write_text(self.card)
        return str(self.folder / name)

    def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
        from huggingface_hub.utils import filter_repo_objects

        names = [str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()]
        self.sent = sorted(filter_repo_objects(names, ignore_patterns=ignore_patterns))
        return SimpleNamespace(oid="0123abc")


@pytest.fixture
def model(tmp_path):
    folder = shutil.copytree(QUICKSTART / "model", tmp_path / "model")
    (folder / "README.md").write_text(CARD)
    (folder / ".env").write_text("SECRET=1")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    return folder


def pushed(hub, model, monkeypatch, *, private=False, repo_id="me/countdown"):
    told: list[str] = []
    monkeypatch.setattr(module, "HfApi", hub)
    upload(model, repo_id, private=private, tell=told.append)
    return told


MODEL_FILES = [
    *("README.md", "config.json", "generation_config.json"),
    *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
]


@pytest.mark.parametrize("card", [None, CARD], ids=["no card", "a card of ours"])
def test_the_model_is_sent_without_hidden_files(model, tmp_path, monkeypatch, card):
    hub = Hub(tmp_path, card=card)
    told = pushed(hub, model, monkeypatch, repo_id="countdown")
    assert hub.sent == MODEL_FILES
    assert told[0].endswith(": 6 files, 2.4 MB")
    assert told[-1].startswith("pushed to ") and "0123abc" in told[-1]


def test_a_card_that_someone_has_written_is_kept(model, tmp_path, monkeypatch):
    hub = Hub(tmp_path, card=CARD + "More.\n")
    told = pushed(hub, model, monkeypatch)
    assert hub.sent == [name for name in MODEL_FILES if name != "README.md"]
    assert told[0] == "README.md of me/countdown was written or changed by hand: it is kept"


def test_nothing_private_goes_to_a_public_repository(model, tmp_path, monkeypatch):
    hub = Hub(tmp_path, private=False)
    with pytest.raises(
        UserError, match=r"--private: .* is public: make it private in its settings"
    ):
        pushed(hub, model, monkeypatch, private=True)
    assert hub.sent == []
    pushed(Hub(tmp_path, private=True), model, monkeypatch, private=True)


@pytest.mark.parametrize(
    ("status", "fix"),
    [
        (401, "HF_TOKEN"),
        (403, "may write"),
        (404, "spelled"),
        (400, "README"),
        (503, "again later"),
    ],
)
def test_what_the_hub_refuses_is_told_with_what_to_do(model, tmp_path, monkeypatch, status, fix):
    hub = Hub(tmp_path)
    answer = SimpleNamespace(status_code=status, headers={}, request=None, text="no")
    hub.refusal = errors.HfHubHTTPError(f"{status} Error:\n\nno", response=answer)
    with pytest.raises(UserError, match=rf"refused me/countdown \({status} Error: no\): .*{fix}"):
        pushed(hub, model, monkeypatch)


def test_without_a_network_the_address_and_the_cause_are_told(model, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(UserError, match=r"me/x: http://127\.0\.0\.1:9 cannot be reached \(Conn.*"):
        upload(model, "me/x", private=False, tell=print)


def test_what_cannot_work_is_told_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    check_access("me/countdown")
    with pytest.raises(UserError, match="names no repository of the hub: give OWNER/NAME"):
        check_access("me/my/countdown")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set in the environment: unset it"):
        check_access("me/countdown")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="without a token: run `hf auth login`, or set HF_TOKEN"):
        check_access("me/countdown")


def test_the_command_names_what_is_no_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    done = megafork("push", tmp_path, "me/x")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: push {tmp_path} holds no config.json (an HF folder)")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert megafork("push", tmp_path, "me/x").returncode == 2
