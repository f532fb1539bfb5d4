"""Names and URLs of videos as logs, errors and files may show them: without user, password and query, which can be secrets."""

import re
from pathlib import Path

from training.street_cameras import street_camera

# The second kind of user: a password with a "/", "?" or "#" in it makes no valid URL, and is a secret all the same.
_URL = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*@|[^/?#:@\[]*:(?!\d*(?:[/?#]|\Z)).*@)?(.*)",
    re.DOTALL,
)
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>`]+")


_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# A video in a tar, as TAR::OFFSET:SIZE:NAME. The name is the tar's word: it is only shown, and nothing in it is taken for a path, an offset or
# an address.
MEMBER = re.compile(r"((?=https?://).*?\.(?i:tar)(?:\?.*?)?|.*?\.(?i:tar))::(\d+):(\d+):", re.DOTALL)


def printable(text: str) -> str:
    """A name or a reason for logs and errors, of one line: what files are called is the word of those who made them."""
    return text if text.isprintable() else ascii(text)[1:-1]


def is_remote(source: str) -> bool:
    return _REMOTE.match(source) is not None


def video_name(source: str) -> str:
    """
    What a video is called where it is shown, kept or compared, and what its pairs are drawn by: its path, and of a URL [`public_url`], so
    that a signature is in no file and a new one changes no pair.
    """
    member = MEMBER.match(source)
    return public_url(member[1]) + source[member.end(1) :] if member else public_url(source)


def public_url(source: str) -> str:
    """
    A URL without user, password, query and fragment; any other text as it is. Twice is as once.

    Beyond http(s) "@" and "?" mean other things too (a container, a revision, one character of a pattern): what is left out there is a user
    with a password, and a query with a "=".
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
    """What JSON or YAML holds, such as a recipe's fields, with its URLs made public by [`public_url`]."""
    if isinstance(value, dict):
        return {name: public_value(item) for name, item in value.items()}
    if isinstance(value, list):
        return [public_value(item) for item in value]
    return public_url(value) if isinstance(value, str) else value


def without_secrets(text: str, url: str = "") -> str:
    """A text, such as another library's error, with all URLs in it made public by [`public_url`]; `url` is one that may hold spaces or quotes."""
    if url:
        text = text.replace(url, public_url(url))
    return _URL_IN_TEXT.sub(lambda found: public_url(found[0]), text)


# --- sources of videos and encoders, as they may be shown ---


def public_source(source: str) -> str | None:
    """A video source without what is of this machine or secret: `None` for local paths, URLs without user and query."""
    if street_camera(source) is not None:
        return source
    if "://" in source:
        return public_url(source)
    return f"hf://datasets/{source}" if is_dataset_id(source) else None


def is_dataset_id(source: str) -> bool:
    """`org/name`, where no such path exists here."""
    return (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?", source) is not None
        and not Path(source).exists()
    )


def dataset_of(source: str | None) -> str | None:
    match = re.match(r"hf://datasets/([^/@]+/[^/@]+)", source or "")
    return match and match.group(1)


def hub_id(name: str | None) -> str | None:
    return name if name and is_dataset_id(name) else None
