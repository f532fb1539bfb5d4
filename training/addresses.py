"""Names and URLs of videos without user, password and query, so that logs, errors and files hold no secrets."""

import re
from pathlib import Path

from training.street_cameras import street_camera

# The second alternative for the user matches passwords with "/", "?" or "#". Such a URL is invalid, but its password is still a secret.
_URL = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*@|[^/?#:@\[]*:(?!\d*(?:[/?#]|\Z)).*@)?(.*)",
    re.DOTALL,
)
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>`]+")


_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# A video in a tar: TAR::OFFSET:SIZE:NAME. The name comes from the tar and is not trusted: it is only shown, and never parsed as a path,
# an offset or an address.
MEMBER = re.compile(r"((?=https?://).*?\.(?i:tar)(?:\?.*?)?|.*?\.(?i:tar))::(\d+):(\d+):", re.DOTALL)


def printable(text: str) -> str:
    """Return a name or a reason as one line for logs and errors. File names are not trusted: they may hold control characters."""
    return text if text.isprintable() else ascii(text)[1:-1]


def is_remote(source: str) -> bool:
    return _REMOTE.match(source) is not None


def video_name(source: str) -> str:
    """
    Return the name by which a video is shown, stored and compared, and from which its pairs are drawn.

    This is the path of a local video, and [`public_url`] of a URL. So no file holds a signature, and a new signature changes no pair.
    """
    member = MEMBER.match(source)
    return public_url(member[1]) + source[member.end(1) :] if member else public_url(source)


def public_url(source: str) -> str:
    """
    Return a URL without user, password, query and fragment, and any other text unchanged. The function is idempotent.

    In schemes other than http(s), "@" and "?" can also mean a container, a revision or one character of a pattern. There the function
    removes only a user with a password, and a query with a "=".
    """
    found = _URL.fullmatch(source)
    if found is None:
        return source
    scheme, user, place = found[1], found[2] or "", found[3]
    if scheme.lower() in ("http", "https"):
        return f"{scheme}://{re.split('[?#]', place, maxsplit=1)[0]}"
    if ":" in user and scheme not in ("hf", "github"):  # github://ORGANISATION:REPOSITORY@REVISION/PATH
        user = ""
    return f"{scheme}://{user}{re.split(r'[?][^/?=]*=', place, maxsplit=1)[0]}"


def public_value(value):
    """Apply [`public_url`] to all strings in a JSON or YAML value, such as a recipe's fields."""
    if isinstance(value, dict):
        return {name: public_value(item) for name, item in value.items()}
    if isinstance(value, list):
        return [public_value(item) for item in value]
    return public_url(value) if isinstance(value, str) else value


def without_secrets(text: str, url: str = "") -> str:
    """
    Apply [`public_url`] to all URLs in a text, such as another library's error.

    Args:
        url: a URL that the text may contain and that may hold spaces or quotes, at which the search for URLs stops.
    """
    if url:
        text = text.replace(url, public_url(url))
    return _URL_IN_TEXT.sub(lambda found: public_url(found[0]), text)


# --- sources of videos and encoders that may be shown ---


def public_source(source: str) -> str | None:
    """Return a video source without local or secret parts: `None` for local paths, URLs without user and query."""
    if street_camera(source) is not None:
        return source
    if "://" in source:
        return public_url(source)
    return f"hf://datasets/{source}" if is_dataset_id(source) else None


def is_dataset_id(source: str) -> bool:
    """Return whether `source` has the form `org/name` or `org/name@revision`, and is not an existing local path."""
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?", source) is not None
        and not Path(source).exists()
    )


def dataset_of(source: str | None) -> str | None:
    match = re.match(r"hf://datasets/([^/@]+/[^/@]+)", source or "")
    return match and match.group(1)


def hub_id(name: str | None) -> str | None:
    return name if name and is_dataset_id(name) else None
