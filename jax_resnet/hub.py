"""Downloads weights such as "hf:timm/resnet50.a1_in1k" from Hugging Face's hub. Needs the pip extra "hub".

Files stay in the cache of huggingface_hub; cached files need no network. The variables HF_ENDPOINT, HF_HOME, HF_TOKEN
and HF_HUB_OFFLINE have the same effect as in huggingface_hub.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from jax_resnet.weight_files import FOLDER_FILES, INDEX
from jax_resnet.weight_settings import SETTINGS_FILES

__all__ = ["fetch", "is_name"]

_NAME = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/[\w.-]+/[\w.-]+|[\w.-]+))?(/(?P<file>[^@]+))?")


def is_name(path: str | os.PathLike) -> bool:
    return os.fspath(path).startswith("hf:")


def fetch(name: str | os.PathLike) -> Path:
    """Downloads the weights of a repository, and the settings beside them, into the cache.

    Args:
      name: "hf:owner/name", "hf:owner/name@revision", or either with a file: "hf:owner/name/folder/file.pth".

    Returns:
      the local path of the folder, or of the file if `name` has one.

    Raises:
      ValueError: huggingface_hub is missing, the hub cannot be reached, or it has no such repository or file.
    """
    match = _NAME.fullmatch(os.fspath(name))
    if match is None:
        raise ValueError(f"{name} is not a name on the hub: expected hf:owner/name[@revision][/file]")
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ValueError(f'{name}: huggingface_hub is missing ({error}): pip install -e ".[hub]"') from error
    offline = False

    def download(file: str) -> Path | None:
        """Returns None if the hub has no such file, or if the hub cannot be reached and the cache has none."""
        nonlocal offline
        try:
            kept = hf_hub_download(match["repo"], file, revision=match["revision"], local_files_only=offline)
            return Path(kept)
        except LocalEntryNotFoundError:
            offline = True
        except EntryNotFoundError:
            pass
        return None

    files = (match["file"],) if match["file"] else FOLDER_FILES
    try:
        path = next((path for path in map(download, files) if path), None)
        if path and path.name.endswith(INDEX):
            for part in set(json.loads(path.read_bytes())["weight_map"].values()):
                download(part)
        for file in SETTINGS_FILES if path else ():
            download(file)
    except (HfHubHTTPError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name} cannot be downloaded: {str(error).strip().splitlines()[0]}") from error
    if path is None and offline:
        raise ValueError(f"{name} is not in the cache, and {constants.ENDPOINT} cannot be reached")
    if path is None:
        raise ValueError(f"{name} has none of {', '.join(files)}: name a weight file, hf:owner/name/FILE")
    return path if match["file"] else path.parent
