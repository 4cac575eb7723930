"""Writes the files that a run and the commands leave behind, each of them whole or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, or leaves the one that is there as it is. A kill leaves at most a hidden .partial file beside it.

    The content is on disk before the file has its name, so that a power cut shows no empty one. A
    link or a device, such as /dev/stdout, is written to as it stands: another file must not take
    its place.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(data)
        return
    # The process's number keeps two commands that write the same file out of each other's half.
    partial = path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # after an error or Ctrl-C; os.replace has moved it otherwise
