"""Features of images by a trained encoder, with the names of their files; and which images are like one.

    python -m kernels.embed runs/vicreg-1 FOLDER --out features.npz      # also .npy, .csv
    python -m kernels.embed runs/vicreg-1 --like new.png                 # the ten nearest of the run's own
    python -m kernels.embed runs/vicreg-1 FOLDER --out f.npz --like new.png          # of the folder's

FOLDER is any --data of the scripts, without labels too, or one image file. Images are read as those that the
encoder was trained on: size, fit, channels and range lie in the run's encoder.pt. Files are decoded while
others are encoded, and what is done is written: of a million images memory has the names alone, and for the
page the features of 10,000.
An earlier output of the same name is replaced; any other file there is left, and the command refused.
"""
import argparse
import os
import signal
import sys
from pathlib import Path

ENDINGS = ".npz", ".npy", ".csv"


def refuse(message):
    print(f"embed: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def parse():
    title, *_ = __doc__.split("\n")
    parser = argparse.ArgumentParser("python -m kernels.embed", description=title, allow_abbrev=False)
    parser.error = refuse
    add = parser.add_argument
    add("run", help="folder of a finished run, or its encoder.pt")
    add("data", nargs="?", help="any --data of the scripts, or one image file")
    add("--out", type=Path, help="features.npz (features, files), .npy (names in a .txt beside), or .csv")
    add("--like", help="an image file: print the ten nearest, of data, or else of the run")
    add("--batch", type=int, default=256, help="images at a time (256)")
    add("--device", help="cpu, cuda, ...: cuda if there is one")
    add("--no-page", action="store_true", help="no page of thumbnails beside --out")
    args = parser.parse_args()
    if not (args.out and args.data) and (args.out or not args.like):
        refuse("give data and --out, to write features; or --like FILE, to see what is like it")
    if args.out and args.out.suffix not in ENDINGS:
        refuse(f"--out {args.out}: its ending must be {', '.join(ENDINGS)}")
    if args.batch < 1:
        refuse(f"--batch {args.batch}: one image at a time at least")
    if args.out and not args.out.parent.is_dir():
        refuse(f"--out {args.out}: there is no folder {args.out.parent}")
    return args


def main():
    args = parse()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as kernels/harness/start.py
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .harness.embedding import command               # now: packages take seconds to load
    from .harness.processes import for_a_reader, print_any_name
    print_any_name()
    for number in (signal.SIGINT, signal.SIGTERM):       # from here on there may be files to take back
        signal.signal(number, signal.default_int_handler)
    try:
        with for_a_reader():
            command(args)
    except KeyboardInterrupt:
        print("embed: ended before all was done: give the command again", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError) as error:
        refuse(str(error))


if __name__ == "__main__":
    main()
