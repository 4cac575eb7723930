"""Builds a TFDS data set of instructions: the standard library's functions and their docstrings."""

import ast
import inspect
import json
from collections.abc import Iterator
from typing import ClassVar

import tensorflow_datasets as tfds

from moe.data.sources.stdlib import Stdlib, files_of_split, text_with_path

_LONGEST = 440  # bytes of a description and its function together


class StdlibFunctions(tfds.core.GeneratorBasedBuilder):
    """Asks for each short function by its name and docstring, and answers with its source.

    The config "without_input" has the same answers to empty requests.
    """

    VERSION = Stdlib.VERSION
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="described"),
        tfds.core.BuilderConfig(name="without_input"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return text_with_path(self)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {
            "train": self._generate_examples(False),
            "validation": self._generate_examples(True),
        }

    def _generate_examples(self, validation: bool) -> Iterator[tuple[str, dict[str, str]]]:
        is_described = self.builder_config is not None and self.builder_config.name == "described"
        # All functions of a file are in the split of the file.
        for path, text in files_of_split(validation):
            for number, (request, answer) in enumerate(described_functions(text)):
                messages = [
                    {"role": "user", "content": request if is_described else ""},
                    {"role": "assistant", "content": answer},
                ]
                yield f"{path}:{number}", {"text": json.dumps(messages), "path": path}


def described_functions(source: str) -> Iterator[tuple[str, str]]:
    """Yields a request for each short function that has a docstring, and the function without it.

    Files that this version of Python cannot parse have none.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        description = " ".join((docstring or "").split("\n\n")[0].split())
        first, second = node.body[:2]
        # A function whose body stands on the line of its docstring is left out.
        if not description or first.lineno <= node.lineno or second.lineno <= first.lineno:
            continue
        kept = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
        answer = inspect.cleandoc("\n" + "\n".join(kept))
        request = f"{node.name}: {description}"
        if len((request + answer).encode()) <= _LONGEST:
            yield request, answer
