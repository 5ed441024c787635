"""A run that loses nothing, in one process or several: files written whole, a locked folder, signals.

    with whole(folder / "last.pt") as file:         # the old file or the new one, whenever power fails
        torch.save(state, file)
    hold(folder)                                    # BlockingIOError if another run holds it
    with noted_signals() as caught:                 # Ctrl-C, SIGTERM, SIGHUP: finish the step, save, leave
        ...
    h = gather(h)                                   # features of all processes that torchrun started

With one process these change nothing and wait for nobody.
"""
import os
import shlex
import signal
import sys
import time
import warnings
import zipfile
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:                                                  # Windows has no such locks
    fcntl = None


# ---- The folder --------------------------------------------------------------------------------------------
@contextmanager
def whole(path):
    """A file to write bytes to; once it is all on the disk it takes the place of `path`."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with open(part, "xb") as file:                                   # x: does not follow a link put here
        try:
            yield file
        except RuntimeError as error:                                # torch.save's, when the disk is full
            raise error.__context__ or error
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_text(path, text):
    """As Path.write_text, but whole."""
    with whole(path) as file:
        file.write(text.encode())


def load(path):
    """A file of torch.save, on the CPU; ValueError if a bit has changed: torch does not look."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged:
        raise ValueError(f"{damaged} in it is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def hold(folder):
    """Locks the folder until this process ends, however it ends; BlockingIOError if another one has it."""
    if fcntl:
        handle = os.open(folder, os.O_RDONLY)                        # stays open
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---- Signals -----------------------------------------------------------------------------------------------
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def on_signals(handler):
    """handler(number, frame) is called at the first of SIGNALS; a second Ctrl-C ends the process at once."""
    def once(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        handler(number, frame)
    return [signal.signal(number, once) for number in SIGNALS]


@contextmanager
def noted_signals():
    """-> a list, empty until signals come; their numbers then."""
    caught = []
    before = on_signals(lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in zip(SIGNALS, before):
            signal.signal(number, handler)


# ---- Several processes, each with a part of every batch ----------------------------------------------------
def join_processes(device):
    """Where torchrun started this process: joins the others. -> its device, one of its own for "cuda"."""
    if not dist.is_torchelastic_launched():
        return device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # torchrun ends all when one ends; until then they wait, however long the first one decodes or draws.
    dist.init_process_group("nccl" if "cuda" in device else "gloo", timeout=timedelta(days=1))
    return device


def rank():
    """Number of this process; 0 writes and prints."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def processes():
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_part(count):
    """The slice of a batch of `count` images that this process has."""
    share = count // processes()
    return slice(rank() * share, (rank() + 1) * share)


class Gather(torch.autograd.Function):
    """See gather(). DistributedDataParallel takes the mean of all processes' gradients: hence x processes."""

    @staticmethod
    def forward(ctx, h):
        parts = [torch.empty_like(h) for _ in range(processes())]
        dist.all_gather(parts, h)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        own = gradient.chunk(processes())[rank()]
        return own * processes()


def parallel(model):
    """model, or what calls it and gives its parameters the mean of all processes' gradients."""
    if not dist.is_initialized():
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)               # torch 2.13 renames broadcast_buffers
        return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)   # they agree anyway


def gather(h):
    """Features h [B, E] of this process -> those of all processes, in order: [B x processes, E].

    What follows must be the same in every process, so that all find the same gradient; no process asks.
    """
    return Gather.apply(h.contiguous()) if dist.is_initialized() else h


def everyone(thing):
    """[thing of process 0, thing of process 1, ...]: anything that pickles; the one thing if alone."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * processes()
    dist.all_gather_object(things, thing)
    return things


def first(thing):
    """Process 0's thing, anything that pickles, in each of them."""
    things = [thing]
    if dist.is_initialized():
        dist.broadcast_object_list(things)
    return things[0]


def agreed(numbers, device):
    """Each the largest of all processes' whole numbers."""
    if not dist.is_initialized():
        return numbers
    numbers = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


@contextmanager
def in_turn():
    """Process 0 goes first, the others after it."""
    if rank():
        dist.barrier()
    yield
    if rank() == 0 and dist.is_initialized():
        dist.barrier()


# ---- Beginning and end -------------------------------------------------------------------------------------
def as_typed(config):
    """Options as the command line that gives them."""
    words = []
    for name, value in config.items():
        if value is not None and value is not False:
            option = f"--{name.replace('_', '-')}"
            text = ("-".join(map(str, value)) or "none") if isinstance(value, list) else value
            words.append(option if value is True else f"{option}={text}")
    return words


def die(message, code=2):
    """How a script ends on a user's mistake: with one line, whatever the message quotes."""
    if rank():
        time.sleep(5)        # what all find process 0 says meanwhile, and torchrun ends this one
        message = f"process {rank()}: {message}"
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def leave(number, folder="THE RUN'S FOLDER"):
    """How a signal ends a run."""
    if rank() == 0:
        die(f"ended by {signal.Signals(number).name}; what was saved stands, go on with: python "
            f"{shlex.quote(sys.argv[0])} --resume {shlex.quote(str(folder))}", 128 + number)
    sys.exit(128 + number)


def run(main):
    """Calls a script's main(); a signal, a full disk, a lost folder or little memory end it with one line."""
    if rank():
        sys.stdout = open(os.devnull, "w")                           # process 0 speaks
    on_signals(lambda number, frame: leave(number))
    try:
        main()
    except OSError as error:
        die(f"cannot read or write {error.filename or 'a file'} ({error.strerror}): mend it, then go on with "
            "--resume and the run's folder")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            die("out of memory: lower --batch, --width or what else makes it large")
        if processes() == 1 or "onnection" not in str(error):
            raise
        die("the connection to another process is lost")
