"""kernels/harness/start.py and how a program starts: what an import leaves alone and what it needs, the version that files
say, and signals before there is a checkpoint and after.
"""
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import kernels
import vicreg
from kernels.harness import cli
from kernels.harness.files import load_checkpoint
from scripts import ALL, ONE_THREAD, ROOT, SMALL, call, process, said

SCRIPTS = [*ALL, "collapse_toy.py"]


def python(code):
    """Runs code in a fresh process in ROOT -> what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- Imports -----------------------------------------------------------------------------------------------
def test_who_imports_a_script_keeps_environment_and_signals():
    printed = python(f"""if True:
        import os, signal
        import torch._dynamo, sklearn, matplotlib        # what they set is theirs
        signal.signal(signal.SIGINT, signal.default_int_handler)     # ignored where pytest is a job in the background
        handlers = [signal.getsignal(number) for number in signal.Signals]
        environment = dict(os.environ)
        from vicreg import Encoder
        for script in {SCRIPTS}:
            __import__(script.removesuffix(".py"))
            assert dict(os.environ) == environment, script
            assert [signal.getsignal(number) for number in signal.Signals] == handlers, script
        print("kept", Encoder(1, 2).features)
    """)
    assert printed == "kept 128\n"


@pytest.mark.parametrize("script", ALL)
def test_a_script_prepares_threads_and_signals_before_torch_is_imported(script, tmp_path):
    """A package `torch` in its place says how it finds the process, and presses Ctrl-C: an end without a traceback."""
    (tmp_path / "torch.py").write_text("""if True:
        import os, signal
        print(*map(os.environ.get, ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OPENBLAS_NUM_THREADS")), flush=True)
        os.kill(os.getpid(), signal.SIGINT)
    """)
    prepared = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OPENBLAS_NUM_THREADS"
    environment = {name: value for name, value in ONE_THREAD.items() if name not in prepared}
    done = subprocess.run([sys.executable, ROOT / script], cwd=tmp_path, capture_output=True, text=True,
                          env={**environment, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "PASSIVE 1000 1\n", "")


def test_what_the_user_has_set_of_threads_stays(tmp_path):
    (tmp_path / "torch.py").write_text("import os; print(os.environ['OMP_WAIT_POLICY']); raise SystemExit(7)")
    done = process("vicreg.py", [], tmp_path, OMP_WAIT_POLICY="ACTIVE", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (7, "ACTIVE\n")


# What torch itself needs; of all else, whatever is installed here, nothing can be imported.
TORCH_ALONE = """if True:
    import re, sys
    from importlib.machinery import PathFinder
    from importlib.metadata import packages_distributions, requires
    own = [re.match(r"[\\w-]+", line)[0].replace("-", "_") for line in requires("torch") if "extra ==" not in line]
    there = {"torch", "torchgen", "functorch", "numpy", "triton", "kernels", "mpmath", "markupsafe", *own}

    not_here = packages_distributions().keys() - there

    class Finder(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return None if name.partition(".")[0] in not_here else PathFinder.find_spec(name, path, target)
    sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
    for name in "sklearn scipy matplotlib PIL tqdm einops tifffile".split():
        try:
            __import__(name)
        except ImportError:
            continue
        raise AssertionError(name)
"""


def test_losses_verdict_and_encoder_need_torch_alone():
    printed = python(TORCH_ALONE + """
    import torch
    from kernels import bank_cross_entropy, collapse_panel, variance_covariance, verdict
    from kernels.harness.encoder import Encoder
    encoder = Encoder(channels=1, axes=2)
    h = encoder(torch.rand(6, 1, 12, 12))
    variance, covariance = variance_covariance(h)
    loss = variance + covariance + bank_cross_entropy(h, h.detach(), torch.arange(6), 0.1)
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in encoder.parameters())
    panel = collapse_panel(h.detach(), h.detach(), h.detach())
    print(h.shape, isinstance(verdict(panel, panel), str))
    """)
    assert printed == "torch.Size([6, 128]) True\n"


def test_every_kernel_file_but_the_commands_needs_torch_alone():
    names = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__", "benchmark", "acceptance"}
    assert len(names) >= 5
    printed = python(TORCH_ALONE + f"""
    import importlib
    for name in {sorted(names)}:
        importlib.import_module("kernels." + name)
    import kernels
    assert all(hasattr(kernels, name) for name in kernels.__all__)
    print(len(kernels.__all__))
    """)
    assert int(printed) >= 10


def test_the_version_is_had_without_torch():
    printed = python("import kernels, sys; print(kernels.__version__, 'torch' in sys.modules)")
    assert printed == f"{kernels.__version__} False\n"


# ---- The version -------------------------------------------------------------------------------------------
def test_a_runs_files_say_the_version(finished):
    config = json.loads((finished / "run" / "config.json").read_text())
    encoder = torch.load(finished / "run" / "encoder.pt", weights_only=True)
    state = load_checkpoint(finished / "run" / "last.pt")
    assert config["version"] == state["config"]["version"] == encoder["version"] == kernels.__version__


@pytest.mark.parametrize("version", [None, "1.0.0"])
def test_a_checkpoint_of_an_earlier_layout_or_another_version_is_refused(version, finished, capsys):
    path = finished / "run" / "last.pt"
    state = load_checkpoint(path)
    del state["config"]["version"]
    if version:
        state["config"]["version"] = version
    torch.save(state, path)
    before = path.read_bytes()
    code = call(finished, "--resume", "run")
    assert code == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("vicreg.py: cannot resume run") and "version" in line and "start a new run" in line
    assert path.read_bytes() == before


def test_an_encoder_without_a_version_still_serves_init(finished):
    whole = torch.load(finished / "run" / "encoder.pt", weights_only=True)
    torch.save({"config": whole["config"], "state_dict": whole["state_dict"]}, finished / "old.pt")
    assert call(finished, *SMALL.split(), "--init", "old.pt", "--lr", "0", "--out", "new") == 0
    new = torch.load(finished / "new" / "encoder.pt", weights_only=True)
    assert new["config"] == whole["config"] and new["version"] == kernels.__version__
    for name, value in whole["state_dict"].items():
        assert torch.equal(new["state_dict"][name], value), name


# ---- Signals before there is a checkpoint, and after -------------------------------------------------------
def interrupting(function):
    """It, but Ctrl-C is pressed when it is called."""
    def call(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return function(*arguments, **options)
    return call


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_nohup_stays_in_force():
    code = ("import signal; {}from kernels.harness import processes; "
            "processes.on_first_signal(print); print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)")
    assert python(code.format("signal.signal(signal.SIGHUP, signal.SIG_IGN); ")).strip() == "True"
    assert python(code.format("")).strip() == "False"


def left_by_a_cut_short_run(folder):
    (folder / "new").mkdir()
    for name, text in (("config.json", '{"method": "VICReg"}'), ("untrained.json", '{"probes": {}, "panel": {}}'),
                       ("skipped.txt", "a.png: of another set"), ("views.png", "")):
        (folder / "new" / name).write_text(text)


def test_what_a_cut_short_run_left_is_not_taken_over(finished):
    left_by_a_cut_short_run(finished)
    assert call(finished, *SMALL.split(), "--out", "new") == 0
    assert not (finished / "new" / "skipped.txt").exists()
    own, report = [json.loads((finished / "new" / name).read_text()) for name in ("untrained.json", "report.json")]
    assert own["panel"]["width"] == report["panels"]["projector z"]["width"] and own["probes"]["random encoder"]


@pytest.mark.parametrize("names", [["config.json"], ["views.png"], ["config.json", "untrained.json"]])
def test_files_of_somebody_else_are_not_overwritten(names, finished, capsys):
    (finished / "theirs").mkdir()
    for name in names:
        (finished / "theirs" / name).write_text('{"mine": 1}')
    said(capsys, call(finished, *SMALL.split(), "--out", "theirs"), "theirs is not empty")
    assert {path.name: path.read_text() for path in (finished / "theirs").iterdir()} == dict.fromkeys(names, '{"mine": 1}')


@pytest.mark.parametrize("moment", ["read_data", "make_encoder", "open_folder", "begin"])
def test_ctrl_c_before_the_first_checkpoint_says_that_nothing_is_lost(moment, finished, capsys, monkeypatch):
    place = cli if moment == "read_data" else vicreg
    monkeypatch.setattr(place, moment, interrupting(getattr(place, moment)))
    assert call(finished, *SMALL.split(), "--out", "new") == 130
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("vicreg.py: ended by SIGINT before there was a checkpoint") and "--resume" not in line
    assert (finished / "new").exists() == (moment == "begin")
    if moment == "begin":
        monkeypatch.undo()
        monkeypatch.setattr(cli, "lock_folder", lambda folder: None)         # this process has it still
        assert call(finished, *SMALL.split(), "--out", "new") == 0           # the same command again


@pytest.mark.parametrize("moment", ["quick_probe", "report"])
def test_ctrl_c_after_the_first_checkpoint_says_how_to_go_on(moment, finished, capsys, monkeypatch):
    monkeypatch.setattr(vicreg, moment, interrupting(getattr(vicreg, moment)))
    assert call(finished, *SMALL.split(), "--out", "new folder") == 130
    line, = [line for line in capsys.readouterr().err.split("\n") if line.startswith("vicreg.py: ")]
    assert line.startswith("vicreg.py: ended by SIGINT; what was saved stands")
    assert line.endswith("python vicreg.py --resume 'new folder'")
    monkeypatch.undo()
    monkeypatch.setattr(cli, "lock_folder", lambda folder: None)
    assert call(finished, "--resume", "new folder") == 0
