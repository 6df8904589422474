"""Builds what the machine can build.

Static metadata is in pyproject.toml. This file lists the packages and builds `vidkern._cpu` from csrc/cpu: it writes a
build.ninja with depfiles and runs ninja, so that an edited header rebuilds only what includes it (objects stay in build/).
torch is not needed.

Every csrc/cpu/*.cpp except those of COMPILED_ONCE is compiled once per instruction set (VK_ISA).

VIDKERN_BUILD=auto (default)  without a working C++ compiler, install without the compiled part and record why
VIDKERN_BUILD=require         without a working C++ compiler, fail
VIDKERN_BUILD=off             leave the compiled part out on purpose
A compiler that works but fails on these sources fails the install in every case.
CXX, CPPFLAGS, CXXFLAGS, LDFLAGS and (macOS) ARCHFLAGS are honoured.

csrc/cuda ships as sources, which are compiled where they run. VIDKERN_CUDA_ARCHS="80;90" compiles them for these compute capabilities now,
into vidkern/_cubins, with the nvcc of CUDACXX, of the PATH or of CUDA_HOME; without one, or with sources that it does not take, it fails.
Sources named *_hopper* are compiled for sm_90a, where 90 (or 90a, which means the same) is asked for.
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
CPU = ROOT / "csrc" / "cpu"
COMPILED_ONCE = ("bindings.cpp", "cpuid.cpp", "pruned_bindings.cpp", "amf_bindings.cpp")
MACOS, WINDOWS = sys.platform == "darwin", sys.platform == "win32"


@dataclass(frozen=True)
class Flags:
    """How one family of compilers spells what we ask of it."""

    common: tuple
    openmp: tuple
    no_openmp: tuple
    isa: dict


GNU = Flags(
    common=(
        *("-O3", "-std=c++17", "-fPIC", "-Wall", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffp-contract=fast"),
        "-DNDEBUG",
    ),
    openmp=("-fopenmp",),
    no_openmp=("-Wno-unknown-pragmas",),
    isa={
        "portable": (),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"),
    },
)
MSVC = Flags(
    common=("/nologo", "/O2", "/std:c++17", "/EHsc", "/MD", "/fp:contract", "/Zc:__cplusplus", "/DNDEBUG", "/DNOMINMAX"),
    openmp=("/openmp",),
    no_openmp=(),
    isa={"portable": (), "avx2": ("/arch:AVX2",), "avx512": ("/arch:AVX512",)},
)


@dataclass
class Toolchain:
    cxx: list
    flags: Flags
    version: str
    env: dict = field(default_factory=lambda: dict(os.environ))
    include: tuple = ()
    link: list = field(default_factory=list)  # msvc only: link.exe and its library paths

    @property
    def msvc(self):
        return self.flags is MSVC

    def takes(self, *flags):
        """None if the compiler builds a program with these flags, else the first line of its complaint."""
        with tempfile.TemporaryDirectory() as tmp:
            source = Path(tmp, "probe.cpp")
            source.write_text("#include <cmath>\nint main(int n, char**) { return std::isnan(double(n)); }\n")
            if self.msvc:
                command = [*self.cxx, "/nologo", "/WX", *flags, *self.include, "/c", str(source), f"/Fo{tmp}/probe.obj"]
            else:
                command = [*self.cxx, *env_flags("CPPFLAGS", "CXXFLAGS"), *flags, str(source), "-o", f"{tmp}/probe"]
                command += env_flags("LDFLAGS")
            try:
                done = subprocess.run(command, capture_output=True, text=True, env=self.env, cwd=tmp, stdin=subprocess.DEVNULL)
            except OSError as error:
                return f"{self.cxx[0]}: {error.strerror}"
        if done.returncode == 0:
            return None
        lines = (done.stderr or done.stdout).strip().splitlines()
        return next((line for line in lines if "error" in line), lines[0] if lines else f"exit status {done.returncode}")


def env_flags(*names):
    names += ("ARCHFLAGS",) if MACOS and "LDFLAGS" not in names else ()
    return [flag for name in names for flag in shlex.split(os.environ.get(name, ""))]


def find_toolchain():
    """A Toolchain that builds a small program, or a sentence saying why there is none."""
    if WINDOWS and "CXX" not in os.environ:
        return find_msvc()
    named = os.environ.get("CXX")
    candidates = [named] if named else [sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    complaint = "CXX is set but empty" if named == "" else None
    for words in filter(None, (shlex.split(c or "") for c in candidates)):
        if shutil.which(words[0]) is None:
            complaint = complaint or f"{words[0]}: not found"
            continue
        toolchain = Toolchain(words, GNU, version="")
        why_not = toolchain.takes("-std=c++17")
        if why_not is None:
            said = subprocess.run([*words, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
            toolchain.version = said.splitlines()[0] if said else words[0]
            return toolchain
        complaint = f"{words[0]} does not build a small program: {why_not}"
    return f"no working C++ compiler ({complaint})"


def find_msvc():
    from setuptools._distutils import ccompiler

    compiler = ccompiler.new_compiler(compiler="msvc")
    try:
        compiler.initialize()
    except Exception as error:  # its class moved between setuptools versions; the message is what matters
        return f"no working C++ compiler ({' '.join(str(error).split())})"
    toolchain = Toolchain([compiler.cc], MSVC, version="Microsoft Visual C++")
    toolchain.env["PATH"] = getattr(compiler, "_paths", None) or os.environ["PATH"]
    toolchain.include = tuple(f"/I{folder}" for folder in compiler.include_dirs)
    toolchain.link = [compiler.linker, *(f"/LIBPATH:{folder}" for folder in compiler.library_dirs)]
    why_not = toolchain.takes("/std:c++17")
    return toolchain if why_not is None else f"no working C++ compiler ({compiler.cc} does not build a small program: {why_not})"


def target_is_x86():
    architectures = re.findall(r"-arch\s+(\S+)", os.environ.get("ARCHFLAGS", "")) if MACOS else []
    if architectures:
        return architectures == ["x86_64"]
    return (platform.machine() if MACOS else sysconfig.get_platform()).lower().endswith(("x86_64", "amd64"))


def choose_isas(toolchain):
    """({isa: flags} to build, {isa: why it is left out})."""
    chosen, left_out = {}, {}
    for isa, flags in toolchain.flags.isa.items():
        if isa != "portable" and not target_is_x86():
            left_out[isa] = "not an x86-64 target"
        elif why_not := toolchain.takes(*flags):
            left_out[isa] = f"the compiler does not take {' '.join(flags)}: {why_not}"
        else:
            chosen[isa] = flags
    return chosen, left_out


def ninja_program():
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")
    if found is None:
        raise PlatformError("vidkern: ninja is not installed; pip install ninja (ordinary build isolation does it for you)")
    return found


def join(words):
    return (subprocess.list2cmdline if WINDOWS else shlex.join)([str(word) for word in words]).replace("$", "$$")


def escape(path):
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(toolchain, isas, openmp, library):
    """The text of build.ninja. Objects are named relative to its folder, sources absolutely."""
    import pybind11

    flags, once = toolchain.flags, [CPU / name for name in COMPILED_ONCE if (CPU / name).exists()]
    per_isa = sorted(path for path in CPU.glob("*.cpp") if path.name not in COMPILED_ONCE)
    define, suffix = ("/D", ".obj") if toolchain.msvc else ("-D", ".o")
    include = [*toolchain.include, ("/I" if toolchain.msvc else "-I") + str(ROOT / "csrc")]
    threads = flags.openmp if openmp else flags.no_openmp
    common = [*flags.common, *threads, *env_flags("CPPFLAGS", "CXXFLAGS"), *include]
    # Only the once-compiled files see Python and pybind11: under build isolation their folders change with every build.
    folders = (pybind11.get_include(), sysconfig.get_path("include"))
    python = [("/I" if toolchain.msvc else "-isystem") + folder for folder in folders]
    have = [f"{define}VK_HAVE_{isa.upper()}" for isa in isas if isa != "portable"]

    lines = ["ninja_required_version = 1.5"]
    if toolchain.msvc:
        lines += ["rule cxx", f"  command = {join(toolchain.cxx)} $flags /showIncludes /c $in /Fo$out", "  deps = msvc"]
        lines += ["  description = compile $out"]
        libraries = f"/LIBPATH:{Path(sys.base_prefix, 'libs')}"
        link = [*toolchain.link, "/nologo", "/DLL", libraries]
        lines += ["rule link", f"  command = {join(link)} @$out.rsp /OUT:$out"]
        lines += ["  rspfile = $out.rsp", "  rspfile_content = $in"]
    else:
        lines += ["rule cxx", f"  command = {join(toolchain.cxx)} $flags -MMD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc", "  description = compile $out"]
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if MACOS else ["-shared"]
        link = [*toolchain.cxx, *shared, *(flags.openmp if openmp else ()), *env_flags()]
        lines += ["rule link", f"  command = {join(link)} $in -o $out {join(env_flags('LDFLAGS'))}"]
    lines += ["  description = link $out"]
    objects = []

    def compile_one(source, folder, extra):
        objects.append(escape(f"{folder}/{source.stem}{suffix}"))
        lines.append(f"build {objects[-1]}: cxx {escape(source)}")
        lines.append(f"  flags = {join([*common, *extra])}")

    for source in once:
        compile_one(source, "once", [*have, *python])
    for isa, isa_flags in isas.items():
        for source in per_isa:
            compile_one(source, isa, [*isa_flags, f"{define}VK_ISA={isa}"])
    lines.append(f"build {escape(library)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def build_cpu():
    """(path of the built library or None, what to record in vidkern/_build_info.json)."""
    mode = os.environ.get("VIDKERN_BUILD") or "auto"
    if mode not in ("auto", "require", "off"):
        raise PlatformError(f"VIDKERN_BUILD={mode!r}: expected auto, require or off")
    if mode == "off":
        return None, {"compiled": False, "reason": "left out on purpose: VIDKERN_BUILD=off at install time"}
    toolchain = find_toolchain()
    if isinstance(toolchain, str):
        if mode == "require":
            raise PlatformError(f"VIDKERN_BUILD=require, but: {toolchain}")
        print(f"vidkern: installing without compiled CPU kernels: {toolchain}", file=sys.stderr)
        return None, {"compiled": False, "reason": toolchain}

    if not (CPU / "bindings.cpp").is_file():
        raise PlatformError(f"{CPU / 'bindings.cpp'} is missing: this copy of the sources is not complete")
    isas, left_out = choose_isas(toolchain)
    without_openmp = "not used on macOS" if MACOS else toolchain.takes(*toolchain.flags.openmp)
    if without_openmp and not MACOS:
        print(f"vidkern: the compiler has no OpenMP, the CPU kernels will use one thread: {without_openmp}", file=sys.stderr)
    tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    folder = ROOT / "build" / f"cpu-{tag}"
    folder.mkdir(parents=True, exist_ok=True)
    library = "_cpu" + sysconfig.get_config_var("EXT_SUFFIX")
    (folder / "build.ninja").write_text(ninja_file(toolchain, isas, without_openmp is None, library), encoding="utf-8")
    if subprocess.run([ninja_program(), "-C", str(folder)], env=toolchain.env, stdin=subprocess.DEVNULL).returncode:
        raise CompileError(
            f"{toolchain.version} failed on vidkern's own sources, its messages are above "
            "(VIDKERN_BUILD=off installs without the compiled kernels)"
        )
    return folder / library, {
        "compiled": True,
        "reason": None,
        "compiler": toolchain.version,
        "isas": list(isas),
        "left_out": left_out,
        "openmp": without_openmp is None,
        "openmp_reason": without_openmp,
    }


# ---- CUDA -------------------------------------------------------------------------------------------------------------
def find_nvcc():
    """nvcc, or None."""
    named = os.environ.get("CUDACXX")
    if named:
        return shutil.which(named)
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc") or next(filter(None, (shutil.which("nvcc", path=str(Path(home, "bin"))) for home in homes)), None)


def build_cuda():
    """(paths of the cubins asked for, what to record of them or None)."""
    asked = os.environ.get("VIDKERN_CUDA_ARCHS", "")
    archs = list(dict.fromkeys(re.split(r"[;,\s]+", asked.strip()))) if asked.strip() else []
    if not archs:
        return [], None
    wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}|90a", arch)]
    if wrong:
        raise PlatformError(f"VIDKERN_CUDA_ARCHS={asked!r}: {wrong[0]!r}, expected compute capabilities such as 80;90")
    nvcc = find_nvcc()
    if nvcc is None:
        raise PlatformError(f"VIDKERN_CUDA_ARCHS={asked!r}, but there is no nvcc in CUDACXX, on the PATH or in CUDA_HOME")
    spec = importlib.util.spec_from_file_location("vidkern_cuda_sources", ROOT / "vidkern" / "cuda" / "sources.py")
    sources = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sources)
    csrc, folder = ROOT / "csrc", ROOT / "build" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)

    def one(job):
        source, arch = job
        made = folder / sources.ahead_name(source, csrc, arch)
        if made.is_file():
            return made, None
        fresh = made.with_suffix(f".{os.getpid()}.new")
        include = [word for path in sources.include_folders(csrc) for word in ("-I", str(path))]
        command = [nvcc, *sources.OPTIONS, "-cubin", f"-arch=sm_{arch}", *include, "-o", str(fresh), str(source)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            fresh.unlink(missing_ok=True)
            return made, done.stdout
        os.replace(fresh, made)
        return made, None

    jobs = [(source, arch) for source in sorted((csrc / "cuda").glob("*.cu")) for arch in sources.archs_of(source.stem, archs)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(one, jobs))
    for (source, arch), (_, complaint) in zip(jobs, done):
        if complaint is not None:
            print(complaint, file=sys.stderr)
            raise CompileError(f"{nvcc} does not compile {source.name} for sm_{arch}, its messages are above")
    said = subprocess.run([nvcc, "--version"], stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL).stdout.split("\n")
    version = next((line for line in said if "release" in line), "unknown")
    return [made for made, _ in done], {"archs": archs, "compiler": version}


# ---- into the package -------------------------------------------------------------------------------------------------
def replace(target, write):
    """Writes beside `target` and renames: a process that has the old library mapped keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    write(fresh)
    os.replace(fresh, target)


class BuildCompiled(build_ext):
    """Puts `_cpu`, _cubins and _build_info.json into the package: in the source tree when editable, else in the build folder."""

    written = ()

    def run(self):
        library, info = build_cpu()
        cubins, built = build_cuda()
        info |= {"cuda": built} if built else {}
        package = (ROOT if self.inplace else Path(self.build_lib)) / "vidkern"
        for stale in [*package.glob("_cpu.*.so"), *package.glob("_cpu.*.pyd")]:
            if library is None or stale.name != library.name:
                stale.unlink()  # or it would be imported although the record says that it is not there
        if library is not None:
            replace(package / library.name, lambda path: shutil.copy2(library, path))
        for stale in package.glob("_cubins/*.cubin"):
            if stale.name not in {path.name for path in cubins}:
                stale.unlink()
        for path in cubins:
            replace(package / "_cubins" / path.name, lambda target, path=path: shutil.copy2(path, target))
        replace(package / "_build_info.json", lambda path: path.write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8"))
        names = ["_build_info.json", *([library.name] if library else []), *(f"_cubins/{path.name}" for path in cubins)]
        self.written = [] if self.inplace else [str(package / name) for name in names]

    def get_outputs(self):
        return list(self.written)

    def get_output_mapping(self):
        return {}


class BuildPython(build_py):
    """Starts from an empty folder: build/lib keeps files that were since deleted, and they would enter the wheel."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def packages_under(folder, name):
    return [name, *(f"{name}.{sub}" for sub in find_packages(str(ROOT / folder)))]


setup(
    packages=[
        *packages_under("vidkern", "vidkern"),
        *packages_under("models", "vidkern.models"),
        *packages_under("bench", "vidkern.bench"),
        "vidkern.csrc",
    ],
    package_dir={"vidkern": "vidkern", "vidkern.models": "models", "vidkern.bench": "bench", "vidkern.csrc": "csrc"},
    package_data={
        "vidkern": ["py.typed"],
        "vidkern.data": ["assets/*"],
        "vidkern.bench": ["results/**/*"],
        "vidkern.models.dfm": ["records/*.json"],
        "vidkern.models.ditflow": ["records/*.json"],
        "vidkern.models.four_real": ["records/*.json"],
        "vidkern.models.mobile_dit": ["records/*.json"],
        "vidkern.csrc": ["**/*"],
    },
    include_package_data=False,
    ext_modules=[Extension("vidkern._cpu", sources=[])],
    cmdclass={"build_ext": BuildCompiled, "build_py": BuildPython},
    zip_safe=False,
)
