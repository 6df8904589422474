"""What launching a hand-written CUDA kernel costs the host, measured without a GPU: ``python -m vidkern.bench.launch_cost``.

cuda.bindings finds a libcuda of a few lines that counts launches and does nothing, so that all of Python's part is real: the launch layer,
the filling of the parameters, the op. What a real driver spends on queueing a launch comes on top, and the time that a GPU needs is another
matter altogether.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from vidkern.errors import UserError

DRIVER = r"""
#include <stdint.h>
#include <string.h>
static unsigned long launches;
static int nothing(void) { return 0; }
static int handle(void** out) { *out = (void*)1; return 0; }
static int number(int* out) { *out = 1; return 0; }
static int launch(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream,
                  void** parameters, void** extra) {
  launches += parameters != 0 && parameters[0] != 0;
  return 0;
}
static int encode(uint64_t* map, int type, unsigned rank, void* at, const uint64_t* sizes, const uint64_t* strides, const unsigned* box,
                  const unsigned* steps, int interleave, int swizzle, int promotion, int fill) {
  map[0] = (uint64_t)at;
  return 0;
}
unsigned long vk_launches(void) { return launches; }
int cuGetProcAddress_v2(const char* name, void** found, int version, uint64_t flags, int* status) {
  static const struct { const char* name; void* call; } calls[] = {
      {"cuInit", (void*)nothing}, {"cuCtxSetCurrent", (void*)nothing}, {"cuFuncSetAttribute", (void*)nothing},
      {"cuDeviceGet", (void*)number}, {"cuDriverGetVersion", (void*)number}, {"cuDevicePrimaryCtxRetain", (void*)handle},
      {"cuModuleLoadData", (void*)handle}, {"cuModuleGetFunction", (void*)handle}, {"cuLaunchKernel", (void*)launch},
      {"cuTensorMapEncodeTiled", (void*)encode},
      {"cuGetProcAddress", (void*)cuGetProcAddress_v2}};
  *found = 0;
  for (unsigned i = 0; i < sizeof calls / sizeof *calls; ++i)
    if (!strcmp(name, calls[i].name)) *found = calls[i].call;
  if (status) *status = *found ? 0 : 1;
  return 0;
}
"""
LIBRARY = "libcuda.so.1"


def build_driver(folder: Path) -> Path:
    """The stand-in for the driver's library.

    Raises:
        UserError: there is no C compiler, or not Linux.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or not sys.platform.startswith("linux"):
        raise UserError("the launch cost is measured on Linux with a C compiler, expected cc on the PATH or in CC")
    source = folder / "driver.c"
    source.write_text(DRIVER, encoding="utf-8")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", folder / LIBRARY, source], check=True)
    return folder / LIBRARY


@contextlib.contextmanager
def on_cpu_tensors() -> Iterator:
    """The launch layer over the driver that is found, with CPU tensors in the place of a GPU's; yields the launcher."""
    from vidkern import cuda
    from vidkern.cuda.driver import Driver

    driver = Driver()
    # In their places, calls that cost what a call into torch's C part costs.
    driver._current, driver._stream = (lambda: -1), (lambda device: 0)
    driver.capturing, driver.capability, driver.on = (lambda device: False), (lambda device: (9, 0)), contextlib.nullcontext
    launcher = cuda.Launcher(driver)
    with contextlib.ExitStack() as patches:
        for name, stand_in in (("launch", launcher), ("why_not", lambda t: None), ("why_not_hopper", lambda t: None)):
            patches.enter_context(mock.patch.object(cuda, name, stand_in))
        patches.enter_context(mock.patch("vidkern.cuda.cubins.candidates", lambda stem, capability: iter([b"no code"])))
        yield launcher


def measure(rounds: int = 25) -> dict:
    """Rows of ``overhead.measure``, for a forward of grid attention with 3 by 2 frames of 16 tokens; and the launches that the driver saw."""
    import torch

    import vidkern
    from vidkern.ops.grid_attention import cuda, hopper

    from . import harness, overhead

    q, k, v = (torch.zeros(1, 2, 96, 64, dtype=torch.bfloat16) for _ in range(3))
    out, lse, pattern = torch.empty_like(q), torch.empty(1, 2, 96), vidkern.GridPattern(3, 2)
    rules = {"pattern": pattern, "frame_len": 16, "n_text": 0, "text_front": False, "scale": 0.125, "out": out, "lse": lse}
    name, given = "grid_attention_forward_bf16_64", cuda.Forward()
    with on_cpu_tensors() as launch, torch.no_grad():
        forward = lambda of: of.forward(q, k, v, None, None, None, launch=launch, **rules)  # noqa: E731
        forward(cuda)
        function, slot = launch._kernels[-1, name].function, (ctypes.c_void_p * 1)(ctypes.addressof(given))
        call = launch._driver._launch_kernel
        # As of k in the launchers for compute capability 9.0: channels, tokens, heads, samples.
        sizes, strides, box = (64, 96, 2, 1), (64, 96 * 64, 2 * 96 * 64), (64, 64, 1, 1)
        numbers = (k.get_device(), k.data_ptr(), k.dtype, sizes, strides, box)
        rows = overhead.measure(
            {
                "cuLaunchKernel of cuda.bindings": lambda: call(function, 8, 1, 1, 128, 1, 1, 0, 0, ctypes.addressof(slot), 0),
                "the launch layer": lambda: launch(name, given, 8, 128, 60_000, [q, k, v], [out, lse]),
                "a tensor map that is kept": lambda: launch.tensor_map(k, sizes, strides, box),
                "a tensor map that is encoded": lambda: launch._encode(*numbers),
                "grid attention's launcher": lambda: forward(cuda),
                "the same for compute capability 9.0": lambda: forward(hopper),
                "vidkern.grid_attention": lambda: vidkern.grid_attention(q, k, v, grid=(3, 2), impl="cuda"),
            },
            harness.cpu_timer,
            rounds,
        )
    return {"rows": rows, "launches": ctypes.CDLL(LIBRARY).vk_launches()}


def run(rounds: int = 25) -> dict:
    """:func:`measure` in a process that finds the stand-in.

    Raises:
        UserError: see :func:`build_driver`; or cuda-python is not installed.
    """
    from vidkern.cuda import cubins

    if reason := cubins.missing_python():
        raise UserError(reason)
    with tempfile.TemporaryDirectory(prefix="vidkern-driver-") as folder:
        path = build_driver(Path(folder))
        libraries = f"{path.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        command = [sys.executable, "-m", "vidkern.bench.launch_cost", str(rounds)]
        env = {**os.environ, "LD_LIBRARY_PATH": libraries, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main(argv: list[str]) -> int:
    """Without an argument, measure in another process and print a table; with rounds, be that process."""
    if argv:
        print(json.dumps(measure(int(argv[0]))))
        return 0
    try:
        found = run()
    except UserError as error:
        print(f"vidkern: error: {error}", file=sys.stderr)
        return 2
    print(f"microseconds on the host, {found['launches']:,} launches of a driver that does nothing")
    for row in found["rows"]:
        print(f"  {row['name']:<34} {row['microseconds']:6.2f}   {row['above_launcher']:+6.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
