"""FALCON: a fixed random dictionary of codes and a uniform prior, proof against four kinds of collapse.

Sansone, Lebailly, Tuytelaars, arXiv 2410.04959, as the authors' code has it (emsansone/CPLearn). Embeddings z
[n, f] of a view (h in the paper) are compared with c codes, random signs W [c, f], never trained:

    p = softmax(z W^T / tau),   L = KL(mean p || uniform) + beta CE(p, p')

each term a mean over the two views, gradients into both. CE wants each image sure of its code and both
views to agree; the prior wants all codes used. At the optimum the n images of a batch share codes only as far
as n / c forces them to, and W^T W / c is near the identity: with many codes embeddings fill all of R^f. The
networks here stop far from it: on digits 9 of 128 dimensions and 60 of 4,096 codes are in use.

    python falcon.py                                    # posed digits
    python falcon.py --codes 16384                      # more codes, for more images
    python falcon.py --prior none                       # collapse, and the meters that show it
    python falcon.py --recipe released                  # the authors' settings, for hours rather than minutes

Expect k-NN accuracy 0.913 ± 0.001 and linear 0.933 ± 0.004 (mean ± std, 3 seeds; raw pixels 0.593, 0.169;
random encoder 0.307 ± 0.042, 0.222 ± 0.018) in 60 to 150 s on 2 cores of an AMD EPYC with torch 2.13.0; on
one thread, which rounds otherwise, 0.923 ± 0.002 and 0.938 ± 0.003.

Deviations from the released code: (1) beta rises from 0 to 1 over the run: the prior spreads images over the
codes before they settle (release: 1 throughout). L2-normalised embeddings (the preprint's), f = 128, c =
4,096, lr 6e-3, 45 epochs (release: tanh, 2048, 16,384, 3.5e-4 in this unit, 1000): a short run with tanh
does not leave the plateau at log c. --recipe released keeps theirs. (2) log mean p by logsumexp: from
probabilities it is NaN once a code underflows. (3) The dictionary comes from a hash of the seed and is in no
checkpoint. (4) Small encoder with GroupNorm; AdamW; views by pose, light, noise. (5) --prior forward is the
preprint's form, known at second hand. (6) The learnable dictionaries are our reading of three names; none is
released.
"""
if __name__ == "__main__":
    import kernels.harness.start                                     # before torch: see there
import json
import math

import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from kernels import bank_topk, dictionary_loss, dictionary_reference, dictionary_signs, unit_rows
from kernels.harness.cli import bounded, layer_sizes, load_data, make_encoder, open_folder, options, parse
from kernels.harness.encoder import Encoder                          # to be found here too
from kernels.harness.files import atomic_write_text
from kernels.harness.images import choose, encode, fixed_order, limited, pixels
from kernels.harness.pictures import plot_meters
from kernels.harness.probes import begin, quick_probe, report
from kernels.harness.processes import die, gather, launch, rank
from kernels.harness.run import Run
from kernels.harness.views import two_views


# ==== The method ============================================================================================
def derived_temperature(n, f, codes, eps=1e-8):
    """tau = f / (sqrt(n) Lam), Lam = log((1 - eps (c - 1)) / eps): the released code's, for n images a view.

    With orthogonal codes, z = w_j / sqrt(n) then gives 1 - eps (c - 1) to code j and eps to each other one.
    ValueError unless 0 < eps < 1 / c, where p is larger for code j than for any other.
    """
    if not 0 < eps * codes < 1 or codes < 2:
        raise ValueError(f"eps {eps} must be above 0 and below 1 / codes, {codes} codes at least 2")
    return f / (math.sqrt(n) * math.log((1 - eps * (codes - 1)) / eps))


class Sphere(nn.Module):
    """Rows of length sqrt(f / n): the preprint's embeddings, in place of tanh."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def forward(self, x):
        return self.length * unit_rows(x)


def projection_head(features, sizes, final):
    """h [B, features] -> z [B, sizes[-1]]: Linear, BatchNorm, ReLU; at last `final` in place of ReLU."""
    layers = nn.Sequential()
    for size in sizes:
        layers.extend([nn.Linear(features, size), nn.BatchNorm1d(size), nn.ReLU()])
        features = size
    layers[-1] = final
    return layers


class FALCON(nn.Module):
    """An encoder to `features` numbers, a projector with layers of these sizes, a dictionary of codes.

    dictionary: a FixedDictionary or one of those below, as wide as the projector's last layer. batch: images
    of a view, n. norm: l2 or tanh. prior: reverse, forward or none, which only logs it. temperature: over the
    derived one. ValueError if the widths differ, or for another norm.
    """

    def __init__(self, encoder, features, dictionary, batch, projector=(128,), norm="l2", prior="reverse",
                 temperature=1., eps=1e-8):
        super().__init__()
        f = projector[-1]
        if dictionary.width != f:
            raise ValueError(f"codes of {dictionary.width} numbers for embeddings of {f}: they must agree")
        if norm not in ("l2", "tanh"):
            raise ValueError(f"norm {norm!r} is neither l2 nor tanh")
        final = nn.Tanh() if norm == "tanh" else Sphere(math.sqrt(f / batch))
        self.encoder = encoder
        self.projector = projection_head(features, projector, final)
        self.dictionary = dictionary
        self.temperature = temperature * derived_temperature(batch, f, dictionary.codes, eps)
        self.prior = prior

    def forward(self, view1, view2):
        h1, h2 = self.encoder(torch.cat([view1, view2])).chunk(2)    # [B, E]
        z1 = self.projector(gather(h1))                              # [B, f]
        z2 = self.projector(gather(h2))
        form = "reverse" if self.prior == "none" else self.prior
        kl, ce = self.dictionary(z1, z2, self.temperature, form)
        if self.prior == "none":
            return {"cross_entropy": ce}, {"prior": kl}
        return {"prior": kl, "cross_entropy": ce}, {}


def beta_at(progress, beta, rise):
    """The cross-entropy's weight: from 0 to beta in the part `rise` of the run, so that the prior has spread
    the codes before images settle on one."""
    return beta if progress >= rise else beta * progress / rise


# ---- Dictionaries: the paper's, and our reading of three names for learnable ones --------------------------
class FixedDictionary(nn.Module):
    """W [codes, width], random signs by a hash of the seed: never trained, in no checkpoint."""

    def __init__(self, codes, width, seed=0):
        super().__init__()
        self.codes = codes
        self.width = width
        self.seed = seed

    def vectors(self, device="cpu"):
        """W [codes, width], rows of length sqrt(width)."""
        return dictionary_signs(self.codes, self.width, self.seed, device=device)

    def forward(self, z1, z2, temperature, prior):
        """Prior and cross-entropy of two views' embeddings [n, width]."""
        return dictionary_loss(z1, z2, self.codes, self.seed, temperature, prior)


class LearnedDictionary(FixedDictionary):
    """Its first `learned` codes start at the fixed ones, keep their length and go down the gradient."""

    def __init__(self, codes, width, seed=0, learned=None):
        super().__init__(codes, width, seed)
        start = dictionary_signs(learned or codes, width, seed)
        self.learned = nn.Parameter(start)

    def vectors(self, device="cpu"):
        learned = F.normalize(self.learned).to(device) * math.sqrt(self.width)
        fixed = super().vectors(device)
        return torch.cat([learned, fixed[len(learned):]])

    def forward(self, z1, z2, temperature, prior):
        with torch.autocast(z1.device.type, enabled=False):
            W = self.vectors(z1.device)
            return dictionary_reference(z1.float(), z2.float(), W, temperature, prior)


class AlternatingDictionary(LearnedDictionary):
    """All codes take a step of k-means every 8 batches of n images in training; no gradient moves them."""

    def __init__(self, codes, width, batch, seed=0):
        super().__init__(codes, width, seed)
        self.learned.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(32, 2 * batch, width))        # in the last 32 batches
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, z1, z2, temperature, prior):
        if self.training:
            self.cluster(torch.cat([z1, z2]).float())
        return super().forward(z1, z2, temperature, prior)

    @torch.no_grad()
    def cluster(self, z):
        """Embeddings z [2n, width] of a batch; codes move to the mean of those seen nearest to them."""
        self.seen[self.count % 32] = z
        self.count += 1
        if self.count % 8 == 0:
            z = self.seen[:self.count].flatten(0, 1)
            _, nearest = bank_topk(z, self.vectors(z.device), 1)     # [.., 1]
            means = torch.zeros_like(self.learned).index_add_(0, nearest.flatten(), z)
            used = means.norm(dim=1) > 0
            self.learned[used] = F.normalize(means[used]) * math.sqrt(self.width)


def make_dictionary(kind, codes, width, batch, seed=0):
    """fixed; learned, by gradient; hybrid, a quarter of it by gradient; alternating, by k-means."""
    if kind == "fixed":
        return FixedDictionary(codes, width, seed)
    if kind == "alternating":
        return AlternatingDictionary(codes, width, batch, seed)
    learned = max(1, codes // 4) if kind == "hybrid" else codes
    return LearnedDictionary(codes, width, seed, learned)


# ---- What the loss is worth --------------------------------------------------------------------------------
def loss_values(n, codes, used, beta=1., eps=1e-8, prior="reverse"):
    """{what the embeddings do: the least loss then}, derived for the reverse prior; of others one number.

    With the forward prior it is a bound, reached where n is a multiple of codes; for other n > codes the
    reverse one's optimum lies a little above what is given, too (n 64, 48 codes: by 0.06).
    """
    used = min(used, n)                                              # a batch uses at most n codes
    most = min(1, beta)
    rest = eps * (codes - 1)
    optimum = -beta * ((1 - rest) * math.log1p(-rest) + rest * math.log(eps))
    if prior == "forward":
        return {"not below": optimum + math.log(codes)}
    if prior == "none":
        return {"optimum, one code for all": optimum}
    times = "" if beta >= 1 else f"{beta:g} "
    return {f"representation collapse, {times}log c": most * math.log(codes),
            f"cluster collapse to {used} codes, {times}log(c / {used})": most * math.log(codes / used),
            "optimum": max(optimum, most * math.log(codes / n))}


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
    watched = choose(data.test_images, fixed_order(len(data.test_images))[:512])
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
                beta = beta_at(run.progress, run.args.beta, run.args.beta_rise)
                terms["cross_entropy"] = beta * terms["cross_entropy"]
                loss = sum(terms.values())
                (loss / len(batches)).backward()
                run.log({"loss": loss, **terms, "beta": beta, **notes})
            optimizer.step()
            schedule.step()
        model.eval()
        meters = collapse_meters(embed(model, watched), model.dictionary.vectors(), model.temperature)
        run.end_epoch({"meters": meters} | (quick_probe(model, data) if run.probing() else {}))


# ---- The meters of four collapses --------------------------------------------------------------------------
def entropy(p):
    """-sum p log p in nats; p >= 0 sums to 1."""
    return -torch.special.xlogy(p, p).sum().item()


def assign(z, W, temperature):
    """Most likely code [N] and mean assignment [c] of z [N, f] to W [c, f]."""
    codes = []
    total = 0
    for rows in z.split(64):
        logits = rows @ W.T                                          # [64, c]
        codes.append(logits.argmax(1))
        p = (logits / temperature).softmax(1)
        total += p.sum(0)
    return torch.cat(codes), total / len(z)


def mixture_entropy(z, components, samples):
    """Entropy, by sampling, of a mixture of diagonal Gaussians fitted to z [N, f], over f; in nats.

    Low where clusters are points, not clouds. The released code (main_collapses.py) rescales embeddings to
    [0, 1] and pads them with zeros to 2048 dimensions, starts from k-means, takes 10 times 10,000 samples and
    does not divide by f: its values are others, only their order between runs can be compared.
    """
    mixture = GaussianMixture(components, covariance_type="diag", init_params="random_from_data",
                              random_state=0).fit(z.numpy())
    drawn, _ = mixture.sample(samples)
    return -float(mixture.score_samples(drawn).mean()) / z.shape[1]


@torch.no_grad()
def collapse_meters(z, W, temperature, mixtures=(10,), samples=2000):
    """What tells the four collapses apart, on embeddings z [N, f] and codes W [c, f] -> {name: number}.

    representation: std over images, mean over dimensions; mean cosine of pairs (1: one point)
    dimensional: exp entropy of the eigenvalues of M = z^T z / N, uncentred (f: all dimensions alike); rms of
    M's off-diagonal over the mean of its diagonal
    cluster: codes that are some image's most likely one; entropy of the mean assignment (log c: uniform)
    intracluster: mixture_entropy for each number of mixtures up to N
    """
    n, f = z.shape
    code, p = assign(z, W, temperature)
    wide = z.double()
    M = wide.T @ wide / n
    spectrum = torch.linalg.eigvalsh(M).clamp(min=0)
    share = spectrum / spectrum.sum()
    diagonal = M.diagonal()
    off = (M - diagonal.diag()).square().sum() / (f * (f - 1))
    cosines = F.normalize(z).sum(0).square().sum() - n               # of all pairs
    meters = {"std": z.std(0).mean().item(),
              "cosine": cosines.item() / (n * (n - 1)),
              "dimensions": math.exp(entropy(share)),
              "off_diagonal": (off.sqrt() / diagonal.mean()).item(),
              "codes": len(code.unique()),
              "assignment_entropy": entropy(p)}
    for components in mixtures:
        if components <= n:
            meters[f"mixture_entropy_{components}"] = mixture_entropy(z, components, samples)
    return meters


@torch.no_grad()
def embed(model, images):
    """z [N, f] on the CPU, of images [N, C, *S]."""
    return model.projector(encode(model.encoder, images)).cpu()


def report_collapses(model, data, history, args, folder):
    """Loss beside its derived values, meters, clusters against classes; meters.png, meters.json."""
    if rank():
        return
    model.eval()
    probed = limited(data)
    z = embed(model, probed.test_images)
    W = model.dictionary.vectors().detach()
    meters = collapse_meters(z, W, model.temperature, (10, 20, 50, 100, 200), samples=10_000)
    values = loss_values(args.batch, args.codes, meters["codes"], args.beta, args.eps, args.prior)
    if probed.labels is not None:
        code, _ = assign(z, W, model.temperature)
        meters["NMI"] = normalized_mutual_info_score(probed.test_labels, code)
        meters["NMI of a random assignment"] = normalized_mutual_info_score(        # into clusters as large
            probed.test_labels, code[fixed_order(len(code))])
        meters["AMI"] = adjusted_mutual_info_score(probed.test_labels, code)
    least = f"training loss {history[-1]['loss']:.3g}; least loss at temperature 1"
    for title, numbers in {"\ntest images": meters, least: values}.items():
        print(f"{title}:", "; ".join(f"{name} {value:.3g}" for name, value in numbers.items()))
    atomic_write_text(folder / "meters.json", json.dumps(
        {**meters, "least loss at temperature 1": values}, indent=1))
    plot_meters(history, args.codes, values, z, folder)


# ---- Its options -------------------------------------------------------------------------------------------
RELEASED = dict(epochs=1000, lr=2.5e-4 * 2 ** 0.5, weight_decay=1e-4,
                projector=[2048], codes=16384, norm="tanh", beta_rise=0.)


def main():
    parser, add = options("FALCON", __doc__, batch=64, epochs=45, lr=6e-3, least_batch=2)
    add("--recipe", default="default", choices=["default", "released"],
        help="released: the authors' settings for options that are not given")
    add("--projector", type=layer_sizes, default="128", help="sizes of the projector's layers; the last is f")
    add("--codes", type=bounded(int, 2, 2**24), default=4096, help="c, size of the dictionary")
    add("--dictionary", default="fixed", choices=["fixed", "learned", "alternating", "hybrid"],
        help="what it does during training")
    add("--norm", default="l2", choices=["tanh", "l2"], help="of z: the release's or the preprint's")
    add("--prior", default="reverse", choices=["reverse", "forward", "none"],
        help="the release's form, the preprint's; none shows the collapse")
    add("--beta", type=bounded(float, 0), default=1., help="weight of the cross-entropy in the end")
    add("--beta-rise", type=bounded(float, 0, 1.000001), default=1.,
        help="part of the run in which beta rises from 0")
    add("--temperature", type=bounded(float, 1e-3), default=1., help="over the derived one")
    add("--eps", type=bounded(float, 1e-30), default=1e-8, help="below 1 / codes: sets the temperature")
    add("--weight-decay", type=bounded(float, 0), default=0.05, help="of AdamW")
    # It decides the defaults of others, so it is read before them; what it does not know parse() refuses.
    if parser.parse_known_args()[0].recipe == "released":
        parser.set_defaults(**RELEASED)
    args, state = parse(parser)
    if args.eps * args.codes >= 1:
        die(f"--eps {args.eps} must be below 1 / codes, {1 / args.codes:.3g}: lower one")
    data = load_data(args)
    encoder = make_encoder(args, data)
    folder = open_folder(args, state)

    dictionary = make_dictionary(args.dictionary, args.codes, args.projector[-1], args.batch, args.seed)
    model = FALCON(encoder, encoder.features, dictionary, args.batch, projector=args.projector,
                   norm=args.norm, prior=args.prior, temperature=args.temperature, eps=args.eps)
    model.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    run = Run(args, data, folder, state)
    untrained = begin(model, data, folder)
    train(model, optimizer, data, run)
    report_collapses(model, data, run.history, args, folder)
    report(model, data, untrained, run.history, folder)


if __name__ == "__main__":
    launch(main)
