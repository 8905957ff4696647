"""Uploads an exported drafter to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi

from drafter.errors import UserError


def publish(folder: Path, name: str, replaced: Iterable[str]) -> str:
    """Uploads a folder as a model repository, made if need be; returns where it is.

    Args:
        folder: As an export wrote it.
        name: Of the repository, such as someone/their-drafter.
        replaced: Files that the repository loses where the folder lacks them.

    Raises:
        UserError: The hub is not reached, or refuses: no token, no right, no such name.
    """
    try:
        hub = HfApi()
        hub.create_repo(name, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=name,
            folder_path=str(folder),
            commit_message="Upload a drafter",
            delete_patterns=sorted(replaced),
        )
    except Exception as error:  # the hub's, the network's and the file system's have no common base
        reason = (str(error).splitlines() or [""])[0].strip(" .") or type(error).__name__
        raise UserError(
            f"{folder} is written, but {name} could not be uploaded ({reason}); set HF_TOKEN or "
            f"run `hf auth login`, look at the network, then run `hf upload {name} {folder}`."
        ) from error
    return str(commit)
