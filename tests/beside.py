"""The second processor: what tests wait for, begun as soon as it is known which tests were chosen, beside the tests that come first.

- Modules of the folders in ``APART``, from the last to the first, each as a run of pytest of its own, whose reports take the tests'
  places when it is their turn (tests/conftest.py). A module that has not begun by then is run the usual way.
- Calls: a test module that has such work defines ``beside(items, folder)``: of its chosen tests and a folder to write into, {name: call},
  the longest first. Its tests take the fixture ``beside``: ``beside(name)`` is what the call returned, or raises what it raised. The
  calls run in threads while other tests run: they start processes by :func:`started` or :func:`process`, and leave the state of this
  one alone.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

ENVIRONMENT = dict(os.environ)  # before the first test, of which some change it for a while
THREADS = torch.get_num_threads()
REPORTS = "VIDKERN_TEST_REPORTS"  # in a run of a module apart: the file that its reports go to
APART = ("executor",)  # folders of tests that compute for minutes on one thread
_running: dict[subprocess.Popen, "Beside | None"] = {}  # whose work it is; None of what the tests' own thread waits for
_thread = threading.local()


@contextlib.contextmanager
def started(command, *, env=None, **options):
    """``subprocess.Popen`` with texts of both outputs, in ``ENVIRONMENT`` unless told otherwise. Beside tests it leaves the processor to
    them."""
    polite = [] if threading.current_thread() is threading.main_thread() or not shutil.which("nice") else ["nice", "-n", "10"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    alone = {"start_new_session": True, "env": ENVIRONMENT if env is None else env}
    with subprocess.Popen([*polite, *map(str, command)], **(pipes | alone | options)) as child:
        _running[child] = getattr(_thread, "works_for", None)
        try:
            yield child
        except BaseException:
            _kill(child)
            raise
        finally:
            del _running[child]


def process(command, **options) -> subprocess.CompletedProcess:
    """The same, to its end."""
    with started(command, **options) as child:
        stdout, stderr = child.communicate()
    return subprocess.CompletedProcess(command, child.returncode, stdout, stderr)


def _kill(child) -> None:
    """And what it has started."""
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()


def _run_apart(nodeids, root: Path, file: Path) -> dict[str, list[dict]]:
    """{test: its reports} of a run of these tests; those that it did not come to are missing."""
    env = ENVIRONMENT | {REPORTS: str(file), "OMP_NUM_THREADS": "1"}
    process([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", *nodeids], cwd=root, env=env)
    found: dict[str, list[dict]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        report = json.loads(line)
        if isinstance(report["longrepr"], list):  # a skip's place and reason: the summary asks for the tuple that JSON does not know
            report["longrepr"] = tuple(report["longrepr"])
        found.setdefault(report["nodeid"], []).append(report)
    # The last of a test's reports is of its teardown.
    return {nodeid: reports for nodeid, reports in found.items() if reports[-1]["when"] == "teardown"}


def _terminated(number, frame) -> None:
    """They are in sessions of their own, where the signal does not reach them."""
    for child in list(_running):
        _kill(child)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


class Beside:
    """The calls of all chosen tests, as many at a time as there are processors but this one."""

    def __init__(self, items, root=None):
        signal.signal(signal.SIGTERM, _terminated)
        self._shares = False
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._calls = {}
        chosen = {}
        for item in items:
            chosen.setdefault(getattr(item, "module", None), []).append(item)
        for module in (m for m in chosen if hasattr(m, "beside")):
            folder = Path(self._folder.name, module.__name__)
            folder.mkdir()
            self._calls |= {(module.__name__, name): call for name, call in module.beside(chosen[module], folder).items()}
        self._workers = max(1, (os.cpu_count() or 1) - 1)
        self._pool = ThreadPoolExecutor(self._workers, initializer=setattr, initargs=(_thread, "works_for", self))
        # Not the module that comes first, nor in a run that is apart itself.
        modules = [] if REPORTS in ENVIRONMENT else [*chosen][:0:-1]
        self._apart = {}
        for i, module in enumerate(m for m in modules if m is not None and Path(m.__file__).parent.name in APART):
            nodeids = [item.nodeid for item in chosen[module]]
            self._apart[module] = self._pool.submit(_run_apart, nodeids, root, Path(self._folder.name, f"{i}.reports"))
        self._results = {key: self._pool.submit(call) for key, call in self._calls.items()}

    def share(self):
        """Before a test, which leaves their processors to what runs beside it: where one of a product's threads shares its processor, the
        others wait for it, and a training takes ten times as long."""
        busy = any(not work.done() for work in (*self._apart.values(), *self._results.values()))
        if busy == self._shares:
            return
        self._shares, threads = busy, max(1, THREADS - self._workers) if busy else THREADS
        torch.set_num_threads(threads)
        if busy:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        elif "OMP_NUM_THREADS" in ENVIRONMENT:
            os.environ["OMP_NUM_THREADS"] = ENVIRONMENT["OMP_NUM_THREADS"]
        else:
            os.environ.pop("OMP_NUM_THREADS", None)

    def result(self, module: str, name):
        key = module, name
        if self._results[key].cancel():
            # It has not begun: waiting, this processor would be idle.
            self._results[key] = Future()
            try:
                self._results[key].set_result(self._calls[key]())
            except Exception as error:
                self._results[key].set_exception(error)
        return self._results[key].result()

    def reports(self, item) -> list[dict] | None:
        """Of a test that was run apart; None if it is to be run here."""
        future = self._apart.get(getattr(item, "module", None))
        return None if future is None or future.cancel() or future.exception() else future.result().get(item.nodeid)

    def end(self):
        """Nothing is begun any more, and what runs is ended: of this one's work, for the tests of this module have others."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for child, owner in list(_running.items()):
            if owner is self:
                _kill(child)
        self._pool.shutdown()
        self._folder.cleanup()
