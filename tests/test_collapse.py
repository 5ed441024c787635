"""kernels/collapse.py: the panel by brute force and on known values, the verdict on runs and on panels, k-NN."""
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from kernels import collapse_panel, few_label_accuracy, knn_accuracy, verdict
from kernels.harness.cli import read_data
from scripts import ROOT, forked


def white(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- The panel: definitions ----------------------------------------------------------------------------------
def brute_force(z, z1, z2):
    """Each measure from its definition, pair by pair, in float64."""
    n, d = z.shape
    unit = z / z.norm(dim=1, keepdim=True)
    pairs = ~torch.eye(n, dtype=torch.bool)
    cosine = (unit @ unit.T)[pairs].mean()
    singular = torch.linalg.svdvals(z)
    share = singular / singular.sum() + 1e-7
    eigenvalues = torch.linalg.eigvalsh(torch.cov(z.T))
    squared = (unit[:, None] - unit[None]).square().sum(2)
    distances = (z[:, None] - z[None]).norm(dim=2).fill_diagonal_(math.inf).sort(dim=1).values
    ratio = distances[:, 1] / distances[:, 0]
    alignment = (z1 / z1.norm(dim=1, keepdim=True) - z2 / z2.norm(dim=1, keepdim=True)).square().sum(1).mean()
    return {"samples": n, "width": d,
            "raw std": z.std(0).mean(),
            "std": unit.std(0).mean() * d ** 0.5,
            "cosine": cosine,
            "RankMe": (-(share * share.log()).sum()).exp(),
            "participation": eigenvalues.sum() ** 2 / eigenvalues.square().sum(),
            "uniformity": (-2 * squared[pairs]).exp().mean().log(),
            "TwoNN": (n - 1) / ratio.log().sum(),
            "alignment": alignment,
            "view ratio": alignment / (2 - 2 * cosine)}


def shifted(n, d):
    """All-positive features of small spread around a large mean, correlated."""
    return 3 + 0.1 * white(n, d) @ white(d, d, 1) / d ** 0.5


@pytest.mark.parametrize("z", [white(500, 40), white(40, 300), shifted(500, 40)], ids=["white", "wide", "shifted"])
def test_panel_equals_the_definitions_by_brute_force(z):
    z1 = z + 0.1 * white(*z.shape, 2)
    z2 = z + 0.1 * white(*z.shape, 3)
    panel = collapse_panel(z, z1, z2)
    truth = brute_force(z, z1, z2)
    assert list(panel) == list(truth)
    for name, value in truth.items():
        assert panel[name] == pytest.approx(float(value), rel=1e-6, abs=1e-6), name


def test_large_samples_are_streamed_in_fp32_to_the_same_values(monkeypatch):
    from kernels import collapse
    z = shifted(500, 40)
    exact = collapse_panel(z, z, z)
    monkeypatch.setattr(collapse, "_work_dtype", lambda z: torch.float32)
    for name, value in collapse_panel(z, z, z).items():
        assert value == pytest.approx(exact[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panel_takes_any_float_dtype(dtype):
    z = white(100, 8).to(dtype)
    panel = collapse_panel(z, z, z)
    wide = collapse_panel(z.double(), z.double(), z.double())
    for name, value in wide.items():
        assert panel[name] == pytest.approx(value, rel=1e-9), name


def test_without_views_their_measures_are_left_out():
    assert "alignment" not in collapse_panel(white(20, 4))
    assert "view ratio" not in collapse_panel(white(20, 4))


@pytest.mark.parametrize("shapes, message", [
    ([(3, 8)], r"N >= 4, got torch.float64 \[3, 8\]"),
    ([(8, 8, 2)], r"\[8, 8, 2\]"),
    ([(8, 8), (8, 8)], "two views, z1 and z2, or none"),
    ([(8, 8), (8, 8), (8, 1)], r"shape of z \[8, 8\], got \[8, 1\]")])
def test_shapes_that_do_not_fit_are_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        collapse_panel(*[torch.zeros(shape, dtype=torch.float64) for shape in shapes])


LARGE = """
import resource, time
import torch
from kernels import collapse_panel

z = torch.randn(50_000, 512)
start = time.time()
panel = collapse_panel(z, z, z)
print(time.time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, panel["RankMe"])
"""


@pytest.mark.slow
def test_panel_of_50_000_by_512_within_a_minute_and_a_gigabyte():
    """In a process of its own: a peak is that of a process's whole life."""
    done = subprocess.run([sys.executable, "-c", LARGE], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, gigabytes, rankme = map(float, done.stdout.split())
    assert seconds <= 60
    assert gigabytes <= 1
    assert rankme > 500


# ---- The panel: known values -----------------------------------------------------------------------------------
def test_ranks_of_white_features():
    got = collapse_panel(white(512, 2048))
    assert got["RankMe"] == pytest.approx(494.9, rel=0.01)
    assert got["participation"] == pytest.approx(409.6, rel=0.01)        # N D / (N + D)


def test_ranks_of_a_power_law():
    """Covariance eigenvalues proportional to 1/k."""
    columns = torch.cat([torch.ones(1024, 1), torch.randn(1024, 512)], 1).double()
    basis = torch.linalg.qr(columns).Q[:, 1:]
    got = collapse_panel(basis * torch.arange(1, 513) ** -0.5)
    assert got["participation"] == pytest.approx(28.2808, abs=1e-3)
    assert got["RankMe"] == pytest.approx(409.5545, abs=0.2)             # its 1e-7 inside the entropy adds 0.11


def test_near_constant_features_have_full_centred_rank_and_no_uncentred_one():
    got = collapse_panel(3 + 0.01 * white(4096, 256))
    assert got["raw std"] == pytest.approx(0.01, rel=0.01)
    assert got["RankMe"] == pytest.approx(1.61, abs=0.02)
    assert got["participation"] == pytest.approx(240.7, rel=0.01)
    assert got["cosine"] > 0.999
    assert got["std"] < 0.01


@pytest.mark.parametrize("d, uniformity", [(128, -3.937), (2, -1.575)])
def test_spread_of_white_features(d, uniformity):
    z = white(2000, d)
    got = collapse_panel(z, z, z)
    assert got["std"] == pytest.approx(1, abs=0.01)
    assert got["cosine"] == pytest.approx(0, abs=0.01)
    assert got["uniformity"] == pytest.approx(uniformity, abs=0.02)
    assert got["alignment"] == 0


@pytest.mark.parametrize("d, twonn", [(2, 1.95), (10, 8.75)])
def test_twonn_of_uniform_cubes(d, twonn):
    cube = torch.rand(3000, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert collapse_panel(cube)["TwoNN"] == pytest.approx(twonn, rel=0.04)


def test_twonn_leaves_out_points_that_have_a_duplicate():
    cube = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = collapse_panel(torch.cat([cube, cube[:50]]))["TwoNN"]
    assert got == pytest.approx(collapse_panel(cube)["TwoNN"], rel=0.1)


# ---- The verdict: real runs -------------------------------------------------------------------------------------
# What is wrong: (script, options, the verdicts it may get). Small and short: 512 digits, a narrow encoder, some 300
# steps. FALCON's embeddings have one length, and without its prior they stay as they start, in one direction: that is
# "not spread yet" after 300 steps; the default length has to end in "collapsed" (slow).
HEALTHY, ONE_POINT, THIN, NOT_YET = "No collapse", "COLLAPSED", "DIMENSIONAL COLLAPSE", "NOT SPREAD YET"
RUNS = {
    "VICReg": ("vicreg.py", "--batch 32 --epochs 20", [HEALTHY]),
    "IConE": ("icone.py", "--batch 16 --epochs 20", [HEALTHY]),
    "FALCON": ("falcon.py", "--batch 32 --epochs 20", [HEALTHY]),
    "BA-SSL": ("ba_ssl.py", "--batch 32 --epochs 20", [HEALTHY]),
    "no variance term": ("vicreg.py", "--batch 32 --epochs 20 --lr 1e-2 --variance 0", [ONE_POINT]),
    "no diversity term": ("icone.py", "--batch 16 --epochs 20 --lr 1e-2 --weight 0", [ONE_POINT]),
    "no covariance term, 512 wide": ("vicreg.py", "--batch 32 --epochs 20 --lr 1e-2 --covariance 0", [THIN]),
    "no covariance term, 32 wide": ("vicreg.py", "--batch 32 --epochs 20 --lr 1e-2 --covariance 0 --projector 32",
                                    [THIN]),
    "FALCON, tanh": ("falcon.py", "--batch 32 --epochs 30 --lr 2e-2 --norm tanh", [THIN, ONE_POINT]),
    "FALCON, no prior": ("falcon.py", "--batch 64 --epochs 30 --prior none", [ONE_POINT, NOT_YET]),
    "VICReg, one epoch": ("vicreg.py", "--batch 32 --epochs 1", [HEALTHY, NOT_YET]),
    "BA-SSL, one epoch": ("ba_ssl.py", "--batch 32 --epochs 1", [HEALTHY, NOT_YET])}
SLOW = ["no diversity term", "no covariance term, 512 wide", "FALCON, tanh", "FALCON, no prior", "BA-SSL, one epoch"]


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """{run: its report} of the chosen runs, as many at a time as there are cores."""
    digits = read_data("digits")
    small = tmp_path_factory.mktemp("verdicts")
    np.savez(small / "small.npz",
             train_images=digits.images[:512, 0].clamp(0, 1).numpy(), train_labels=digits.labels[:512].numpy(),
             test_images=digits.test_images[:360, 0].clamp(0, 1).numpy(), test_labels=digits.test_labels[:360].numpy())
    items = [item for item in request.session.items
             if item.path == Path(__file__) and not item.get_closest_marker("skip")]
    chosen = {item.callspec.params["run"] for item in items
              if "run" in getattr(getattr(item, "callspec", None), "params", ())}

    def make(name):
        script, options, _ = RUNS[name]
        folder = small / name.replace(" ", "-").replace(",", "")
        folder.mkdir()
        arguments = ["--data", small / "small.npz", "--width", 4, *options.split(), "--out", "run"]
        done = forked(script, arguments, folder)
        assert done.returncode == 0, done.stderr
        return json.loads((folder / "run" / "report.json").read_text())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(chosen, pool.map(make, chosen)))


@pytest.mark.parametrize("run", [pytest.param(run, marks=[pytest.mark.slow] * (run in SLOW)) for run in RUNS])
def test_verdict_on_a_run(reports, run):
    sentence = reports[run]["verdict"]
    assert any(sentence.startswith(expected) for expected in RUNS[run][2]), sentence


@pytest.mark.slow
def test_falcon_without_its_prior_ends_collapsed(tmp_path):
    done = forked("falcon.py", ["--prior", "none", "--out", "run"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "report.json").read_text())["verdict"].startswith(ONE_POINT)


@pytest.mark.parametrize("run", ["VICReg", "IConE", "FALCON", "BA-SSL"])
def test_an_untrained_network_is_not_called_collapsed(reports, run):
    untrained = reports[run]["panels"]["untrained z"]
    assert verdict(untrained, untrained).startswith(NOT_YET)


# ---- The verdict: synthetic embeddings --------------------------------------------------------------------------
def near(z):
    """Two views that know their image."""
    scale = z.std()
    return z, z + 0.1 * scale * white(*z.shape, 8), z + 0.1 * scale * white(*z.shape, 9)


def line():
    return white(500, 1) @ white(1, 64, 1)


def four_points():
    return white(4, 64)[torch.arange(500) % 4]


def positive():
    """All-positive features with a mean cosine of 0.97."""
    return 1 + 0.175 * white(500, 64)


def one_nan():
    z = white(500, 64)
    z[3, 5] = math.nan
    return z


SYNTHETIC = {  # name: (embeddings of images, of two views, the verdict)
    "white": (near(white(500, 64)), HEALTHY),
    "all positive": (near(positive()), HEALTHY),
    "small but whole": (near(1e-3 * white(500, 64)), HEALTHY),
    "fewer samples than dimensions": (near(white(12, 512)), HEALTHY),
    "duplicates": (near(white(250, 64).repeat(2, 1)), HEALTHY),
    "a constant": ((torch.ones(500, 64),) * 3, ONE_POINT),
    "zeros": ((torch.zeros(500, 64),) * 3, ONE_POINT),
    "a constant plus noise": ((1 + 1e-3 * white(500, 64),) * 3, ONE_POINT),
    "a constant plus noise of each view": (tuple(1 + 0.1 * white(500, 64, k) for k in range(3)), ONE_POINT),
    "views as far apart as images": (tuple(white(500, 64, k) for k in range(3)), ONE_POINT),
    "a line": (near(line()), THIN),
    "four points": ((four_points(),) * 3, THIN),
    "a line and noise": (near(line() + 0.05 * white(500, 64, 2)), THIN),
    "NaN": ((one_nan(),) * 3, ONE_POINT)}


@pytest.mark.parametrize("name", SYNTHETIC)
def test_verdict_on_synthetic_embeddings(name):
    embeddings, expected = SYNTHETIC[name]
    sentence = verdict(collapse_panel(*embeddings))
    assert sentence.startswith(expected), sentence


def test_all_positive_features_have_the_mean_cosine_that_the_table_says():
    assert collapse_panel(positive())["cosine"] == pytest.approx(0.97, abs=0.005)


@pytest.mark.parametrize("name, expected", [("white", HEALTHY), ("a line", THIN), ("a constant plus noise", ONE_POINT)])
def test_verdict_without_views(name, expected):
    z, _, _ = SYNTHETIC[name][0]
    sentence = verdict(collapse_panel(z))
    assert sentence.startswith(expected)
    assert "views" not in sentence


def test_the_sentence_names_the_criterion_that_failed_with_value_and_bound_alone():
    sentence = verdict(collapse_panel(*near(line())))
    assert sentence == "DIMENSIONAL COLLAPSE: participation is 1.00 of at most 64 (bound 1.25)."


def test_what_is_no_narrower_than_before_training_is_not_called_collapsed():
    blind = collapse_panel(*[white(500, 64, k) for k in range(3)])
    shrunk = collapse_panel(*[0.1 * white(500, 64, k) for k in range(3)])
    assert verdict(blind, blind).startswith(NOT_YET)
    assert verdict(shrunk, blind).startswith(ONE_POINT)
    assert "raw std is 0.1 of the untrained network's (bound 0.3)" in verdict(shrunk, blind)


def test_what_training_has_shrunk_is_collapsed_though_views_are_not_wholly_apart():
    """--variance 0 on digits, seed 2, ended at a view ratio of 0.79 and 0.081 of its raw std, k-NN 0.15."""
    def embeddings(scale, noise):
        z = scale * white(500, 64)
        return collapse_panel(z, *(z + noise * scale * white(500, 64, k) for k in (8, 9)))

    untrained, half_seen, seen = embeddings(1, 1.2), embeddings(.08, 1.2), embeddings(.08, .4)
    assert .5 < half_seen["view ratio"] < .8 and seen["view ratio"] < .3
    assert verdict(half_seen, untrained).startswith(ONE_POINT)
    assert "(bound 0.45)" in verdict(half_seen, untrained)
    assert verdict(untrained, untrained).startswith(HEALTHY)
    assert verdict(half_seen).startswith(HEALTHY)                        # an untrained panel is what tells
    assert verdict(seen, untrained).startswith(HEALTHY)                  # small, but each image is known


# ---- Neighbours ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [1, 5, 500])
def test_knn_equals_scikit_learn(k):
    h, h_test = white(200, 6).float(), white(90, 6, 1).float()
    y = (h[:, 0] > 0).long() + (h[:, 1] > 0)
    y_test = (h_test[:, 0] > 0).long() + (h_test[:, 1] > 0)
    theirs = KNeighborsClassifier(min(k, 200), metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    assert knn_accuracy(h, y, h_test, y_test, k=k) == pytest.approx(theirs.fit(h, y).score(h_test, y_test))


def test_readmes_four_lines_run_in_a_foreign_loop():
    """A network and views of somebody else's."""
    network = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    images = torch.rand(50, 20)
    z = [network(images + 0.1 * torch.randn(50, 20)) for _ in range(3)]
    panel = collapse_panel(*z)
    assert verdict(panel, panel).endswith(".")
    assert not math.isnan(panel["TwoNN"])
    assert F.normalize(z[0]).requires_grad                               # nothing of it is detached in place


@pytest.mark.parametrize("labels", [1, 3, 50])
def test_few_label_accuracy_is_sklearns_nearest_centroid_of_the_chosen(labels):
    """CL2N by hand, the same choices; a class of 12 images has all of them taken."""
    generator = torch.Generator().manual_seed(1)
    y, y_test = torch.arange(60) % 4 + 2, torch.arange(80) % 4 + 2       # classes 2 to 5
    y = torch.cat([y[:-3], y.new_full((12,), 9)])                        # and a small one, far apart in number
    centres = torch.randn(10, 6, generator=generator)
    h, h_test = (centres[c] + 1.5 * torch.randn(len(c), 6, generator=generator) + 3 for c in (y, y_test))
    unit, unit_test = (torch.nn.functional.normalize(x - h.mean(0)) for x in (h, h_test))
    draws, scores = torch.Generator().manual_seed(0), []
    for _ in range(7):
        order = torch.randperm(len(y), generator=draws)
        rows = torch.cat([order[y[order] == c][:labels] for c in y.unique()])
        scores.append(NearestCentroid().fit(unit[rows], y[rows]).score(unit_test, y_test))
    expected = sum(scores) / 7
    assert few_label_accuracy(h, y, h_test, y_test, labels, draws=7) == pytest.approx(expected) and .2 < expected < 1
