"""IConE: learnable instance embeddings, kept apart by a diversity objective; trains at batch size 1.

After Almpanakis, Kreshuk, arXiv 2603.15263 (2026). THIS IS A RECONSTRUCTION: only the abstract was at hand,
all else is our reading. Each image i owns a row u_i of unit length in a table. Its views z, brought to that
length, are pulled to its row; the row is pushed away from a bank of others:

    L = mean_b [1 - <z_b, u_b>] + w t mean_b log mean_{n != b} exp(<u_b, u_n> / t)
           alignment                  diversity: a soft maximum of cosines to the bank, which has no gradient

What prevents collapse thus never looks at the batch: no term compares embeddings of two of its images, no
layer mixes them. Nor does a step look at the whole table: the bank are the rows of the last 2,048 visits, on
digits some 430. Rows of the batch take a step of gradient descent and keep unit length. A row starts at the
untrained encoder's embedding of its image; if the first visit comes after a tenth of the run, at the mean of
that moment's views. Steps draw from a window of 400 images that slides over the data once a run: visits of an
image lie close together (but of those in the first window), and rows meet an encoder that has not gone far.

    python icone.py                                      # posed digits
    python icone.py --batch 1 --epochs 24                # one image at a time
    python icone.py --data FOLDER --size 64              # your own images, or volumes
    python icone.py --weight 0                           # without the diversity: collapse

Expect k-NN accuracy 0.927 ± 0.007 and linear 0.943 ± 0.009 (mean ± std, 3 seeds; raw pixels 0.593, 0.169;
random encoder 0.307 ± 0.042, 0.222 ± 0.018) in 53 to 148 s on 2 cores of an AMD EPYC with torch 2.13.0; at
batch 1 and 32 epochs 0.938 and 0.942 (seed 0), seven to ten minutes on one core.

Choices of our own: (1) --diversity logsumexp; relu2, the mean of max(0, <u_b, u_n>)^2, is the form of a third
party, "not an exact reproduction" (WagnerJon/organoid-3d-shape-retrieval). (2) --view-view 0: the third party
also pulls the two views together. (3) --table-init visit, as above; the third party draws rows at random.
(4) --centre 0.99: a running mean is taken off the embeddings; a mean over the batch would mix images. (5)
--table-lr 0.6 to the last step, no momentum. (6) lr follows sqrt(batch). (7) --window 400, or some six
steps, and recent rows as the bank: after Cao et al., arXiv 2006.14618, who classify instances; 0: none.
Towards the third party's form: --diversity relu2 --weight 2 --view-view 1 --centre 0 --table-init normal
--lr 1.4e-4 --epochs 100 --window 0. Cut: its AdamW on the table; that all rows push each other in each step.
"""
if __name__ == "__main__":
    import kernels.harness.start                                     # before torch: see there
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from kernels import bank_logsumexp, bank_repulsion, unit_rows
from kernels.harness.cli import (bounded, layer_sizes_or_none, load_data, make_encoder, open_folder, options,
                                 parse, typed)
from kernels.harness.encoder import Encoder                          # to be found here too
from kernels.harness.images import fixed_order, in_parts, pixels
from kernels.harness.order import through_window
from kernels.harness.probes import begin, quick_probe, report
from kernels.harness.processes import die, gather, launch
from kernels.harness.run import Run
from kernels.harness.views import two_views


# ==== The method ============================================================================================
class Centre(nn.Module):
    """x - mean [B, D], the mean running over what earlier steps saw: no sample sees the rest of its batch."""

    def __init__(self, width, momentum):
        super().__init__()
        self.momentum = momentum                                     # of the mean, for each 128 views
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("total", torch.zeros(width))            # of the views since the last step
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        x = x.to(self.mean.dtype)                                    # fp32 also under autocast
        if self.training and torch.is_grad_enabled():                # a validation loss leaves nothing
            self.total += x.detach().sum(0)
            self.count += len(x)
        return x - self.mean

    @torch.no_grad()
    def step(self):
        """After an optimiser's step, so that one step of K batches equals one of a batch K times as large."""
        momentum = self.momentum ** (self.count / 128)
        self.mean.lerp_(self.total / self.count.clamp(min=1), 1 - momentum)
        self.total.zero_()
        self.count.zero_()


def crowding(rows, bank, exclude, diversity="logsumexp", temperature=0.2):
    """How near rows [R, D] come to those of a bank [M, D], all of unit length, but for a column each [R].

    logsumexp  t mean_r log mean_{n != excluded} exp(<u_r, u_n> / t)     1 if all are equal, 0 if orthogonal
    relu2      mean_{r, n != excluded} max(0, <u_r, u_n>)^2              the same; random directions: 1/(2 D)
    """
    if diversity == "relu2":
        return bank_repulsion(rows, bank, exclude=exclude)
    sums = bank_logsumexp(rows, bank, temperature, exclude=exclude)  # [R]
    return temperature * (sums.mean() - math.log(len(bank) - 1))


def column_to_exclude(places, index):
    """The column that each image of index [B] skips in a bank, made of the rows at sorted places [M].

    It is its own row if that is there, else the last (any would do), so that M - 1 rows push each image.
    """
    last = len(places) - 1
    column = torch.searchsorted(places, index).clamp(max=last)
    return torch.where(places[column] == index, column, last)


def projection_head(features, sizes):
    """h [B, features] -> z [B, sizes[-1]]: Linear, LayerNorm, ReLU; at last no ReLU and no gains."""
    layers = nn.Sequential()
    for size in sizes:
        layers.extend([nn.Linear(features, size), nn.LayerNorm(size), nn.ReLU()])
        features = size
    if sizes:
        return layers[:-2].append(nn.LayerNorm(size, elementwise_affine=False))
    return layers


class IConE(nn.Module):
    """An encoder to `features` numbers, a projector and a table [count, D], a row for each training image.

    projector: sizes of a head's layers; () is no head. bank: of so many visits rows push those of a batch.
    ValueError for a diversity that is none. Call start_table before training. The optimiser has the encoder
    and the projector alone; step(), after each of its steps, moves a row by `table_lr` x the gradient of its
    image. The table may lie on another device than all else: model.table = model.table.cpu().
    """

    def __init__(self, encoder, features, count, projector=(), centre=0.99, diversity="logsumexp",
                 temperature=0.2, weight=6., view_view=0., bank=2048, table_lr=0.6):
        super().__init__()
        if diversity not in ("logsumexp", "relu2"):
            raise ValueError(f"diversity {diversity!r} is neither logsumexp nor relu2")
        width = projector[-1] if projector else features
        self.encoder = encoder
        self.projector = projection_head(features, projector)
        if centre:
            self.projector.append(Centre(width, centre))
        self.register_buffer("table", torch.zeros(count, width))
        self.register_buffer("known", torch.zeros(count).bool())            # visited at least once
        self.diversity = diversity
        self.temperature = temperature
        self.weight = weight
        self.view_view = view_view
        self.table_lr = table_lr
        # Image numbers, the latest at the end; before there are visits, any.
        self.register_buffer("visited", fixed_order(count)[torch.arange(bank) % count])
        # Of the step under way: the rows that its batches took, whose gradient step() reads.
        self.taken = []                                              # (index [B], rows [B, D]) of each batch

    @torch.no_grad()
    def start_table(self, images, table_init="visit"):
        """Rows start at centred embeddings of images [N, C, *S] ("encoder", "visit") or random ("normal")."""
        self.known.fill_(table_init != "visit")
        self.eval()
        for rows in in_parts(images):
            h = self.encoder(pixels(images, rows, self.visited.device))
            self.table[rows] = self.projector(h).to(self.table)
        mean = self.table.mean(0)
        self.table.sub_(mean)
        if table_init == "normal":
            self.table.normal_()
        F.normalize(self.table, out=self.table)
        for layer in self.projector:
            if isinstance(layer, Centre):
                layer.mean.copy_(mean)

    def rows_of(self, index, fresh, renew):
        """Rows [B, D] of the images index [B], of unit length, which the next step moves if it trains; renew:
        those not visited before are fresh [B, D]."""
        rows = self.table[index.to(self.table.device)].to(index.device)
        if self.training and torch.is_grad_enabled():                # a validation loss leaves nothing behind
            known = self.known[index, None] | (not renew)
            rows = torch.where(known, rows, fresh.detach()).requires_grad_()
            self.taken.append((index, rows))
        return F.normalize(rows)

    def forward(self, view1, view2, index, renew=False):
        """renew: with table_init "visit", rows of images not visited before start at their views' mean."""
        views = torch.cat([view1, view2])                            # [2B, C, *S]
        h1, h2 = self.encoder(views).chunk(2)
        h = torch.cat([gather(h1), gather(h2)])                      # [2B, E]
        z = unit_rows(self.projector(h).to(self.table.dtype))        # [2B, D]
        z1, z2 = z.chunk(2)
        u = self.rows_of(index, F.normalize(z1 + z2), renew)         # [B, D]
        places = self.visited.unique()                               # [M], in order: one bank a step
        bank = self.table.index_select(0, places.to(self.table.device)).to(index.device)     # [M, D]
        exclude = column_to_exclude(places, index)
        crowded = crowding(u, bank, exclude, self.diversity, self.temperature)
        terms = {"alignment": 1 - (z * u.repeat(2, 1)).sum(1).mean(),
                 "diversity": self.weight * crowded}
        if self.view_view:
            terms["view_view"] = self.view_view * (1 - (z1 * z2).sum(1).mean())
        return terms, {"cosine_to_all": z.mean(0) @ bank.mean(0)}

    @torch.no_grad()
    def step(self, scale=1.):
        """After the optimiser's: rows that were taken go down their gradient, no other moves; and the mean.

        The loss is a mean over the step's images: rows.grad is an image's own gradient over their number.
        scale: what the loss was multiplied with, scaler.get_scale() under a GradScaler, before its update().
        """
        images = sum(len(index) for index, _ in self.taken)
        for index, rows in self.taken:
            self.known[index] = True
            self.visited = torch.cat([self.visited[len(index):], index[-len(self.visited):]])
            rows = F.normalize(rows - self.table_lr * images / scale * rows.grad)
            self.table[index.to(self.table.device)] = rows.to(self.table.device)
        self.taken.clear()
        for layer in self.projector:
            if isinstance(layer, Centre):
                layer.step()


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
                    # index of all processes: h is gathered. After a tenth new rows start at their views.
                    terms, notes = call(*views, index, run.progress > 0.1)
                loss = sum(terms.values())
                (loss / len(batches)).backward()
                run.log({"loss": loss, **terms, **notes})
            optimizer.step()
            model.step()                                             # rows of these images, and the mean
            schedule.step()
        model.eval()
        run.end_epoch(quick_probe(model, data) if run.probing() else {})     # saves, too


def main():
    parser, add = options("IConE", __doc__, batch=64, epochs=45, lr=3e-3)
    at_least_0 = bounded(float, 0)
    add("--projector", type=layer_sizes_or_none, default="none",
        help="sizes of a head's layers, as 512-128, or none")
    add("--centre", type=bounded(float, 0, 1), default=0.99, help="momentum of the mean per 64 images, or 0")
    add("--table-init", default="visit", choices=["visit", "encoder", "normal"], help="where rows start")
    add("--table-on", default="device", choices=["device", "cpu"], help="cpu: if it is too large for the GPU")
    add("--table-lr", type=at_least_0, default=0.6, help="a row moves by this x its gradient")
    add("--diversity", default="logsumexp", choices=["logsumexp", "relu2"], help="form of the term")
    add("--temperature", type=bounded(float, 1e-3), default=0.2, help="of logsumexp")
    add("--weight", type=at_least_0, default=6., help="of the diversity; 0 shows the collapse")
    add("--view-view", type=at_least_0, default=0., help="weight of pulling the two views together")
    add("--window", type=bounded(int, 0), default=400, help="images to draw steps from; 0: all shuffled")
    add("--bank", type=bounded(int, 3, 2**31), default=2048, help="rows of so many last visits push a step's")
    args, state = parse(parser)
    if args.diversity == "relu2" and "--temperature" in typed():
        die("--temperature is of --diversity logsumexp: leave it out")
    data = load_data(args)
    encoder = make_encoder(args, data)
    folder = open_folder(args, state)

    model = IConE(encoder, encoder.features, len(data.images), projector=args.projector, centre=args.centre,
                  diversity=args.diversity, temperature=args.temperature, weight=args.weight,
                  view_view=args.view_view, bank=args.bank, table_lr=args.table_lr)
    model.to(args.device)
    if args.table_on == "cpu":
        model.table = model.table.cpu()
    model.start_table(data.images, args.table_init)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05, fused=True)
    run = Run(args, data, folder, state, through_window(args.window))
    untrained = begin(model, data, folder)
    if args.epochs < 5:
        print(f"note: --epochs {args.epochs}: IConE learns little from so few visits of an image (letters, "
              "k-NN: 0.074 after 2, 0.598 after 5; SimCLR 0.431, 0.497): more, or ba_ssl.py --no-fusion")
    train(model, optimizer, data, run)
    report(model, data, untrained, run.history, folder)


if __name__ == "__main__":
    launch(main)
