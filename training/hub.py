"""Push a folder to the Hub as one commit, and explain every failure of the Hub in one sentence."""

import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants

# HTTPError comes from the client's own HTTP library (httpx or httpx2) and covers failed connections too.
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from modeling_poodle.remote_code import CODE_FILES

PANEL = "panel.png"  # a card's picture
# Files that a push may send. It deletes those of an earlier push that are no longer in the folder, and touches nothing else in the
# repository.
PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    *sorted({name for names in CODE_FILES.values() for name in names}),
    "README.md",
    PANEL,
)
# Errors of the client when the Hub refuses, fails or cannot be reached. It wraps errors of LFS uploads in a RuntimeError.
FAILURES = (OSError, HTTPError, RuntimeError, ValueError)


def belongs(name: str) -> bool:
    """Return whether a file in a folder of weights is sent to the Hub."""
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS)


def check_repo_id(repo_id: str, flag: str) -> None:
    """
    Check a repository id that was given with `flag`.

    Raises:
        ValueError: it is not a valid id.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{flag} must be a name on the Hub such as org/poodle-r50, got {repo_id!r}: {error}"
        ) from None


def push(folder: Path, repo_id: str, message: str, private: bool | None = None) -> CommitInfo:
    """
    Send the files of `folder` as one commit, or none if nothing has changed. The repository is created if it does not exist.

    This is a single commit because `upload_folder` may make several: an interrupted push then leaves the earlier revision unchanged. The
    token comes from the environment or the cached login.

    Raises:
        ConnectionError: the Hub refused, failed or was not reached; the message says what to do.
    """
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        added = sorted(path.name for path in folder.iterdir() if path.is_file())
        before = [name for name in api.list_repo_files(repo_id) if belongs(name)]
        operations = [CommitOperationDelete(name) for name in before if name not in added]
        operations += [CommitOperationAdd(name, folder / name) for name in added]
        return api.create_commit(repo_id, operations, commit_message=message)
    except FAILURES as error:
        raise ConnectionError(explain(error, repo_id)) from error


_BY_STATUS = {
    400: "the Hub does not accept this push ({server})",
    401: "the Hub does not accept the token, or there is none: log in with `hf auth login`, or set HF_TOKEN",
    402: "the Hub asks for a paid plan to do this ({server})",
    403: "the token may not write there: it needs write permission for {namespace} ({server})",
    404: "no such repository, or it is private and the token may not see it",
    409: "another commit was made at the same time: publish again",
    412: "another commit was made at the same time: publish again",
    413: "a file is too large for the Hub ({server})",
    429: "the Hub takes no more requests for now (rate limit): try again in a few minutes",
}


def explain(error: Exception, repo_id: str) -> str:
    """Explain an error of the Hub or of the connection to it in one sentence that says what to do and contains no token."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    where = f"{repo_id} on {constants.ENDPOINT}"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{where}: not reached, since HF_HUB_OFFLINE is set: unset it"
    response = getattr(error, "response", None)
    if isinstance(error, HfHubHTTPError) and response is not None:
        status = response.status_code
        server = error.server_message or response.headers.get("X-Error-Message") or f"status {status}"
        if isinstance(error, (RevisionNotFoundError, EntryNotFoundError)):
            return f"{where}: {status}, no such {'revision' if isinstance(error, RevisionNotFoundError) else 'file'}"
        default = "the Hub fails at the moment ({server}): try again later" if status >= 500 else "{server}"
        sentence = _BY_STATUS.get(status, default)
        return f"{where}: {status}, " + sentence.format(
            server=" ".join(server.split()), namespace=repo_id.split("/")[0]
        )
    if isinstance(error, FileNotFoundError):
        return (
            f"{where}: no such repository, revision or file, or it is private and the token may not see it ({error})"
        )
    if isinstance(error, (HTTPError, OSError)):
        reason = str(error) or type(error).__name__
        return f"{where}: the connection failed or broke off ({reason}): try again when the network is there"
    return f"{where}: {error}"
