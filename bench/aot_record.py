"""The command of an ahead-of-time record: build every case in several processes, write what came out, print what breaks a limit."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from vidkern._files import replacing

from .aot_launch import Built

FOLDER = Path(__file__).parent / "results" / "aot"
ARCHITECTURES = (80, 89, 90, 100, 120)
COUNTED = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "LDGSTS", "LDG.E.128", "STG.E.128", "STL", "LDL")


@dataclass(frozen=True)
class Kind:
    """One record: ``path`` of the file, the command ``module``, the kernels' ``sources``, ``build(case)`` -> [Built] and
    ``faults(case, built)`` -> sentences. Cases have a ``name``; ``build`` is a module's function, which other processes import."""

    path: Path
    module: str
    sources: tuple[str, ...]
    build: Callable
    faults: Callable

    def digest(self) -> str:
        """What a record is bound to: the kernels' sources, without comments."""
        from vidkern import verified

        return verified.digest(self.sources)

    def head(self) -> dict[str, str]:
        """What a record begins with; rows made under another one do not count."""
        import triton

        return {"sources": self.digest(), "triton": triton.__version__, "command": f"python -m {self.module}"}

    def fault_of(self, case, row: list | str) -> str | None:
        """The first limit that a row of the record breaks, or None."""
        if isinstance(row, str):
            return f"{case.name}: {row}"
        return next(iter(self.faults(case, [Built(**b) for b in row])), None)

    def make(self, chosen: Sequence, path: Path, jobs: int) -> dict[str, list | str]:
        """Build ``chosen`` in ``jobs`` processes and write the record to ``path``; what an earlier, interrupted run with the same sources
        wrote there is kept."""
        from tqdm import tqdm

        head, found = self.head(), {}
        if path.is_file():
            before = json.loads(path.read_text())
            if {name: before.get(name) for name in head} == head:
                found = before["built"]
        todo = [c for c in chosen if c.name not in found]
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows: Iterable = pool.map(partial(_measured, self.build), todo)
            for i, (name, row) in enumerate(tqdm(rows, total=len(todo), unit="case", desc="compiling")):
                found[name] = row
                if i % 16 == 15:
                    _write(path, head, found)
        _write(path, head, found)
        return found

    def main(self, cases: Callable, dtypes: Iterable[str], description: str, argv=None) -> int:
        """The command: compile ``cases(architectures, dtypes)``, write the record, print what breaks a limit. Exit status 1 when anything
        does."""
        parser = argparse.ArgumentParser(prog=f"python -m {self.module}", description=description)
        parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, help="such as 80 90")
        parser.add_argument("--dtypes", nargs="+", choices=tuple(dtypes), default=("bf16", "fp32"))
        parser.add_argument("--out", type=Path, default=self.path, help="the record to write (default: %(default)s)")
        parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
        args = parser.parse_args(argv)
        chosen = cases(args.architectures, args.dtypes)
        found = self.make(chosen, args.out, args.jobs)
        broken = [fault for c in chosen if (fault := self.fault_of(c, found[c.name]))]
        print(f"{len(chosen)} cases, {len(broken)} beyond the limits", *broken, sep="\n")
        return 1 if broken else 0


def _measured(build, case) -> tuple[str, list | str]:
    try:
        return case.name, [asdict(b) for b in build(case)]
    except Exception as error:  # whatever the compiler raises is the result
        return case.name, f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _write(path: Path, head: dict, found: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(found.items()))
    with replacing(path) as temporary:
        temporary.write_text(f"{json.dumps(head, indent=1)[:-2]},\n \"built\": {{\n{rows}\n }}\n}}\n")
