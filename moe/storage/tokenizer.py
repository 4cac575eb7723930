"""Keeps copies of the tokenizer and the chat template in a run, so that it needs no other files.

The folder `tokenizer` holds the tokenizer's file, under the name that it had, and about.json, which
is written last: `{"file": "notes.json", "sha256": "..."}`. The folder `chat_template` holds the
template in the same way.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from moe.config import ConfigError, DataConfig
from moe.config.checks import expand_path
from moe.storage.owner import Check, unchecked
from moe.storage.paths import RunPath, absolute, make_directory, write_whole

FIELDS = ("tokenizer", "chat_template")  # of the config, which are also the names of the folders
_ABOUT_FILE = "about.json"


class StoredFile(NamedTuple):
    """Says which file a run directory holds."""

    field: str  # the field of the config that names the file
    path: RunPath
    sha256: str


def names_file(config: DataConfig, field: str) -> bool:
    """Returns whether a field of the config names a file: bytes have none, and plain text too."""
    # A chat template may lie in a file of any name, "byte" too.
    return getattr(config, field) != ("byte" if field == "tokenizer" else "")


def store_tokenizer(workdir: RunPath, config: DataConfig, check: Check = unchecked) -> None:
    """Copies the tokenizer's file and the chat template into a run directory, if `check` lets it.

    Raises OSError if a file cannot be read or written.
    """
    for field in FIELDS:
        if names_file(config, field):
            _store(workdir / field, field, config, check)


def _store(directory: RunPath, field: str, config: DataConfig, check: Check) -> None:
    """Copies the file that a field of the config names into a directory."""
    source = Path(expand_path(f"data.{field}", getattr(config, field)))
    content = source.read_bytes()
    check()
    make_directory(directory)
    name = source.name if source.name != _ABOUT_FILE else f"copy-{source.name}"
    write_whole(directory / name, content)
    about = {"file": name, "sha256": hashlib.sha256(content).hexdigest()}
    write_whole(directory / _ABOUT_FILE, json.dumps(about, indent=1) + "\n")


def read_stored(workdir: RunPath, field: str = "tokenizer") -> StoredFile | None:
    """Returns which file of a field a run directory holds, or None. Raises ConfigError for damage.

    The field is one of `FIELDS`.
    """
    path = workdir / field / _ABOUT_FILE
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return StoredFile(field, path.parent / Path(about["file"]).name, str(about["sha256"]))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, TypeError, LookupError):
        raise ConfigError(
            f"{path} is not what was written: restore it, or delete {path.parent}, "
            f"so that data.{field} is read instead"
        ) from None


def local_copy(stored: StoredFile, config: DataConfig) -> Path:
    """Returns a local path of a stored file. One at gs:// is copied to `config.directory` first.

    Raises ConfigError if the file is damaged, and OSError if it cannot be read or copied.
    """
    cached = config.path / f"{stored.field}s" / stored.sha256 / stored.path.name
    if not isinstance(stored.path, Path) and _sha256(cached) == stored.sha256:
        return cached
    content = stored.path.read_bytes()
    if hashlib.sha256(content).hexdigest() != stored.sha256:
        raise ConfigError(
            f"{stored.path} is not the file that was stored (its SHA-256 is another): restore it, "
            f"or delete {stored.path.parent}, so that data.{stored.field} is read instead"
        )
    if isinstance(stored.path, Path):
        return absolute(stored.path)
    cached.parent.mkdir(parents=True, exist_ok=True)
    write_whole(cached, content)
    return cached


def check_same(workdir: RunPath, stored: StoredFile, config: DataConfig) -> None:
    """Raises ConfigError if `config` names a file other than the stored one.

    The file need not be there: on another machine a run has its own copy alone.
    """
    name, value = f"data.{stored.field}", getattr(config, stored.field)
    here = _sha256(Path(expand_path(name, value)))
    if here not in (None, stored.sha256):
        kind = stored.field.replace("_", " ")
        raise ConfigError(
            f"{name}={value} is another {kind} than that of {workdir} "
            f"(SHA-256 {here[:12]} here, {stored.sha256[:12]} there): set {name} to "
            f"{stored.path}, or set another workdir"
        )


def _sha256(path: Path) -> str | None:
    """Returns the checksum of a file, or None where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None
