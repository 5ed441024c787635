"""What others' numbers say of embeddings whose state is known, beside the verdict: a table, in a minute on two cores.

    python tests/experiments/verdicts.py

std: mean standard deviation of unit vectors, times sqrt(D) (SimSiam's measure, 2011.10566, lightly's
std_of_l2_normalized). RankMe: 2210.02885, eq. 1 and 2. MONAI: its EmbeddingCollapseMetric (1.6), the greatest of one
less the effective rank of centred embeddings over what it can be and, with labels, the cosine of class centres and one
less the silhouette, both brought to 0 ... 1. None has a bound of its own: each gets the one that parts these very
cases best. They see the same embeddings; only the verdict takes views and the untrained network.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.metrics import silhouette_score

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from embeddings import HEALTHY, ONE_POINT, PARTIAL, SYNTHETIC, THIN, sentence_of


def std_of_unit_vectors(z, labels):
    return F.normalize(z).std(0).mean().item() * z.shape[1] ** .5


def rankme(z, labels):
    share = torch.linalg.svdvals(z)
    share = share / share.sum() + 1e-7
    return (-(share * share.log()).sum()).exp().item()


def effective_rank_score(z):
    share = torch.linalg.svdvals(z - z.mean(0))
    if not share.sum():
        return 1.
    share = share / share.sum()
    rank = (-(share * share.clamp(min=torch.finfo(share.dtype).tiny).log()).sum()).exp()
    return min(1, max(0, 1 - rank.item() / min(len(z) - 1, z.shape[1])))


def monai(z, labels):
    scores = [effective_rank_score(z)]
    if labels is not None:
        centres = F.normalize(torch.stack([z[labels == name].mean(0) for name in labels.unique()]))
        upper = torch.triu_indices(len(centres), len(centres), 1)
        cosines = (centres @ centres.T)[upper[0], upper[1]]
        scores += [(cosines.mean().item() + 1) / 2, (1 - silhouette_score(z, labels, metric="cosine")) / 2]
    return max(scores)


THEIRS = {"std": std_of_unit_vectors, "RankMe": rankme, "MONAI": monai}


def best_bound(numbers, collapsed):
    """(right, bound, whether what lies below it is called collapsed) that parts the cases best."""
    places = sorted({*numbers})
    bounds = [places[0] - 1, *((a + b) / 2 for a, b in zip(places, places[1:])), places[-1] + 1]
    return max((sum((number < bound) == (truth == below) for number, truth in zip(numbers, collapsed)), bound, below)
               for bound in bounds for below in (True, False))


def known_cases():
    """{name: whether collapsed} of those that are plainly one or the other, and whose numbers are finite."""
    cases = {}
    for name, ((z, *_), expected) in SYNTHETIC.items():
        if expected in (HEALTHY, ONE_POINT, THIN, PARTIAL) and torch.as_tensor(rows_of(z)).isfinite().all():
            cases[name] = expected != HEALTHY
    return cases


def rows_of(embeddings):
    z = embeddings[0]
    return torch.as_tensor(z.astype(z.dtype.newbyteorder("=")) if hasattr(z, "astype") else z).double()


def main():
    cases = known_cases()
    numbers = {}
    for name in cases:
        z, labels = rows_of(SYNTHETIC[name][0][0]), [*SYNTHETIC[name][0], None, None][2]
        numbers[name] = [function(z, labels) for function in THEIRS.values()]
    chosen = [best_bound(column, [*cases.values()]) for column in zip(*numbers.values())]
    print(f"| embeddings | truth | verdict | {' | '.join(THEIRS)} |\n{'|---' * (3 + len(THEIRS))}|")
    right = 0
    for name, collapsed in cases.items():
        said = sentence_of(name).split(":")[0].split(",")[0]
        right += said.startswith(HEALTHY) != collapsed
        cells = []
        for number, (_, bound, below) in zip(numbers[name], chosen):
            wrong = ((number < bound) == below) != collapsed
            cells.append(f"{number:.3g}" + " wrong" * wrong)
        print(f"| {name} | {'collapsed' if collapsed else 'healthy'} | {said} | {' | '.join(cells)} |")
    counts = [f"{count} of {len(cases)}" for count, _, _ in chosen]
    print(f"| right | | {right} of {len(cases)} | {' | '.join(counts)} |")
    bounds = [f"{'below' if below else 'above'} {bound:.3g}" for _, bound, below in chosen]
    print(f"| called collapsed | | its own | {' | '.join(bounds)} |")


if __name__ == "__main__":
    main()
