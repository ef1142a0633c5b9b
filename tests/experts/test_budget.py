"""Memory budgets as users write them, and the free memory that "auto" is measured from."""

import pytest

from sida_ext.experts.budget import available_memory, cgroup_room, format_bytes, parse_bytes, parse_memory


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


GIB = 2**30


def machine(root, cgroup, files, available=64 * GIB):
    """A tree of the kernel's files."""
    files = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {available // 1024} kB\n", "proc/self/cgroup": cgroup} | {
        f"sys/fs/cgroup/{name}": text for name, text in files.items()
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def group(limit, usage, idle=None):
    """A v2 group's files."""
    stat = {} if idle is None else {"memory.stat": f"anon 5\ninactive_file {idle}\nactive_file 7\n"}
    return {"memory.max": f"{limit}\n", "memory.current": f"{usage}\n", **stat}


def under(folder, files):
    return {f"{folder}/{name}": text for name, text in files.items()}


def v1_group(limit, usage, idle):
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{usage}\n",
        "memory.stat": f"inactive_file 1\ntotal_inactive_file {idle}\n",
    }


@pytest.mark.parametrize(
    ("cgroup", "files", "room"),
    [
        ("0::/\n", {}, None),
        ("0::/a/b\n", under("a/b", group("max", 5)), None),
        ("0::/a/b\n", under("a/b", group(8 * GIB, 3 * GIB)), 5 * GIB),
        ("0::/a/b\n", under("a/b", group(8 * GIB, 3 * GIB, 2 * GIB)), 7 * GIB),
        ("0::/a/b\n", under("a/b", group(8 * GIB, 3 * GIB)) | under("a", group(4 * GIB, 3 * GIB)), GIB),
        ("0::/a/b\n", under("a/b", group("max", 1)) | under("a", group(4 * GIB, GIB)), 3 * GIB),
        ("0::/a\n", under("a", group(2 * GIB, 3 * GIB)), 0),
        ("0::/not/visible\n", group(6 * GIB, GIB), 5 * GIB),  # inside a container the mount is the group
        ("0::/../../other\n", group(6 * GIB, GIB), 5 * GIB),
        ("5:cpu:/a\n4:memory:/a\n", under("memory/a", v1_group(4 * GIB, 3 * GIB, GIB)), 2 * GIB),
        ("4:cpu,memory:/a\n", under("memory", v1_group(4 * GIB, GIB, 0)), 3 * GIB),
        ("4:memory:/a\n", under("memory/a", v1_group(2**63 - 4096, GIB, 0)), None),
        (
            "4:memory:/a\n0::/b\n",
            under("memory/a", v1_group(4 * GIB, GIB, 0)) | under("b", group(2 * GIB, GIB)),
            GIB,
        ),
    ],
)
def test_limits_of_control_groups(tmp_path, cgroup, files, room):
    machine(tmp_path, cgroup, files)
    assert cgroup_room(tmp_path) == room
    assert available_memory(tmp_path) == (64 * GIB if room is None else room)


def test_free_memory_of_the_machine_binds_where_it_is_less(tmp_path):
    machine(tmp_path, "0::/a\n", under("a", group(8 * GIB, GIB)), available=2 * GIB)
    assert available_memory(tmp_path) == 2 * GIB


def test_a_machine_without_the_kernels_files(tmp_path):
    assert cgroup_room(tmp_path) is None
    machine(tmp_path, "0::/\n", {})
    (tmp_path / "proc/meminfo").write_text("MemTotal: 5 kB\n")
    with pytest.raises(RuntimeError, match="no MemAvailable"):
        available_memory(tmp_path)


def test_auto_leaves_the_reserve_and_counts_what_is_held(monkeypatch):
    monkeypatch.setattr("sida_ext.experts.budget.available_memory", lambda: 10 * GIB)
    assert parse_memory("auto", 2**60) == 9 * GIB - 512 * 2**20
    assert parse_memory(" auto ", 2**60, reserved=5 * GIB) == 4.5 * GIB - 512 * 2**20
    assert parse_memory("auto", 2**60, reserved=-10 * GIB) == 18 * GIB - 512 * 2**20
    monkeypatch.setattr("sida_ext.experts.budget.available_memory", lambda: 512 * 2**20)
    assert parse_memory("auto", 2**60) == 0
