"""Records: what they are bound to, which count, and what automatic choice makes of them."""

import json
import sys
import warnings

import pytest
import torch

import vidkern
from vidkern import registry, verified

GPU = verified.DeviceClass("NVIDIA Test 1", "9.0")
SOURCES = ("ops/merge_attention/reference.py",)


def backend(trust="warn", name="made_up", sources=SOURCES):
    return registry.Backend(name, lambda *a: None, None, None, "made up for a test", trust, sources)


def record(**changes):
    fields = dict(
        op="grid_attention", backend="made_up", device=GPU.name, capability=GPU.capability, dtypes=("float32", "bfloat16"),
        worst_max=1.5, worst_rms=1.1, cases=3, versions={"torch": "2.13"}, seed=1, date="2026-01-01T00:00:00+00:00",
        sources=verified.digest(SOURCES),
    )  # fmt: skip
    return verified.Record(**{**fields, **changes})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, no shipped records, and every device of one class."""
    monkeypatch.setenv("VIDKERN_CACHE", str(tmp_path))
    monkeypatch.setattr(verified, "shipped_dir", lambda: None)
    monkeypatch.setattr(verified, "device_class", lambda device: GPU)
    monkeypatch.setattr(registry, "_warned", set())
    verified.forget()
    yield tmp_path
    verified.forget()


def lacking(b, dtype=torch.bfloat16):
    return verified.lacking("grid_attention", b, torch.device("cuda", 0), dtype)


# ---- which records count --------------------------------------------------------------------------------------------
def test_a_record_counts_for_its_backend_device_and_dtypes(cache):
    assert "not verified on NVIDIA Test 1 (9.0): run `vidkern verify`" == lacking(backend())
    (path,) = verified.write(cache, [record()])
    assert path == cache / "nvidia-test-1" / "verified.json"
    assert lacking(backend()) is None and lacking(backend(), torch.float32) is None
    assert "with float16" in lacking(backend(), torch.float16)
    assert lacking(backend(name="another")) and verified.lacking("merge_attention", backend(), torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("change", [{"device": "NVIDIA Other"}, {"capability": "8.0"}, {"sources": "0" * 32}, {"dtypes": ()}])
def test_another_device_or_source_does_not_count(cache, change):
    verified.write(cache, [record(**change)])
    assert "not verified on NVIDIA Test 1 (9.0)" in lacking(backend())
    assert ("sources have changed" in lacking(backend())) == ("sources" in change)


def test_a_newer_record_takes_the_place_of_the_older(cache):
    verified.write(cache, [record(), record(backend="second")])
    (path,) = verified.write(cache, [record(worst_max=1.9)])
    assert sorted((r.backend, r.worst_max) for r in verified.read(path)) == [("made_up", 1.9), ("second", 1.5)]
    verified.write(cache, [], [verified.key("grid_attention", "made_up", GPU)])
    assert [r.backend for r in verified.read(path)] == ["second"] and lacking(backend())


def test_shipped_and_cached_records_are_both_found(cache, tmp_path_factory, monkeypatch):
    shipped = tmp_path_factory.mktemp("shipped")
    verified.write(shipped, [record()])
    monkeypatch.setattr(verified, "shipped_dir", lambda: shipped)
    verified.forget()
    assert lacking(backend()) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2, "records": []}', '{"format": 1, "records": [{"op": "x"}]}', '{"format": 1, "records": [7]}']
)
def test_a_damaged_record_is_ignored_and_named(cache, text):
    verified.write(cache / "good", [record(backend="second")])
    (cache / verified.FILE).write_text(text)
    verified.forget()
    with pytest.warns(UserWarning, match=f"{cache / verified.FILE}: no record of verification, ignored"):
        assert lacking(backend())
    assert lacking(backend(name="second")) is None


def test_an_interrupted_write_keeps_the_old_file(cache, monkeypatch):
    (path,) = verified.write(cache, [record()])
    before = path.read_bytes()
    monkeypatch.setattr(verified.json, "dumps", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        verified.write(cache, [record(worst_max=1.0)])
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("VIDKERN_CACHE", str(tmp_path / "a"))
    assert verified.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("VIDKERN_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verified.cache_dir() == tmp_path / "vidkern"


# ---- what a record is bound to --------------------------------------------------------------------------------------
PYTHON = '''"""Module docstring."""
from . import helper
from .table import ROWS


def kernel(x):
    """What it does."""
    # a comment
    y = x + 1  # another

    return f"{y} # no comment" + "'''  # the rest differs between the cases


def tree(folder, main, helper="K = 1\n", table="ROWS = 2\n"):
    folder.mkdir()
    for name, text in (("main", main), ("helper", helper), ("table", table)):
        (folder / f"{name}.py").write_text(text)
    return folder


def digest_of(monkeypatch, folder, name="main.py"):
    monkeypatch.setattr(verified, "_path_of", lambda source: folder / source)
    verified.digest.cache_clear()
    return verified.digest((name,))


def test_comments_docstrings_and_blank_lines_do_not_matter(tmp_path, monkeypatch):
    a = PYTHON + '"""keep"""[0]\n'
    b = a.replace("What it does", "Other\n    words").replace("# a comment\n", "#\n\n\n").replace("  # another", "")
    b = b.replace("Module docstring", "New")
    (tmp_path / "x").mkdir(), (tmp_path / "y").mkdir()
    first, second = tree(tmp_path / "x/op", a), tree(tmp_path / "y/op", b)
    assert digest_of(monkeypatch, first) == digest_of(monkeypatch, second)
    stripped = verified._strip_python(b)
    assert "# no comment" in stripped and "keep" in stripped and "another" not in stripped and "Other" not in stripped
    compile(verified._strip_python('x = 1\n"""doc"""\n# c\ny = 2  # d\n'), "x", "exec")


@pytest.mark.parametrize("change", [{"main": PYTHON.replace("x + 1", "x + 2") + '"\n'}, {"helper": "K = 3\n"}, {"table": "ROWS = 5\n"}])
def test_code_in_the_file_or_its_neighbours_matters(tmp_path, monkeypatch, change):
    (tmp_path / "x").mkdir(), (tmp_path / "y").mkdir()
    plain = {"main": PYTHON + '"\n'}
    first, second = tree(tmp_path / "x/op", **plain), tree(tmp_path / "y/op", **(plain | change))
    assert digest_of(monkeypatch, first) != digest_of(monkeypatch, second)


def test_c_comments_and_includes(tmp_path, monkeypatch):
    header = tmp_path / "h.h"
    header.write_text("#define N 1 // one\n")
    main = tmp_path / "k.cu"
    main.write_text('#include "h.h"\nint f() { return N; /* many\nlines */ }\nconst char* s = "// kept /* kept */";\n')
    first = digest_of(monkeypatch, tmp_path, "k.cu")
    main.write_text(main.read_text().replace("/* many\nlines */", "// few\n"))
    header.write_text("#define N 1\n")
    stripped = verified._strip_c(main.read_text())
    assert '"// kept /* kept */"' in stripped and "few" not in stripped
    header.write_text("#define N 2\n")
    assert digest_of(monkeypatch, tmp_path, "k.cu") != first
    same = verified._strip_c("int f() { /* a */ return 1'000; } // b\n'x'; R\"(/* raw */)\"")
    assert same == "int f() {   return 1'000; }\n'x'; R\"(/* raw */)\""


def test_every_declared_source_exists():
    for op in registry.ops().values():
        for b in op.backends:
            if b.sources:
                assert verified.closure(b.sources) and len(verified.digest(tuple(b.sources))) == 32
    with pytest.raises(FileNotFoundError, match="no_such.py does not exist"):
        verified.closure(("ops/no_such.py",))
    assert any(p.name == "isa.h" for p in verified.closure(("csrc/cpu/gemm.h",)))


# ---- choice ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def op(monkeypatch):
    """grid_attention with a made-up first backend whose trust a test sets; CPU tensors stand for ones on an accelerator."""
    op = registry.ops()["grid_attention"]

    def with_trust(trust):
        plain = op._by_name["reference"]
        b = registry.Backend("made_up", plain.why_not, plain.run, plain.run_backward, "made up", trust, SOURCES)
        monkeypatch.setattr(op, "backends", (b, *op.backends))
        monkeypatch.setitem(op._by_name, "made_up", b)
        unverified = lambda backend, args: (  # noqa: E731
            None if backend.trust == "none" else verified.lacking(op.name, backend, torch.device("cuda", 0), args[0].dtype)
        )
        monkeypatch.setattr(op, "unverified", unverified)
        return op

    return with_trust


def inputs():
    return [torch.randn(1, 1, 8, 8) for _ in range(3)]


def explain(**more):
    return vidkern.explain(vidkern.grid_attention, *inputs(), grid=(2, 2), **more)


def test_warn_is_chosen_and_says_so_once(op, cache):
    op("warn")
    with pytest.warns(registry.UnverifiedBackendWarning, match='"made_up" is not verified on .*`vidkern verify`') as caught:
        vidkern.grid_attention(*inputs(), grid=(2, 2))
        vidkern.grid_attention(*inputs(), grid=(2, 2))
    assert len([w for w in caught if w.category is registry.UnverifiedBackendWarning]) == 1
    assert explain().chosen == "made_up" and "not verified on" in explain().reasons["made_up"]
    verified.write(cache, [record()])
    registry._warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vidkern.grid_attention(*inputs(), grid=(2, 2))
    assert explain().reasons["made_up"] == "serves this call"


def test_require_is_passed_over_without_a_record_unless_named(op, cache):
    op("require")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = explain()
        assert found.chosen == "cpu" and "chosen only by name: it is not verified on" in found.reasons["made_up"]
        assert explain(impl="made_up").chosen == "made_up"
        vidkern.grid_attention(*inputs(), grid=(2, 2), impl="made_up")
    verified.write(cache, [record()])
    assert explain().chosen == "made_up"


def test_tracing_does_not_warn(op):
    chosen = op("warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error", registry.UnverifiedBackendWarning)
        with torch._subclasses.FakeTensorMode():
            vidkern.grid_attention(*inputs(), grid=(2, 2))
        args = [torch.empty(1, 1, 8, 8, device="meta") for _ in range(3)]
        assert chosen._trusted(chosen.backends[0], (torch._subclasses.FakeTensorMode().from_tensor(args[0]), "auto"))
    compiled = torch.compile(lambda q, k, v: vidkern.grid_attention(q, k, v, grid=(2, 2)), backend="eager", fullgraph=True)
    with pytest.warns(registry.UnverifiedBackendWarning):
        compiled(*inputs())


def test_cpu_tensors_need_no_record():
    op = registry.ops()["grid_attention"]
    assert op.unverified(backend("require"), inputs()) is None
    assert op.unverified(backend("none"), [torch.empty(1, device="meta")]) is None
    assert "not verified" in op.unverified(backend("warn"), [torch.empty(1, device="meta")])


@pytest.mark.parametrize("trust, sources, message", [("maybe", SOURCES, "trust: 'maybe'"), ("warn", (), "sources: none given")])
def test_bad_backends(trust, sources, message):
    with pytest.raises(ValueError, match=message):
        backend(trust, sources=sources)


def test_info_shows_what_is_verified(op, cache):
    op("require")
    state = lambda: vidkern.info().ops["grid_attention"]["made_up"]  # noqa: E731
    assert state() == "made up; verified on no device yet (vidkern verify), elsewhere only by name"
    verified.write(cache, [record()])
    assert state() == "made up; verified on NVIDIA Test 1 (9.0) float32, bfloat16, elsewhere only by name"
    assert all(text for backends in vidkern.info().ops.values() for text in backends.values())


def test_a_record_says_everything_it_should(cache):
    (path,) = verified.write(cache, [record()])
    (content,) = json.loads(path.read_text())["records"]
    assert set(content) == {
        "op", "backend", "device", "capability", "dtypes", "worst_max", "worst_rms", "cases", "versions", "seed", "date", "sources",
    }  # fmt: skip
