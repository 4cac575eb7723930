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

    The docstring stands in the source too, as people write functions. The config "without_request"
    has the same answers to empty requests.
    """

    VERSION = Stdlib.VERSION
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="with_request"),
        tfds.core.BuilderConfig(name="without_request"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return text_with_path(self)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {
            "train": self._generate_examples(False),
            "validation": self._generate_examples(True),
        }

    def _generate_examples(self, validation: bool) -> Iterator[tuple[str, dict[str, str]]]:
        config = self.builder_config
        has_request = config is not None and config.name == "with_request"
        # All functions of a file are in the split of the file.
        for path, text in files_of_split(validation):
            for number, (request, answer) in enumerate(described_functions(text)):
                messages = [
                    {"role": "user", "content": request if has_request else ""},
                    {"role": "assistant", "content": answer},
                ]
                yield f"{path}:{number}", {"text": json.dumps(messages), "path": path}


def described_functions(source: str) -> Iterator[tuple[str, str]]:
    """Yields a request for each short function that has a docstring, and the function.

    The request has the function's name and the first paragraph of its docstring. Files that this
    version of Python cannot parse have none.
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
        # A function that stands on the line of its docstring is left out.
        if not description or node.body[0].lineno <= node.lineno:
            continue
        answer = inspect.cleandoc("\n" + "\n".join(lines[node.lineno - 1 : node.end_lineno]))
        request = f"{node.name}: {description}"
        if len((request + answer).encode()) <= _LONGEST:
            yield request, answer
