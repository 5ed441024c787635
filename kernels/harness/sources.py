"""What the name after --data is, told by the name and a look at the disk alone: needs no package.

    problem("~/photos")      # one line that says what is wrong and what to do, or None
"""
import os
import re
from pathlib import Path

BUILT_IN = {"digits": 2, "digits3d": 3}                  # axes of their images
IMAGES = set(".jpg .jpeg .png .bmp .gif .tif .tiff .webp".split())
TIFFS = ".tif", ".tiff"
NIFTI = ".nii", ".nii.gz"
IDX = re.compile(r"(?P<set>.*?)-?(?P<split>train|t10k|test)-(?P<part>images|labels)[-.]idx\d-ubyte(\.gz)?$")

SAVE = "np.savez('data.npz', train_images=x, train_labels=y), then --data data.npz"
OTHERS = {  # endings: what it is, what to do
    (".h5", ".hdf5", ".hdf", ".he5"): ("an HDF5 file", f"read its array x with h5py and write {SAVE}"),
    (".mat",): ("a MATLAB file", f"read its array x with scipy.io.loadmat and write {SAVE}"),
    (".parquet", ".arrow", ".feather"): (
        "a table of rows", "give its folder as --data hf:FOLDER, which reads it by the package datasets"),
    (".csv", ".tsv", ".xlsx", ".json", ".jsonl"): (
        "a table, no images", "give the folder of the images, and the table as --labels FILE.csv"),
    (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst"): (
        "a packed archive", "unpack it and give the folder"),
    (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg"): (
        "a video", "write its frames as images, as with ffmpeg -i FILE folder/%06d.png, and give the folder"),
    (".dcm", ".dicom"): (
        "a DICOM file", "convert the series to NIfTI, as with dcm2niix, and give the folder"),
    (".pt", ".pth", ".safetensors"): ("a file of tensors", f"write its images x by {SAVE}"),
    (".pkl", ".pickle"): (
        "a pickle, which may run anything when it is read", f"write its images x by {SAVE}"),
    (".svg", ".pdf", ".eps"): ("a drawing", "write it as PNG, and give the folder"),
}


def ending(path):
    """.png, .nii.gz, ...: of a name, in lower case."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def problem(name):
    """Why --data cannot be this, in one line that says what to do; None if it may be."""
    if name in BUILT_IN or name.startswith("hf:"):
        return None
    if re.match(r"\w+://", name):
        return f"{name} is an address: fetch it first, and give the file or folder"
    path = Path(name)
    if not os.path.lexists(path):
        if name.startswith("~"):
            return f"{name} is not there: the shell left its ~ as it is, write $HOME or leave out the quotes"
        return f"{name} is not there: check the path (it is looked for in {Path.cwd()})"
    if path.is_dir():
        return None
    if not path.is_file():
        return f"{name} is neither a file nor a folder"
    kind = ending(path)
    if IDX.match(path.name) or kind in (".npz", ".npy", *TIFFS):
        return None
    if kind in IMAGES:
        return f"{name} is one image: give the folder of all"
    if kind in NIFTI:
        return f"{name} is one volume: give the folder of all"
    for endings, (what, remedy) in OTHERS.items():
        if kind in endings:
            return f"{name} is {what}: {remedy}"
    return f"{name} cannot be read: give a folder of images, a .npz, a .npy or a .tif stack, or IDX files"
