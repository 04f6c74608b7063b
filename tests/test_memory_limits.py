"""What may be taken of memory: found where systems say it, set by the user, and what does not fit is refused."""

import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from idap import memory
from idap.errors import ConfigError, InsufficientMemoryError
from idap.memory import Need, Room, allowed_bytes, free_bytes, pack, parse_bytes


@pytest.fixture(autouse=True)
def unset_limit(monkeypatch):
    monkeypatch.delenv("IDAP_MEMORY", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@dataclass(frozen=True)
class Item:
    need: Need


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("1000", 1000), ("8GB", 8 * 10**9), (" 1.5 GiB ", 3 * 2**29), ("3k", 3000), ("2MiB", 2**21), ("7b", 7)],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "0.1", "-1", "8 GiBs", "lots", "1e9", "8XB", "inf", "9" * 40, "1 000"])
def test_what_is_no_size_is_refused_by_name(text):
    with pytest.raises(ConfigError, match=rf"IDAP_MEMORY must be a size .* found {re.escape(repr(text))[:30]}"):
        parse_bytes(text)


def test_the_users_bound_counts_whatever_is_free(monkeypatch):
    monkeypatch.setenv("IDAP_MEMORY", "3 MB")
    assert allowed_bytes() == allowed_bytes("cuda:0") == allowed_bytes(torch.device("cpu")) == 3_000_000
    monkeypatch.setenv("IDAP_MEMORY", "1000TB")
    assert allowed_bytes() == 10**15
    monkeypatch.setenv("IDAP_MEMORY", "plenty")
    with pytest.raises(ConfigError, match="found 'plenty'"):
        allowed_bytes()


def test_without_a_bound_it_is_a_share_of_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda _device: 1000)
    assert allowed_bytes() == 900


def test_processes_of_one_launcher_share_a_machine(monkeypatch):
    monkeypatch.setattr(memory, "_left_in_groups", lambda _root: [4000])
    assert free_bytes() == 4000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes() == 1000
    monkeypatch.setattr(memory, "_left_in_groups", lambda _root: [])
    assert 0 < free_bytes() <= psutil.virtual_memory().total // 4


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_limits_of_control_groups_of_the_second_version(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/memory.max": "5000\n",
            "sys/fs/cgroup/outer/memory.current": "3000\n",
            "sys/fs/cgroup/outer/memory.stat": "anon 2000\ninactive_file 700\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/inner/memory.current": "3000\n",
        },
    )
    assert memory._left_in_groups(tmp_path) == [2700]


def test_limits_of_a_container_are_those_of_its_root(tmp_path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu:/\n4:memory:/docker/abc\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "900\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "100\n",
            "sys/fs/cgroup/memory/memory.stat": "cache 50\ntotal_inactive_file 20\n",
        },
    )
    assert memory._left_in_groups(tmp_path) == [820]
    assert memory._left_in_groups(tmp_path / "elsewhere") == []


def test_work_fits_or_lacks_its_numbers():
    cpu, gpu = Room("cpu", 100, 100), Room("cuda:0", 100, 10)
    assert cpu.lacks([Need(held=60, solving=40, on_cpu=40)]) is None
    assert cpu.lacks([Need(held=60, solving=41, on_cpu=40)]) == (101, 100, "cpu")
    assert cpu.lacks([Need(held=60, solving=40, on_cpu=41)]) == (101, 100, "cpu")
    assert cpu.lacks([Need(40, 20), Need(30, 30)]) is None  # they are solved one by one
    assert gpu.lacks([Need(held=90, solving=10, on_cpu=10)]) is None
    assert gpu.lacks([Need(held=91, solving=10)]) == (101, 100, "cuda:0")
    assert gpu.lacks([Need(on_cpu=11)]) == (11, 10, "cpu")
    assert gpu.lacks([]) is None


def test_the_refusal_says_what_how_much_and_the_way_out(monkeypatch):
    room = Room("cpu", 4 * 10**9, 4 * 10**9)
    need = Need(held=30 * 10**9, on_cpu=4 * 10**9)
    room.check(Need(held=4 * 10**9), what="little", way_out="")
    with pytest.raises(InsufficientMemoryError) as caught:
        room.check(need, what="the elimination of group 'fc1'", way_out='Take criterion="relative".')
    assert str(caught.value) == (
        "the elimination of group 'fc1' would take 34.0 GB of memory on cpu, and 4.0 GB may be taken there (90% of "
        'what is free). Take criterion="relative". Or free memory, or set IDAP_MEMORY to more, such as '
        "IDAP_MEMORY=34GB."
    )
    monkeypatch.setenv("IDAP_MEMORY", "4GB")
    with pytest.raises(InsufficientMemoryError, match=r"may be taken there \(IDAP_MEMORY=4GB\)"):
        room.check(need, what="it", way_out="")


def test_rounds_keep_the_order_and_both_bounds():
    items = [Item(Need(held, solving)) for held, solving in ((10, 5), (10, 5), (30, 0), (10, 50), (10, 0))]
    sizes = lambda limit, there: [len(part) for part in pack(items, limit, Room("cpu", there, there))]  # noqa: E731
    assert sizes(1000, 1000) == [5]
    assert sizes(20, 1000) == [2, 1, 2]
    assert sizes(1, 1000) == [1, 1, 1, 1, 1]
    assert sizes(1000, 70) == [3, 2]
    assert [item for part in pack(items, 1000, Room("cpu", 70, 70)) for item in part] == items
    assert pack([], 10, Room("cpu", 1, 1)) == [[]]
