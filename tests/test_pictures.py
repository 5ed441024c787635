"""kernels/harness/pictures.py: titles, legends and axes say what is shown, and nothing runs off a picture."""
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels.harness import pictures
from kernels.harness.images import Data
from kernels.harness.views import posed_view

NOWHERE = Path("nowhere")                                            # nothing is saved: see drawn()


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they would be saved."""
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def noise(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def data_of(x, classes=None, **more):
    labels = None if classes is None else torch.arange(len(x)) % len(classes)
    return Data(x, labels, x, labels, [] if classes is None else np.array(classes), view=posed_view, **more)


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


@pytest.mark.parametrize("shape, words", [
    ((1, 8, 8), ""), ((3, 8, 8), ""), ((4, 8, 8), "channels 1 to 3 as RGB"), ((7, 8, 8), "mean of 7 channels"),
    ((1, 6, 8, 8), "central slice along the first axis"),
    ((2, 6, 8, 8), "central slice along the first axis, mean of 2 channels")])
def test_what_part_of_an_image_is_shown_is_said(drawn, shape, words):
    assert pictures.part_shown(*shape) == words
    data, h = data_of(noise(12, *shape)), noise(12, 4)
    pictures.plot_views(data, NOWHERE)
    pictures.plot_neighbours(data, h, h, NOWHERE)
    for figure in drawn:
        assert [text for text in texts(figure) if text.startswith("shown: ")] == [f"shown: {words}"] * bool(words)
    pictures.plot_embedding(data, h, NOWHERE)
    assert drawn[-1].axes[0].get_title() == f"t-SNE of the encoder's test features\n{words}".strip()


def test_numbers_and_strange_names_below_neighbours(drawn):
    files = np.array(["a\r\u2028b.png"] * 12)
    data = data_of(noise(12, 1, 8, 8), ["", "cat"], files=files, test_files=files)
    pictures.plot_neighbours(data, noise(12, 4), noise(12, 4), NOWHERE)
    found = texts(drawn[0])
    assert "nearest 1\n(cosine)" in found and "cat\na  b.png" in found and "(empty)\na  b.png" in found


@pytest.mark.parametrize("count", [60, 61, 200])
def test_a_legend_is_there_where_it_fits(drawn, count):
    data = data_of(noise(400, 1, 8, 8), [f"a long name of class {k}" for k in range(count)])
    pictures.plot_embedding(data, noise(400, 4), NOWHERE)
    figure, = drawn
    axis, = figure.axes
    if count > 60:
        assert axis.get_legend() is None and f"{count} classes, no legend" in axis.get_title()
    else:
        figure.draw_without_rendering()
        box = axis.get_legend().get_window_extent()
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1 and axis.bbox.x1 < box.x0 < box.x1 <= figure.bbox.x1


def test_a_class_without_a_name_is_in_the_legend(drawn):
    pictures.plot_embedding(data_of(noise(12, 1, 8, 8), ["", "cat"]), noise(12, 4), NOWHERE)
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["(empty)", "cat"]


@pytest.mark.parametrize("n, words", [
    (100, ""), (200, "150 of 200 as images"), (1100, "1,000 of the 1,100 looked at, 150 of 1,000 as images")])
def test_of_many_features_a_part_is_shown(drawn, monkeypatch, n, words):
    monkeypatch.setattr(pictures.TSNE, "fit_transform", lambda self, h: h[:, :2].numpy())
    pictures.plot_embedding(data_of(noise(n, 1, 4, 4)), noise(n, 4), NOWHERE)
    assert drawn[0].axes[0].get_title() == f"t-SNE of the encoder's test features\n{words}".strip()


@pytest.mark.parametrize("sides", [(120, 8), (8, 120), (8, 8)])
def test_images_among_features_are_20_points_long(drawn, sides):
    pictures.plot_embedding(data_of(noise(12, 1, *sides)), noise(12, 4), NOWHERE)
    for box in drawn[0].axes[0].artists:
        assert box.offsetbox.get_zoom() * max(box.offsetbox.get_data().shape[:2]) == pytest.approx(20)


def test_features_at_one_point_are_not_called_tsne(drawn):
    pictures.plot_embedding(data_of(noise(12, 1, 8, 8)), torch.ones(12, 4), NOWHERE)
    assert drawn[0].axes[0].get_title() == "first two features: all at one point, t-SNE has nothing to place"


@pytest.mark.parametrize("losses", [[24, 23, 22.2], [15, 9, 8], [30, 3, .5, .02], [.4, -1, -3], [5, -5], [1e6, 1, .1],
                                    [.05, .002], [7.], [1e30, 1.]])
def test_a_loss_axis_has_several_readable_numbers(drawn, losses):
    history = [{"epoch": k, "loss": loss, "RankMe": 3. + k} for k, loss in enumerate(losses, 1)]
    pictures.plot_curves(history, {}, NOWHERE)
    loss, rank = drawn[0].axes
    low, high = loss.get_ylim()
    assert low <= min(losses) <= max(losses) <= high
    ticks = [tick for tick in loss.yaxis.get_majorticklocs() if low <= tick <= high]
    assert 3 <= len(ticks) <= 15
    for tick in ticks:                                               # short, and yet the number where it stands
        label = loss.yaxis.get_major_formatter()(tick)
        assert len(label) <= 6 and float(label) == pytest.approx(tick)
    assert rank.get_ylim() == (0, pytest.approx(1.08 * (3 + len(losses))))       # the top point is not cut


def test_a_picture_is_of_the_kind_of_its_name_and_never_half_written(tmp_path):
    figure = pictures.Figure()
    for ending, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml"), (".PNG", b"\x89PNG")):
        pictures.save_figure(figure, tmp_path / f"x{ending}")
        assert (tmp_path / f"x{ending}").read_bytes().startswith(start)


def test_neighbours_are_the_nearest_and_the_first_images_of_different_classes(drawn):
    """A test image's features are those of the training image with its number less three."""
    h = noise(40, 6) - .5
    data = data_of(noise(40, 1, 8, 8), classes=[*"abcdefgh"], files=range(40), test_files=range(40))
    pictures.plot_neighbours(data, h, h.roll(3, 0), NOWHERE)
    figure, = drawn
    below = [int(word.split("\n")[-1]) for word in texts(figure) if word[-1:].isdigit() and "\n" in word]
    own, nearest, *_ = numbers = torch.tensor(below).view(6, 8).tolist()
    assert len({number % 8 for number in own}) == 8
    assert [(number - 3) % 40 for number in own] == nearest
    cosines = F.normalize(h.roll(3, 0)[own]) @ F.normalize(h).T
    for k in range(5):
        assert cosines.topk(5).indices[:, k].tolist() == numbers[1 + k]
