"""Finds the user's files of text: one file, a directory, or a glob, here, at gs:// or at s3://."""

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

from moe.config import ConfigError
from moe.config.checks import show

PLAIN = (".txt", ".md", ".py")
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*PLAIN, *LINES, ".parquet")
SPLITS = ("train", "validation")  # and the folders that hold them, if PATH has these
_STORES = {"gs": "gcsfs", "s3": "s3fs"}  # and the package that each of them needs


class SourceFile(NamedTuple):
    """Describes one file as it was when it was found."""

    path: str  # as its file system takes it
    name: str  # relative to the directory that was listed, in which it is unique
    size: int
    version: str  # its etag, or the time of its last change


class Listing(NamedTuple):
    """Holds the files of a path, in the order of their names."""

    path: str  # as the config has it
    file_system: Any  # fsspec's, whose methods have no useful types
    files: tuple[SourceFile, ...]
    num_left_out: int  # files that are hidden or of other kinds

    @property
    def size(self) -> int:
        """Returns the bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Returns a text that changes if any file is changed, added or removed."""
        described = [file._replace(path="") for file in self.files]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def open(self, file: SourceFile) -> IO[bytes]:
        """Opens a file for reading."""
        return self.file_system.open(file.path, "rb")

    def address(self, file: SourceFile) -> str:
        """Returns a file's path as messages show it."""
        return self.file_system.unstrip_protocol(file.path).removeprefix("file://")


def check_split(dataset: str, split: str) -> None:
    """Raises ConfigError for a split that the user's files cannot have. It reads no file."""
    if split not in SPLITS:
        raise ConfigError(
            f"split {split!r} is not one of data.dataset={dataset!r}: "
            "set the split to 'train' or 'validation'"
        )


def find_files(path: str) -> Listing:
    """Returns the files of text at `path`. Raises ConfigError if there is none to read."""
    file_system = _file_system(path)
    with explained(path):
        root = file_system._strip_protocol(path)
        found = _find(file_system, root)
        is_missing = not found and not file_system.exists(root)
    if is_missing:
        raise ConfigError(
            f"data.dataset='text:{path}' does not exist: set it to text:PATH, "
            "where PATH is a file, a directory or a glob"
        )
    base = _base(root, found)
    names = {name: name.removeprefix(base).lstrip("/") for name in sorted(found)}
    with explained(path):
        files = tuple(
            SourceFile(full_name, name, info["size"], _version(info))
            for full_name, name in names.items()
            if _is_text(name)
            for info in [_follow(file_system, full_name, found[full_name])]
        )
    if not files:
        raise ConfigError(
            f"data.dataset='text:{path}' holds no file of text: its {len(found)} files are hidden "
            f"or of other kinds than {' '.join(SUFFIXES)}: convert or rename them"
        )
    _check_names(files)
    listing = Listing(path, file_system, files, len(found) - len(files))
    if base == root:
        _check_folders(listing, root)
    return listing


def _check_folders(listing: Listing, root: str) -> None:
    """Raises ConfigError if the folder of one split has text, and that of the other has none.

    The held-out documents would be drawn from the first one, and the user would not know of it.
    """
    folders = {file.name.partition("/")[0] for file in listing.files if "/" in file.name}
    missing = {*SPLITS} - folders
    if len(missing) != 1:
        return
    (split,) = missing
    with explained(listing.path):
        is_there = listing.file_system.isdir(f"{root}/{split}")
    if is_there:
        raise ConfigError(
            f"data.dataset='text:{listing.path}' has the folders train and validation, and "
            f"{split} holds no file of text: convert or rename its files, or rename the folders"
        )


def _check_names(files: tuple[SourceFile, ...]) -> None:
    """Raises ConfigError for a name that is not UTF-8, as a document's origin has to be.

    Python holds such bytes as halves of characters.
    """
    for file in files:
        try:
            file.name.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"the name of the file {show(file.path)} is not UTF-8: rename it"
            ) from None


def _file_system(path: str) -> Any:
    """Returns the file system in which a path lies. Raises ConfigError for an unknown one."""
    if not path or "\0" in path:
        raise ConfigError(f"data.dataset={show(f'text:{path}')} has no path: set it to text:PATH")
    scheme = match[1] if (match := re.match(r"(\w[\w+.-]*)://", path)) else "file"
    if scheme not in ("file", *_STORES):
        raise ConfigError(
            f"data.dataset='text:{path}' is an address of another kind: "
            "set it to a local path, or to one at gs:// or s3://"
        )
    import fsspec

    # gcsfs's second implementation warns at each file of a bucket whose kind it may not ask for.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for name in ("gcsfs", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they log the errors that they raise
    try:
        # A listing that is kept would hide files that have changed since.
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError:
        package = _STORES[scheme]
        raise ConfigError(
            f"data.dataset='text:{path}' needs a package: pip install {package}"
        ) from None


def _find(file_system: Any, root: str) -> dict[str, dict[str, Any]]:
    """Returns the files at a path, or those that match it, and what is known of each."""
    if not file_system.exists(root):
        if not re.search(r"[*?\[]", root):
            return {}
        matches = file_system.glob(root, detail=True)
    else:
        matches = {root: file_system.info(root)}
    found: dict[str, dict[str, Any]] = {}
    for name, info in matches.items():
        if info["type"] == "directory":
            options = {"on_error": "raise"} if _is_local(file_system) else {}
            found |= file_system.find(name, detail=True, **options)
        else:
            found[name] = info
    # Stores show directories as empty objects whose names end in a slash.
    return {
        name: info
        for name, info in found.items()
        if info["type"] != "directory" and not (_is_local(file_system) and os.path.isdir(name))
    }


def _follow(file_system: Any, path: str, info: dict[str, Any]) -> dict[str, Any]:
    """Returns what is known of a file. A link changes when its file does."""
    if not _is_local(file_system):
        return info
    stat = os.stat(path)
    return info | {"size": stat.st_size, "mtime": stat.st_mtime_ns}


def _is_local(file_system: Any) -> bool:
    return "file" in (file_system.protocol, *file_system.protocol)


def _base(root: str, found: dict[str, Any]) -> str:
    """Returns the directory to which the names of files are relative."""
    if list(found) == [root]:
        return root.rpartition("/")[0]
    parts = root.split("/")
    magic = [i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)]
    is_glob = magic and not all(name.startswith(root) for name in found)
    return "/".join(parts[: magic[0]]) if is_glob else root


def _version(info: dict[str, Any]) -> str:
    """Returns a text that changes when a file does."""
    known = (info.get(name) for name in ("etag", "ETag", "mtime"))
    return next(str(value) for value in known if value is not None)


def _is_text(name: str) -> bool:
    """Returns whether a file is read: its kind is known, and no part of its path is hidden."""
    is_hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
    return name.endswith(SUFFIXES) and not is_hidden


def is_plain(file: SourceFile) -> bool:
    """Returns whether a file is text as it stands."""
    return file.name.endswith(PLAIN)


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Turns the error of a file system or of a store into a ConfigError of one line."""
    try:
        yield
    except _errors() as error:
        text = getattr(error, "strerror", None) or " ".join(str(error).split())
        place = getattr(error, "filename", None) or path
        raise ConfigError(
            f"{place} cannot be read ({text[:300] or type(error).__name__}): "
            "make it readable, or set data.dataset to another"
        ) from None


def _errors() -> tuple[type[Exception], ...]:
    """Returns the errors of a file system, and those of the stores that are in use."""
    errors: list[type[Exception]] = [OSError]
    if "gcsfs" in sys.modules:
        import google.auth.exceptions  # pyright: ignore[reportMissingImports]
        from gcsfs import retry  # pyright: ignore[reportMissingImports]

        errors += [retry.HttpError, retry.NonRetryableError, *retry.RETRIABLE_EXCEPTIONS]
        errors.append(google.auth.exceptions.GoogleAuthError)
    if "botocore" in sys.modules:
        import botocore.exceptions  # pyright: ignore[reportMissingImports]

        errors += [botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError]
    return tuple(errors)
