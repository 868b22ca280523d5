"""`rollstream model push`: an exported model on a hub, whole in one commit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker_schemas.errors import ConfigError, DataError
from broker_schemas.method.model_folder import check_model_folder
from rollstream.staged_folder import MARKER_NAME

CARD: Final = "README.md"
STATE_FILES: Final = ("trainer_state.json", "optimizer.pt", "checksums.json")
_CARD_TEXT: Final = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [rollstream, object-detection, visual-grounding]
---

# {name}

A vision-language model that lists the objects of an image as one line of JSON, with boxes or polygons in
coordinate tokens `<|coord_0|>` to `<|coord_999|>` (0 to 1000 of width and height); trained with rollstream.
"""


@dataclass(frozen=True, kw_only=True)
class PushSummary:
    """Where a model went, and how much of it."""

    url: str
    num_files: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.url}: {self.num_files} files, {self.num_bytes / 1e6:,.1f} MB"


def push_model(
    folder: Path, name: str, *, is_private: bool = True, message: str | None = None
) -> PushSummary:
    """Put the model in ``folder`` into the repository ``name`` (owner/model), made where it is not there.

    The hub is that of the environment (``HF_ENDPOINT``, ``HF_TOKEN`` or the login of ``hf auth login``).
    A folder without a model card gets a short one. Raises DataError for no exported model, ConfigError for
    what the hub refuses or an address that does not answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    files = list(_files(folder))
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=path.relative_to(folder).as_posix(), path_or_fileobj=str(path))
        for path in files
    ]
    if not (folder / CARD).exists():
        card = _CARD_TEXT.format(name=name.rpartition("/")[2]).encode()
        operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card))
    hub = HfApi()
    try:
        place = hub.create_repo(name, private=is_private, exist_ok=True)
        hub.create_commit(
            place.repo_id, operations, commit_message=message or "Upload a model trained with rollstream"
        )
    except (HFValidationError, LocalTokenNotFoundError, HfHubHTTPError, OSError, RuntimeError) as exc:
        raise ConfigError(_refusal(name, str(hub.endpoint), exc)) from exc
    except Exception as exc:  # the hub's client lets errors of its HTTP library through
        if not type(exc).__module__.startswith(("httpx", "httpcore", "huggingface_hub", "requests")):
            raise
        raise ConfigError(_refusal(name, str(hub.endpoint), exc)) from exc
    size = sum(path.stat().st_size for path in files)
    return PushSummary(url=str(place), num_files=len(operations), num_bytes=size)


def _files(folder: Path) -> Iterator[Path]:
    if any((folder / name).exists() for name in STATE_FILES) or (folder / "checkpoints").is_dir():
        raise DataError(
            f"{folder}: a run or a checkpoint, expected the model alone; write it with "
            f"'rollstream model export {folder} DST' and push that folder"
        )
    check_model_folder(folder)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MARKER_NAME and not path.name.startswith("."):
            yield path


def _refusal(name: str, endpoint: str, error: BaseException) -> str:
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # "error while uploading", around what happened
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = " ".join(str(error).split())[:300]
    if status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
        remedy = "log in with 'hf auth login', or set HF_TOKEN to a token that may write there"
    elif type(error).__name__ == "HFValidationError":
        remedy = "give the name as owner/model"
    elif status is None:
        remedy = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and say it again"
    else:
        remedy = "say it again; what is there already is not sent twice"
    return f"push of {name} to {endpoint}: {said}; {remedy}"
