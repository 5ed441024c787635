"""The encoder of the scripts trained with labels, by cross-entropy on one view of each image: what fashion.py compares with.

    python tests/experiments/supervised.py --data FOLDER --epochs 10 --out FOLDER       # options as of the scripts

As many images, of the same views, in batches of 128 by AdamW and a one-cycle schedule of 3e-3, from random weights, on the CPU.
Leaves features.npz, as a script does, and an empty report.json.
"""
import argparse
from pathlib import Path

import common  # noqa: F401 (it puts kernels in reach)
import numpy as np
import torch

from kernels.harness.encoder import Encoder
from kernels.harness.images import encode, pixels
from kernels.harness.reading import read_images
from kernels.harness.views import view_for

BATCH, RATE = 128, 3e-3


def train(data, epochs, seed):
    torch.manual_seed(seed)
    encoder = Encoder(data.images.shape[1], data.images.ndim - 2)
    head = torch.nn.Linear(encoder.features, len(data.classes))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], RATE, weight_decay=0.05)
    steps = len(data.images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, epochs * steps)
    view, generator = view_for(data.images), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(data.images), generator=generator).split(BATCH)[:steps]:
            x = view(pixels(data.images, index, "cpu"), generator)
            loss = torch.nn.functional.cross_entropy(head(encoder(x)), data.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return encoder


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    data = read_images(args.data)
    encoder = train(data, args.epochs, args.seed).eval()
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez(args.out / "features.npz", train_features=encode(encoder, data.images), train_labels=data.labels,
             test_features=encode(encoder, data.test_images), test_labels=data.test_labels)
    (args.out / "report.json").write_text("{}")


if __name__ == "__main__":
    main()
