"""In which order a run sees its images: what Run calls once an epoch, as order(run).

All of them shuffled is what nearly every method has. Through a window that slides over the data an image's
visits come close together: for a method that remembers something of each image, as IConE a row of its table,
which then has not aged so much at the next visit. The idea is of Cao et al., arXiv 2006.14618, who classify
instances; the form here is ours.
"""
import torch
from tqdm import tqdm

from .processes import rank


def shuffled(run):
    """Numbers of all images [run.count], at random."""
    return torch.randperm(run.count, generator=run.generator, device=run.device).cpu()


def through_window(images):
    """-> order(run): steps draw from a window of so many images, or of some six steps; 0: all are shuffled.

    The images lie in one random order, its end joined to its start, and the window passes over them all, once
    in the run (once more in epochs that are added later). An epoch is several windows, the images of each of
    them shuffled: none holds an image twice. An image is visited as often as there are epochs, give or take
    one, but for what is left of windows after their last whole step. Where an epoch is one window, all images
    are shuffled. The first epoch's prints which it is.
    """
    def order(run):
        windows = round(run.steps_per_epoch / max(6, images // run.step_size)) if images else 0
        if images and not run.history and not rank():
            tqdm.write(f"order: {run.steps_per_epoch} steps an epoch, " + (
                f"{windows} windows of {run.count // windows:,} images, sliding" if windows > 1 else
                "too few for two windows: all images are shuffled"))
        if windows < 2:
            return shuffled(run)
        generator = torch.Generator().manual_seed(run.args.seed % 2**63)
        row = torch.randperm(run.count, generator=generator)
        epoch = len(run.history)
        begin = max([0, *(end for end in run.cycles if end <= epoch)])
        end = min(end for end in run.cycles if end > epoch)
        drawn = []
        for window in range(windows):
            first = run.steps_per_epoch * window // windows
            steps = run.steps_per_epoch * (window + 1) // windows - first
            width = run.count * steps // run.steps_per_epoch
            number = (epoch - begin) * windows + window
            start = run.count * number // ((end - begin) * windows)
            places = torch.randperm(width, generator=run.generator, device=run.device)
            places = places[:steps * run.step_size].cpu()
            drawn.append(row[(start + places) % run.count])
        return torch.cat(drawn)
    return order
