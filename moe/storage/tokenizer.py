"""Keeps a copy of the tokenizer's file in a run directory, so that the run needs no other.

The folder `tokenizer` holds the file, under the name that it had, and about.json, which is written
last: `{"file": "notes.json", "sha256": "..."}`.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from moe.config import ConfigError, DataConfig
from moe.config.checks import expand_path
from moe.storage.owner import Check, unchecked
from moe.storage.paths import RunPath, absolute, make_directory, write_whole

FOLDER = "tokenizer"
_ABOUT_FILE = "about.json"


class StoredTokenizer(NamedTuple):
    """Says which file a run directory holds."""

    path: RunPath
    sha256: str


def store_tokenizer(workdir: RunPath, config: DataConfig, check: Check = unchecked) -> None:
    """Copies the tokenizer's file into a run directory, if `check` lets it. Bytes have no file.

    Raises OSError if the file cannot be read or written.
    """
    if config.tokenizer == "byte":
        return
    source = Path(expand_path("data.tokenizer", config.tokenizer))
    content = source.read_bytes()
    directory = workdir / FOLDER
    check()
    make_directory(directory)
    write_whole(directory / source.name, content)
    about = {"file": source.name, "sha256": hashlib.sha256(content).hexdigest()}
    write_whole(directory / _ABOUT_FILE, json.dumps(about, indent=1) + "\n")


def read_stored(workdir: RunPath) -> StoredTokenizer | None:
    """Returns which tokenizer a run directory holds, or None. Raises ConfigError for damage."""
    path = workdir / FOLDER / _ABOUT_FILE
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return StoredTokenizer(path.parent / Path(about["file"]).name, str(about["sha256"]))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError):
        raise ConfigError(
            f"{path} is not what was written: restore it, or delete {path.parent}, "
            "so that data.tokenizer is read instead"
        ) from None


def local_copy(stored: StoredTokenizer, config: DataConfig) -> Path:
    """Returns a local path of a stored file. One at gs:// is copied to `config.directory` first.

    Raises ConfigError if the file is damaged, and OSError if it cannot be read or copied.
    """
    cached = config.path / "tokenizers" / stored.sha256 / stored.path.name
    if isinstance(stored.path, Path):
        content = stored.path.read_bytes()
    elif _sha256(cached) == stored.sha256:
        return cached
    else:
        content = stored.path.read_bytes()
    if hashlib.sha256(content).hexdigest() != stored.sha256:
        raise ConfigError(
            f"{stored.path} is not the file that was stored (its SHA-256 is another): restore it, "
            f"or delete {stored.path.parent}, so that data.tokenizer is read instead"
        )
    if isinstance(stored.path, Path):
        return absolute(stored.path)
    cached.parent.mkdir(parents=True, exist_ok=True)
    write_whole(cached, content)
    return cached


def check_same(workdir: RunPath, stored: StoredTokenizer, config: DataConfig) -> None:
    """Raises ConfigError if `config` names a file other than the stored one.

    The file need not be there: on another machine a run has its own copy alone.
    """
    path = Path(expand_path("data.tokenizer", config.tokenizer))
    here = _sha256(path)
    if here not in (None, stored.sha256):
        raise ConfigError(
            f"data.tokenizer={config.tokenizer} is another tokenizer than that of {workdir} "
            f"(SHA-256 {here[:12]} here, {stored.sha256[:12]} there): set data.tokenizer to "
            f"{stored.path}, or set another --workdir"
        )


def _sha256(path: Path) -> str | None:
    """Returns the checksum of a file, or None where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None
