"""kernels/harness/encoder.py: its shapes; that it starts from another run's, is tuned and exported, and that another
backbone takes its place as kernels/harness/README.md says.
"""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.harness.encoder import Encoder
from scripts import ROOT, SMALL, command, forked, saved, small_arrays, snippet

COLOURED = saved(**small_arrays(16, 16, 3))


@pytest.mark.parametrize("shape", [(1, 20, 20), (3, 28, 28), (1, 16, 16, 16), (2, 9, 7)])
def test_encoder_shapes_and_no_sample_sees_another(shape):
    torch.manual_seed(0)
    encoder = Encoder(shape[0], len(shape) - 1, width=4, depth=2)
    x = torch.randn(5, *shape)
    h = encoder(x)
    assert h.shape == (5, 32)
    assert encoder.features == 32
    torch.testing.assert_close(encoder(x[2:3])[0], h[2])


INIT = "--data small.npz --batch 8 --epochs 3 --lr 0 --init runs/vicreg-1"


@command(f"{SMALL} --width 5; {INIT}; {INIT}/encoder.pt --width 5", prepare=COLOURED)
def test_init_starts_from_an_encoder_of_its_own_width(run):
    encoders = [run.encoder(number) for number in (1, 2, 3)]
    for encoder in encoders[1:]:
        assert encoder["config"] == encoders[0]["config"]
        for name, value in encoders[0]["state_dict"].items():
            assert torch.equal(encoder["state_dict"][name], value), name
    config, first, second = [json.loads((run.out(number) / file).read_text()) for number, file in
                             ((2, "config.json"), (1, "report.json"), (2, "report.json"))]
    assert (config["width"], config["depth"]) == (5, 1)
    probes = second["probes"]
    assert [*probes] == ["raw pixels", "random encoder", "encoder of runs/vicreg-1", "trained encoder"]
    assert probes["encoder of runs/vicreg-1"] == probes["trained encoder"] == first["probes"]["trained encoder"]
    assert probes["random encoder"] != probes["trained encoder"]
    assert "\nencoder of runs/vicreg-1  " in run.done[1].stdout


@command(f"{SMALL} --width 5; {INIT} --width 4; {INIT} --depth 2", prepare=COLOURED)
def test_init_refuses_options_that_it_would_ignore(run):
    for done, words in zip(run.done[1:], ("the width of its encoder is 5: leave out --width",
                                          "the depth of its encoder is 1: leave out --depth")):
        assert done.returncode == 2 and words in done.stderr


@command(f"{SMALL} --width 5; {INIT}; --resume runs/vicreg-2", prepare=COLOURED)
def test_a_run_of_init_resumes(run):
    assert run.done[2].returncode == 0, run.done[2].stderr
    assert "encoder of runs/vicreg-1" in run.stdout


@command(SMALL, prepare=saved(**small_arrays(32, 32, 3)))
def test_the_encoder_is_tuned_and_exported_and_the_run_plotted(run, monkeypatch):
    run.out()
    monkeypatch.chdir(run.folder)
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8) % 3
    names = {"loader": [(x, y)] * 30, "classes": 3}
    exec(snippet("torch.nn.functional.cross_entropy"), names)
    assert (names["model"](x).argmax(1) == y).all()

    exec(snippet("torch.export.save"), names)
    exported = torch.export.load("encoder.pt2").module()
    torch.testing.assert_close(exported(x), names["encoder"](x))

    exec(snippet("pyplot.savefig"), {})
    assert Image.open("loss.png").size > (100, 100)


TORCHVISION = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 512, 3, 2)
        self.fc = nn.Linear(512, 1000)

    def forward(self, x):
        return self.fc(self.convolution(x).mean((2, 3)))

class models:
    resnet18 = Net
"""


def test_another_backbone_takes_the_encoders_place(tmp_path):
    script = (ROOT / "vicreg.py").read_text()
    line = "    encoder = make_encoder(args, data)\n"
    assert script.count(line) == 1
    (tmp_path / "vicreg.py").write_text(script.replace(line, snippet("resnet18")))
    (tmp_path / "torchvision.py").write_text(TORCHVISION)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    COLOURED(tmp_path)
    for _ in range(2):
        done = forked(tmp_path / "vicreg.py", SMALL.split(), tmp_path)
        assert done.returncode == 0, done.stderr
    first, second = (tmp_path / "runs" / f"vicreg-{number}" for number in (1, 2))
    assert np.load(first / "features.npz")["train_features"].shape == (40, 512)
    assert (first / "metrics.jsonl").read_text() == (second / "metrics.jsonl").read_text()         # of one seed

    before = (first / "metrics.jsonl").read_text()
    longer = str(len(before.splitlines()) + 1)
    done = forked(tmp_path / "vicreg.py", ["--resume", "runs/vicreg-1", "--epochs", longer], tmp_path)
    assert done.returncode == 0, done.stderr
    after = (first / "metrics.jsonl").read_text()
    assert after.startswith(before) and len(after.splitlines()) == int(longer)
