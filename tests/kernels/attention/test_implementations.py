"""Every implementation of the table against float64, over the same cases, and how to add one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.kernels.attention import (
    IMPLEMENTATIONS,
    Choice,
    Implementation,
    flash_attention,
    reference,
)
from tests.kernels.attention.cases import (
    SMALL,
    Case,
    able_dtypes,
    check_numerics,
    check_seed,
    evaluate,
    expected,
    random_case,
)


def names_on(chip: str) -> list[str]:
    """Returns the implementations that can do one case or another on a chip."""
    cases = [random_case(seed, longest=8) for seed in range(4)]
    return [name for name in IMPLEMENTATIONS if any(able_dtypes(name, x, chip) for x in cases)]


def blocks(name: str) -> tuple[int, int] | None:
    """Returns small blocks, where an implementation has blocks that a caller chooses."""
    return None if IMPLEMENTATIONS[name].blocks is None else SMALL


def test_every_implementation_that_can_run_here_is_tested() -> None:
    assert names_on("cpu") == ["reference", "blockwise", "tpu"]
    assert names_on("NVIDIA H200") == ["reference", "blockwise", "hopper", "hopper_fused"]


@pytest.mark.parametrize("name", names_on("cpu"))
@pytest.mark.parametrize("seed", range(5))
def test_numerics(seed, name):
    assert check_seed(name, seed, "cpu", blocks=blocks(name))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", names_on("cpu"))
@pytest.mark.parametrize("seed", range(5, 305))
def test_numerics_of_300_calls(seed, name):
    """Blocks are small, or those of the implementation's rule with longer sequences."""
    if seed % 2:
        assert check_seed(name, seed, "cpu", blocks=blocks(name))
    else:
        assert check_seed(name, seed, "cpu", blocks=None, longest=700)


@pytest.mark.gpu
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(20))
def test_numerics_on_a_gpu(seed, name):
    chip = jax.devices()[0].device_kind
    # By default a GPU multiplies float32 numbers rounded to 10 bits (TF32). All errors are large
    # then, and the sum for a sink may by chance have more than twice XLA's.
    with jax.default_matmul_precision("highest"):
        if not check_seed(name, seed, chip, blocks=None, longest=700):
            pytest.skip(f"{name} cannot do this case on {chip}")


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, (40, 0)])
@pytest.mark.parametrize("documents", ["none", "same", "shifted"])
def test_cudnn_on_a_gpu(window, documents):
    """cuDNN gives no lse and takes few options, so the drawn cases leave it out.

    With shifted documents the first queries see no key.
    """
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(4, dtype=np.int32), 96)[None].repeat(2, axis=0)
    keywords = {"causal": True} | ({"window": window} if window else {})
    if documents != "none":
        keywords |= {"q_segment_ids": ids, "kv_segment_ids": ids + (documents == "shifted")}
    shapes = [(2, 384, heads, 64) for heads in (4, 2, 2, 4)]
    q, k, v, g = (rng.normal(size=shape) for shape in shapes)
    case = Case((q, k, v, None), (g, np.zeros(shapes[0][:3])), keywords)

    def cudnn(q, k, v, sinks, **keywords):
        output = flash_attention(q, k, v, implementation="cudnn", **keywords)
        return output, jnp.zeros(output.shape[:3])

    values, (right, sizes) = evaluate(cudnn, case, "bfloat16"), expected(case)
    for i in (0, 2, 3, 4):  # without the lse
        difference = float(np.sqrt(np.mean((values[i] - right[i]) ** 2)))
        assert difference < 0.01 * sizes[i], (i, difference / sizes[i])


# docs/kernels.md shows the following as an example of how to add a kernel.
def causal_forward(options, inputs):
    return reference.forward(options, inputs)


def obstacle_to_causal(request, chip):
    return None if request.options.right == 0 else "it takes causal attention alone"


CAUSAL = Implementation(causal_forward, reference.backward, obstacle_to_causal)


def test_adding_a_kernel(monkeypatch):
    """A row is enough for flash_attention to take the name, and for the cases to run."""
    monkeypatch.setitem(IMPLEMENTATIONS, "causal", CAUSAL)
    ran = [check_seed("causal", seed, "cpu", blocks=None) for seed in range(6)]
    assert True in ran and False in ran
    with pytest.raises(NotImplementedError, match=r"'causal' cannot .* it takes causal attention"):
        q = jax.numpy.zeros((1, 8, 2, 16))
        flash_attention(q, q, q, implementation="causal")


@pytest.mark.parametrize("changes", [{"softcap": None}, {"left": None}])
def test_a_kernel_that_ignores_an_option_is_found(changes, monkeypatch):
    """By one of the first cases that have the option."""

    def careless(options, inputs):
        return reference.forward(dataclasses.replace(options, **changes), inputs)

    row = Implementation(careless, reference.backward, lambda request, chip: None)
    monkeypatch.setitem(IMPLEMENTATIONS, "careless", row)
    # A window of 300 limits nothing in these short cases.
    has_option = {
        "softcap": lambda keywords: "softcap" in keywords,
        "left": lambda keywords: keywords.get("window", (99, 99))[0] < 10,
    }[next(iter(changes))]
    cases = (random_case(seed, longest=60) for seed in range(200))
    case = next(case for case in cases if has_option(case.keywords) and len(case.arrays[0][0]) > 30)
    with pytest.raises(AssertionError):
        check_numerics(case, Choice("careless"), "float32")
    check_numerics(case, Choice("reference"), "float32")
