"""Tests that mixtures survive every form of a config, and that mistakes in them are named."""

import json
from typing import Any

import pytest
from ml_collections import ConfigDict

from moe.config import ConfigError, DataConfig, RunConfig, SourceConfig
from moe.scaling.experiments.sweep import Point, expand, identity, overrides_between
from moe.workdir.identity import differing_fields

CODE = {"dataset": "stdlib", "weights": (3.0, 1.0)}
TEXT = {"dataset": "lm1b", "weights": (1, 1), "max_epochs": 4}


def values(**fields: Any) -> dict[str, Any]:
    mixed = {"mixture": {"text": TEXT, "code": CODE}, "stages": (0, 1000)}
    return {"data": mixed | fields}


def build(**fields: Any) -> RunConfig:
    return RunConfig.from_config_dict(values(**fields))


def test_a_mixture_is_read_from_every_form_of_a_config():
    config = build()
    assert config.data.mixture == (
        SourceConfig("code", "stdlib", weights=(3.0, 1.0)),
        SourceConfig("text", "lm1b", weights=(1.0, 1.0), max_epochs=4.0),
    )
    in_file: Any = RunConfig.config_dict()
    in_file.data.mixture.text = TEXT
    in_file.data.mixture.code = SourceConfig.config_dict(**CODE)
    in_file.data.stages = (0, 1000)
    for form in (
        ConfigDict(values()),
        in_file,
        config.to_dict(),
        json.loads(json.dumps(config.to_dict())),
    ):
        assert RunConfig.from_config_dict(form) == config
    assert hash(config.data) == hash(build().data)


def test_a_config_without_a_mixture_has_one_source_without_a_name():
    data = DataConfig(dataset="lm1b", train_split="test", validation_split="train")
    (source,) = data.sources
    assert (source.name, source.dataset) == ("", "lm1b")
    assert (source.train_split, source.validation_split) == ("test", "train")
    assert data.for_source(source) == data
    assert data.description == "lm1b"


def test_the_config_of_one_source_has_its_fields():
    data = build(sequence_length=64).data
    alone = data.for_source(data.mixture[1])
    assert alone == DataConfig(dataset="lm1b", sequence_length=64)
    assert data.description == "code=stdlib 3/1 + text=lm1b 1/1 from 0/1000"
    splits = [source.validation_split for source in data.with_validation_split("test").mixture]
    assert splits == ["test", "test"]
    assert DataConfig().with_validation_split("test").validation_split == "test"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixture": 3}, "data.mixture=3 is not a group of fields: set mixture to a dict"),
        ({"mixture": {"a": 3}}, "data.mixture.a=3 is not a group of fields"),
        ({"mixture": {"a": {"weight": (1.0, 1.0)}}}, "data.mixture.a.weight=(1.0, 1.0) is not a"),
        ({"mixture": {"a": CODE | {"name": "b"}}}, "data.mixture.a.name='b' is not a field"),
        ({"mixture": {"a-b": CODE}}, "data.mixture has a source named 'a-b'"),
        ({"mixture": {"": CODE}}, "data.mixture has a source named ''"),
        ({"mixture": {"a": CODE | {"dataset": ""}}}, "data.mixture.a.dataset='' names no data"),
        ({"mixture": {"a": CODE | {"weights": ()}}}, "data.mixture.a.weights=() has 0 weights"),
        (
            {"mixture": {"a": CODE | {"weights": (1.0,)}}},
            "data.mixture.a.weights=(1.0,) has 1 weight, and data.stages has 2 stages: set one",
        ),
        ({"mixture": {"a": CODE | {"weights": (1.0, 0.0)}}}, "data.mixture.a.weights=(1.0, 0.0)"),
        ({"mixture": {"a": CODE | {"weights": (1.0, -2)}}}, "data.mixture.a.weights=(1.0, -2.0)"),
        ({"mixture": {"a": CODE | {"weights": 1.0}}}, "data.mixture.a.weights=1.0 has type float"),
        ({"mixture": {"a": CODE | {"weights": ("x", 1)}}}, "data.mixture.a.weights[0]='x' has"),
        ({"mixture": {"a": CODE | {"max_epochs": -1}}}, "data.mixture.a.max_epochs=-1.0 must not"),
        (
            {"mixture": {"a": CODE, "b": CODE | {"weights": (1.0, 1e-6)}}},
            "data.mixture.b.weights=(1.0, 1e-06) gives the source no example in 65,536 of stage 1",
        ),
        ({"mixture": {}}, "data.stages=(0, 1000) has no effect without data.mixture"),
        ({"dataset": "lm1b"}, "data.dataset='lm1b' has no effect with data.mixture: set data.mix"),
        ({"train_split": "test"}, "data.train_split='test' has no effect with data.mixture"),
        ({"stages": ()}, "data.stages=() does not begin with 0"),
        ({"stages": (1, 2)}, "data.stages=(1, 2) does not begin with 0"),
        ({"stages": (0, 0)}, "data.stages=(0, 0) does not begin with 0 and increase"),
        ({"stages": (0, 2**63)}, "data.stages=(0, 9223372036854775808) goes beyond"),
    ],
)
def test_a_mistake_is_named_with_a_fix(fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        build(**fields)
    found = str(error.value)
    assert found.startswith(message) and ": " in found and "\n" not in found


def test_a_source_may_not_be_named_twice():
    source = SourceConfig("a", "stdlib", weights=(1.0,))
    with pytest.raises(ConfigError, match=r"^mixture names a source twice"):
        DataConfig(mixture=(source, source))


def test_runs_differ_by_the_fields_of_their_sources():
    config = build()
    other = build(mixture={"text": TEXT | {"weights": (2.0, 1.0)}, "code": CODE})
    assert differing_fields(config, other) == [
        "data.mixture.text.weights is (1.0, 1.0) there and (2.0, 1.0) here"
    ]
    fewer = build(mixture={"code": CODE})
    assert "data.mixture.text.dataset is 'lm1b' there and missing here" in differing_fields(
        config, fewer
    )
    assert differing_fields(fewer, config)
    assert identity(config) != identity(other)


def test_a_sweep_changes_the_fields_of_a_source_but_not_which_there_are():
    base = build()
    (run,) = expand(base, [Point("a", {"data.mixture.text.weights": (5.0, 1.0)})])
    assert overrides_between(base, run.config) == {"data.mixture.text.weights": (5.0, 1.0)}
    with pytest.raises(ConfigError, match=r"^data\.mixture has other sources than the base"):
        overrides_between(base, build(mixture={"code": CODE}))
