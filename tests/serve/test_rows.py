"""Laws of rows in buckets: what a step touches, what memory it takes, what a row leaves behind."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from serve.cache.capacity import (
    Bucket,
    Move,
    Place,
    RowCost,
    positions_capacity,
    ring_capacity,
    rows_capacity,
)
from serve.cache.families import make_rows
from serve.cache.precision import PLAIN, KvPrecision
from serve.cache.rows import BatchRows
from serve.cache.spans import Span, SpanPart
from serve.device import backend
from serve.errors import RequestError
from serve.model.loading import load
from serve.model.network import Network

GEMMA = {
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 259,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "sliding_window": 24,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 16,
}
FORMS = {
    "plain": PLAIN,
    "q8": KvPrecision("affine", 8, 8, group_size=32),
    "t3:4": KvPrecision("turbo", 3, 4),
}


@pytest.fixture(scope="module")
def network(make_model) -> Network:
    """A windowed layer and one that sees everything."""
    return load(str(make_model("rows-gemma", GEMMA)), name="gemma").network


@pytest.mark.skipif(backend() != "cpu", reason="elsewhere a rotary embedding is one kernel")
@pytest.mark.parametrize("num_tokens", [1, 6])
def test_a_forwards_layers_share_their_angles(network, num_tokens, tmp_path):
    rows = make_rows(network, prefill_chunk_tokens=8)
    bucket = Bucket(PLAIN, 64)
    rows.resize({bucket: 2})
    for start in (0, num_tokens):
        rows.set_span(Span([SpanPart(bucket, [0, 1], [start, start], [not start] * 2)], num_tokens))
        hidden = network.hidden(mx.ones((2, num_tokens), mx.int32), rows.caches)
        mx.export_to_dot(str(tmp_path / "graph.dot"), hidden)
        # Two layers, two calls each.
        assert (tmp_path / "graph.dot").read_text().count('label ="Cos"') == 1
        mx.eval(hidden, rows.arrays())


@pytest.fixture(params=FORMS)
def precision(request) -> KvPrecision:
    return FORMS[request.param]


def proven(network: Network) -> BatchRows:
    """Empty rows."""
    rows = make_rows(network, prefill_chunk_tokens=32)
    rows.prove()
    assert rows.num_bytes == 0
    return rows


def forward(network: Network, rows: BatchRows, span: Span, seed: int = 0) -> mx.array:
    """Hidden states of random tokens, evaluated."""
    mx.random.seed(seed)
    shape = (span.num_rows, span.num_tokens)
    rows.set_span(span)
    hidden = network.hidden(mx.random.randint(3, 259, shape), cache=rows.caches)
    mx.eval(hidden, rows.arrays())
    return hidden


def one_span(bucket: Bucket, starts: list[int], num_tokens: int = 1) -> Span:
    """Rows 0, 1, 2 … of one bucket."""
    return Span([SpanPart(bucket, range(len(starts)), starts, [s == 0 for s in starts])], num_tokens)


def peak_above(run) -> int:
    """Bytes that `run()` takes at most beyond what is held before it."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run()
    return max(0, mx.get_peak_memory() - before)


def test_capacities_hold_what_they_are_asked_for_and_are_reached_from_below():
    for capacity, most in ((rows_capacity, 300), (positions_capacity, 9000)):
        values = [capacity(count) for count in range(1, most)]
        assert values == sorted(values)
        assert all(value >= count for count, value in enumerate(values, 1))
        assert all(capacity(value) == value for value in set(values))
    assert sorted({rows_capacity(n) for n in range(34)}) == [0, 1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40]
    assert sorted({positions_capacity(n) for n in range(1, 5000)}) == [
        *(256, 512, 1024, 2048),
        *(2560, 3072, 3584, 4096, 5120),
    ]


@pytest.mark.parametrize("start_after", [0, 300, 5000])
def test_the_longest_row_is_the_longest_that_fits(network, start_after):
    cost = proven(network).cost
    precision = KvPrecision("affine", 4, 4, group_size=32, start_after=start_after)

    def fits(length: int, max_bytes: int) -> bool:
        return all(
            cost.row_bytes(Bucket(precision.at(each), positions_capacity(each))) <= max_bytes
            for each in {length, min(length, start_after)} - {0}
        )

    for num_tokens in (1, 256, 257, 700, 3000, 5000, 5001, 9000):
        for bucket in (
            Bucket(PLAIN, positions_capacity(num_tokens)),
            Bucket(precision.at(num_tokens), positions_capacity(num_tokens)),
        ):
            for max_bytes in (cost.row_bytes(bucket), cost.row_bytes(bucket) - 1):
                longest = cost.max_positions(max_bytes, precision)
                assert longest == 0 or fits(longest, max_bytes)
                assert not fits(longest + 1, max_bytes)


def addresses(rows: BatchRows) -> list[int]:
    """Where in memory each array is."""
    return [np.array(part, copy=False).__array_interface__["data"][0] for part in rows.arrays()]


@pytest.mark.skipif(backend() != "cpu", reason="numpy sees the addresses of the host alone")
def test_a_step_writes_into_its_buffers_and_copies_none(network, precision):
    rows, bucket = proven(network), Bucket(precision, 128)
    rows.resize({bucket: 4})
    span = one_span(bucket, [9, 30, 17, 3])
    forward(network, rows, span)
    before = addresses(rows)
    assert len(set(before)) == len(before)
    for coming in (span.next(), Span([SpanPart(bucket, [1, 3], [40, 12], [False, False])], 20)):
        forward(network, rows, coming)
        assert addresses(rows) == before
    for num_positions in (32, 128):
        for moves in ([(3, 0)], [(3, 0), (0, 2)]):
            rows.move([Move(Place(bucket, a), Place(bucket, b), num_positions) for a, b in moves])
            mx.eval(rows.arrays())
            assert addresses(rows) == before, (num_positions, moves)


def test_moving_a_row_copies_that_row_alone(network, precision):
    rows, bucket = proven(network), Bucket(precision, 4096)
    rows.resize({bucket: 16})
    forward(network, rows, one_span(bucket, [5] * 16))
    one = rows.cost.row_bytes(bucket)
    move = [Move(Place(bucket, 15), Place(bucket, 2), 6)]

    def run() -> None:
        rows.move(move)
        mx.eval(rows.arrays())

    run()
    assert peak_above(run) < 4 * one


@pytest.mark.parametrize("num_positions", [5, 128])
@pytest.mark.parametrize("moved", [{2: 0}, {1: 0, 0: 1}, {3: 0, 0: 1, 1: 3}], ids=str)
def test_moved_rows_hold_what_they_held_and_nothing_behind_it(network, precision, moved, num_positions):
    """Also where they change places: all are read before any is written. `moved`: from → to."""
    rows, bucket = proven(network), Bucket(precision, 128)
    rows.resize({bucket: 4})
    for position in (0, 3, 40, 127):
        forward(network, rows, one_span(bucket, [position] * 4))
    before = [part[...] + 0 for part in rows.arrays()]
    mx.eval(before)
    rows.move([Move(Place(bucket, a), Place(bucket, b), num_positions) for a, b in moved.items()])
    source_of = {b: a for a, b in moved.items()}
    for part, old in zip(rows.arrays(), before, strict=True):
        extent = min(num_positions, part.shape[2])
        for row in range(4):
            assert mx.array_equal(part[row, :, :extent], old[source_of.get(row, row), :, :extent])
            behind = mx.zeros_like(part[row]) if row in source_of else old[row]
            assert mx.array_equal(part[row, :, extent:], behind[:, extent:])


def test_a_chunk_at_the_end_of_a_long_prompt_takes_no_more_memory_for_being_quantized(make_model):
    config = {**GEMMA, "model_type": "qwen3", "num_hidden_layers": 8}
    network = load(str(make_model("rows-qwen3", config))).network
    peaks = {}
    for name, precision in FORMS.items():
        rows, bucket = proven(network), Bucket(precision, 4096)
        rows.resize({bucket: 1})
        span = Span([SpanPart(bucket, [0], [4000], [False])], 32)
        forward(network, rows, span)
        peaks[name] = rows.num_bytes + peak_above(lambda rows=rows, span=span: forward(network, rows, span))
    assert max(peaks, key=peaks.__getitem__) == "plain", peaks


def test_rows_give_back_what_is_left_out(network, precision):
    rows = proven(network)
    short, long = Bucket(precision, 256), Bucket(PLAIN, 1024)
    for counts in ({short: 3, long: 1}, {short: 6}, {long: 2}, {short: 1, long: 0}, {}):
        rows.resize(counts)
        mx.eval(rows.arrays())
        assert rows.num_bytes == sum(count * rows.cost.row_bytes(bucket) for bucket, count in counts.items())


def test_rows_that_stay_are_what_they_were_when_their_bucket_grows_and_shrinks(network, precision):
    rows, bucket = proven(network), Bucket(precision, 256)
    rows.resize({bucket: 2})
    forward(network, rows, one_span(bucket, [0, 0], 30))
    held = [mx.array(part[:2]) for part in rows.arrays()]
    for count in (5, 3, 2):
        rows.resize({bucket: count})
        assert all(mx.array_equal(part[:2], old) for part, old in zip(rows.arrays(), held, strict=True))


def test_the_span_a_token_later_is_the_span_that_would_be_made_anew(network, precision):
    short, long = Bucket(precision, 64), Bucket(PLAIN, 128)

    def span(step: int) -> Span:
        return Span(
            [
                SpanPart(short, [0, 1, 2], [step + 3, step + 30, step + 8], [False] * 3),
                SpanPart(long, [0], [step + 90], [False]),
            ],
            1,
        )

    found = []
    for is_anew in (False, True):
        rows = proven(network)
        rows.resize({short: 4, long: 1})
        following = span(0)
        for step in range(5):
            hidden = forward(network, rows, span(step) if is_anew else following, seed=step)
            following = following.next()
        found.append(hidden)
    assert mx.array_equal(*found)


@pytest.mark.parametrize("way", ["begins", "moves", "put", "grows"])
def test_nothing_of_a_poisoned_row_reaches_who_comes_after_it(network, precision, way):
    rows, bucket = proven(network), Bucket(precision, 64)
    rows.resize({bucket: 3})
    mx.random.seed(0)
    prompt, longer = mx.random.randint(3, 259, (1, 20)), mx.random.randint(3, 259, (1, 30))

    def run(row: int, start: int, tokens: mx.array) -> None:
        rows.set_span(Span([SpanPart(bucket, [row], [start], [start == 0])], tokens.shape[1]))
        mx.eval(network.hidden(tokens, cache=rows.caches), rows.arrays())

    run(1, 0, prompt)
    run(2, 0, longer)
    segment = rows.take(Place(bucket, 1), 1, 0, 20)
    for layer in rows.attending:
        for part in layer.stores[bucket].parts:
            if mx.issubdtype(part.dtype, mx.floating):
                part[0] = float("nan")
    if way == "begins":
        run(0, 0, prompt)
    elif way == "put":
        rows.put(Place(bucket, 0), 0, [segment], 20)
    else:
        if way == "grows":  # a row that was given back and comes again
            rows.move([Move(Place(bucket, 1), Place(bucket, 0), 20)])
            rows.resize({bucket: 1})
            rows.resize({bucket: 3})
            run(2, 0, longer)
            rows.move([Move(Place(bucket, 0), Place(bucket, 1), 20)])
        rows.move([Move(Place(bucket, 1), Place(bucket, 0), 20)])
    # The third row is longer, so that what stands behind the others is read with it.
    rows.set_span(one_span(bucket, [20, 20, 30]))
    hidden = network.hidden(mx.array([[7], [7], [9]]), cache=rows.caches)
    assert mx.all(mx.isfinite(hidden))
    assert mx.allclose(hidden[0], hidden[1], atol=1e-4)


def test_a_short_row_beside_one_that_has_gone_round_sees_only_what_it_holds(network):
    bucket = Bucket(PLAIN, 256)  # longer than the ring of the window
    mx.random.seed(1)
    short, long = mx.random.randint(3, 259, (1, 6)), mx.random.randint(3, 259, (1, 160))
    found = []
    for with_company in (False, True):
        rows = proven(network)
        rows.resize({bucket: 2})
        for row, tokens in enumerate([short, long][: 1 + with_company]):
            for start in range(0, tokens.shape[1], 32):
                chunk = tokens[:, start : start + 32]
                rows.set_span(Span([SpanPart(bucket, [row], [start], [start == 0])], chunk.shape[1]))
                mx.eval(network.hidden(chunk, cache=rows.caches), rows.arrays())
        for layer in rows.attending:
            for part in layer.stores[bucket].parts:
                part[0, :, 6:] = 50  # what must not be seen would be heard
        rows.set_span(one_span(bucket, [6, 160][: 1 + with_company]))
        found.append(network.hidden(mx.array([[5], [8]])[: 1 + with_company], cache=rows.caches)[0])
    assert mx.allclose(*found, atol=1e-4)


def test_a_window_is_taken_as_far_as_it_is_still_there(network):
    rows, bucket = proven(network), Bucket(PLAIN, 256)
    rows.resize({bucket: 1})
    ring = ring_capacity(24, 32)
    place, length = Place(bucket, 0), 0
    for count in (32, 32, 32, 32, 1, 1):
        forward(network, rows, one_span(bucket, [length], count))
        length += count
        segment = rows.take(place, 0, length - count, length)
        assert segment.has_window, "a chunk that has just run is there"
    whole = rows.take(place, 0, 0, length)
    assert not whole.has_window
    assert whole.num_window_tokens == ring
    with pytest.raises(AssertionError, match="keys from"):
        rows.put(place, 0, [whole.with_window(20)], length)
    short = whole.with_window(23)
    assert short.num_bytes < whole.num_bytes
    old, new = whole.cut(length - ring)
    assert (old.num_window_tokens, new.num_window_tokens) == (0, ring)
    assert old.num_bytes + new.num_bytes == whole.num_bytes
    expected = forward(network, rows, one_span(bucket, [length]), seed=3)
    for parts in ([whole], [short], [old, new]):
        rows.put(place, 0, parts, length)
        assert mx.array_equal(forward(network, rows, one_span(bucket, [length]), seed=3), expected)


def test_a_segment_is_a_copy_that_later_writes_leave_alone(network, precision):
    rows, bucket = proven(network), Bucket(precision, 64)
    rows.resize({bucket: 1})
    forward(network, rows, one_span(bucket, [0], 20))
    segment = rows.take(Place(bucket, 0), 0, 5, 20)
    before = {name: array.tolist() for name, array in segment.arrays().items()}
    forward(network, rows, one_span(bucket, [0], 20), seed=9)
    assert {name: array.tolist() for name, array in segment.arrays().items()} == before
    assert segment.num_bytes == sum(layer.shape.position_bytes(precision) for layer in rows.attending) * 15


def test_a_plain_prefix_becomes_what_the_row_is_as_the_row_itself_would_have(network):
    precision = KvPrecision("affine", 4, 4, group_size=32)
    rows, plain, packed = proven(network), Bucket(PLAIN, 64), Bucket(precision, 64)
    rows.resize({plain: 1, packed: 2})
    forward(network, rows, one_span(plain, [0], 20))
    prefix = rows.take(Place(plain, 0), 0, 0, 20)
    rows.move([Move(Place(plain, 0), Place(packed, 0), 20)])
    rows.put(Place(packed, 1), 1, [prefix], 20)
    assert all(
        mx.array_equal(part[0], part[1]) for layer in rows.attending for part in layer.stores[packed].parts
    )


def test_some_of_the_last_layers_stay_plain(network):
    rows = proven(network)
    some = KvPrecision("affine", 4, 4, group_size=32, num_plain_layers=1)
    assert rows.cost.row_bytes(Bucket(some, 256)) == rows.cost.row_bytes(Bucket(PLAIN, 256))


def test_a_group_that_does_not_divide_the_channels_is_refused_with_what_does(network):
    rows = proven(network)
    rows.check(KvPrecision("affine", 8, 8, group_size=32))
    rows.check(KvPrecision("turbo", 3, 4))
    with pytest.raises(RequestError, match=r"kv_group_size is 64.* 32 channels .* expected one of \[32\]"):
        rows.check(KvPrecision("affine", 8, 8, group_size=64))


def test_plain_arrays_never_notice_that_a_family_takes_held_rows(make_model):
    module = load(str(make_model("rows-inert", GEMMA))).network.module
    tokens = mx.array([[5, 9, 44, 7]])
    before = module(tokens, cache=make_prompt_cache(module))
    proven(load(str(make_model("rows-inert-again", GEMMA))).network)
    assert mx.array_equal(module(tokens, cache=make_prompt_cache(module)), before)


def test_a_row_that_outgrows_its_bucket_is_noticed_before_it_writes(network):
    rows, bucket = proven(network), Bucket(PLAIN, 32)
    rows.resize({bucket: 1})
    with pytest.raises(AssertionError, match="outgrown"):
        rows.set_span(one_span(bucket, [32]))


def test_cost_of_nothing_is_nothing():
    assert RowCost().row_bytes(Bucket(PLAIN, 256)) == 0
    assert RowCost().max_positions(0) > 10**9


def made_up(number: int) -> Iterator[KvPrecision]:
    """Precisions that no two requests share: clients may name any."""
    for index in range(number):
        yield KvPrecision("affine", 8, 4, 32, start_after=3 * index, num_plain_layers=index)


def test_precisions_that_clients_make_up_are_not_remembered_for_ever(network):
    rows = make_rows(network, prefill_chunk_tokens=16)

    def ask(number: int) -> int:
        for form in made_up(number):
            rows.cost.max_positions(1 << 30, form)
            rows.resize({Bucket(form.at(2**30), 256): 1})
        rows.clear()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        first, second = ask(500), ask(1000)
    finally:
        tracemalloc.stop()
    assert second - first < 1 << 20
