"""Rotary embeddings with shared angles are MLX's, bit for bit: values, gradients, and under every transformation."""

from __future__ import annotations

import itertools
from threading import Thread

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from serve import device
from serve.model import rotary
from serve.model.rotary import rope

OWN = rotary._own
FREQS = mx.array([1.0, 7.0, 40.0, float("inf")])
SHAPES = [(3, 5, 8), (3, 2, 5, 8), (3, 2, 1, 8), (3, 2, 2, 5, 8), (1, 2, 5, 12), (3, 2, 5, 12)]


def numbers(shape: tuple[int, ...]) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(len(shape)))


def offsets(num_rows: int) -> list[int | mx.array]:
    rows = mx.array([7, 0, 30_000][:num_rows])
    return [29, 0, mx.array(11), mx.array([5]), rows]


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("traditional", [True, False])
@pytest.mark.parametrize(("base", "freqs"), [(10_000.0, None), (1e6, None), (None, FREQS)])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_mlxs(shape, scale, base, freqs, traditional, is_shared):
    a = numbers(shape)
    for offset in offsets(shape[0]):
        if is_shared and isinstance(offset, mx.array):
            rotary.share(offset)
        turn = {"traditional": traditional, "base": base, "freqs": freqs, "scale": scale, "offset": offset}
        theirs = OWN(a, 8, **turn)
        assert str(offset) == "0" or not mx.array_equal(theirs, a)
        for _ in range(2):  # the second time from what the first has found
            assert mx.array_equal(rope(a, 8, **turn), theirs), (offset, shape)


@pytest.mark.parametrize("traditional", [True, False])
def test_gradients_are_mlxs(traditional):
    a, factors = numbers((2, 3, 5, 8)), numbers((2, 3, 5, 12))[..., :8]
    for offset in (0, mx.array([4, 9])):
        turn = {"traditional": traditional, "base": 1e4, "scale": 1.0, "offset": offset}
        ours, theirs = (
            mx.grad(lambda x, turn=turn, function=function: (function(x, 8, **turn) * factors).sum())(a)
            for function in (rope, OWN)
        )
        assert mx.allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_an_offset_that_changes_in_place_is_looked_at_each_time():
    # Only who says that an array stays as it is has its angles kept.
    a, offset = numbers((2, 3, 4, 8)), mx.array([3, 8])
    turn = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": offset}
    for place in (1, 40):
        offset[0] = place
        assert mx.array_equal(rope(a, 8, **turn), OWN(a, 8, **turn))


def test_another_offset_and_another_length_have_angles_of_their_own():
    a = numbers((2, 3, 6, 8))
    places = [mx.array([3, 8]), 4, mx.array([0, 1]), 0]
    for (offset, length), base in itertools.product(itertools.product(places, (6, 1)), (1e4, 5e5)):
        rotary.share(offset if isinstance(offset, mx.array) else None)
        turn = {"traditional": False, "base": base, "scale": 1.0, "offset": offset}
        part = a[:, :, :length]
        assert mx.array_equal(rope(part, 8, **turn), OWN(part, 8, **turn))


def test_traced_calls_leave_nothing_behind_that_others_find():
    a = numbers((1, 2, 7, 8))

    def turn(x):
        return rope(x, 8, traditional=False, base=1e4, scale=1.0, offset=3) * 2

    expected = OWN(a, 8, traditional=False, base=1e4, scale=1.0, offset=3) * 2
    for traced in (mx.compile(turn), mx.checkpoint(turn), lambda x: mx.vmap(turn)(x[None])[0]):
        rotary.share(None)
        assert mx.array_equal(traced(a), expected)
        assert mx.array_equal(turn(a), expected)


def test_threads_have_their_own():
    a, offset = numbers((2, 3, 1, 8)), mx.array([5, 6])
    expected = OWN(a, 8, traditional=False, base=1e4, scale=1.0, offset=offset)
    mx.eval(a, offset, expected)
    same: list[bool] = []

    def turn() -> None:
        rotary.share(offset)
        same.append(
            all(
                mx.array_equal(rope(a, 8, traditional=False, base=1e4, scale=1.0, offset=offset), expected)
                for _ in range(200)
            )
        )

    threads = [Thread(target=turn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 4


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_left_to_mlx(dtype):
    a = numbers((1, 2, 7, 8)).astype(dtype)
    turn = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": 3}
    assert mx.array_equal(rope(a, 8, **turn), OWN(a, 8, **turn))


@pytest.mark.parametrize(
    "wrong",
    [{"base": None}, {"freqs": FREQS}, {"offset": mx.array([1, 2, 3, 4])}, {"offset": 1.5}],
    ids=lambda wrong: ", ".join(wrong),
)
def test_what_mlx_refuses_is_refused(wrong):
    turn = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": 0} | wrong
    raised = []
    for function in (rope, OWN):
        with pytest.raises((ValueError, TypeError)) as error:
            function(numbers((2, 2, 7, 8)), 8, **turn)
        raised.append(type(error.value))
    assert raised[0] is raised[1]


@pytest.mark.skipif(device.backend() != "cpu", reason="elsewhere it is one kernel")
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "longrope", "original_max_position_embeddings": 64, "short_factor": [1.0] * 4}
        | {"long_factor": [1.0, 1.5, 2.0, 4.0]},
        {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5},
    ],
    ids=lambda scaling: scaling["rope_type"] if scaling else "plain",
)
def test_the_families_code_uses_it(scaling):
    assert mx.fast.rope is rope
    module = initialize_rope(8, 1e4, False, scaling, 256)
    a, offset = numbers((2, 3, 5, 8)), mx.array([40, 90])
    ours = module(a, offset=offset)
    mx.fast.rope = OWN
    try:
        assert mx.array_equal(ours, module(a, offset=offset))
    finally:
        mx.fast.rope = rope
    assert isinstance(module, nn.Module)
