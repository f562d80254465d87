"""Keys without HTTP: files of them, how they are found, allowances against a plain count of what was had."""

import asyncio
import hashlib
import os
import random
from pathlib import Path

import pytest

from serve.errors import ConfigError, ForbiddenError, TenantLimitError
from serve.keys.bucket import Bucket
from serve.keys.file import read_keys, the_one_key
from serve.keys.keeper import LOOK_EVERY_S, Keeper
from serve.keys.limits import Allowance, Limits
from serve.keys.ring import KeyRing


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def write(path: Path, *entries: str) -> Path:
    path.write_text("keys:\n" + "".join(f"  - {{{entry}}}\n" for entry in entries))
    path.chmod(0o600)
    return path


def problems_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_keys(path)
    return str(caught.value)


def test_a_key_is_found_by_its_text_and_by_nothing_near_it(tmp_path):
    hashed = hashlib.sha256(b"sk-two").hexdigest()
    file = write(
        tmp_path / "k.yaml", "name: one, key: sk-one", f"name: two, key_sha256: {hashed}, admin: true"
    )
    ring = KeyRing([*read_keys(file), the_one_key("sk-three")])
    assert [ring.find(text).name for text in ("sk-one", "sk-two", "sk-three")] == ["one", "two", "api_key"]
    rng = random.Random(0)
    for _ in range(2000):
        text = rng.choice(["sk-one", "sk-two", hashed])
        place = rng.randrange(len(text) + 1)
        near = rng.choice(
            [text[:place], text[place:], text[:place] + rng.choice("x \u00e9\ud800\x00") + text[place:]]
        )
        if near not in ("sk-one", "sk-two"):
            assert ring.find(near) is None, near


def test_what_is_wrong_with_a_file_is_told_by_line_and_no_key_is_quoted(tmp_path):
    file = write(
        tmp_path / "k.yaml",
        "name: one, key: sk secret",
        "name: 'a\\nb', key: sk-b",
        "name: two",
        "name: three, key: sk-c, key_sha256: abc",
        "name: four, key_sha256: abc",
        "name: five, key: sk-d, tenant: 'a b'",
    )
    told = problems_of(file)
    for line, (name, what) in enumerate(
        [
            ("keys.0.key", "it cannot be a key"),
            ("keys.1.name", "expected 1 to 64 of"),
            ("keys.2.key", "expected either key or key_sha256"),
            ("keys.3.key", "expected either key or key_sha256"),
            ("keys.4.key_sha256", "expected 64 digits"),
            ("keys.5.tenant", "expected characters from ! to ~"),
        ],
        start=2,
    ):
        assert f"k.yaml:{line}: {name}: " in told
        assert what in told
    assert "sk" not in told.replace("sk-", "").replace("k.yaml", "")
    for bad in ("requests_per_minute: 0", "adapters: []", "rate: 3", "admin: maybe"):
        assert "keys.0" in problems_of(write(file, f"name: one, key: sk-hidden, {bad}"))
        assert "hidden" not in problems_of(file)


def test_two_keys_of_one_name_or_one_text_are_refused(tmp_path):
    same = hashlib.sha256(b"sk-a").hexdigest()
    told = problems_of(
        write(tmp_path / "k.yaml", "name: a, key: sk-a", "name: a, key: sk-b", f"name: c, key_sha256: {same}")
    )
    assert "keys.1.name: found 'a', which is keys.0's too" in told
    assert "keys.2.key: found the text of keys.0 again" in told
    file = write(tmp_path / "k.yaml", "name: api_key, key: sk-a")
    with pytest.raises(ConfigError, match="two keys are called 'api_key'"):
        Keeper(file, "sk-b")


def test_a_key_speaks_for_its_own_tenant_and_a_proxys_for_any(tmp_path):
    keys = read_keys(
        write(
            tmp_path / "k.yaml",
            "name: one, key: sk-a",
            "name: two, key: sk-b, tenant: team",
            "name: proxy, key: sk-c, tenant: '*'",
        )
    )
    one, two, proxy = keys
    assert [one.tenant_for(""), one.tenant_for("one"), two.tenant_for(""), two.tenant_for("team")] == [
        "one",
        "one",
        "team",
        "team",
    ]
    for key, named in ((one, "two"), (two, "two"), (two, "*")):
        with pytest.raises(ForbiddenError, match="X-Tenant: found"):
            key.tenant_for(named)
    assert [proxy.tenant_for(""), proxy.tenant_for("x")] == ["", "x"]


def test_what_is_had_of_an_allowance_in_any_stretch_of_time_is_its_size_and_what_came_since():
    rng = random.Random(1)
    for _ in range(50):
        clock, size = Clock(), rng.randint(1, 30)
        limits = Limits("k", Allowance(requests_per_minute=size), clock)
        had: list[float] = []
        for _ in range(400):
            clock.now_s += rng.choice([0, 0, 0.01, 0.5, 3, 90])
            try:
                limits.take_request()
                had.append(clock.now_s)
            except TenantLimitError as error:
                before_s = clock.now_s
                clock.now_s += error.retry_after_s + 1e-6
                limits.take_request()  # what it says is so
                had.append(clock.now_s)
                assert clock.now_s - before_s <= 60 / size + 1e-3, "no cooldown beyond what one takes to come"
        for first in range(len(had)):
            for last in range(first, len(had)):
                since_s = had[last] - had[first]
                assert last - first + 1 <= size + since_s * size / 60 + 1e-3


def test_tokens_that_were_overdrawn_are_paid_off_and_no_more_is_had_than_allowed():
    clock = Clock()
    limits = Limits("k", Allowance(tokens_per_minute=600, tokens_per_day=100_000), clock)
    limits.take_request()
    limits.take_tokens(900)  # an answer nobody knew the length of
    with pytest.raises(TenantLimitError, match="key 'k' may have 600 tokens a minute") as caught:
        limits.take_request()
    assert caught.value.retry_after_s == pytest.approx(30, abs=0.2)
    clock.now_s += 30.2
    limits.take_request()
    limits.take_tokens(100_000)
    with pytest.raises(TenantLimitError, match="600 tokens a minute") as caught:
        limits.take_request()
    assert caught.value.retry_after_s == pytest.approx(10_000, rel=0.01)


def test_the_allowance_that_takes_longest_to_come_back_is_the_one_that_is_told():
    clock = Clock()
    limits = Limits("k", Allowance(tokens_per_minute=600, tokens_per_day=1000), clock)
    for _ in range(3):
        limits.take_request()
        limits.take_tokens(400)
        clock.now_s += 60
    with pytest.raises(TenantLimitError, match="1000 tokens a day") as caught:
        limits.take_request()
    assert 15_000 < caught.value.retry_after_s < 18_000


def test_a_request_refused_by_one_allowance_takes_nothing_of_another():
    clock = Clock()
    limits = Limits("k", Allowance(requests_per_minute=2, tokens_per_minute=60), clock)
    limits.take_tokens(70)
    for _ in range(10):
        with pytest.raises(TenantLimitError):
            limits.take_request()
    assert limits.requests.num_left == 2


def test_a_bucket_says_what_is_left_and_when_it_is_full():
    clock = Clock()
    bucket = Bucket(60, 60, clock)
    bucket.take(60)
    assert (bucket.num_left, bucket.full_in_s) == (0, 60)
    clock.now_s += 12
    assert (bucket.num_left, bucket.full_in_s) == (12, 48)
    bucket.take(-1000)
    assert (bucket.num_left, bucket.full_in_s) == (60, 0)


@pytest.fixture
def find():
    """find(keeper, text) → the name of the key, or None, as an endpoint asks for it."""

    def by(keeper: Keeper, text: str) -> str | None:
        key = asyncio.run(keeper.find(text))
        return key.name if key else None

    return by


def test_a_file_that_changes_is_read_again_within_a_second_of_the_next_question(tmp_path, find):
    clock, file = Clock(), write(tmp_path / "k.yaml", "name: a, key: sk-a")
    keeper = Keeper(file, None, clock)
    assert find(keeper, "sk-a") == "a"
    write(tmp_path / "next.yaml", "name: b, key: sk-b").replace(file)
    clock.now_s += LOOK_EVERY_S
    assert [find(keeper, "sk-a"), find(keeper, "sk-b")] == [None, "b"]


def test_a_file_that_became_wrong_or_went_leaves_the_keys_and_says_so(tmp_path, find, caplog):
    clock, file = Clock(), write(tmp_path / "k.yaml", "name: a, key: sk-a")
    keeper = Keeper(file, None, clock)
    for change in (lambda: write(file, "name: b"), file.unlink):
        change()
        for _ in range(5):
            clock.now_s += LOOK_EVERY_S
            assert find(keeper, "sk-a") == "a"
    told = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 2, "once a change, not once a request"
    write(file, "name: c, key: sk-c")
    clock.now_s += LOOK_EVERY_S
    assert [find(keeper, "sk-a"), find(keeper, "sk-c")] == [None, "c"]


def test_what_was_used_stays_used_when_the_file_is_read_again(tmp_path):
    clock, file = Clock(), write(tmp_path / "k.yaml", "name: a, key: sk-a, requests_per_minute: 3")
    keeper = Keeper(file, None, clock)
    key = asyncio.run(keeper.find("sk-a"))
    for _ in range(3):
        key.limits.take_request()
    write(file, "name: a, key: sk-new, requests_per_minute: 4")
    keeper.look(is_asked=True)
    renewed = asyncio.run(keeper.find("sk-new"))
    assert renewed.limits.requests.num_left == 1
    key.limits.take_request()  # by a request that began before
    assert renewed.limits.requests.num_left == 0


def test_asked_for_it_a_file_is_read_again_that_looks_the_same(tmp_path, find):
    file = write(tmp_path / "k.yaml", "name: a, key: sk-a")
    keeper, before = Keeper(file, None, Clock()), file.stat()
    with file.open("r+") as opened:
        opened.write(file.read_text().replace("sk-a", "sk-b"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert find(keeper, "sk-b") is None
    keeper.look(is_asked=True)
    assert find(keeper, "sk-b") == "a"


def test_keys_in_plain_text_that_others_can_read_are_told(tmp_path, caplog):
    file = write(tmp_path / "k.yaml", "name: a, key: sk-a")
    Keeper(file, None)
    assert not caplog.records
    file.chmod(0o644)
    Keeper(file, None)
    assert "others can read" in caplog.records[0].message


def test_a_missing_file_is_a_mistake_at_start(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        Keeper(tmp_path / "none.yaml", None)
