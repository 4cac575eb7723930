"""Writes a config as a file in the manner of configs/: only what differs from the defaults."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from launch.fit.axes import power_text
from launch.fit.results import Results, interval_text, value_text
from moe.config import RunConfig

_FILE = '''"""{docstring}"""

from ml_collections import ConfigDict

from moe.config import RunConfig


def get_config() -> ConfigDict:
    config = RunConfig.config_dict()
{body}
    return config
'''


def docstring(path: Path, results: Results) -> str:
    """Returns the docstring of the config of the best model for the largest budget."""
    optimum = results.optima[-1]
    forms = (("parameters", "count"), ("tokens", "count"), ("loss", "loss"))
    said = "\n".join(
        f"{name:12}{value_text(optimum.best[name], form)} "
        f"({interval_text(*optimum.intervals[name], form)})"
        for name, form in forms
        if name in optimum.best  # approach 2 says no loss
    )
    budget, table = power_text(optimum.budget, 3), Path(results.table).name
    return f"""Trains the model that a scaling law predicts to be best for {budget} FLOP.

The law is {results.law}, fitted to {results.num_runs} runs of {table}.
It predicts, with 95 % of the bootstrap in brackets:

{said}

Command:  python -m launch.train --config={quote(str(path))} --workdir={quote(f"runs/{path.stem}")}
Hardware: not run yet.
Time, result: not measured yet.
"""


def config_file(config: RunConfig, docstring: str) -> str:
    """Returns the text of a config file whose get_config() gives `config`."""
    # The docstring has names of files, which may have any characters, and must stay a text.
    docstring = docstring.replace("\\", r"\\").replace('"""', r"\"\"\"")
    changed = _changed(config.to_dict(), RunConfig().to_dict())
    body = "\n".join(_statements(changed, "config"))
    return _FILE.format(docstring=docstring, body=body)


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that differ from the defaults, with the groups that have any."""
    changed = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            value, default = _changed(value, defaults[name]), {}
        else:
            default = defaults[name]
        if value != default:
            changed[name] = value
    return changed


def _statements(values: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yields the lines that set the fields of one group and of the groups within it."""
    fields = {name: value for name, value in values.items() if not isinstance(value, Mapping)}
    if len(fields) == 1:
        ((name, value),) = fields.items()
        yield f"    {path}.{name} = {_literal(value)}"
    elif fields:
        arguments = [f"{name}={_literal(value)}" for name, value in fields.items()]
        line = f"    {path}.update({', '.join(arguments)})"
        if len(line) <= 100:
            yield line
        else:
            yield f"    {path}.update("
            yield from (f"        {argument}," for argument in arguments)
            yield "    )"
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _statements(value, f"{path}.{name}")


def _literal(value: Any) -> str:
    """Returns a value of a config as Python writes it, texts in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
