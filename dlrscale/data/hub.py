"""Data sets of the library `datasets`: folders, and names on the Hugging Face hub. It is imported where one is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dlrscale.errors import ConfigError

_FORMATS = ("arrow", "csv", "json", "parquet")  # of folders; text files would become one document per line
_NAME = re.compile(
    r"hf:(?P<name>[\w.-]+(?:/[\w.-]+)?(?::[\w.-]+)?)(?:@(?P<split>[\w.\-\[\]:%+]+))?(?:#(?P<fingerprint>\w+))?"
)


def parse(place: str) -> tuple[str, str | None, str | None]:
    """The name with its configuration, the split and the fingerprint in `hf:org/name:configuration@split#fingerprint`.

    Args:
        place: The value of an option.

    Returns:
        Name (and configuration after a colon), split or None, fingerprint or None.

    Raises:
        ConfigError: If it is not of that form.
    """
    match = _NAME.fullmatch(place)
    if match is None:
        raise ConfigError(
            f"{place}: is no name of a hub data set. Write hf:org/name, with :CONFIGURATION and @SPLIT if need be."
        )
    if Path(match["name"]).exists():
        raise ConfigError(
            f"{place}: a file or folder {match['name']} is here too, and would be read instead. "
            "Name it without hf:, or start in another folder."
        )
    return match["name"], match["split"], match["fingerprint"]


def pin(place: str, heldout: bool = False) -> str:
    """The place with the data set's fingerprint, so that every later start reads the same data or refuses.

    Args:
        place: Any place of data; all but `hf:` names stay as they are.
        heldout: Whether the data are for evaluation: of several splits one must be named then.

    Returns:
        The place.

    Raises:
        ConfigError: If the data set cannot be read, or held-out data would be the training split by default.
    """
    hub = place.startswith("hf:")
    name, split, _ = parse(place) if hub else (place, None, None)
    if heldout and not split and (hub or Path(place).is_dir()):
        found = _open(place)
        if isinstance(found, dict) and len(found) > 1:
            mend = f"{place}@SPLIT" if hub else "the folder or file of one split"
            raise ConfigError(f"{place}: held-out data of the splits {', '.join(map(str, found))}. Name one: {mend}.")
    if not hub:
        return place
    return f"hf:{name}@{split or 'train'}#{open_dataset(place)._fingerprint}"


def _is_saved(place: str) -> bool:
    """Whether a place is a folder that `save_to_disk` wrote."""
    return any((Path(place) / key).is_file() for key in ("state.json", "dataset_dict.json"))


def _open(place: str) -> Any:
    """What `datasets` makes of a place: a data set, or several by split."""
    import datasets

    datasets.disable_progress_bars()
    hub = place.startswith("hf:")
    name, split, _ = parse(place) if hub else (place, None, None)
    try:
        if _is_saved(place):
            return datasets.load_from_disk(place)
        return datasets.load_dataset(*(name.split(":") if hub else (name,)), split=split)
    except Exception as error:  # the library's own, Arrow's, the hub's
        raise ConfigError(_reason(place, error)) from None


def open_dataset(place: str) -> Any:
    """Open a data set.

    Args:
        place: A folder that `Dataset.save_to_disk` wrote, one that `datasets.load_dataset` reads, or an `hf:` name.

    Returns:
        A `datasets.Dataset`; of several splits `train`.

    Raises:
        ConfigError: If it cannot be read, or its splits do not tell which to take.
    """
    hub = place.startswith("hf:")
    name, _, fingerprint = parse(place) if hub else (place, None, None)
    found = _open(place)
    if isinstance(found, dict):
        if "train" not in found and len(found) != 1:
            mend = f"hf:{name}@SPLIT" if hub else "the folder or file of one split"
            raise ConfigError(f"{place}: holds the splits {', '.join(map(str, found))}. Name one: {mend}.")
        found = found["train"] if "train" in found else next(iter(found.values()))
    if not hub and not _is_saved(place) and found.info.builder_name not in _FORMATS:
        raise ConfigError(f"{place}: a folder of {found.info.builder_name} files. Name the data file in it.")
    if fingerprint and found._fingerprint != fingerprint:
        raise ConfigError(f"{place}: the data set is another one now ({found._fingerprint}). Start a new run with it.")
    return found


def _reason(place: str, error: Exception) -> str:
    words = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
    if not place.startswith("hf:"):
        return f"{place}: no data set that `datasets` can read ({words}). Mend the folder, or name one file in it."
    if isinstance(error, ConnectionError) or "offline" in words.lower() or "couldn't reach" in words.lower():
        return (
            f"{place}: this machine is offline, and the data set is not in the cache of `datasets`. Fetch it once with "
            "a connection, or name a file or folder."
        )
    return f"{place}: cannot be read from the hub ({words}). Check name and split: hf:org/name@split."
