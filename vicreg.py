"""VICReg: variance, invariance and covariance regularisation; no negatives, no momentum, no stop-gradient.

Bardes, Ponce, LeCun, arXiv 2105.04906 (ICLR 2022), as its released code has it (facebookresearch/vicreg). Two
views of a batch of images go through an encoder (features h) and a projector (embeddings z, z'):

    L = 25 s(z, z') + 25 (v(z) + v(z'))/2 + 1 (c(z) + c(z'))    s, v, c: see vicreg_terms below

s pulls the two views of an image together; alone it would map all images to one point. v pushes the spread of
every dimension up to 1 (this run's ends at 0.45), c keeps different dimensions from saying the same thing.

    python vicreg.py                                    # posed digits
    python vicreg.py --data FOLDER --size 64            # your own images, or volumes
    python vicreg.py --variance 0                       # collapse, and how the panel shows it

Expect k-NN accuracy 0.860 ± 0.010 and linear 0.885 ± 0.012 (mean ± std, 3 seeds; raw pixels 0.593, 0.169;
random encoder 0.307 ± 0.042, 0.222 ± 0.018) in 34 to 124 s on 2 cores of an AMD EPYC with torch 2.13.0.

Deviations from the paper: (1) s is divided by D and v halved, as in the released code. (2) Small encoder with
GroupNorm, projector of two layers of 512 (paper: ResNet-50, three of 8192). (3) AdamW, cosine schedule,
weight decay 0.05 of all weights, batch 128 (paper: LARS, no decay of biases and norms, batch 2048). (4) Views
differ by pose, light and noise, which suit digits and volumes (paper: crops, blur, solarisation). (5) The
loss is computed in fp32 also under --amp.
"""
if __name__ == "__main__":
    import kernels.harness.start                                     # before torch: see there
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from kernels import variance_covariance
from kernels.harness.cli import bounded, layer_sizes, load_data, make_encoder, open_folder, options, parse
from kernels.harness.encoder import Encoder                          # to be found here too
from kernels.harness.images import pixels
from kernels.harness.probes import begin, quick_probe, report
from kernels.harness.processes import gather, launch
from kernels.harness.run import Run
from kernels.harness.views import two_views


# ==== The method ============================================================================================
def vicreg_terms(z1, z2):
    """The three terms, unweighted, of two views' embeddings z1, z2 [B, D], any float dtype; in fp32 or finer.

        s = 1/(B D) sum (z1 - z2)^2                                      invariance
        v = 1/D sum_d max(0, 1 - sqrt(C_dd + 1e-4))                      variance, mean of the two views
        c = 1/D sum_{i != j} C_ij^2,   C = Z_c^T Z_c / (B - 1)           covariance, sum of the two views

    The paper's terms, scaled as in the released code. ValueError unless B >= 2 and shapes agree.
    """
    if z1.shape != z2.shape:
        raise ValueError(f"embeddings of two views must agree in shape, got {[*z1.shape]} and {[*z2.shape]}")
    v1, c1 = variance_covariance(z1)
    v2, c2 = variance_covariance(z2)
    return {"invariance": F.mse_loss(z1.to(v1), z2.to(v1)),          # in v1's dtype
            "variance": (v1 + v2) / 2,
            "covariance": c1 + c2}


def expander(features, sizes):
    """The paper's projector, h [B, features] -> z [B, sizes[-1]]: Linear, BatchNorm, ReLU; linear at last."""
    layers = []
    for size in sizes[:-1]:
        layers += [nn.Linear(features, size), nn.BatchNorm1d(size), nn.ReLU()]
        features = size
    return nn.Sequential(*layers, nn.Linear(features, sizes[-1], bias=False))


class VICReg(nn.Module):
    """An encoder to `features` numbers, a projector with layers of these sizes, the weights of the terms."""

    def __init__(self, encoder, features, projector=(512, 512), invariance=25., variance=25., covariance=1.):
        super().__init__()
        self.encoder = encoder
        self.projector = expander(features, projector)
        self.weights = {"invariance": invariance, "variance": variance, "covariance": covariance}

    def forward(self, view1, view2):
        z1 = self.projector(gather(self.encoder(view1)))        # [B, D]
        z2 = self.projector(gather(self.encoder(view2)))
        terms = vicreg_terms(z1, z2)
        notes = {"c_per_view": terms["covariance"] / 2,
                 "c_noise_floor": (z1.shape[1] - 1) / (len(z1) - 1)}        # c of white, unit noise
        return {name: self.weights[name] * term for name, term in terms.items()}, notes


# ==== Training ==============================================================================================
def learning_rate(step, steps, batch):
    """What to multiply --lr with: a linear rise to the peak in the first tenth, then half a cosine to 0.

    The peak follows sqrt(batch), 1 at 128 images a step: the learning rate's part of the rule for Adam in
    arXiv 2205.10287. Its betas, epsilon and the decay stay as they are.
    """
    peak = math.sqrt(batch / 128)
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def train(model, optimizer, data, run):
    """Minimise the sum of the model's terms. A step of the optimiser takes `accumulate` batches."""
    schedule = LambdaLR(optimizer, run.rate(learning_rate))
    call = run.start(model, optimizer, schedule)                     # or goes on where last.pt stands
    for epoch in run.epochs():
        model.train()
        for batches in run.steps():                                  # [accumulate, batch]; may end the run
            optimizer.zero_grad()
            for index in batches:                                    # numbers of `batch` images
                x = pixels(data.images, run.own(index), run.device)
                views = two_views(x, run.generator, data.view)       # [B, C, *S] each
                with run.autocast():
                    terms, notes = call(*views)
                loss = sum(terms.values())
                (loss / len(batches)).backward()
                run.log({"loss": loss, **terms, **notes})
            optimizer.step()
            schedule.step()
        model.eval()
        run.end_epoch(quick_probe(model, data) if run.probing() else {})     # saves, too


def main():
    parser, add = options("VICReg", __doc__, batch=128, epochs=45, lr=3e-3, least_batch=2)
    weight = bounded(float, 0)
    add("--projector", type=layer_sizes, default="512-512", help="sizes of the projector's layers")
    add("--invariance", type=weight, default=25., help="weight lambda of s")
    add("--variance", type=weight, default=25., help="weight mu of v; 0 shows collapse")
    add("--covariance", type=weight, default=1., help="weight nu of c; 0 shows dimensional collapse")
    args, state = parse(parser)
    data = load_data(args)
    encoder = make_encoder(args, data)
    folder = open_folder(args, state)

    model = VICReg(encoder, encoder.features, projector=args.projector, invariance=args.invariance,
                   variance=args.variance, covariance=args.covariance)
    model.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    run = Run(args, data, folder, state)
    untrained = begin(model, data, folder)
    train(model, optimizer, data, run)
    report(model, data, untrained, run.history, folder)


if __name__ == "__main__":
    launch(main)
