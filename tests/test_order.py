"""kernels/harness/order.py: who is seen when."""
import types

import pytest
import torch

from kernels.harness.order import shuffled, through_window


def run_of(count, batch, epochs, seed=0):
    return types.SimpleNamespace(
        count=count, step_size=batch, steps_per_epoch=count // batch, device="cpu", cycles=[epochs], history=[],
        generator=torch.Generator().manual_seed(seed), args=types.SimpleNamespace(seed=seed))


def epochs_of(run, order, many):
    """Image numbers of each epoch, cut to whole steps as a run does."""
    found = []
    for _ in range(many):
        found.append(order(run)[:run.steps_per_epoch * run.step_size])
        run.history.append({})
    return found


def steps_apart(numbers):
    """Visits of an image in a row lie so many visits apart, the median over all of them."""
    order = numbers.argsort(stable=True)
    same = numbers[order].diff() == 0
    return order.diff()[same].median().item()


def test_shuffled_has_each_image_once():
    run = run_of(100, 8, 3)
    first, second = shuffled(run), shuffled(run)
    assert torch.equal(first.sort().values, torch.arange(100)) and not torch.equal(first, second)


@pytest.mark.parametrize("count, batch, window", [(1437, 64, 400), (2000, 16, 400), (1000, 1, 100), (5000, 20, 500)])
def test_visits_through_a_window_come_close_together_and_as_often(count, batch, window):
    many = 12
    run = run_of(count, batch, many)
    epochs = epochs_of(run, through_window(window), many)
    assert {len(epoch) for epoch in epochs} == {count // batch * batch}
    everything = torch.cat(epochs)
    visits = torch.bincount(everything, minlength=count)
    assert visits.sum() == many * (count // batch * batch)
    assert visits.min() >= many - 4 and visits.max() <= many + 1
    assert steps_apart(everything) < 1.5 * window < .95 * steps_apart(torch.cat(epochs_of(run_of(count, batch, many), shuffled, many)))


@pytest.mark.parametrize("count, epochs, rows", [(1437, 45, 430), (20_000, 10, 550)])
def test_the_last_visits_are_of_few_images(count, epochs, rows):
    """What icone.py says of its bank, the rows of the last 2,048 visits, at batch 64."""
    everything = torch.cat(epochs_of(run_of(count, 64, epochs), through_window(400), epochs))
    half = len(everything) // 2
    for end in (half, half + 1000, half + 5000):
        assert len(everything[end - 2048:end].unique()) == pytest.approx(rows, rel=.1)


def test_no_window_has_an_image_twice_and_no_step_crosses_two():
    run = run_of(1437, 64, 45)
    epoch, = epochs_of(run, through_window(400), 1)
    windows = epoch.split([5 * 64, 6 * 64, 5 * 64, 6 * 64])              # 22 steps in four windows
    for images in windows:
        assert len(images.unique()) == len(images)
    assert len(epoch.unique()) < 450                                     # of the first 1/45 of the way


def test_the_orders_end_is_joined_to_its_start():
    run = run_of(1000, 10, 8)
    epochs = epochs_of(run, through_window(200), 8)
    assert torch.isin(epochs[0], epochs[-1]).any()                       # by the window that reaches around
    assert not torch.isin(epochs[0], epochs[4]).any()


@pytest.mark.parametrize("count, batch, window", [(1437, 256, 400), (300, 64, 400), (80, 10, 20), (1437, 64, 0)])
def test_where_an_epoch_is_one_window_all_are_shuffled_and_it_says_so(count, batch, window, capsys):
    assert torch.equal(through_window(window)(run_of(count, batch, 9)), shuffled(run_of(count, batch, 9)))
    said = f"order: {count // batch} steps an epoch, too few for two windows: all images are shuffled\n"
    assert capsys.readouterr().out == (said if window else "")           # 0 asks for it


def test_a_window_that_slides_is_said_once(capsys):
    epochs_of(run_of(1437, 64, 45), through_window(400), 3)
    assert capsys.readouterr().out == "order: 22 steps an epoch, 4 windows of 359 images, sliding\n"


def test_added_epochs_pass_over_all_images_once_more():
    run = run_of(1000, 10, 6)
    epochs_of(run, through_window(200), 6)
    run.cycles.append(11)
    visits = torch.bincount(torch.cat(epochs_of(run, through_window(200), 5)), minlength=1000)
    assert visits.min() >= 4 and visits.max() <= 6


def test_an_epochs_order_depends_on_the_generator_and_the_epochs_before_alone():
    whole, resumed = run_of(1000, 10, 6), run_of(1000, 10, 6)
    epochs_of(whole, through_window(200), 3)
    resumed.history, state = [{}] * 3, whole.generator.get_state()
    resumed.generator.set_state(state)
    assert torch.equal(through_window(200)(whole), through_window(200)(resumed))
