"""Memory budgets as users write them."""

import pytest

from sida_ext.budget import available_memory, format_bytes, parse_bytes, parse_memory


@pytest.mark.parametrize(
    ("text", "expected"),
    [(0, 0), (4096, 4096), ("4096", 4096), ("2GiB", 2 << 30), ("1.5 GB", 1_500_000_000), ("512mib", 512 << 20)],
)
def test_bytes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", -1, "2 apples", None, True, 1.5, "1e9"])
def test_bad_bytes_name_the_value(text):
    with pytest.raises(ValueError, match=f"expert_memory is {text!r}"):
        parse_bytes(text, "expert_memory")


def test_shares():
    assert parse_memory("25%", 1000) == 250
    for text in ("0%", "101%", "%", "x%"):
        with pytest.raises(ValueError, match="above 0% and up to 100%"):
            parse_memory(text, 1000)


def test_auto_takes_no_more_than_there_is():
    assert parse_memory("auto", 10) == 10
    assert 0 < parse_memory("auto", 2**60) < available_memory()
    reserved = available_memory() // 2
    assert parse_memory("auto", 2**60, reserved=reserved) < parse_memory("auto", 2**60) - reserved // 2
    assert parse_memory("auto", 2**60, reserved=2**60) == 0
    assert parse_memory(5, 10, reserved=2**60) == 5


def test_format():
    assert [format_bytes(n) for n in (5, 2048, 3 << 20, 3 << 29)] == ["5 B", "2.0 KiB", "3.0 MiB", "1.50 GiB"]
