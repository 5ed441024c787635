"""Processes: several that torchrun started, signals that end one, and how a script ends.

    h = gather(h)                                   # features of all processes, with their gradient
    with noted_signals() as caught:                 # Ctrl-C, SIGTERM, SIGHUP: finish the step, save, end
        ...
    die("--batch 7 is odd: give an even one")       # one line, exit code 2

With one process nothing here changes anything or waits for anybody.
"""
import os
import shlex
import signal
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


# ---- Several processes, each with its share of every batch -------------------------------------------------
def join_process_group(device):
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


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_slice(count):
    """The slice of a batch of `count` images that this process has."""
    share = count // world_size()
    return slice(rank() * share, (rank() + 1) * share)


class Gather(torch.autograd.Function):
    """See gather(). DistributedDataParallel takes the mean of all gradients: hence x world_size."""

    @staticmethod
    def forward(ctx, h):
        shares = [torch.empty_like(h) for _ in range(world_size())]
        dist.all_gather(shares, h)
        return torch.cat(shares)

    @staticmethod
    def backward(ctx, gradient):
        local = gradient.chunk(world_size())[rank()]
        return local * world_size()


def gather(h):
    """Features h [B, E] of this process -> those of all processes, in order: [B x world_size, E].

    What follows must be the same in every process, so that all find the same gradient; no process asks.
    """
    return Gather.apply(h.contiguous()) if dist.is_initialized() else h


def data_parallel(model):
    """model, or what calls it and gives its parameters the mean of all processes' gradients."""
    if not dist.is_initialized():
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)               # torch 2.13 renames broadcast_buffers
        return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)   # they agree anyway


def all_gather_object(thing):
    """[thing of process 0, thing of process 1, ...]: anything that pickles; the one thing if alone."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * world_size()
    dist.all_gather_object(things, thing)
    return things


def broadcast(thing):
    """Process 0's thing, anything that pickles, in each of them."""
    things = [thing]
    if dist.is_initialized():
        dist.broadcast_object_list(things)
    return things[0]


def all_reduce_max(numbers, device):
    """Each the largest of all processes' whole numbers."""
    if not dist.is_initialized():
        return numbers
    numbers = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


@contextmanager
def main_process_first():
    """Process 0 does it, then the others do."""
    if rank():
        dist.barrier()
    yield
    if not rank() and dist.is_initialized():
        dist.barrier()


# ---- Signals -----------------------------------------------------------------------------------------------
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


if "SIGHUP" in signal.Signals.__members__ and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    SIGNALS.remove(signal.SIGHUP)                                    # nohup: it goes on without its terminal


def on_first_signal(handler):
    """handler(number) is called at the first of SIGNALS; a second Ctrl-C ends the process at once."""
    def once(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        handler(number)
    return [signal.signal(number, once) for number in SIGNALS]


@contextmanager
def noted_signals():
    """-> a list, empty until signals come; their numbers then."""
    caught = []
    before = on_first_signal(caught.append)
    try:
        yield caught
    finally:
        for number, handler in zip(SIGNALS, before):
            signal.signal(number, handler)


# ---- How a script ends -------------------------------------------------------------------------------------
class NotFinite(ValueError):
    """Features are no numbers any more."""


def die(message, code=2):
    """How a script ends on a user's mistake: with one line, whatever the message quotes."""
    if rank():
        time.sleep(5)        # what all find process 0 says meanwhile, and torchrun ends this one
        message = f"process {rank()}: {message}"
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def end_by_signal(number, folder=None):
    """How a signal ends a script; folder: that of a run with a checkpoint, if there is one yet."""
    if rank():
        sys.exit(128 + number)
    what_stands = "before there was a checkpoint: nothing is lost, give the same command again"
    if folder:
        several = f"torchrun --standalone --nproc_per_node={world_size()}"
        begin = several if world_size() > 1 else "python"
        resume = f"{begin} {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(folder))}"
        what_stands = f"what was saved stands, go on with: {resume}"
    mark = "; " if folder else " "
    die(f"ended by {signal.Signals(number).name}{mark}{what_stands}", 128 + number)


def print_any_name():
    """Of files and classes, escaped where the terminal cannot show it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def for_a_reader():
    """Where what is printed goes into another program, as head, that may end first: ends with it, quietly."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def launch(main):
    """Calls a script's main(); a signal, a full disk, a lost folder or little memory end it with one line."""
    if rank():
        sys.stdout = open(os.devnull, "w")                           # process 0 speaks
    print_any_name()
    on_first_signal(end_by_signal)
    try:
        main()
    except ValueError as error:
        if not isinstance(error, NotFinite) and "Input X contains" not in str(error):    # of scikit-learn
            raise
        traceback.clear_frames(error.__traceback__)
        die("features are not finite: start anew, with a lower --lr")
    except (OSError, MemoryError, RuntimeError) as error:
        traceback.clear_frames(error.__traceback__)                  # ends the bar before the line is printed
        if isinstance(error, OSError):
            die(f"cannot read or write {error.filename or 'a file'} ({error.strerror}): mend it, then go on "
                "with --resume and the run's folder")
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            die("out of memory: lower --batch, --width or what else makes it large")
        if isinstance(error, torch.linalg.LinAlgError):
            die("embeddings are not finite: start anew, with a lower --lr")
        if world_size() == 1 or "onnection" not in str(error):
            raise
        die("the connection to another process is lost")
