"""kernels/harness/probes.py: what is measured on a model, before, while and after it is trained, on whatever encoder."""
import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import vicreg
from kernels import collapse_panel, few_label_accuracy, knn_accuracy
from kernels.harness import probes
from kernels.harness.images import Data, limited
from scripts import SMALL, call
from small import small_data, small_model, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("labels", [True, False])
def test_any_module_from_images_to_features_can_be_the_encoder(tmp_path, labels, capsys):
    """The contract above the rooms: no attribute of the encoder is used."""
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.BatchNorm1d(10))
    model = vicreg.VICReg(backbone, 10, projector=(16, 16))
    data = small_data(labels=labels)
    untrained = probes.begin(model, data, tmp_path)
    run = train("vicreg", model, data, tmp_path, batch=8, accumulate=1, epochs=2)
    probes.report(model, data, untrained, run.history, tmp_path)
    assert len(run.history) == 2
    assert ("trained encoder" in capsys.readouterr().out) == labels
    saved = torch.load(tmp_path / "encoder.pt", weights_only=True)
    backbone.load_state_dict(saved["state_dict"])


def test_images_that_are_all_the_same_end_with_a_report(finished, capsys):
    """t-SNE of equal features ends the process where nobody looks."""
    arrays = dict(np.load(finished / "small.npz"))
    for split in ("train_images", "test_images"):
        arrays[split] = arrays[split][:1].repeat(len(arrays[split]), 0)
    np.savez(finished / "small.npz", **arrays)
    assert call(finished, *SMALL.split(), "--out", "same") == 0
    assert {"report.json", "features.npz", "embedding.png"} <= {file.name for file in (finished / "same").iterdir()}
    assert "COLLAPSED" in capsys.readouterr().out


@pytest.mark.parametrize("shape, numbers", [
    ((1, 20, 24), 480), ((3, 64, 128), 3 * 32 * 32), ((1, 16, 16, 16), 4096), ((2, 32, 8, 48), 2 * 16 * 8 * 16)])
def test_small_pixels_are_means_of_equal_areas(shape, numbers):
    x = torch.rand(5, *shape)
    small = probes.small_pixels(x)
    assert small.shape == (5, numbers)
    torch.testing.assert_close(small.view(5, shape[0], -1).mean(2), x.flatten(2).mean(2))
    if numbers == x[0].numel():
        assert torch.equal(small, x.flatten(1))


@pytest.mark.parametrize("labels", [True, False])
def test_quick_probe_is_the_rank_of_z_and_the_accuracy_of_h(labels):
    model, data = small_model("vicreg").eval(), small_data(labels=labels)
    with torch.no_grad():
        h, h_test = [model.encoder(x / 255) for x in (data.images, data.test_images)]
        z = model.projector(h_test)
    expected = {"RankMe": collapse_panel(z)["RankMe"]}
    if labels:
        expected["knn"] = knn_accuracy(h, data.labels, h_test, data.test_labels)
    assert probes.quick_probe(model, data) == pytest.approx(expected)


def test_examine_looks_at_the_same_views_each_time_and_leaves_the_random_state():
    model, data = small_model("vicreg"), small_data()
    state = torch.get_rng_state()
    first = probes.examine(model, data)
    assert torch.equal(torch.get_rng_state(), state)
    again = probes.examine(model, data)
    assert first.panels == again.panels and first.probe == again.probe
    assert not model.training
    assert first.h.shape == (24, 32) and first.h_test.shape == (9, 32)
    assert list(first.panels) == ["encoder h", "projector z"]
    assert list(first.probe) == ["k-NN", "linear", "1 a class", "5 a class", "10 a class"]
    torch.testing.assert_close(first.h, model.encoder(data.images / 255).detach())


def test_the_report_says_what_examine_finds(tmp_path, capsys):
    model, data = small_model("vicreg"), small_data()
    untrained = probes.begin(model, data, tmp_path)
    probes.report(model, data, untrained, [{"epoch": 1, "loss": 1., "invariance": 1.}], tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    found = probes.examine(model, data)
    assert report["probes"]["trained encoder"] == report["probes"]["random encoder"] == found.probe
    assert report["panels"]["projector z"] == report["panels"]["untrained z"] == found.panels["projector z"]
    assert report["verdict"] in capsys.readouterr().out
    features = np.load(tmp_path / "features.npz")
    assert np.array_equal(features["train_features"], found.h) and np.array_equal(features["test_features"], found.h_test)


def test_a_table_has_columns_under_their_names(capsys):
    probes.print_table({"one row": {"k-NN": 0.5, "participation": 3.25}, "another": {"k-NN": 12345.678, "participation": 1}})
    assert capsys.readouterr().out == (
        "\n                       k-NN participation\n"
        "one row                 0.5          3.25\n"
        "another            1.235e+04             1\n")


def test_where_one_class_alone_is_looked_at_there_are_no_probes(capsys):
    data = small_data()
    data = data._replace(labels=torch.zeros_like(data.labels), test_labels=torch.zeros_like(data.test_labels))
    found = probes.probe(data, torch.rand(len(data.images), 8), torch.rand(len(data.test_images), 8))
    assert all(value != value for value in found.values()) and "features are of one class: no probes" in capsys.readouterr().out
    assert "knn" not in probes.quick_probe(small_model("vicreg").eval(), data)     # it could only be 1


def test_the_probes_are_those_of_scikit_learn_and_of_so_many_labels():
    """Columns of the features differ in scale by far, so that it matters that they are standardised."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 4
    h = torch.randn(400, 16, generator=generator) + 1.2 * torch.eye(16)[y]
    h = h * torch.logspace(-4, 4, 16)
    data = Data(None, y[:200], None, y[200:], classes=range(4))
    found = probes.probe(data, h[:200], h[200:])
    known = h[:200], y[:200], h[200:], y[200:]
    fitted = LogisticRegression(max_iter=300).fit((h[:200] - h[:200].mean(0)) / h[:200].std(0, correction=0), y[:200])
    linear = fitted.score((h[200:] - h[:200].mean(0)) / h[:200].std(0, correction=0), y[200:])
    assert found["linear"] == pytest.approx(linear, abs=.011) and linear > .5
    assert found["k-NN"] == knn_accuracy(*known)
    few = [found[f"{count} a class"] for count in (1, 5, 10)]
    assert few == [few_label_accuracy(*known, count) for count in (1, 5, 10)] and len({*few}) == 3


def test_features_of_more_images_than_are_looked_at_are_all_kept(tmp_path, monkeypatch):
    model, data = small_model("vicreg").eval(), small_data()
    monkeypatch.setattr(probes, "limited", lambda data: limited(data, 8))
    found = probes.examine(model, data)
    assert len(found.h) == len(found.h_test) == 8
    probes.save_features(model.encoder, data, found, tmp_path)
    with np.load(tmp_path / "features.npz") as kept:
        assert len(kept["train_features"]) == len(kept["train_files"]) == len(kept["train_labels"]) == 24
        assert len(kept["test_features"]) == len(kept["test_files"]) == 9
        torch.testing.assert_close(torch.from_numpy(kept["train_features"]), model.encoder(data.images / 255).detach())
