"""The examples of docs/contributing.md, run as they stand there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.config import DataConfig
from moe.data.sources import open_documents
from moe.kernels.grouped_matmul import Shapes
from moe.kernels.grouped_matmul.choice import IMPLEMENTATIONS
from tests.kernels.grouped_matmul.cases import check_implementation

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/contributing.md").read_text()
SECTIONS = re.split(r"^(?=## )", PAGE, flags=re.MULTILINE)
PATHS = re.compile(r"`((?:moe|kernels|launch|tests|configs)/(?!.*NAME)[\w/.]+)`")
BLOCKS = {
    re.search(r"^## (.*)$", section, re.MULTILINE)[1]: block
    for section in SECTIONS
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
}


def run(section: str, **names: object) -> dict:
    """Runs a section's example, and returns the names that it leaves."""
    names = {"jax": jax, "jnp": jnp, "__name__": __name__} | names
    with jax.numpy_rank_promotion("raise"):  # as in a process that imports the model
        exec(BLOCKS[section], names)  # word for word what the page says
    return names


def test_the_page_has_the_examples() -> None:
    parts = ["a router", "an attention variant", "a kernel", "a data set"]
    assert list(BLOCKS) == [f"Add {part}" for part in parts]


def test_a_router() -> None:
    # softplus(log(e - 1)) = 1 and softplus(log(e^3 - 1)) = 3.
    logits_BTE = jnp.log(jnp.expm1(jnp.array([[[1.0, 3.0]]])))
    names = run("Add a router", logits_BTE=logits_BTE)
    np.testing.assert_allclose(names["scores_BTE"], [[[1.0, 3.0]]], rtol=1e-6)
    np.testing.assert_allclose(names["probs_BTE"], [[[0.25, 0.75]]], rtol=1e-6)


def test_the_functions_that_a_section_names_are_in_its_files() -> None:
    for section in SECTIONS:
        files = [ROOT / path for path in PATHS.findall(section)]
        text = "".join(path.read_text() for path in files if path.is_file())
        for name in re.findall(r"`((?:_|test_)\w+)`", section):
            assert f"def {name}(" in text, name


def test_an_attention_variant() -> None:
    # The token at position 7 sees 8 keys: log 8 is 3 log 2. The one at position 0 sees itself.
    names = run(
        "Add an attention variant",
        query_BTNH=jnp.array([[[[5.0], [7.0]], [[1.0], [-2.0]]]]),
        positions_BT=jnp.array([[0, 7]]),
        scale_N=jnp.array([1.0, 10.0]),
    )
    expected = 3 * np.log(2) * np.array([[[[0.0], [0.0]], [[1.0], [-20.0]]]])
    np.testing.assert_allclose(names["query_BTNH"], expected, rtol=1e-6)


def test_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    row = run("Add a kernel")["row"]
    monkeypatch.setitem(IMPLEMENTATIONS, "example", row)
    check_implementation("example", "runs of every length", "float32")
    assert row.obstacle(Shapes(8, 2, "float32"), "cpu") is None
    assert row.obstacle(Shapes(8, 2, "int8"), "cpu") == "it takes float32, not int8"


def test_a_data_set(tmp_path: Path) -> None:
    names = run(
        "Add a data set",
        DataConfig=DataConfig,
        open_documents=open_documents,
        directory=str(tmp_path),
    )
    (document,) = names["documents"].between(0, 2)
    assert document.text == "Many hands make light work."


@pytest.mark.parametrize("path", PATHS.findall(PAGE))
def test_the_files_that_the_page_names_are_there(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((\w+\.md)(?:#[\w-]*)?\)", PAGE):
        assert (ROOT / "docs" / target).exists()
