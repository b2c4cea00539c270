"""Each line of the doctor's report, on machines that are made up: no rights, old torch, missing packages, small containers."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from demem_lab import doctor, limits
from demem_lab.doctor import Check, cores, data, extra, memory, packages, python, report, store, widgets

GB = 10**9
HAVE = {"torch": "2.6.0+cpu", "numpy": "2.1", "plotly": "6.10.0", "dask": "2026.1"}


def test_this_machine_is_well_and_every_line_says_something():
    checks = doctor.checkup()
    assert [c.name for c in checks if c.state == "fail"] == []
    names = [c.name for c in checks]
    assert names[:2] == ["Python", "packages"]
    assert names[-8:] == ["GPU", "memory", "cores", "profile", "data", "store", "widgets", "kernel"]
    assert all(c.text and (c.state == "ok") == (not c.fix) for c in checks)


def test_the_report_lines_up_and_shows_the_fix_below():
    text = report([Check("GPU", "ok", "none"), Check("packages", "fail", "torch is missing", "install it")])
    assert text.splitlines() == ["ok    GPU       none", "fail  packages  torch is missing", " " * 16 + "fix: install it"]


@pytest.mark.parametrize(("have", "state"), [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 14, 1), "ok"), ((4, 0, 0), "ok")])
def test_python(have, state):
    assert python(have).state == state


@pytest.mark.parametrize(("required", "words"), [
    (["torch>=2.6", "numpy", "plotly>=6.1"], ""), (["torch>=2.6.1"], "torch 2.6.0+cpu is older than 2.6.1"),
    (["torch>=2.10"], "older than 2.10"), (["plotly>=6.9"], ""), (["torch>=2.6.0.0"], ""),
    (["absent>=1", "numpy"], "absent is missing"), (["dask[distributed]>=2027"], "dask 2026.1 is older than 2027"),
])
def test_packages(required, words):
    check = packages(required, HAVE.get)
    assert check.state == ("fail" if words else "ok") and words in check.text
    if words:
        assert f'"{required[0]}"' in check.fix and '"numpy"' not in check.fix and sys.executable in check.fix


def test_a_package_that_is_not_installed_at_all():
    check = packages([], HAVE.get)
    assert check.state == "fail" and "-e" in check.fix


def test_extras_only_warn():
    assert extra("attacks", ["pyautoattack"], HAVE.get).state == "warn"
    assert "AutoAttack" in extra("attacks", ["pyautoattack"], HAVE.get).text
    assert extra("scale", ["dask[distributed]"], HAVE.get) == Check("extra: scale", "ok", "dask 2026.1")


def groups(root, files, listing="0::/\n"):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(listing)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


BINDER = {"memory.max": "2147483648\n", "memory.current": "200000000\n", "cpu.max": "100000 100000\n"}
OLD = {
    "memory/memory.limit_in_bytes": "2147483648", "memory/memory.usage_in_bytes": "1900000000",
    "cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000",
}
FREE = {
    "memory.max": "max\n", "cpu.max": "max 100000\n", "memory/memory.limit_in_bytes": "9223372036854771712",
    "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
}
DEEP = {"a/b/memory.max": "max", "a/memory.max": "1000000000", "a/cpu.max": "50000 100000"}


@pytest.mark.parametrize(("files", "listing", "environ", "state", "words"), [
    ({}, "0::/\n", {}, "ok", "64.0 GB, 32.0 GB of it free"), (FREE, "0::/\n", {}, "ok", "64.0 GB, 32.0 GB"),
    (BINDER, "0::/\n", {}, "ok", "2.1 GB, 1.9 GB"), (OLD, "4:memory:/\n", {}, "warn", "2.1 GB, 0.2 GB"),
    (DEEP, "0::/a/b\n", {}, "fail", "1.0 GB"), ({}, "0::/\n", {"MEM_LIMIT": "2147483648"}, "ok", "2.1 GB, 2.1 GB"),
    ({}, "0::/gone\n", {"MEM_LIMIT": "0"}, "ok", "64.0 GB"), ({}, "0::/\n", {"MEM_LIMIT": "1000000000"}, "fail", "1.0 GB"),
])
def test_memory_is_that_of_the_container(tmp_path, files, listing, environ, state, words):
    check = memory(groups(tmp_path, files, listing), environ, (64 * GB, 32 * GB))
    assert (check.state, words in check.text) == (state, True), check


@pytest.mark.parametrize(("files", "listing", "environ", "state", "words"), [
    ({}, "0::/\n", {}, "ok", "8 of 8 may be used, 8 workers"), (FREE, "0::/\n", {}, "ok", "8 of 8"),
    (BINDER, "0::/\n", {}, "warn", "export DEMEM_WORKERS=1"), (BINDER, "0::/\n", {"DEMEM_WORKERS": "1"}, "ok", "1 of 8"),
    (OLD, "3:cpu,cpuacct:/\n", {}, "warn", "DEMEM_WORKERS=2"), (DEEP, "0::/a/b\n", {"DEMEM_WORKERS": "1"}, "ok", "0.5 of 8"),
    ({}, "0::/\n", {"DEMEM_WORKERS": "many"}, "fail", "'many'"), ({}, "0::/\n", {"DEMEM_WORKERS": "0"}, "fail", "'0'"),
    ({}, "0::/\n", {"OMP_NUM_THREADS": "1"}, "ok", "OMP_NUM_THREADS=1"),
])
def test_cores_are_those_of_the_container(tmp_path, files, listing, environ, state, words):
    check = cores(groups(tmp_path, files, listing), environ, 8)
    assert check.state == state and words in f"{check.text} {check.fix}", check


def test_data_sets_that_are_there(tmp_path, monkeypatch):
    monkeypatch.delenv("DEMEM_DATA", raising=False)
    assert data().state == "ok" and "not set" in data().text
    assert data(str(tmp_path / "no")).state == "warn"
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "FashionMNIST" / "raw").mkdir(parents=True)
    monkeypatch.setenv("DEMEM_DATA", str(tmp_path))
    assert "fashion_mnist, cifar10 in " in data().text


def test_a_store_without_write_permission_fails(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    check = store(tmp_path / "file" / "store")
    assert check.state == "fail" and str(tmp_path) in check.text and "DEMEM_STORE" in check.fix
    assert store(tmp_path / "new").state == "ok" and "0 results, 0 MB" in store(tmp_path / "new").text
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e8))
    assert store(tmp_path / "new").state == "warn"


def test_widgets_need_jupyterlab_extensions_except_on_colab(tmp_path):
    assert widgets([str(tmp_path)], {}).state == "fail" and "anywidget" in widgets([str(tmp_path)], {}).text
    for name in doctor.EXTENSIONS:
        (tmp_path / name).mkdir(parents=True)
    assert widgets([str(tmp_path)], {}).state == "ok"
    assert widgets([], {"COLAB_RELEASE_TAG": "x"}).state == "ok"


def test_a_panel_that_cannot_be_made_fails(monkeypatch):
    import plotly.graph_objects as go

    def broken():
        raise ImportError("Please install anywidget")

    monkeypatch.setattr(go, "FigureWidget", broken)
    check = widgets()
    assert check.state == "fail" and "Please install anywidget" in check.text


def test_a_kernel_of_another_python_is_noticed(tmp_path, monkeypatch):
    place = tmp_path / "kernels" / "python3"
    place.mkdir(parents=True)
    (place / "kernel.json").write_text('{"argv": ["/other/bin/python", "-m", "x"], "display_name": "p", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert doctor.kernel().state == "warn" and "/other/bin/python" in doctor.kernel().text


def test_a_torch_that_cannot_be_imported_is_a_line_not_a_traceback(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.gpu().state == "fail" and "torch" in doctor.gpu().fix


def test_a_driver_that_does_not_fit_is_said(monkeypatch):
    import warnings

    import torch

    def available():
        warnings.warn("The NVIDIA driver is too old\nand more", UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", available)
    assert doctor.gpu().state == "warn" and doctor.gpu().text == "cannot be used: The NVIDIA driver is too old"


def test_a_gpu_is_described(monkeypatch):
    import torch

    facts = SimpleNamespace(name="T4", total_memory=16e9, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: facts)
    assert all(word in doctor.gpu().text for word in ("T4, 16 GB", "capability 7.5", "no bf16", "digits stay on the CPU"))


def test_it_runs_where_nothing_is_installed():
    found = subprocess.run([sys.executable, "-S", "-m", "demem_lab.doctor"], capture_output=True, text=True,
                           cwd=doctor.Path(doctor.__file__).parents[1])
    # a checkout that was installed once keeps its list of requirements: then they are named as missing
    said = "not installed in this Python" in found.stdout or "torch is missing" in found.stdout
    assert found.returncode == 1 and said and "Traceback" not in found.stderr


def test_no_limit_is_not_a_size(tmp_path, monkeypatch):
    """Version 1 of control groups spells "no limit" as a number near 2 to the 63rd."""
    group = tmp_path / "sys/fs/cgroup/memory"
    group.mkdir(parents=True)
    (group / "memory.usage_in_bytes").write_text("1000000")
    monkeypatch.setattr(limits, "_machine", lambda: None)
    (group / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert doctor.memory(tmp_path, {}).text == "unknown here"
    (group / "memory.limit_in_bytes").write_text("2147483648")
    assert doctor.memory(tmp_path, {}).text.startswith("2.1 GB")


def test_the_exit_status_is_1_only_when_something_fails(monkeypatch, capsys):
    for state, status in (("ok", 0), ("warn", 0), ("fail", 1)):
        monkeypatch.setattr(doctor, "checkup", lambda state=state: [Check("x", state, "text", "fix")])
        assert doctor.main() == status and "fix: fix" in capsys.readouterr().out


@pytest.mark.parametrize(("asked", "state", "words"), [
    ("", "ok", "lesson"), ("smoke", "ok", "smoke"), ("foo", "fail", "DEMEM_PROFILE=foo is no profile"), ("paper", "warn", "08"),
])
def test_the_profile_that_the_environment_names(monkeypatch, asked, state, words):
    monkeypatch.setenv("DEMEM_PROFILE", asked)
    check = doctor.profile()
    assert check.state == state and words in check.text and ("smoke or lesson or full" in check.fix) == (state != "ok")


def test_relative_folders_differ_from_notebook_to_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name, line in (("DEMEM_STORE", doctor.store), ("DEMEM_DATA", doctor.data)):
        monkeypatch.setenv(name, "here")
        assert line().state == "warn" and line().fix == f"export {name}={tmp_path}/here"
        monkeypatch.setenv(name, str(tmp_path / "here"))
        assert line().state == "ok"
    monkeypatch.setenv("DEMEM_STORE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("in the way")
    assert doctor.store().state == "fail" and "it is a file" in doctor.store().text
