"""`megafork push`: uploads an HF folder to the Hugging Face Hub."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, get_token
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from megafork.checkpoint.model_card import CARD, is_unchanged
from megafork.errors import UserError

_HIDDEN = [".*", "**/.*"]
"""Patterns of files that are not uploaded: caches, and what may hold a secret"""
_FIXES = {
    400: "mend what it names (of a README.md: the lines between its two ---)",
    401: "the token is not valid (any more): make one that may write and set HF_TOKEN to it",
    403: "take a token that may write to this owner's repositories",
    404: "look whether the owner is spelled so, and whether the token may write there",
    413: "look at the account's storage, or take another repository",
    429: "wait, and push again: what is there already is not sent twice",
}


def check_access(repo_id: str) -> None:
    """Raise UserError where it is plain before anything is read that nothing could be uploaded."""
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise UserError(
            f"{repo_id!r} names no repository of the hub: give OWNER/NAME, of letters, digits and "
            f". _ - ({error})"
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{repo_id} cannot be pushed to, for HF_HUB_OFFLINE is set in the environment: unset it"
        )
    if get_token() is None:
        raise UserError(
            f"{repo_id} cannot be pushed to without a token: run `hf auth login`, or set HF_TOKEN "
            "to one that may write (https://huggingface.co/settings/tokens)"
        )


def upload(folder: Path, repo_id: str, *, private: bool, tell: Callable[[str], None]) -> None:
    """Make the repository if there is none, and upload the folder's files in one commit.

    A README.md of the repository that someone has written or changed is kept. Raises UserError when
    the hub cannot be reached or refuses, and for a public repository where `private` is asked for.
    """
    api = HfApi(library_name="megafork")
    with _told(repo_id):
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        repo_id = url.repo_id
        if private and not api.repo_info(repo_id).private:
            raise UserError(
                f"--private: {url} exists and is public: make it private in its settings, or name "
                "another repository"
            )
        kept = (folder / CARD).is_file() and _has_own_card(api, repo_id)
        if kept:
            tell(f"{CARD} of {repo_id} was written or changed by hand: it is kept")
        ignored = [*_HIDDEN, CARD] if kept else _HIDDEN
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        sizes = [
            (folder / name).stat().st_size
            for name in filter_repo_objects(names, ignore_patterns=ignored)
        ]
        tell(f"uploading {folder}: {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB")
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Upload the model with megafork",
            ignore_patterns=ignored,
        )
    tell(f"pushed to {url} ({done.oid})")


def _has_own_card(api: HfApi, repo_id: str) -> bool:
    """Return whether the repository has a card that megafork did not write as it is now."""
    if not api.file_exists(repo_id, CARD):
        return False
    card = Path(api.hf_hub_download(repo_id, CARD))
    return not is_unchanged(card.read_text(encoding="utf-8", errors="replace"))


@contextlib.contextmanager
def _told(repo_id: str) -> Iterator[None]:
    """Turn what the hub answers, and no answer, into UserError."""
    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        fix = _FIXES.get(status, "push again later: what is there already is not sent twice")
        answer = " ".join(str(error).split())
        raise UserError(f"the hub refused {repo_id} ({answer}): {fix}") from error
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"{repo_id}: {constants.ENDPOINT} cannot be reached ({type(error).__name__}: {error}). "
            "Look at the network and at HTTPS_PROXY, or push from another machine, which needs "
            "the model's folder and nothing else"
        ) from error
