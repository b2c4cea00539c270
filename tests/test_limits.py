"""Memory and cores of containers that are made up."""

import pytest
from test_doctor import groups

from demem_lab import limits

MACHINE = (64 * 10**9, 32 * 10**9)


@pytest.mark.parametrize(("files", "listing", "found"), [
    ({}, "0::/\n", MACHINE), ({"memory.max": "max", "memory.current": "5"}, "0::/\n", MACHINE),
    ({"memory.max": "2000000", "memory.current": "1500000"}, "0::/\n", (2_000_000, 500_000)),
    ({"memory.max": "2000000", "memory.current": "1500000", "memory.stat": "anon 5\ninactive_file 300000\n"}, "0::/\n",
     (2_000_000, 800_000)),
    ({"memory.max": "2000000", "memory.current": "1500000", "memory.stat": "a b c\n"}, "0::/\n", (2_000_000, 500_000)),
    # the narrowest of nested groups: total and free need not be of the same one
    ({"a/memory.max": "3000000", "a/memory.current": "2900000", "a/b/memory.max": "2000000", "a/b/memory.current": "100000"},
     "0::/a/b\n", (2_000_000, 100_000)),
    ({"memory/a/memory.limit_in_bytes": "2000000", "memory/a/memory.usage_in_bytes": "1500000",
      "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 300000\n"}, "7:memory:/a\n", (2_000_000, 800_000)),
    ({"memory/memory.limit_in_bytes": "9223372036854771712"}, "7:memory:/\n", MACHINE),
])
def test_memory_is_that_of_the_narrowest_group(tmp_path, files, listing, found):
    assert limits.memory(groups(tmp_path, files, listing), {}, MACHINE) == found


def test_nobody_says_how_much_memory_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "_machine", lambda: None)
    assert limits.memory(tmp_path, {}) is None and limits.memory(tmp_path, {"MEM_LIMIT": "5"}) == (5, 5)


@pytest.mark.parametrize(("files", "listing", "cores"), [
    ({}, "0::/\n", None), ({"cpu.max": "max 100000"}, "0::/\n", None),
    ({"a/cpu.max": "150000 100000", "cpu.max": "400000 100000"}, "0::/a\n", 1.5),
])
def test_cores_are_those_of_the_narrowest_group(tmp_path, files, listing, cores):
    assert limits.quota(groups(tmp_path, files, listing)) == cores
