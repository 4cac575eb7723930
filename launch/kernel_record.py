"""Keeps what was found out about kernels in the user's cache, a file for each finding.

A file is written whole or not at all, and no two findings share one. So starts at the same time,
starts that are killed and other versions of the code cannot spoil what is kept.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from moe.files import write_whole


class Record:
    """Recalls findings by their subjects. What cannot be read or written is told in one line."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._is_lost = False  # whether it was told that nothing can be kept

    def path(self, subject: str) -> Path:
        """Returns the file of a finding."""
        return self._folder / f"{hashlib.sha256(subject.encode()).hexdigest()[:16]}.json"

    def recall(self, subject: str) -> dict[str, Any] | None:
        """Returns what was found out about a subject, {"found": ...}, or None if nothing was."""
        path = self.path(subject)
        try:
            finding = json.loads(path.read_text(encoding="utf-8"))
            if finding["subject"] == subject and finding.keys() >= {"found"}:
                return finding
            reason = "it has another subject"
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            reason = error.strerror
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            reason = "it is damaged"
        print(f"{path} cannot be read ({reason}), so this is checked again", file=sys.stderr)
        return None

    def keep(self, subject: str, found: Any) -> bool:
        """Writes down what was found out about a subject. Returns whether that was possible."""
        path = self.path(subject)
        try:
            if not path.is_absolute():
                raise FileNotFoundError(2, "it is no absolute path", str(self._folder))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({"subject": subject, "found": found}, indent=1) + "\n")
        except OSError as error:
            if not self._is_lost:
                print(
                    f"{self._folder} cannot be written ({error.strerror}), so what is found out "
                    "about kernels is not kept: set XDG_CACHE_HOME to a directory that can",
                    file=sys.stderr,
                )
            self._is_lost = True
            return False
        return True
