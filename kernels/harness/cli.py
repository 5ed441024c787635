"""The command line: options that every script has, and what main() makes of them before it has a model.

    parser, add = options("VICReg", __doc__, batch=128, epochs=45, lr=3e-3)
    add("--variance", type=bounded(float, 0), default=25.)   # the method's own come first in --help
    args, state = parse(parser)                              # state: the checkpoint to go on from, or None
    data = load_data(args)
    encoder = make_encoder(args, data)
    folder = open_folder(args, state)

A user's mistake ends the program with one line that says what to do, and exit code 2.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch

from .. import __version__
from .digits import posed_digits
from .encoder import Encoder
from .files import atomic_write_text, load_checkpoint, lock_folder
from .images import digest
from .processes import broadcast, die, join_process_group, main_process_first, rank, world_size
from .reading import read_images, say_built_in
from .sources import BUILT_IN
from .views import view_for

NOT_TYPED = "encoder", "digest", "numbers", "method", "version"      # what config.json holds beside options
READING = "views crop flips pose noise size fit channels_last pages labels strict".split()   # of read_data
# What a run has that never began to train.
CUT_SHORT = {"config.json", "skipped.txt", "untrained.json", "views.png"}


# ---- Types of options --------------------------------------------------------------------------------------
def bounded(kind, low, high=math.inf):
    """Numbers of this kind in [low, high)."""
    def number(text):
        if not low <= kind(text) < high:
            raise argparse.ArgumentTypeError(f"{text} does not lie in [{low}, {high})")
        return kind(text)
    return number


def layer_sizes(text):
    """512-512 -> [512, 512]; 2 at least, since a norm makes one number 0."""
    return [bounded(int, 2, 2**20)(size) for size in text.split("-")]


def layer_sizes_or_none(text):
    """As layer_sizes; none -> []."""
    return [] if text == "none" else layer_sizes(text)


def range_of_numbers(words):
    """[dtype], or two numbers, the first one less -> ("dtype",) or (low, high)."""
    if words == ["dtype"]:
        return ("dtype",)
    try:
        low, high = map(float, words)
    except ValueError:
        die(f"--range {' '.join(words)}: give two numbers, those that become black and white, or dtype")
    if not -math.inf < low < high < math.inf:
        die(f"--range {' '.join(words)}: the first number must be less than the second")
    return low, high


def filled(text):
    """Any text but none, which an unset variable leaves."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; is a variable unset?")
    return text


# ---- Options -----------------------------------------------------------------------------------------------
def options(method, description, batch, epochs, lr, least_batch=1):
    """-> a parser, and add(...), which adds options of the method itself, in a group of their own."""
    parser = argparse.ArgumentParser(
        description=description.split("\n")[0], usage="%(prog)s [options]", allow_abbrev=False,
        add_help=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = die
    parser.set_defaults(encoder=None, digest=None, numbers=None, method=method, version=__version__)
    add_own = parser.add_argument_group(method).add_argument
    count = bounded(int, 1)

    add = parser.add_argument_group("data").add_argument
    add("--data", type=filled, default="digits",
        help="digits, digits3d, a folder of image files (in class subfolders or not, in train/ with test/ or "
        "val/ or not), of NIfTI or .npy volumes, of train_images.npy or of IDX files, a .npz in MedMNIST's "
        "layout, a .npy, a TIFF stack, or hf:NAME[:SPLIT] of Hugging Face's datasets")
    add("--size", type=bounded(int, 4, 10_000), default=64, help="canvas of images from a folder, N x N")
    add("--fit", default="crop", choices=["crop", "pad", "stretch"],
        help="how an image comes to the canvas: its middle, all within a border, or out of shape")
    add("--range", nargs="+", metavar=("LOW", "HIGH"),
        help="numbers in the files that become black and white, or dtype: all that their kind holds; not "
        "given: 0 to 255, 0 to 1, or the 0.1 and 99.9 percentiles of the set, by what the files hold")
    add("--pages", default="auto", choices=["auto", "first", "channels", "volume"],
        help="of a TIFF whose pages are not said to be channels; auto: first")
    add("--channels-last", action="store_true", help="arrays [N, H, W, C] are images of C bands, not volumes")
    add("--labels", type=filled, default="auto",
        help="auto: class subfolders; top: the first subfolder's name; or a .csv with the columns file, "
        "class and perhaps group, of which none is split")
    add("--strict", action="store_true", help="end at a file that cannot be read; else one in ten is skipped")
    add("--views", default="auto", choices=["auto", "crops", "poses"],
        help="what training shows: crops, light and colours, or poses; auto: crops of flat images from files")
    add("--crop", type=bounded(float, 0.01, 1),
        help="least share of an image's area in a crop; not given: .08 of RGB, else .4")
    add("--flips", default="auto", choices=["auto", "on", "off"],
        help="whether half of the crops are mirrored; auto: those of RGB")
    add("--pose", type=bounded(float, 0, 10), default=1., help="strength of turns, sizes and shifts of poses")
    add("--noise", type=bounded(float, 0, 100), default=1., help="strength of the noise of poses")

    add = parser.add_argument_group("training").add_argument
    add("--batch", type=bounded(int, least_batch), default=batch,
        help="images at a time; what is left over after the last step is dropped")
    add("--epochs", type=count, default=epochs,
        help="in each as many images are seen as there are for training; where a run that has ended is "
        "resumed more of them: the learning rate rises and falls once more")
    add("--accumulate", type=count, default=1, help="batches whose gradients are averaged for one step")
    add("--lr", type=bounded(float, 0), default=lr,
        help="peak learning rate of AdamW is this x sqrt(batch x accumulate / 128)")
    add("--seed", type=bounded(int, 0, 2**63), default=0, help="of weights, order and views; not of the data")

    add = parser.add_argument_group("encoder").add_argument
    add("--width", type=bounded(int, 3, 10_000), default=16,
        help="channels of the encoder's stem, 3 at least; features are 8 x this")
    add("--depth", type=bounded(int, 1, 1000), default=1, help="residual blocks in each of three stages")
    add("--init", type=filled,
        help="a run's folder or encoder.pt: start from its encoder; --width and --depth are its own then")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--amp", default="off", choices=["off", "bf16"], help="mixed precision; losses stay fp32")
    add("--compile", action="store_true", help="torch.compile the model; the first step takes a minute")

    add = parser.add_argument_group("run folder").add_argument
    add("--out", type=filled, help="run folder, new or empty; if not given runs/SCRIPT-1, -2, ...")
    add("--save-minutes", type=bounded(float, 0), default=10.,
        help="a checkpoint within an epoch is no older than this; after an epoch, where it is cheap, too")
    add("--resume", type=filled, help="folder of a run to continue, with its own options; epochs may rise")
    return parser, add_own


def parse(parser):
    """The options, and the checkpoint to go on from or None; a resumed run keeps its own options, but for
    --out, which is where it lies now, and --epochs, which may rise."""
    # Not before: a script may look at its options first, and set defaults by them.
    parser.add_argument_group("help").add_argument("-h", "--help", action="help", default=argparse.SUPPRESS,
                                                   help="show this and exit")
    args = parser.parse_args()
    if args.range:
        args.range = range_of_numbers(args.range)
    if args.resume is None:
        return args, None
    if typed() - {"--resume", "--epochs"}:
        die("--resume takes no other option but --epochs: the run keeps its own")
    epochs = args.epochs
    path = Path(args.resume, "last.pt")
    if not path.is_file():
        die(f"cannot resume {args.resume}: there is no {path}; give the folder of a run, or start a new run")
    try:
        state = load_checkpoint(path)
        config = dict(state["config"])
        whose = config.get("method"), config.get("version")
        if whose != (args.method, args.version) or config.keys() != vars(args).keys():
            raise ValueError(f"it is of {whose[0] or 'an earlier layout'}, version {whose[1]}; this is "
                             f"{args.method}, version {args.version}")
        not_typed = {name: config.pop(name) for name in NOT_TYPED}
        if not_typed["encoder"]:                         # else the script has a backbone of its own
            Encoder(**not_typed["encoder"])
        config["out"] = args.resume
        done, _ = len(state["history"]), state["cycles"]
        args = parser.parse_args(as_typed(config))       # checks a file's options as those of a person
        args.range = config["range"]
        for name, value in config.items():
            again = getattr(args, name)
            if again != value:                           # of a kind that is not written as it is read
                raise ValueError(f"its --{name} {value} cannot be typed again, it would be {again}")
    except Exception as error:                           # cut short, not a checkpoint
        die(f"cannot resume {args.resume}, its last.pt does not serve ({error}): start a new run")
    if "--epochs" in typed():
        if not done == args.epochs < epochs:
            die(f"--epochs {epochs}: the run stands at {done} of its {args.epochs}; once it has ended it "
                "can be made longer, by more than these")
        args.epochs = epochs
    return argparse.Namespace(**vars(args) | not_typed), state


def typed():
    """Names of the options in the command."""
    return {word.partition("=")[0] for word in sys.argv if word.startswith("--")}


def as_typed(config):
    """Options as the words that give them."""
    words = []
    for name, value in config.items():
        if value is not None and value is not False and name != "range":
            option = f"--{name.replace('_', '-')}"
            text = ("-".join(map(str, value)) or "none") if isinstance(value, list) else value
            words.append(option if value is True else f"{option}={text}")
    return words


# ---- What a run starts with --------------------------------------------------------------------------------
def join_device(args):
    """Joins other processes, and ends the program if the device is none that computes."""
    try:
        args.device = join_process_group(args.device)
        torch.zeros(1, device=args.device).item()
    except Exception as error:                                       # any of a dozen kinds
        die(f"cannot use --device {args.device} ({str(error).splitlines()[0]}): try --device cpu")
    if args.batch % world_size():
        die(f"--batch {args.batch} is that of all {world_size()} processes: give a multiple")


def read_data(name, views="auto", crop=None, flips="auto", pose=1., noise=1., **reading):
    """The digits, or what read_images finds in a file or folder; with the views that suit it."""
    padding = "zeros"
    try:
        if name in BUILT_IN:
            data = posed_digits(axes=BUILT_IN[name])
            say_built_in(name, **reading)
            views = "poses" if views == "auto" else views
        else:
            data = read_images(name, **reading)
            if len(data.images.shape) == 5:
                padding = "border"                                   # black would cut tissue off
        return data._replace(view=view_for(data.images, views, crop, flips, pose, noise, padding))
    except (OSError, ValueError) as error:
        die(str(error))


def load_data(args):
    """The data of --data, once the device is ready; ends the program if this run cannot take them."""
    join_device(args)
    with main_process_first():                                       # it decodes, the others find the array
        data = read_data(args.data, value_range=args.range, **{name: getattr(args, name) for name in READING})
    there = f"{args.data} has {len(data.images)} training and {len(data.test_images)} test images"
    if len(data.test_images) < 4:
        die(f"{there}: 4 test images at least are needed, and 16 to hold out a fifth")
    if len(data.images) < max(2, args.batch * args.accumulate):
        die(f"{there}: --batch {args.batch} x {args.accumulate} needs as many for training: lower --batch")
    if args.amp != "off" and "cpu" in args.device and len(data.images.shape) == 5:
        die("--amp with volumes needs a GPU: on CPUs oneDNN's bf16 gradient is wrong on 2 x 2 x 2 canvases")
    found = digest(data)
    if args.digest not in (None, found):
        die(f"cannot resume: {args.data} holds other images or labels than those this run began with")
    args.digest = found
    args.numbers = data.numbers
    torch.manual_seed(args.seed)                                     # what comes next has random weights
    return data


def make_encoder(args, data):
    """An Encoder for these images, new or that of --init; ends the program if it does not fit them. Its
    `origin` is what a table calls it before it is trained."""
    channels, *sides = data.images.shape[1:]
    wanted = dict(channels=channels, axes=len(sides))
    if args.encoder:                                                 # a resumed run: its weights come later
        encoder = Encoder(**args.encoder | wanted)
    elif args.init:
        path = Path(args.init)
        try:
            saved = load_checkpoint(path / "encoder.pt" if path.is_dir() else path)
            encoder = Encoder(**saved["config"])
            encoder.load_state_dict(saved["state_dict"])
        except Exception as error:                                   # missing, cut short, another network's
            die(f"--init {path} has no encoder.pt of these scripts ({error}): give a finished run's folder")
        for name in ("width", "depth"):
            own = encoder.config[name]
            if f"--{name}" in typed() and getattr(args, name) != own:
                die(f"--init {path}: the {name} of its encoder is {own}: leave out --{name}")
        if not wanted.items() <= encoder.config.items():
            die(f"--init {path}: its encoder is {encoder.config}, but {args.data} has {wanted}")
    else:
        encoder = Encoder(**wanted, width=args.width, depth=args.depth, large=min(sides) >= 96)
    args.encoder = encoder.config
    args.width, args.depth = [encoder.config[name] for name in ("width", "depth")]
    encoder.origin = f"encoder of {args.init}" if args.init else "random encoder"
    return encoder


def open_folder(args, state):
    """The run's folder, made where there is none, with config.json in it; --out, or the first free number.

    Ends the program if it holds something else than the run that is resumed. Two runs that start at once do
    not get one number: then exist_ok is False, and the second one ends.
    """
    if rank():
        return broadcast(None)                                       # what process 0 sends, below
    number = 1
    while (free := Path("runs", f"{Path(sys.argv[0]).stem}-{number}")).exists():
        number += 1
    folder = Path(args.out or free)
    try:
        folder.mkdir(parents=True, exist_ok=bool(args.out))
        lock_folder(folder)
        there = {file.name for file in folder.iterdir() if file.suffix != ".part"}
        if not state:
            if there and (there - CUT_SHORT or "config.json" not in there
                          or '"method"' not in (folder / "config.json").read_text()):
                die(f"{folder} is not empty: choose another --out, or continue with --resume {folder}")
            for name in there:                                       # another network's, or another set's
                (folder / name).unlink()
        atomic_write_text(folder / "config.json", json.dumps(vars(args), indent=1))
    except BlockingIOError:
        die(f"another run is at work in {folder}: wait until it ends, or choose another --out")
    except OSError as error:
        die(f"cannot write into {folder} ({error.strerror}): choose another --out")
    return broadcast(folder)
