"""The mean and deviation with which a model normalises images, read from the model's own files."""

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError
from transformers import AutoImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .recipe_files import is_finite

logger = logging.getLogger("poodle")
IMAGENET = (tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD))
FILES = ("preprocessor_config.json", "processor_config.json")  # the latter holds processors of several kinds


def preprocessing_of(source: str, given_by: str = "--model") -> tuple[tuple, tuple, str]:
    """
    Return the mean and deviation of the image processor in a folder or Hub repository, and the name of their origin.

    Without an image processor they are ImageNet's, which is logged.

    Args:
        source: folder or Hub id.
        given_by: the flag or field that `source` was given by, for the error message.

    Raises:
        ValueError: the processor's file is damaged or cannot be fetched, does not give three numbers each, or asks for another range than
            0 to 1.
    """
    try:
        for name in FILES:
            if (file := _file(source, name)) is None:
                continue
            if (processor := _processor(source, file)) is not None:
                return *statistics(processor), name
            lack = f"the {name} of {source} names code alone, which is not run, and no numbers"
            break
        else:
            lack = f"{source} has no {FILES[0]}"
    except (OSError, HTTPError, ValueError, AttributeError, TypeError, ImportError) as error:
        raise ValueError(f"{given_by} {source}: its {name} cannot be read ({error})") from error
    logger.warning("%s: its images get ImageNet's mean and deviation", lack)
    return *IMAGENET, "ImageNet"


def _file(source: str, name: str) -> Path | None:
    """Return the local path of a file; `None` if the repository does not have it. It is an error if the Hub cannot be asked."""
    if Path(source).is_dir():
        return Path(source, name) if Path(source, name).is_file() else None
    try:
        return Path(hf_hub_download(source, name))  # from the cache if the Hub is not reached
    except LocalEntryNotFoundError:
        if try_to_load_from_cache(source, name) is _CACHED_NO_EXIST:
            return None
        raise
    except EntryNotFoundError:
        return None


def _processor(source: str, file: Path):
    """Return the image processor; its file's values if its class is unknown here; `None` if the file names only code and no numbers."""
    values = json.loads(file.read_text(encoding="utf-8"))
    values = values.get("image_processor", values)
    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, TypeError, ImportError):
        if {"image_mean", "image_std"} <= values.keys():
            return SimpleNamespace(**values)
        if "auto_map" in values:
            return None
        raise


def statistics(processor) -> tuple[tuple, tuple]:
    """
    Return the mean and deviation of an image processor, for images in [0, 1].

    Raises:
        ValueError: they are not three numbers each, or the processor rescales images to another range.
    """
    factor = getattr(processor, "rescale_factor", 1 / 255) if getattr(processor, "do_rescale", True) else 1
    if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(
            f"expected images rescaled by 1/255, from 0 to 1, got do_rescale and rescale_factor for {factor}"
        )
    if not getattr(processor, "do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    if not all(len(values) == 3 and all(map(is_finite, values)) for values in (mean, std)) or min(std) <= 0:
        raise ValueError(f"must give three numbers of image_mean and image_std, got {mean} and {std}")
    return mean, std
