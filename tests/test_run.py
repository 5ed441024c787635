"""run.py: what a training loop sees of a run."""
import argparse

import pytest
import torch

import vicreg
from kernels.harness.images import Data
from kernels.harness.probes import examine, report
from kernels.harness.run import Run
from kernels.harness.views import posed_view


def test_learning_rate_rises_for_a_tenth_and_falls_to_zero():
    rates = [vicreg.learning_rate(step, steps=100, batch=512) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == 2
    assert rates[10] == 2
    assert rates[55] == pytest.approx(1)
    assert rates[100] == pytest.approx(0)
    assert vicreg.learning_rate(1, steps=1, batch=512) == 2                # asked for after the last step


def arguments(**more):
    return argparse.Namespace(batch=8, accumulate=1, epochs=2, seed=0, device="cpu", amp="off", compile=False,
                              save_minutes=10., **more)


def small_data(labels=True):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(24) % 3
    x = torch.rand(24, 1, 12, 12, generator=generator) + y[:, None, None, None]
    return Data(x, y if labels else None, x[:9], y[:9] if labels else None, view=posed_view)


@pytest.mark.parametrize("labels", [True, False])
def test_any_module_from_images_to_features_can_be_the_encoder(tmp_path, labels, capsys):
    """The contract above the rooms: no attribute of the encoder is used."""
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 10), torch.nn.BatchNorm1d(10))
    model = vicreg.VICReg(backbone, 10, projector=(16, 16))
    data = small_data(labels)
    untrained = examine(model, data)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    run = Run(arguments(), data, tmp_path)
    vicreg.train(model, optimizer, data, run)
    report(model, data, untrained, run.history, tmp_path)
    assert len(run.history) == 2
    assert ("trained encoder" in capsys.readouterr().out) == labels
    saved = torch.load(tmp_path / "encoder.pt", weights_only=True)
    backbone.load_state_dict(saved["state_dict"])


def test_training_sees_each_image_once_an_epoch_and_drops_the_rest(tmp_path):
    """20 images at 8: 16 of them, in an order of their own each epoch."""
    seen = []

    class Watched(Run):
        def own(self, index):
            seen.append(index)
            return super().own(index)

    model = vicreg.VICReg(vicreg.Encoder(1, 2, width=2), 16, projector=(8, 8))
    data = small_data()
    data = data._replace(images=data.images[:20], labels=data.labels[:20])
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    vicreg.train(model, optimizer, data, Watched(arguments(), data, tmp_path))
    first, second = torch.cat(seen[:2]), torch.cat(seen[2:])
    assert len(first.unique()) == 16
    assert len(second.unique()) == 16
    assert not torch.equal(first, second)
