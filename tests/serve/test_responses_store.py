"""What is kept of responses: within its bounds, each tenant its own, whole as long as something goes on from it."""

from __future__ import annotations

import random

import pytest

from serve.api.responses.store import Entry, ResponseStore

MANY = 1 << 30


class Clock:
    """Seconds, as a test has them."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def put(
    store: ResponseStore, id: str, previous: Entry | None = None, tenant: str = "", size: int = 1
) -> bool:
    asked = [{"id": f"in-{id}", "type": "message", "role": "user", "content": "x" * size}]
    answer = {"id": f"out-{id}", "type": "message", "role": "assistant", "content": "y" * size}
    return store.put(tenant, {"id": id, "output": [answer]}, asked, previous)


def history(store: ResponseStore, id: str, tenant: str = "") -> list[str]:
    entry = store.get(tenant, id)
    assert entry is not None
    return [item["id"] for item in entry.history]


def test_a_response_is_known_by_its_tenant_alone():
    store = ResponseStore(MANY, 10, 60)
    put(store, "a", tenant="one")
    assert history(store, "a", "one") == ["in-a", "out-a"]
    assert store.item("one", "out-a") is not None
    assert store.get("two", "a") is None
    assert store.item("two", "out-a") is None
    assert not store.delete("two", "a")
    assert store.delete("one", "a")
    assert (store.num_bytes, store.item("one", "out-a")) == (0, None)


def test_what_goes_on_from_a_response_keeps_what_was_said_when_that_is_deleted():
    store = ResponseStore(MANY, 10, 60)
    put(store, "a")
    put(store, "b", store.get("", "a"))
    put(store, "c", store.get("", "b"))
    before = store.num_bytes
    store.delete("", "b")
    assert store.get("", "b") is None
    assert history(store, "c") == ["in-a", "out-a", "in-b", "out-b", "in-c", "out-c"]
    assert store.num_bytes == before
    store.delete("", "c")
    assert store.num_bytes < before / 2  # b went with the last that needed it
    store.delete("", "a")
    assert store.num_bytes == 0


def test_what_is_forgotten_while_an_answer_is_written_still_stands_before_it():
    store = ResponseStore(MANY, 10, 60)
    put(store, "a")
    put(store, "b", store.get("", "a"))
    before, entry = store.num_bytes, store.get("", "b")
    store.delete("", "a")
    store.delete("", "b")
    assert store.num_bytes == 0
    put(store, "c", entry)
    assert history(store, "c") == ["in-a", "out-a", "in-b", "out-b", "in-c", "out-c"]
    assert store.num_bytes > before
    store.delete("", "c")
    assert store.num_bytes == 0


def test_responses_grow_old():
    clock = Clock()
    store = ResponseStore(MANY, 10, 60, clock)
    put(store, "a")
    clock.now_s = 50
    put(store, "b", store.get("", "a"))
    clock.now_s = 70
    assert store.get("", "a") is None
    assert history(store, "b") == ["in-a", "out-a", "in-b", "out-b"]
    clock.now_s = 120
    assert store.get("", "b") is None
    assert (len(store), store.num_bytes) == (0, 0)


def test_a_response_that_is_gone_on_from_outlives_those_that_are_not():
    store = ResponseStore(MANY, 3, 60)
    for id in "abc":
        put(store, id)
    put(store, "d", store.get("", "a"))
    assert [id for id in "abcd" if store.get("", id)] == ["a", "c", "d"]


def test_a_tenant_that_stores_much_crowds_out_itself():
    store = ResponseStore(20_000, 1000, 60)
    put(store, "mine", tenant="small")
    for number in range(100):
        assert put(store, str(number), tenant="large", size=1000)
    assert store.get("small", "mine") is not None
    assert store.num_bytes <= 20_000
    assert len(store) > 5


def test_what_is_larger_than_the_store_is_not_kept_and_drives_nothing_out():
    store = ResponseStore(5_000, 10, 60)
    put(store, "a")
    assert not put(store, "b", size=5_000)
    assert store.get("", "a") is not None
    assert not put(ResponseStore(MANY, 0, 60), "c")


@pytest.mark.parametrize("seed", range(20))
def test_bytes_are_of_what_can_be_come_to_whatever_happens(seed):
    rng, clock = random.Random(seed), Clock()
    store = ResponseStore(4_000, 12, 100, clock)
    held: dict[str, Entry] = {}
    for number in range(200):
        clock.now_s += rng.expovariate(1 / 5)
        tenant = rng.choice(["", "t"])
        known = [
            entry for entry in held.values() if store.get(entry.tenant, entry.id) and entry.tenant == tenant
        ]
        if known and rng.random() < 0.2:
            store.delete(tenant, rng.choice(known).id)
            continue
        previous = rng.choice([None, *known])
        if put(store, str(number), previous, tenant, rng.randrange(300)):
            entry = store.get(tenant, str(number))
            assert entry is not None
            held[entry.id] = entry
        reachable: set[str] = set()
        for entry in held.values():
            if store.get(entry.tenant, entry.id) is entry:
                step: Entry | None = entry
                while step is not None:
                    reachable.add(step.id)
                    step = step.previous
        assert store.num_bytes == sum(len(held[id].written) for id in reachable)
        assert store.num_bytes <= 4_000
        assert len(store) <= 12
    assert len(held) > 50
