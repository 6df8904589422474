"""The command: exit statuses, one-line errors, nothing imported that was not asked for."""

import subprocess
import sys
import types

import pytest

import vidkern
from vidkern import cli
from vidkern.errors import MissingExtra, UserError, import_extra


@pytest.fixture
def demo(monkeypatch):
    """A stand-in for the demo's module whose run() a test sets."""
    module = types.ModuleType("stand_in_demo")
    module.add_arguments = lambda parser: parser.add_argument("--steps", type=int, default=7)
    module.run = lambda args: print(args.method, args.steps)
    monkeypatch.setitem(sys.modules, "stand_in_demo", module)
    monkeypatch.setitem(cli.DEMOS, "four-real", "stand_in_demo")
    return module


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"vidkern {vidkern.__version__}\n"


@pytest.mark.parametrize("argv", [["demo"], ["demo", "four-real"], ["demo", "--steps", "7"], ["demo", "four-real", "--steps", "7"]])
def test_demo_runs_without_arguments_and_takes_a_method(demo, argv, capsys):
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == "four-real 7\n"


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["demo", "nonsense"], ["demo", "--nonsense"]])
def test_a_wrong_command_line_exits_with_2(demo, argv, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2 and "error:" in capsys.readouterr().err


def raises(error):
    def run(args):
        raise error

    return run


def test_a_user_error_is_one_line(demo, capsys):
    demo.run = raises(UserError("steps=-1: expected\n at least 1"))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == "vidkern: error: steps=-1: expected at least 1\n"


def test_a_missing_extra_is_named_with_the_way_to_install_it(demo, capsys):
    demo.run = raises(ModuleNotFoundError("No module named 'av'", name="av"))
    assert cli.main(["demo"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and 'needs av, which is not installed: it comes with vidkern\'s extra "demo", in a checkout by pip install -c constraints.txt -e ".[demo]"' in err


def test_a_bar_in_a_log_writes_an_entry_now_and_then():
    program = """if True:
        import sys, time, types
        from vidkern import cli
        def work(args):
            from tqdm import tqdm
            for _ in tqdm(range(40)):
                time.sleep(0.02)
        module = types.ModuleType("stand_in_demo")
        module.add_arguments, module.run = lambda parser: None, work
        sys.modules["stand_in_demo"], cli.DEMOS["four-real"], sys.argv = module, "stand_in_demo", ["vidkern", "demo"]
        sys.exit(cli.main())"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "40/40" in done.stderr, done.stderr
    assert done.stderr.count("it/s]") <= 2, done.stderr


def test_other_errors_keep_their_traceback(demo):
    demo.run = raises(ModuleNotFoundError("No module named 'vidkern.nonsense'", name="vidkern.nonsense"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["demo"])
    demo.run = raises(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["demo"])


def test_ctrl_c_prints_one_line(demo, capsys):
    demo.run = raises(KeyboardInterrupt())
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "\nvidkern: interrupted\n"


def test_info_as_a_user_calls_it():
    done = subprocess.run([sys.executable, "-m", "vidkern", "info"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "grid_attention" in done.stdout and vidkern.__version__ in done.stdout


def test_help_imports_no_torch():
    program = "import sys\nfrom vidkern.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m vidkern info | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr


def test_import_extra(monkeypatch):
    assert import_extra("tqdm", "progress") is sys.modules["tqdm"]
    monkeypatch.setitem(cli.sys.modules, "tqdm", None)
    with pytest.raises(MissingExtra, match=r'progress needs tqdm, which is not installed: it comes with vidkern.s extra "demo", in a checkout by pip install'):
        import_extra("tqdm", "progress")
    assert issubclass(MissingExtra, ImportError) and issubclass(MissingExtra, UserError)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import_extra("no_such_module", "nothing")
