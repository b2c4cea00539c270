import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demem_lab import doctor
from demem_lab import store as module
from demem_lab.bytecode import code_of
from demem_lab.mechanisms import Drop, SelectiveDP
from demem_lab.store import Store, StoreError, StoreWarning, canonical, code_version


@dataclass(frozen=True)
class A:
    a: float = 1.0


@dataclass(frozen=True)
class B:
    a: float = 1.0


class Color(Enum):
    RED = 1


ARRAYS = {
    "float": np.linspace(0, 1, 6).reshape(2, 3), "int": np.arange(4), "bool": np.array([True, False]),
    "single": np.float32([[1.5]]), "zero-d": np.array(7), "empty": np.zeros((0, 3)),
}


def test_round_trip(store):
    put = store.put("kind", {"a": 1}, ARRAYS, {"note": "hello"})
    got = store.get("kind", {"a": 1})
    assert put.fresh and not got.fresh and got.meta["note"] == "hello"
    assert got.meta["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    for name, array in ARRAYS.items():
        assert got.arrays[name].dtype == array.dtype and got.arrays[name].shape == array.shape
        assert np.array_equal(got.arrays[name], array)


def test_missing_is_none_and_dropped_is_missing(store):
    assert store.get("kind", {"a": 1}) is None
    store.put("kind", {"a": 1}, ARRAYS)
    store.drop("kind", {"a": 1})
    store.drop("kind", {"a": 1})
    assert store.get("kind", {"a": 1}) is None and store.entries() == []


configs = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3), max_leaves=6,
)


@given(configs)
def test_equal_configurations_have_equal_keys(config):
    import copy

    assert canonical(config) == canonical(copy.deepcopy(config))


@pytest.mark.parametrize(("a", "b"), [
    (A(), B()), (A(1.0), A(2.0)), (1, 1.0), (1, True), ("1", 1), (0.1, 0.1 + 1e-17 * 3), (np.arange(3), np.arange(3.0)),
    (np.zeros((2, 3)), np.zeros((3, 2))), (torch.ones(2), torch.zeros(2)), (Color.RED, "RED"), (None, False), ([1, 2], [2, 1]),
])
def test_different_configurations_have_different_keys(store, a, b):
    same = a == b if isinstance(a, float) and isinstance(b, float) else False
    assert (store.key("k", a) == store.key("k", b)) == same


def test_a_tensor_and_its_array_are_the_same_configuration():
    assert canonical(torch.arange(3)) == canonical(np.arange(3)) and canonical((1, 2)) == canonical([1, 2])
    assert canonical({"b": 1, "a": 2}) == canonical({"a": 2, "b": 1}) and canonical(Path("x")) == "x"


@pytest.mark.parametrize(("bad", "kind"), [(float("nan"), ValueError), (object(), TypeError), ({"f": len}, TypeError)])
def test_what_cannot_be_a_configuration(bad, kind):
    with pytest.raises(kind, match="configuration"):
        canonical(bad)


def test_key_depends_on_kind_and_on_the_source_of_modules(store):
    assert store.key("a", 1) != store.key("b", 1) != store.key("b", 1, modules=("risk",))
    assert code_version(("risk",)) != code_version(("membership",))


def test_a_key_follows_the_code_it_names(store):
    assert store.key("a", 1, modules=("risk",)) != store.key("a", 1, modules=("membership",))


def damage(place, how):
    data, sidecar = next(place.glob("*.safetensors")), next(place.glob("*.json"))
    if how == "cut":
        data.write_bytes(data.read_bytes()[:-3])
    elif how == "bit":
        content = bytearray(data.read_bytes())
        content[-1] ^= 1
        data.write_bytes(bytes(content))
    elif how == "gone":
        data.unlink()
    elif how == "json":
        sidecar.write_text('{"data": ')
    elif how == "empty":
        sidecar.write_text("")
    elif how == "list":
        sidecar.write_text("[]")


@pytest.mark.parametrize("how", ["cut", "bit", "gone", "json", "empty", "list"])
def test_damage_is_noticed_reported_and_computed_anew(store, how):
    calls = []

    def compute():
        calls.append(1)
        return {"x": np.arange(5)}

    store.compute("k", {"a": 1}, compute)
    damage(store.root / "k", how)
    with pytest.warns(StoreWarning, match="is computed again"):
        again = store.compute("k", {"a": 1}, compute)
    assert len(calls) == 2 and again.fresh and np.array_equal(again.arrays["x"], np.arange(5))
    assert not store.compute("k", {"a": 1}, compute).fresh and len(calls) == 2


def test_a_failing_computation_leaves_nothing(store):
    with pytest.raises(RuntimeError, match="planted"):
        store.compute("k", 1, lambda: (_ for _ in ()).throw(RuntimeError("planted")))
    assert store.get("k", 1) is None and store.compute("k", 1, lambda: {"x": np.ones(1)}).fresh


def compute_slowly(root, log):
    def work():
        with open(log, "a") as file:
            file.write("computed\n")
        time.sleep(0.5)
        return {"x": np.arange(3)}

    entry = Store(root).compute("k", {"a": 1}, work)
    assert entry.arrays["x"].tolist() == [0, 1, 2]


def test_two_processes_compute_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=compute_slowly, args=(str(tmp_path / "s"), str(tmp_path / "log"))) for _ in range(3)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [p.exitcode for p in both] == [0, 0, 0] and (tmp_path / "log").read_text() == "computed\n"


def test_a_killed_writer_leaves_no_half_entry_and_no_lock(tmp_path):
    script = textwrap.dedent("""
        import sys, numpy as np
        from demem_lab.store import Store
        store = Store(sys.argv[1])
        def work():
            print("started", flush=True)
            while True:
                store.put("k", 2, {"x": np.random.rand(300_000)})
        store.compute("k", 1, work)
    """)
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = Store(tmp_path)
    assert store.get("k", 1) is None
    assert store.compute("k", 1, lambda: {"x": np.ones(2)}).fresh  # the lock died with its owner
    two = store.get("k", 2)
    assert two is None or two.arrays["x"].shape == (300_000,)


def test_files_are_replaced_and_never_written_over(store):
    store.put("k", 1, {"x": np.zeros(3)}, {"note": "old"})
    with open(next((store.root / "k").glob("*.json"))) as reader:
        store.put("k", 1, {"x": np.ones(3)}, {"note": "new"})
        assert '"note": "old"' in reader.read()  # whoever was reading goes on reading what it had opened
    assert sorted(file.suffix for file in (store.root / "k").iterdir()) == [".json", ".safetensors"]  # nothing is left over
    assert store.get("k", 1).meta["note"] == "new"


@pytest.mark.parametrize("dies_at", [1, 2])
def test_a_writer_that_dies_between_data_and_sidecar_leaves_the_old_entry(store, monkeypatch, dies_at):
    import demem_lab.store as module

    store.put("k", 1, {"x": np.zeros(3)})
    real, count = module.write_whole, []

    def write(path, content):
        count.append(path)
        if len(count) == dies_at:
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(module, "write_whole", write)
    with pytest.raises(KeyboardInterrupt):
        store.put("k", 1, {"x": np.ones(3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.get("k", 1).arrays["x"].tolist() == [0, 0, 0]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/demem")):
        with pytest.raises(PermissionError, match="set DEMEM_STORE"):
            Store(place)


def test_the_place_is_argument_then_environment_then_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEMEM_STORE", str(tmp_path / "env"))
    assert Store().root == tmp_path / "env" and Store(tmp_path / "arg").root == tmp_path / "arg"
    monkeypatch.delenv("DEMEM_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert str(Store().root).startswith(str(tmp_path / "cache")) or sys.platform != "linux"


def test_nothing_is_pickled():
    for file in Path(__file__).parents[1].glob("demem_lab/*.py"):
        source = file.read_text()
        assert "import pickle" not in source and "allow_pickle=True" not in source, file
        for call in re.findall(r"(?:torch|np|numpy)\.load\(.*", source):  # weights and arrays of users, never their objects
            assert "weights_only=True" in call or "allow_pickle=False" in call, (file, call)


def test_code_version_follows_the_source_of_the_named_modules(tmp_path, monkeypatch):
    import demem_lab.store as module

    monkeypatch.setattr(module, "__file__", str(tmp_path / "store.py"))

    def version(**sources):
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        code_version.cache_clear()
        return code_version(("one", "two"))

    first = version(one="a = 1", two="b = 2", other="c = 3")
    assert version(other="c = 4") == first != version(two="b = 3") != version(one="a = 2")
    assert version(one="a = 1", two="b = 2") == first
    monkeypatch.setattr(module, "installed", lambda package: "0.0")
    assert version() != first
    code_version.cache_clear()


def test_looking_at_results_does_not_need_torch():
    script = "import sys, demem_lab.store as s; s.code_version(('risk',)); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_reader_sees_whole_entries_while_a_writer_replaces_them(tmp_path):
    script = textwrap.dedent("""
        import sys, numpy as np
        from demem_lab.store import Store
        store = Store(sys.argv[1])
        print("started", flush=True)
        for number in range(10_000):
            store.put("k", 1, {"x": np.full(50_000, number)}, {"number": number})
    """)
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "started\n"
        store, seen = Store(tmp_path), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StoreWarning)  # an entry replaced while it is read counts as missing
            while len(seen) < 40:
                entry = store.get("k", 1)
                if entry is not None:
                    assert (entry.arrays["x"] == entry.meta["number"]).all()
                    seen.append(entry.meta["number"])
        assert seen == sorted(seen)
    finally:
        process.kill()
        process.wait()


def test_numpy_and_python_numbers_are_the_same_configuration():
    for kind in (np.float64, np.float32, np.int64):
        assert canonical(kind(2)) == canonical(kind(2).item())
    assert canonical(np.bool_(True)) is True


@pytest.mark.parametrize(("a", "b"), [({1: "x"}, {"1": "x"}), (1.5, {"float": "1.5"}), (A(), {"class": "A", "a": 1.0})])
def test_look_alikes_are_told_apart(a, b):
    assert canonical(a) != canonical(b)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_a_file_that_the_disk_refuses_leaves_nothing_and_loses_nothing(tmp_path):
    """The operating system really refuses here: it limits the size of files as a full disk would."""
    script = textwrap.dedent("""
        import resource, sys, numpy as np
        from demem_lab.store import Store, StoreError
        store = Store(sys.argv[1])
        store.put("k", 1, {"x": np.zeros(10)})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        for call in (lambda: store.put("k", 2, {"x": np.zeros(50_000)}),
                     lambda: store.compute("k", 3, lambda: {"x": np.zeros(50_000)})):
            try:
                call()
            except StoreError as error:
                print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(store.get("k", 1).arrays["x"].sum(), store.compute("k", 3, lambda: {"x": np.zeros(50_000)}).fresh)
    """)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *sentences, last = done.stdout.splitlines()
    assert len(sentences) == 2 and last == "0.0 True"
    for sentence in sentences:
        assert str(tmp_path) in sentence and "DEMEM_STORE" in sentence and "MB are free" in sentence
    assert len(files(tmp_path)) == 4  # two whole entries: no temporary file, no data without its JSON


@pytest.mark.parametrize("refused", [".json", ".safetensors"])
def test_a_full_disk_leaves_no_half_entry_and_keeps_the_old_one(store, monkeypatch, refused):
    store.put("k", 1, {"x": np.zeros(3)})
    before, replace = files(store.root), os.replace

    def full(source, target):
        if str(target).endswith(refused):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(StoreError, match="No space left on device"):
        store.put("k", 2, {"x": np.ones(3)})
    with pytest.raises(StoreError):
        store.put("k", 1, {"x": np.ones(3)})
    assert files(store.root) == before and store.get("k", 1).arrays["x"].sum() == 0
    if refused == ".json":
        with pytest.raises(StoreError):  # the same content as before: its data file belongs to the entry that stays
            store.put("k", 1, {"x": np.zeros(3)})
        assert files(store.root) == before


def test_a_lock_is_given_back_when_the_disk_refuses(store, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_whole", full)
        with pytest.raises(StoreError):
            store.compute("k", 1, lambda: {"x": np.zeros(3)})
    assert store.compute("k", 1, lambda: {"x": np.zeros(3)}).fresh


def test_an_error_of_the_computation_is_not_blamed_on_the_disk(store):
    def broken():
        raise FileNotFoundError("my own file")

    with pytest.raises(FileNotFoundError, match="my own file"):
        store.compute("k", 1, broken)


def test_entries_are_counted_by_what_they_were_computed_from(store):
    for number in range(3):
        store.put("k", {"data": "abc", "n": number}, {"x": np.zeros(1)})
    store.put("other", {"data": "xyz"}, {"x": np.zeros(1)})
    assert (store.count("abc"), store.count("xyz"), store.count("none"), store.count()) == (3, 1, 0, 4)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_shared_store_can_be_read_as_far_as_its_owner_lets(tmp_path, mask, mode):
    """mkstemp's files are for their owner alone; the umask decides, as for any other file."""
    script = f"import os, sys; os.umask({mask}); from demem_lab.store import Store; Store(sys.argv[1]).put('k', 1, {{'a': 1.0}})"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    kept = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(kept) == 2 and {file.stat().st_mode & 0o777 for file in kept} == {mode}


def test_files_that_are_no_entries_or_go_away_are_not_counted(store, monkeypatch):
    store.put("k", {"data": "abc"}, {"x": np.zeros(1)})
    (store.root / "k" / "aaaa.json").write_bytes(b"\xff\xfe")
    (store.root / "k" / "._b.json").write_text("abc")  # what other systems leave beside a file
    (store.root / "k" / "gone.json").symlink_to(store.root / "nowhere")  # another process took it away after it was listed
    assert store.count("abc") == 1
    with pytest.warns(StoreWarning, match="aaaa.json"):
        assert len(store.entries()) == 1
    check = doctor.store(store.root)
    assert check.state in ("ok", "warn") and "2 results" in check.text


@pytest.mark.parametrize("error", [
    OSError(errno.ENOLCK, "No locks available"), OSError(errno.EOPNOTSUPP, "Not supported"), NotImplementedError(),
])
def test_a_file_system_without_locks_is_not_called_full(store, monkeypatch, error):
    def refused(*_, **__):
        raise error

    monkeypatch.setattr(module.FileLock, "acquire", refused)
    with pytest.raises(StoreError, match=f"{store.root} is on a file system that has no locks.*DEMEM_STORE") as caught:
        store.compute("k", 1, lambda: {"x": np.zeros(1)})
    assert "full" not in str(caught.value) and "free" not in str(caught.value)


def test_whoever_waits_for_another_process_is_told_once(store, monkeypatch, capsys):
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    place = store.root / "k" / store.key("k", 1)
    place.parent.mkdir()
    held = threading.Event()

    def hold():
        with module.FileLock(f"{place}.lock"):
            held.set()
            time.sleep(1)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    assert store.compute("k", 1, lambda: {"x": np.zeros(1)}).fresh
    other.join()
    assert capsys.readouterr().out == f"somebody else computes this; waiting ({place}.lock)\n"


BODY = """
from dataclasses import dataclass
FACTOR = 1.0

def helper(x):
    return x * 2

@dataclass(frozen=True)
class Mine:
    weight: float = 1.0
    scale = 3

    def __call__(self, x):
        return helper(x) * FACTOR + [v for v in (1, 2)][0]

    @property
    def size(self):
        return 1
"""


def made(body):
    """The class of that source, as a notebook's cell would make it."""
    space = {"__name__": "__main__"}
    exec(compile(body, "<cell>", "exec"), space)
    return space["Mine"]


def test_an_edited_class_asks_for_other_results(store):
    key = store.key("k", made(BODY)())
    assert key == store.key("k", made("\n\n# moved, and with a comment\n" + BODY)())
    for old, new in (("x * 2", "x * 3"), ("FACTOR = 1.0", "FACTOR = 2.0"), ("+ [v", "- [v"), ("scale = 3", "scale = 4"),
                     ("(1, 2)", "(1, 3)"), ("return 1", "return 2"), ("weight: float = 1.0", "weight: float = 2.0")):
        assert BODY.count(old) == 1 and key != store.key("k", made(BODY.replace(old, new))()), old
    assert code_of(Drop, SelectiveDP, torch.nn.Linear) == ""  # known by the version of what they come from
    assert "code" not in canonical(Drop(np.ones(2, dtype=bool)))


def test_the_digest_of_a_class_is_the_same_in_every_process():
    """Sets of text are in another order in each."""
    script = f"""
import sys
body = {BODY.replace("(1, 2)", "({'a', 'b', 'c'} and 'c' in {'a', 'b', 'c', 'd'}, 2)")!r}
space = {{"__name__": "__main__"}}
exec(body, space)
from demem_lab.bytecode import code_of
print(code_of(space["Mine"]))
"""
    found = {
        subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": str(seed)}, check=True,
                       capture_output=True, text=True).stdout
        for seed in range(3)
    }
    assert len(found) == 1 and len(found.pop().strip()) == 16
