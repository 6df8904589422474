"""Work begun beside the tests: results and errors come back, what has not begun runs here, and nothing outlives the run."""

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import beside as subject


@pytest.fixture
def work(monkeypatch):
    """A run's work, of one module with these calls, on two processors."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    made = []

    def begin(**calls):
        module = ModuleType("some_module")
        module.beside = lambda items, folder: (folder / "written").write_text("") or (calls if items else {})
        made.append(subject.Beside([SimpleNamespace(module=module), SimpleNamespace()]))
        return made[-1]

    yield begin
    for one in made:
        one.end()


def test_results_and_errors(work):
    begun = work(good=lambda: 3, bad=lambda: 1 // 0)
    for _ in range(2):
        assert begun.result("some_module", "good") == 3
        with pytest.raises(ZeroDivisionError):
            begun.result("some_module", "bad")


def test_what_has_not_begun_runs_here(work):
    gate, here = threading.Event(), threading.current_thread()
    begun = work(first=lambda: gate.wait(60) and threading.current_thread(), second=threading.current_thread, third=lambda: 1 // 0)
    assert begun.result("some_module", "second") is here
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            begun.result("some_module", "third")
    gate.set()
    assert begun.result("some_module", "first") not in (here, True)


def test_a_process_has_the_environment_of_before(work, monkeypatch):
    monkeypatch.setenv("VIDKERN_SET_BY_A_TEST", "1")
    command = [sys.executable, "-c", "import os; print('VIDKERN_SET_BY_A_TEST' in os.environ, os.getpriority(os.PRIO_PROCESS, 0))"]
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert subject.process(command).stdout.split() == ["False", str(own)]
    begun = work(there=lambda: subject.process(command))
    while not begun._results["some_module", "there"].done():
        time.sleep(0.01)
    assert begun.result("some_module", "there").stdout.split() == ["False", str(min(19, own + 10))]


def test_nothing_outlives_the_run(work, tmp_path):
    """Nor what a process has started."""
    inner = f"import pathlib, time; pathlib.Path({str(tmp_path / 'up')!r}).touch(); time.sleep(300)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    begun = work(long=lambda: subject.process([sys.executable, "-c", outer]), never=lambda: (tmp_path / "never").touch())
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    before = time.monotonic()
    begun.end()  # waits until the pipes are closed, which both processes hold
    assert time.monotonic() - before < 60
    assert begun._results["some_module", "long"].result(0).returncode < 0
    assert not (tmp_path / "never").exists() and not os.path.exists(begun._folder.name)


def test_work_of_another_run_goes_on(work, tmp_path):
    """As that of the tests' own run does, whichever of them these tests here come beside."""
    waits = f"""import pathlib, time
pathlib.Path({str(tmp_path / "up")!r}).touch()
while not pathlib.Path({str(tmp_path / "gate")!r}).exists(): time.sleep(0.01)"""
    other, own = work(waits=lambda: subject.process([sys.executable, "-c", waits])), work(good=lambda: 3)
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    with subject.started([sys.executable, "-c", waits]) as here:
        own.end()
        (tmp_path / "gate").touch()
        assert here.wait(60) == 0
    assert other.result("some_module", "waits").returncode == 0


ENDED = """
import sys, threading, time, types
sys.path.insert(0, {tests!r})
import beside
sleeper = [sys.executable, "-c", "import os, time; print(os.getpid()); open({file!r}, 'w').write(str(os.getpid())); time.sleep(300)"]
module = types.ModuleType("m")
module.beside = lambda items, folder: {{"sleeps": lambda: beside.process(sleeper)}}
beside.Beside([types.SimpleNamespace(module=module)])
time.sleep(300)
"""


def test_a_terminated_run_takes_them_along(tmp_path):
    file = tmp_path / "pid"
    with subject.started([sys.executable, "-c", ENDED.format(tests=str(Path(__file__).parent), file=str(file))]) as run:
        while not (file.exists() and file.read_text()):
            time.sleep(0.01)
        run.terminate()
        assert run.wait(60) == -signal.SIGTERM
    end = time.monotonic() + 60
    while time.monotonic() < end and Path("/proc", file.read_text()).exists():
        time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


WAITS = """
import os, pathlib, time
def test_waits():
    end = time.monotonic() + 60
    while not all(pathlib.Path(name).exists() for name in ("apart", "dying")) and time.monotonic() < end:
        time.sleep(0.01)
"""
RUNS_APART = """
import os, pathlib, pytest
@pytest.fixture(scope="module")
def where():
    return "VIDKERN_TEST_REPORTS" in os.environ
"""
MODULES = {
    "first/test_waits.py": WAITS,
    "executor/test_apart.py": RUNS_APART + """
@pytest.mark.parametrize("n", ["a b", "c::d"])
def test_passes(where, n):
    pathlib.Path("apart").touch()
    assert where
def test_fails(where):
    print("said by it")
    assert not where
@pytest.mark.skip(reason="no need")
def test_skipped(): pass
@pytest.mark.xfail
def test_expected(): assert False
@pytest.mark.slow
def test_not_chosen(): assert False
""",
    "executor/test_dying.py": RUNS_APART + """
def test_ends_its_process(where):
    pathlib.Path("dying").touch()
    if where: os._exit(3)
""",
    "last/test_here.py": RUNS_APART + "def test_here(where): assert not where\n",
}


def test_modules_run_apart(tmp_path):
    """Their reports count as those of tests run here; what a process that died left undone is run here; what was not chosen is not
    run."""
    for name, text in MODULES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for name in ("beside.py", "conftest.py"):
        shutil.copy(Path(__file__).with_name(name), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\ntestpaths = first executor last\n")
    done = subject.process([sys.executable, "-m", "pytest", "-rA", "-m", "not slow", "-p", "no:cacheprovider"], cwd=tmp_path)
    assert done.returncode == 1 and "said by it" in done.stdout, done.stdout + done.stderr
    wanted = ("1 failed", "5 passed", "1 skipped", "1 deselected", "1 xfailed")
    assert all(part in done.stdout.splitlines()[-1] for part in wanted), done.stdout


def test_other_processors_are_left_alone(work, monkeypatch):
    """In this process and in those that a test starts, as long as there is work."""
    monkeypatch.setattr(subject, "THREADS", 3)
    monkeypatch.setitem(subject.ENVIRONMENT, "OMP_NUM_THREADS", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    before, gate = torch.get_num_threads(), threading.Event()
    try:
        begun = work(one=lambda: gate.wait(60))
        begun.share()
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (2, "2")
        gate.set()
        assert begun.result("some_module", "one")
        begun.share()
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (3, "3")
        torch.set_num_threads(1)  # by a test, for itself
        begun.share()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
