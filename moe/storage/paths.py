"""Reaches the files of a run directory, in a file system or in Google Cloud Storage.

A file system's path is a `pathlib.Path`, and that of an object store is an `epath.Path`, which has
the same methods. Only what differs between the two is here. An object store has no directories, no
links and no renames, but an object appears whole or not at all.
"""

import contextlib
import functools
import io
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, Union

from moe import files
from moe.config.checks import ConfigError, expand_run_path, show
from moe.files import announce_wait

if TYPE_CHECKING:
    from etils import epath

# A Union, since a text in quotes cannot stand beside |. It keeps epath from being loaded here.
RunPath = Union[Path, "epath.Path"]
P = TypeVar("P", bound=RunPath)

_CREDENTIALS_ADVICE = (
    "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to the "
    "key file of an account that may write there"
)


class Unreachable(OSError):
    """Says that an object store did not answer, or only with an error of its own.

    It may answer later, unlike a store that refuses this account.
    """


def run_path(path: str | os.PathLike[str], *, ask: bool = True) -> RunPath:
    """Returns the path of a run directory: a local one, one on a mount, or one at gs://.

    Raises ConfigError for an address of another kind, and for a bucket that does not exist or that
    this account may not use, and Unreachable if the store does not answer. Without `ask`, the
    bucket is not asked for, since nothing in it may be needed.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"workdir={show(path)} is no path: set workdir to the directory of a run")
    # pathlib writes gs://bucket/run as gs:/bucket/run.
    text = re.sub(r"^gs:/+", "gs://", expand_run_path("workdir", os.fspath(path)))
    return _bucket_path(text, ask) if text.startswith("gs://") else Path(text)


def absolute(path: P) -> P:
    """Returns a path that does not depend on the working directory."""
    return path.absolute() if isinstance(path, Path) else path


def resolve(path: P) -> P:
    """Returns an absolute path whose links are followed."""
    return path.resolve() if isinstance(path, Path) else path


def size(path: RunPath) -> int:
    """Returns the number of bytes of a file."""
    return path.stat().st_size if isinstance(path, Path) else path.stat().length


def make_directory(path: RunPath, name: str = "workdir") -> None:
    """Makes a directory and those above it. An object store needs none.

    Where it cannot, it raises an OSError of one line, whose advice is to set what has this `name`.
    """
    if not isinstance(path, Path):
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        is_there = isinstance(error, FileExistsError)
        reason = "something else is there" if is_there else error.strerror
        raise type(error)(
            f"{path} cannot be made a directory ({reason}): set {name} to one that can be written"
        ) from None


def remove_tree(path: RunPath) -> None:
    """Deletes a directory with all that is in it. Raises OSError."""
    if isinstance(path, Path):
        shutil.rmtree(path)
    else:
        with _explained(path, "deleted"):
            path.rmtree(missing_ok=True)


@contextlib.contextmanager
def open_whole(path: RunPath) -> Iterator[IO[bytes]]:
    """Opens a file that takes the place of `path` once it is written whole.

    After an error, `path` stays as it is. Raises OSError if it cannot be written.
    """
    if isinstance(path, Path):
        with files.open_whole(path) as file:
            yield file
        return
    content = io.BytesIO()
    yield content
    with _explained(path, "written"):
        path.write_bytes(content.getvalue())


def write_whole(path: RunPath, content: str | bytes) -> None:
    """Writes a file whole or, after an error, not at all, as `open_whole` does."""
    with open_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def create(path: RunPath, content: str) -> bool:
    """Writes a new file, or returns False if there is one. One of several processes succeeds."""
    try:
        if isinstance(path, Path):
            with path.open("x", encoding="utf-8") as file:
                file.write(content)
        else:
            with _explained(path, "written"):
                _file_system().pipe_file(str(path), content.encode(), mode="create")
    except FileExistsError:
        return False
    return True


def cloud_errors() -> tuple[type[Exception], ...]:
    """Returns the errors of an object store, which are no OSErrors. There are none without one."""
    if "gcsfs" not in sys.modules:
        return ()
    import google.auth.exceptions  # pyright: ignore[reportMissingImports]
    from gcsfs import retry  # pyright: ignore[reportMissingImports]

    own = (retry.HttpError, retry.NonRetryableError, google.auth.exceptions.GoogleAuthError)
    return own + retry.RETRIABLE_EXCEPTIONS


def is_unreachable(error: BaseException) -> bool:
    """Returns whether an error, or one of its causes, says that an object store did not answer."""
    if isinstance(error, Unreachable | ConnectionError | TimeoutError):
        return True
    if "gcsfs" in sys.modules:
        import google.auth.exceptions  # pyright: ignore[reportMissingImports]
        from gcsfs import retry  # pyright: ignore[reportMissingImports]

        if isinstance(error, google.auth.exceptions.GoogleAuthError):
            is_broken = isinstance(error, google.auth.exceptions.TransportError)
            return is_broken or error.retryable
        if isinstance(error, retry.HttpError):
            return error.code in retry.errs  # 5xx, and too many requests
        if isinstance(error, retry.RETRIABLE_EXCEPTIONS):
            return True
    # TensorStore writes the arrays, and has the kind of an error in its text.
    if re.search(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED)\b|CURL error", str(error)):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_unreachable(cause)


def is_lost(path: RunPath, error: BaseException | None) -> bool:
    """Returns whether an error says that the object store in which a path lies did not answer."""
    return error is not None and not isinstance(path, Path) and is_unreachable(error)


def explain(error: Exception) -> str:
    """Returns the system's or an object store's words for an error, on one line.

    Where credentials are missing, it adds where they come from.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    is_refused = re.search(r"forbidden|anonymous|credential|\b40[13]\b", text, re.IGNORECASE)
    return f"{text[:300]}: {_CREDENTIALS_ADVICE}" if is_refused else text[:300]


@contextlib.contextmanager
def _explained(path: RunPath, what: str) -> Iterator[None]:
    """Turns an object store's error into an OSError of one line, which may be Unreachable."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except (OSError, *cloud_errors()) as error:
        kind = Unreachable if is_unreachable(error) else OSError
        raise kind(f"{path} cannot be {what} ({explain(error)})") from None


def _bucket_path(text: str, ask: bool) -> "epath.Path":
    """Returns a path at gs://. If asked, its bucket answers, or else it raises an error."""
    # With TensorFlow installed, epath would load it. gcsfs's second implementation, for buckets of
    # other kinds, warns at each file of a bucket whose kind it may not ask for.
    os.environ.setdefault("EPATH_USE_TF", "false")
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for name in ("fsspec", "gcsfs", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they log the errors that they raise
    if ask:
        _ask_bucket(text)
    from etils import epath

    return epath.Path(text)


def _ask_bucket(text: str) -> None:
    """Raises ConfigError or Unreachable if the bucket of a path at gs:// does not answer."""
    bucket = text.removeprefix("gs://").split("/")[0]
    try:
        with announce_wait(f"waiting for gs://{bucket} to answer"):
            _file_system().call("GET", "b/{}/o", bucket, maxResults=1, json_out=True)
    except ImportError as error:
        raise ConfigError(
            f"{text} needs a package ({error}): pip install gcsfs, which the extra `gcs` has"
        ) from None
    except FileNotFoundError:
        raise ConfigError(
            f"{text} lies in a bucket that does not exist: create gs://{bucket}, or set another"
        ) from None
    except (OSError, *cloud_errors()) as error:
        kind = Unreachable if is_unreachable(error) else ConfigError
        raise kind(f"{text} cannot be reached ({explain(error)})") from None


@functools.cache
def _file_system() -> Any:
    """Returns the object store's client, which epath and Orbax use as well."""
    import fsspec
    import fsspec.config

    # A listing that is kept would hide what other hosts write.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs", finalize_on_close=True)
