"""What grows with the number of images, from a thousand to a million: steps, checkpoints, what the report looks at."""
import contextlib
import io
import statistics
import time

import pytest
import torch
from small import LOOPS, small_model, small_options

from kernels.harness.images import Data, limited
from kernels.harness.run import Run

STEPS = 200


class Enough(Exception):
    pass


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(count):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (count + 100, 1, 8, 8), dtype=torch.uint8, generator=generator)
    y = torch.arange(count + 100) % 10
    return x[:count], y[:count], x[count:], y[count:]


def numbers(name, count, folder):
    """Of a script's own loop: ms of a step (median), MB of last.pt at the end of an epoch and inside of one, s to write it."""
    x, y, x_test, y_test = images(count)
    began = []

    def view(x, generator):
        began.append(time.perf_counter())
        if len(began) > 2 * STEPS:                                       # two views a step
            raise Enough
        return x + .1 * torch.randn(x.shape, generator=generator)

    model = small_model(name, batch=8, count=count)
    data = Data(x, y, x_test, y_test, classes=range(10), view=view)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    folder.mkdir(parents=True)
    run = Run(small_options(batch=8, accumulate=1, epochs=2, save_minutes=1e9), data, folder)
    run.end_epoch = lambda measured: (run.history.append({"loss": 1.}), run.begin_epoch())     # writes nothing
    with pytest.raises(Enough), contextlib.redirect_stderr(io.StringIO()):           # of the bar
        LOOPS[name].train(model, optimizer, data, run, *[lambda model: {}] * (name == "ba_ssl"))
    steps = [1e3 * (later - sooner) for sooner, later in zip(began[::2], began[2::2])]
    sizes = []
    for order in (run.order, None):
        run.order = order
        start = time.perf_counter()
        run.write_checkpoint()
        seconds = time.perf_counter() - start
        sizes.append((folder / "last.pt").stat().st_size / 1e6)
    inside, after = sizes
    return statistics.median(steps[50:]), after, inside, seconds


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_a_step_does_not_grow_and_a_checkpoint_by_rows_alone(name, tmp_path, capsys):
    """kernels/harness/README.md carries these numbers. last.pt holds 8 bytes an image inside of an epoch, its order; IConE's
    a row of 32 numbers and a byte besides."""
    found = {}
    for count in (1000, 100_000, 1_000_000):
        found[count] = numbers(name, count, tmp_path / str(count))
        with capsys.disabled():
            step, after, inside, seconds = found[count]
            print(f"\n{name:7} {count:9,} images: step {step:5.2f} ms; last.pt {after:6.1f} MB, {inside:6.1f} inside of an epoch, "
                  f"{seconds:4.2f} s", end="")
    few, many = found[1000], found[1_000_000]
    assert many[0] <= 2 * few[0] + .5
    a_row = 129 if name == "icone" else 0
    assert many[1] - few[1] <= 1.01 * 1e-6 * a_row * 999_000 + .1
    assert many[2] - many[1] <= 8.1


@pytest.mark.slow
def test_a_report_looks_at_as_many_images_however_many_there_are():
    found = {}
    for count in (20_000, 1_000_000):
        data = Data(*images(count), classes=range(10))
        start = time.perf_counter()
        seen = limited(data)
        found[count] = len(seen.images), time.perf_counter() - start
    assert found[20_000][0] == found[1_000_000][0] == 10_000
    assert found[1_000_000][1] < 2
