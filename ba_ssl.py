"""BA-SSL: batch fusion, a plug-in that lets the images of a batch see each other before the encoder does.

After Zhang, Shen, Liu, arXiv 2311.09974 (2023). THIS IS A RECONSTRUCTION: the blocks are known (patch
partition, conv embedding, patch restore, learned with the encoder), their layers are not. A batch of views x
[B, C, *S] is cut into patches that are pictures of B channels, so that convolutions mix images. The encoder
sees

    x' = x + share (F(x) - x + mean of the batch),   F = restore . conv embedding . partition

of one view, F brought to a fixed strength and free of x itself, and the other view as it is. Any loss
follows: NT-Xent (SimCLR), or that of vicreg.py, falcon.py, icone.py.

    python ba_ssl.py                                    # SimCLR + fusion, posed digits
    python ba_ssl.py --no-fusion                        # plain SimCLR
    python ba_ssl.py --loss vicreg                      # or falcon, icone; each with or without fusion
    python ba_ssl.py --mixing mixup                     # a control: another image in place of F

Expect k-NN accuracy 0.898 ± 0.012 and linear 0.906 ± 0.001 (mean ± std, 3 seeds; raw pixels 0.593, 0.169)
in 70 to 190 s on 2 cores of an AMD EPYC with torch 2.13.0. Five seeds, one core a run, 105 s: 0.904 ± 0.010
and 0.910 ± 0.007; plain SimCLR 0.880 ± 0.018, 0.896 ± 0.011; random encoder 0.287 ± 0.064, 0.214 ±
0.029. What is learned adds nothing: the same convolutions never trained gain as much, and so does a fifth of
one other image (tests/experiments/ba_ssl.md).

Choices of our own: (1) The share is fixed. A gate that is learned closes: what other images add differs
between two views, and to the loss it is noise. (2) A fused view meets a clean one. (3) A layer is a 3x3
convolution over B channels inside the patch, without bias, norm or nonlinearity: several are one linear map
of wider reach. (4) Slots are drawn anew in each call: a convolution over slots that stay could stamp both
views of an image with its slot's mark and solve NT-Xent without a look at it. (5) At evaluation the module
is dropped. (6) SimCLR's settings suit digits: batch 64, AdamW, t = 0.2, views by pose, light, noise. (7)
IConE is simpler than in icone.py: a random table, all of it bank and in AdamW; batch norm centres; .5 weight.
"""
if __name__ == "__main__":
    import kernels.harness.start                                     # before torch: see there
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from kernels import bank_cross_entropy, bank_logsumexp, dictionary_loss, unit_rows, variance_covariance
from kernels.harness.cli import (bounded, layer_sizes_or_none, load_data, make_encoder, open_folder, options,
                                 parse, typed)
from kernels.harness.encoder import Encoder                          # to be found here too
from kernels.harness.images import fixed_order, limited, pixels
from kernels.harness.probes import begin, probe, quick_probe, report
from kernels.harness.processes import die, gather, launch, world_size
from kernels.harness.run import Run
from kernels.harness.views import two_views


# ==== The method ============================================================================================
class BatchFusion(nn.Module):
    """x + share (F(x) - x + mean) for views x [B, C, H, W] or [B, C, D, H, W] of exactly B = `batch` images.

    F(x) shows the other images as image i sees them. x less its mean over the batch is cut into patches of
    side `patch`, each a small picture of B channels, an image a channel; `layers` convolutions 3x3 (axes=3:
    3x3x3) mix channels; patches are put back. No bias, so equal images mix to nothing; what lies along the
    own image is taken out, and the rest gets the strength of x less its mean: others' part is `share` at any
    number of layers, in the first step and in the last. What of the others is learned.

    mixing: conv; three controls: random, conv not trained; grouped, each image with its own channel alone;
    mixup, F(x) = another image less the mean, without layers.
    keep_slots: image i is channel i in every call; otherwise each call deals the images to the channels anew.

    Call it for each view by itself, leave out an incomplete last batch, and use the encoder alone in the end:
    eval() changes nothing. ValueError for another mixing, one image, two with patches of one pixel or mixup,
    no layers, another B or rank of x, a side that `patch` does not divide.
    """

    def __init__(self, batch, patch=4, layers=2, share=0.2, mixing="conv", keep_slots=False, axes=2):
        super().__init__()
        if mixing not in ("conv", "random", "grouped", "mixup"):
            raise ValueError(f"mixing {mixing!r} is none of conv, random, grouped, mixup")
        if batch < 2 or layers < 1 or batch == 2 and (patch == 1 or mixing == "mixup"):      # nothing is left
            raise ValueError(f"batch {batch}, layers {layers}, patch {patch}: two images and a layer; of "
                             "patches of one pixel, or for mixup, three images")
        self.batch = batch
        self.patch = patch
        self.share = share
        self.mixing = mixing
        self.keep_slots = keep_slots
        self.axes = axes
        conv = nn.Conv2d if axes == 2 else nn.Conv3d
        groups = batch if mixing == "grouped" else 1
        self.embedding = nn.ModuleList()
        for _ in range(0 if mixing == "mixup" else layers):
            self.embedding.append(conv(batch, batch, 3, padding=1, groups=groups, bias=False))
        self.requires_grad_(mixing != "random")

    def partition(self, x):
        """[B, C, *S] -> [C x patches, B, *patch]: a pixel's neighbours are those that it had."""
        p = self.patch
        if self.axes == 2:
            return rearrange(x, "b c (h p) (w q) -> (c h w) b p q", p=p, q=p)
        return rearrange(x, "b c (d o) (h p) (w q) -> (c d h w) b o p q", o=p, p=p, q=p)

    def restore(self, patches, shape):
        """The inverse; shape = [B, C, *S]."""
        _, c, *sides = shape
        along = [side // self.patch for side in sides]               # patches along each axis
        if self.axes == 2:
            h, w = along
            return rearrange(patches, "(c h w) b p q -> b c (h p) (w q)", c=c, h=h, w=w)
        d, h, w = along
        return rearrange(patches, "(c d h w) b o p q -> b c (d o) (h p) (w q)", c=c, d=d, h=h, w=w)

    @staticmethod
    @torch.compiler.disable                                          # torch 2.13 cannot compile it
    def deal(count):
        """A slot for each image; drawn on the CPU, whose generator's state is in checkpoints."""
        return torch.randperm(count)

    def mix(self, x):
        """x [B, C, *S], of mean 0 over the batch, in slots -> what the other slots bring, as strong as x."""
        if self.mixing == "mixup":
            return x.roll(1, 0)
        patches = self.partition(x)
        strength = rms(patches)
        for conv in self.embedding:
            patches = conv(patches)
            patches = patches * (strength / rms(patches))
        mixed = self.restore(patches, x.shape)
        if self.mixing != "grouped":
            own = (mixed * x).flatten(1).sum(1) / x.square().flatten(1).sum(1).clamp(min=1e-12)      # [B]
            mixed = mixed - x * own.view(-1, *[1] * (x.ndim - 1))
        return mixed * (rms(x) / rms(mixed))

    def forward(self, x):
        divisible = self.mixing == "mixup" or all(side % self.patch == 0 for side in x.shape[2:])
        if x.ndim != 2 + self.axes or len(x) != self.batch or not divisible:
            raise ValueError(f"views are {[*x.shape]}, but must be [B, C, {'D, ' * (self.axes == 3)}H, W], "
                             f"B = {self.batch} and sides divisible by {self.patch}: drop what is left over")
        image_in = torch.arange(len(x)) if self.keep_slots else self.deal(len(x))      # each slot
        slot_of = image_in.argsort()                                 # each image
        centred = x - x.mean(0)
        mixed = self.mix(centred[image_in.to(x.device)])[slot_of.to(x.device)]
        return x + self.share * (mixed - centred)


def rms(x):
    return x.square().mean().clamp(min=1e-12).sqrt()                 # a root at 0 has no gradient


# Four losses of two views' embeddings; those of other scripts are unweighted terms by name, as there.
def same_shape(z1, z2):
    if z1.shape != z2.shape:
        raise ValueError(f"embeddings of two views must agree in shape, got {[*z1.shape]} and {[*z2.shape]}")


def nt_xent(z1, z2, temperature=0.2):
    """NT-Xent of z1, z2 [B, d]: each view has to find its partner among all 2B - 1 others; in nats.

    Chen et al., SimCLR, arXiv 2002.05709, eq. 1. The bank is the views themselves. log(2B - 1) if all agree.
    ValueError for views of different shapes.
    """
    same_shape(z1, z2)
    z = unit_rows(torch.cat([z1, z2]))                               # [2B, d]
    itself = torch.arange(len(z), device=z.device)
    partner = itself.roll(len(z1))
    return bank_cross_entropy(z, z, partner, temperature, exclude=itself)


def vicreg_terms(z1, z2):
    """vicreg.py's terms, for z1, z2 [B, D]."""
    same_shape(z1, z2)
    v1, c1 = variance_covariance(z1)
    v2, c2 = variance_covariance(z2)
    return {"invariance": F.mse_loss(z1.to(v1), z2.to(v1)),
            "variance": (v1 + v2) / 2,
            "covariance": c1 + c2}


def falcon_terms(z1, z2, seed, codes=512, eps=1e-8):
    """falcon.py's terms, L2-normalised, for z1, z2 [B, f]; a smaller dictionary, and beta does not rise."""
    same_shape(z1, z2)
    n, f = z1.shape
    length = math.sqrt(f / n)
    temperature = f / (math.sqrt(n) * math.log((1 - eps * (codes - 1)) / eps))
    z1 = length * unit_rows(z1)
    z2 = length * unit_rows(z2)
    prior, cross_entropy = dictionary_loss(z1, z2, codes, seed, temperature)
    return {"prior": prior, "cross_entropy": cross_entropy}


def icone_terms(z1, z2, table, index, temperature=0.2):
    """icone.py's terms for z1, z2 [B, D] of the images index [B] of table [N, D], any lengths of rows.

    Its defaults, but for the bank, which is the table, with gradient: both rows of a pair move, not one.
    """
    same_shape(z1, z2)
    if index.shape != z1.shape[:1]:
        raise ValueError(f"index must name a row for each of {len(z1)} images, got {[*index.shape]}")
    u = unit_rows(table)
    sums = bank_logsumexp(u[index], u, temperature, exclude=index)
    z = unit_rows(z1) + unit_rows(z2)
    return {"alignment": 1 - (z * u[index]).sum(1).mean() / 2,
            "diversity": temperature * (sums.mean() - math.log(len(u) - 1))}


WEIGHTS = {"simclr": {"nt_xent": 1},
           "vicreg": {"invariance": 25, "variance": 25, "covariance": 1},
           "falcon": {"prior": 1, "cross_entropy": 0.7},
           "icone": {"alignment": 1, "diversity": 3}}                # half of icone.py's: see icone_terms


class BASSL(nn.Module):
    """Fusion (or None), an encoder to `features` numbers, a projector with layers of these sizes, and a loss.

    both: fuse both views, each by itself; otherwise a fused view meets a clean one. loss: simclr, vicreg,
    falcon, icone; count: training images, icone has a row for each. temperature: of NT-Xent. seed: of
    falcon's dictionary. ValueError for another loss.
    """

    def __init__(self, encoder, features, fusion=None, both=False, loss="simclr", projector=(512, 128),
                 count=0, temperature=0.2, seed=0):
        super().__init__()
        if loss not in WEIGHTS:
            raise ValueError(f"loss {loss!r} is none of {', '.join(WEIGHTS)}")
        self.encoder = encoder
        self.fusion = fusion
        self.both = both
        self.loss = loss
        self.temperature = temperature
        self.seed = seed
        layers = []
        for size in projector:
            layers += [nn.Linear(features, size), nn.BatchNorm1d(size), nn.ReLU()]
            features = size
        ending = 2 if loss == "vicreg" else 1                        # linear; the others end in a norm
        self.projector = nn.Sequential(*layers[:-ending])
        if not projector:
            self.projector.append(nn.BatchNorm1d(features, affine=False))
        if loss == "icone":
            self.table = nn.Parameter(0.1 * torch.randn(count, features))

    def encode(self, view1, view2):
        """h [B, E] of both views. The module is used here and nowhere else: probes, encoder.pt and who takes
        model.encoder see images as they are."""
        if self.fusion:
            view1 = self.fusion(view1)
        if self.fusion and self.both:
            view2 = self.fusion(view2)
        return self.encoder(torch.cat([view1, view2])).chunk(2)

    def project(self, h1, h2):
        """z [B, D] of both views, each projected by itself."""
        return self.projector(h1).float(), self.projector(h2).float()

    def forward(self, view1, view2, index):
        h1, h2 = self.encode(view1, view2)
        z1, z2 = self.project(gather(h1), gather(h2))
        if self.loss == "simclr":
            terms = {"nt_xent": nt_xent(z1, z2, self.temperature)}
        elif self.loss == "vicreg":
            terms = vicreg_terms(z1, z2)
        elif self.loss == "falcon":
            terms = falcon_terms(z1, z2, self.seed)
        else:
            terms = icone_terms(z1, z2, self.table, index)
        return {name: WEIGHTS[self.loss][name] * term for name, term in terms.items()}, {}


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


def train(model, optimizer, data, run, meters):
    """Minimise the sum of the model's terms. A step of the optimiser takes `accumulate` batches.

    meters(model in eval mode) -> {name: number}, for each epoch's line.
    """
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
                    terms, notes = call(*views, index)
                loss = sum(terms.values())
                (loss / len(batches)).backward()
                run.log({"loss": loss, **terms, **notes})
            optimizer.step()
            schedule.step()
        model.eval()
        run.end_epoch({"meters": meters(model)} | (quick_probe(model, data) if run.probing() else {}))


# ---- Does it mix? Does it cheat? ---------------------------------------------------------------------------
@torch.no_grad()
def mixing_meters(fusion, x, deals=16):
    """What the module adds to images x [B, C, *S], in `deals` calls; rms, over that of x.

    own: what stays however slots are dealt, with keep_slots all of it. others: what differs; of grouped this
    is the slots' filters alone. bias: what is added to equal images.
    """
    added = torch.stack([fusion(x) - x for _ in range(deals)])       # [deals, B, C, *S]
    own = added.mean(0)
    equal = x.mean(0).expand_as(x)
    found = {"own": own, "others": added - own, "bias": fusion(equal) - equal}
    return {name: (part.norm() / part.numel() ** 0.5 / rms(x)).item() for name, part in found.items()}


@torch.no_grad()
def noise_meters(model, shape):
    """Whether views of pure noise [B, C, *S] find their partners, though only their slot could tell.

    model in eval mode -> noise_nt_xent of two unrelated views; noise_exchanged, the same with partners
    exchanged; chance, log(2B - 1). Where embeddings spread both lie above chance; the first well below the
    second is a shortcut.
    """
    device = next(model.parameters()).device
    noise1 = torch.rand(shape).to(device)
    noise2 = torch.rand(shape).to(device)
    z1, z2 = model.project(*model.encode(noise1, noise2))
    own = nt_xent(z1, z2, model.temperature)
    exchanged = nt_xent(z1, z2.roll(1, 0), model.temperature)
    return {"noise_nt_xent": own.item(), "noise_exchanged": exchanged.item(),
            "chance": math.log(2 * shape[0] - 1)}


def noise_verdict(model, shape, draws=20):
    """What the noise meters say, in a sentence; a difference of a tenth (our threshold) is a shortcut."""
    meters = [noise_meters(model, shape) for _ in range(draws)]
    own, exchanged = [sum(line[name] for line in meters) / draws
                      for name in ("noise_nt_xent", "noise_exchanged")]
    chance = meters[0]["chance"]
    said = "SHORTCUT, slots give partners away" if own < 0.9 * exchanged else "Slots give no partner away"
    return f"{said}: NT-Xent of noise {own:.2f}, with partners exchanged {exchanged:.2f}, chance {chance:.2f}"


@torch.no_grad()
def fused_features(model, images):
    """Features [N, E] of images behind the module, B at a time, in random order; a rest is filled up."""
    count = len(images)
    size = model.fusion.batch
    order = fixed_order(count)                                       # sorted by class they would tell it
    filled = order[torch.arange(count + -count % size) % count]
    device = next(model.parameters()).device
    h = []
    for rows in filled.split(size):
        x = pixels(images, rows, device)
        h.append(model.encoder(model.fusion(x)))
    return torch.cat(h)[order.argsort()].cpu()


# ---- Its options -------------------------------------------------------------------------------------------
RECIPES = {"simclr": dict(batch=64, lr=3e-3, projector=[512, 128]),
           "vicreg": dict(batch=128, lr=3e-3, projector=[512, 512]),
           "falcon": dict(batch=64, lr=6e-3, projector=[64]),
           "icone": dict(batch=64, lr=3e-3, projector=[])}


def main():
    parser, add = options("BA-SSL", __doc__, batch=64, epochs=55, lr=3e-3, least_batch=2)
    add("--loss", default="simclr", choices=RECIPES, help="base method; sets batch, lr and projector")
    add("--projector", type=layer_sizes_or_none, default="512-128", help="sizes of its layers; icone: none")
    add("--no-fusion", action="store_true", help="the base method alone")
    add("--layers", type=int, default=2, choices=range(1, 5), help="conv embeddings")
    add("--patch", type=bounded(int, 1), default=4, help="side of a patch; must divide the canvas")
    add("--share", type=bounded(float, 0, 1), default=0.2, help="of an image that others take the place of")
    add("--mixing", default="conv", choices=["conv", "random", "grouped", "mixup"],
        help="conv: learned; controls: random, never trained; grouped, own image alone; mixup, one other")
    add("--both", action="store_true", help="fuse both views; otherwise a fused view meets a clean one")
    add("--keep-slots", action="store_true", help="images keep channels: a shortcut with --both, share .9")
    add("--temperature", type=bounded(float, 1e-3), default=0.2, help="of NT-Xent")
    # It decides the defaults of others, so it is read before them; what it does not know parse() refuses.
    parser.set_defaults(**RECIPES[parser.parse_known_args()[0].loss])
    args, state = parse(parser)
    if not args.projector and args.loss != "icone":
        die(f"--projector none is for --loss icone: give {args.loss} sizes, as 512-128")
    for name, chosen, unused in (
            ("--no-fusion", args.no_fusion,
             {"--layers", "--patch", "--share", "--mixing", "--both", "--keep-slots"}),
            ("--mixing mixup", args.mixing == "mixup", {"--layers", "--patch"}),
            (f"--loss {args.loss}", args.loss != "simclr", {"--temperature"})):
        if chosen and unused & typed():
            die(f"{name} has no {', '.join(sorted(unused & typed()))}: leave out either")
    data = load_data(args)
    canvas = data.images.shape[2:]
    own = args.batch // world_size()                             # a process fuses its own images
    encoder = make_encoder(args, data)
    fusion = None
    if not args.no_fusion:
        if args.mixing != "mixup" and any(side % args.patch for side in canvas):
            die(f"--patch {args.patch} does not divide the canvas {[*canvas]}: choose another")
        try:
            fusion = BatchFusion(own, args.patch, args.layers, args.share, args.mixing, args.keep_slots,
                                 axes=len(canvas))
        except ValueError as error:
            die(f"--batch {args.batch} leaves each process too few to mix: {error}")
    folder = open_folder(args, state)
    model = BASSL(encoder, encoder.features, fusion, both=args.both, loss=args.loss,
                  projector=args.projector, count=len(data.images), temperature=args.temperature,
                  seed=args.seed)
    model.to(args.device)

    network = [weight for name, weight in model.named_parameters() if name != "table"]
    groups = [{"params": network}]
    if args.loss == "icone":
        groups.append({"params": [model.table], "lr": 10 * args.lr})
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=0.05, fused=True)
    run = Run(args, data, folder, state)
    untrained = begin(model, data, folder)
    sample = pixels(data.images, fixed_order(len(data.images))[:own], args.device)

    def meters(model):
        return (mixing_meters(fusion, sample) if fusion else {}) | noise_meters(model, sample.shape)

    train(model, optimizer, data, run, meters)
    more_probes = {}
    if fusion:
        model.eval()
        shares = ", ".join(f"{name} {value:.3f}" for name, value in mixing_meters(fusion, sample).items())
        print(f"\nadded to an image, of its own strength: {shares}. {noise_verdict(model, sample.shape)}")
        probed = limited(data)
        h, h_test = fused_features(model, probed.images), fused_features(model, probed.test_images)
        more_probes["with the module"] = probe(probed, h, h_test)
    report(model, data, untrained, run.history, folder, **more_probes)


if __name__ == "__main__":
    launch(main)
