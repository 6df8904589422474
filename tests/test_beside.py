"""Work begun beside the tests: results and errors come back, what has not begun runs here, and nothing outlives the run."""

import os
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest

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
