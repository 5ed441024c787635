"""What the kernel files share: whether Triton can be used and where, how many programs, torch.compile."""
import functools
import os
import warnings
from contextlib import nullcontext

import torch

try:
    import triton
    import triton.language as tl
except ImportError:                                    # no wheel here: all but impl="triton" works
    triton = None
    tl = None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"     # Triton read it just now
OLDEST_TRITON = 3, 3                                   # 3.2 aborts the whole process on some of these kernels
INTERPRETED_PROCESSORS = 132                           # without a GPU, work is split as for an H100


def triton_version():
    """(major, minor) of the installed Triton; (0, 0) without one."""
    if triton is None:
        return 0, 0
    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


if triton is not None:

    @triton.jit
    def _count_up(number):
        tl.store(number, tl.load(number) + 1)


@functools.lru_cache(maxsize=None)
def _compiles(index):
    """Whether a small kernel compiles and starts on this CUDA device; warns once where it does not."""
    if triton_version() < OLDEST_TRITON:
        reason = f"Triton {triton.__version__} is too old, 3.3 is needed"
    else:
        try:
            if not torch.version.hip and torch.cuda.get_device_capability(index) < (8, 0):
                raise NotImplementedError("its tensor cores take neither tf32 nor bf16")
            with torch.cuda.device(index):
                _count_up[(1,)](torch.zeros(1, device="cuda"))
            return True
        except Exception as error:                     # no C compiler, no driver, a GPU it does not know
            reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"kernels use plain torch on cuda:{index}, since Triton cannot be used there ({reason})")
    return False


@torch.compiler.assume_constant_result
def _compiles_now(index):
    """torch.compile calls it while it traces, and takes the answer for a constant."""
    return _compiles(index)                            # it would look through the cache's wrapper


def pick(impl, tensors, worthwhile=True):
    """"torch" or "triton" for an option "auto", "torch" or "triton" and these inputs.

    worthwhile: whether "auto" shall take Triton at this shape, if it can be used at all: for CUDA tensors,
    none of them float64, where Triton is installed, not older than 3.3, and compiles.
    Raises ValueError for another option, or if "triton" is asked for and cannot be had.
    """
    wide = any(x.dtype == torch.float64 for x in tensors)
    missing = triton_version() < OLDEST_TRITON
    if impl not in ("auto", "torch", "triton") or (impl == "triton" and (missing or wide)):
        raise ValueError(f"impl={impl!r}: auto, torch, or triton (needs the triton package, 3.3 or newer, "
                         "and takes at most fp32)")
    device = tensors[0].device
    if impl == "triton" and device.type == "cpu" and not INTERPRETED:
        raise ValueError("impl='triton' takes CUDA tensors; those of a CPU only if TRITON_INTERPRET=1 was "
                         "set before import")
    if impl != "auto":
        return impl
    if device.type != "cuda" or triton is None or wide or not worthwhile:
        return "torch"
    return "triton" if _compiles_now(device.index) else "torch"


def free_to_look(x):
    """Whether a look at the values of x need not be waited for: on a CPU."""
    return not x.is_cuda


def on_device(x):
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@functools.lru_cache(maxsize=None)
def _processors(index):
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs(x):
    """How many programs fill the device of x: two for each processor."""
    return 2 * (_processors(x.device.index) if x.is_cuda else INTERPRETED_PROCESSORS)


def is_hopper(x):
    """Whether x is on an NVIDIA GPU with Hopper's matrix units, or Blackwell's of data centres."""
    if not x.is_cuda or torch.version.hip:
        return False
    return (9, 0) <= torch.cuda.get_device_capability(x.device) < (12, 0)


def opaque(name, fake):
    """Decorator: under torch.compile the function is one operator that nobody looks into, else itself.

    fake: from the same arguments, empty tensors of the shapes and dtypes that the function returns.
    """
    def wrap(function):
        operator = torch.library.custom_op(f"kernels::{name}", function, mutates_args=())
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*arguments):
            if torch.compiler.is_compiling():
                return operator(*arguments)
            return function(*arguments)
        return call
    return wrap


def check_temperature(temperature):
    """ValueError unless it is a number above 0, or a tensor of one, whose value only CPUs look at."""
    if not isinstance(temperature, torch.Tensor):
        good = temperature > 0
    elif temperature.numel() != 1:
        raise ValueError(f"temperature must be one number, got {list(temperature.shape)}")
    else:
        good = temperature.is_cuda or torch.compiler.is_compiling() or temperature > 0
    if not good:
        raise ValueError(f"temperature {temperature} must be above 0")


def refuse_transforms(name, instead):
    """RuntimeError inside grad, vmap, jvp and the others of torch.func."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(f"{name} cannot be transformed by torch.func (grad, vmap, jvp): use {instead}")


def refuse_double_backward(name, instead=""):
    """Call in a backward: RuntimeError under create_graph=True."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name} has no double backward{instead}")
