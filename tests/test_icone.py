"""icone.py: the diversity forms and what is known of them, and that no sample depends on the rest of its batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import icone
import vicreg
from small import small_data, small_model, train


ROOT = Path(__file__).parents[1]


def unit(n, d, seed=0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x)


def images(n=12, seed=0):
    return torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(data, seed=0, **options):
    torch.manual_seed(seed)
    net = icone.IConE(icone.Encoder(1, 2, width=2), 16, len(data), **{"projector": (6,), **options}).double()
    net.start_table(data)
    return net.train()


def test_rows_begin_at_their_views_after_a_tenth_of_the_run(tmp_path, monkeypatch):
    """A row that is not known yet; what the loop asks for, batch by batch, of 24 steps of two batches."""
    small = small_model("icone")
    asked = []
    real = small.rows_of
    monkeypatch.setattr(small, "rows_of", lambda index, fresh, renew: asked.append(bool(renew)) or real(index, fresh, renew))
    train("icone", small, small_data(), tmp_path, epochs=8)
    assert asked == [k + 1 > 4.8 for k in range(48)]


def test_the_heads_last_norm_has_no_gains():
    last = icone.projection_head(8, (6, 4))[-1]
    assert not [*last.parameters()]
    torch.testing.assert_close(last(torch.randn(5, 4)).norm(dim=1), torch.full((5,), 2.), rtol=0, atol=1e-2)


# ---- Diversity ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, orthogonal", [("logsumexp", 0), ("relu2", 0)])
def test_diversity_of_orthogonal_rows(kind, orthogonal):
    u = torch.eye(8).double()
    assert icone.crowding(u, u, torch.arange(8), kind).item() == pytest.approx(orthogonal, abs=1e-7)


@pytest.mark.parametrize("kind, collapsed", [("logsumexp", 1), ("relu2", 1)])
def test_diversity_of_collapsed_rows(kind, collapsed):
    u = unit(1, 5).expand(9, 5)
    assert icone.crowding(u, u, torch.arange(9), kind).item() == pytest.approx(collapsed, rel=1e-6)


def test_relu2_of_random_directions():
    u = unit(2000, 32)
    assert icone.crowding(u, u, torch.arange(2000), "relu2").item() == pytest.approx(1 / 64, rel=.02)


def test_relu2_does_not_forbid_orthogonal_clusters():
    u = torch.eye(10).double().repeat(50, 1)                             # ten points, fifty rows in each
    assert icone.crowding(u, u, torch.arange(500), "relu2").item() == pytest.approx(1 / 10, rel=.03)


def textbook(pushing, bank, own, kind, t):
    s = (pushing @ bank.T)[torch.arange(len(bank)) != own[:, None]].view(len(pushing), len(bank) - 1)
    if kind == "logsumexp":
        return t * (s / t).exp().mean(1).log().mean()
    return s.clamp(min=0).square().mean()


@pytest.mark.parametrize("kind", ["logsumexp", "relu2"])
def test_diversity_and_gradient_equal_the_textbook(kind):
    rows = 3 * unit(4, 6).requires_grad_()
    pushing, bank, own = F.normalize(rows), unit(20, 6, 1), torch.tensor([3, 11, 11, 0])
    ours, theirs = icone.crowding(pushing, bank, own, kind, .2), textbook(pushing, bank, own, kind, .2)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-10)
    a, b = (torch.autograd.grad(-1.7 * value, rows, retain_graph=True)[0] for value in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# ---- The table ---------------------------------------------------------------------------------------------
def test_at_the_start_the_bank_is_all_of_a_small_table():
    assert torch.equal(model(images()).visited.unique(), torch.arange(12))


def step(net, index, **options):
    index = torch.as_tensor(index)
    terms, _ = net(images(len(index), 1), images(len(index), 2), index, **options)
    sum(terms.values()).backward()
    net.step()


@pytest.mark.parametrize("batch, last", [([3, 40], [9, 3, 40]), ([7, 11, 12, 13, 2], [12, 13, 2])])
def test_the_bank_are_the_rows_visited_last(batch, last):
    net = model(images(50), bank=3)
    step(net, [5, 6, 9])
    step(net, batch)
    assert net.visited.tolist() == last
    terms, _ = net(images(1, 3), images(1, 4), torch.tensor([9]))
    bank = net.table[sorted(last)]
    own = torch.tensor([sorted(last).index(9) if 9 in last else 2])       # if it is not there, one more has to go
    right = 6 * textbook(net.table[[9]], bank, own, "logsumexp", .2)
    assert terms["diversity"].item() == pytest.approx(right.item(), rel=1e-9)


def test_the_bank_stays_until_the_step(monkeypatch):
    net, seen = model(images(50), bank=20), []
    step(net, range(20, 40))
    crowding = icone.crowding
    monkeypatch.setattr(icone, "crowding", lambda rows, bank, *rest: seen.append(bank.clone()) or crowding(rows, bank, *rest))
    for index in ([1, 2], [3, 4]):                                       # two batches of a step
        terms, _ = net(images(2, 1), images(2, 2), torch.tensor(index))
        sum(terms.values()).backward()
    net.step()
    step(net, [5, 6])
    assert torch.equal(seen[0], seen[1]) and len(seen[0].unique(dim=0)) == 20        # distinct rows
    assert not torch.equal(seen[1], seen[2])


def test_the_own_row_is_excluded_where_it_is_in_the_bank():
    places = torch.tensor([2, 3, 7, 30])
    column = icone.column_to_exclude(places, torch.tensor([7, 2, 30, 0, 5, 49]))
    assert column.tolist() == [2, 0, 3, 3, 3, 3]                         # as many are left for each


@pytest.mark.parametrize("start", ["visit", "encoder", "normal"])
def test_a_row_starts_anew_at_its_first_visit_if_that_comes_late(start):
    data, index = images(), torch.tensor([4, 1, 9])
    net = model(data)
    net.start_table(data, start)
    net.train()
    step(net, [1, 3])
    before = net.table.clone()
    views = images(3, 5), images(3, 6)
    z1, z2 = (F.normalize(net.projector(net.encoder(view))).detach() for view in views)
    net(*views, index, renew=True)
    (_, rows), = net.taken
    expected = before[index].clone()
    if start == "visit":
        expected[[0, 2]] = F.normalize(z1 + z2)[[0, 2]]                  # 1 was visited before
    torch.testing.assert_close(rows, expected)
    assert torch.equal(net.table, before)                                # until the step


def test_late_visits_end_in_the_table():
    net = model(images(), table_lr=0)
    step(net, [4, 9], renew=True)
    assert net.known[[4, 9]].all()
    rows = net.table[[4, 9]].clone()
    step(net, [4, 9], renew=True)
    torch.testing.assert_close(net.table[[4, 9]], rows)


def test_a_step_moves_the_rows_of_its_images_and_no_other():
    data, index = images(), torch.tensor([4, 1, 9])
    net = model(data, table_lr=.3, weight=2.)
    before = net.table.clone()
    views = images(3, 1), images(3, 2)
    z1, z2 = (F.normalize(net.projector(net.encoder(view))).detach() for view in views)
    terms, _ = net(*views, index)
    sum(terms.values()).backward()
    net.step()

    rows = before[index].requires_grad_()
    u = F.normalize(rows)
    loss = 3 * (1 - ((z1 + z2) * u).sum(1).mean() / 2 + 2 * textbook(u, before, index, "logsumexp", .2))
    gradient, = torch.autograd.grad(loss, rows)                          # of each image's own loss
    torch.testing.assert_close(net.table[index], F.normalize(rows - .3 * gradient))
    others = torch.ones(12, dtype=torch.bool).index_fill(0, index, False)
    assert torch.equal(net.table[others], before[others])
    assert not net.taken


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_table_may_lie_on_the_cpu_while_the_rest_is_on_a_gpu():
    data, index = images(), torch.tensor([4, 1, 9])
    tables = []
    for table_on in ("cpu", "cuda"):
        net = model(data, bank=8)
        net.cuda().table = net.table.to(table_on)
        net.start_table(data)
        net.train()
        terms, _ = net(images(3, 1).cuda(), images(3, 2).cuda(), index.cuda())
        sum(terms.values()).backward()
        net.step()
        tables.append(net.table.cpu())
    torch.testing.assert_close(*tables)


# ---- The model ---------------------------------------------------------------------------------------------
def test_terms_are_the_formulas():
    data, index = images(), torch.tensor([2, 7])
    net = model(data, view_view=.5, diversity="relu2", weight=2.)
    view1, view2 = images(2, 1), images(2, 2)
    terms, notes = net(view1, view2, index)
    z1, z2 = (F.normalize(net.projector(net.encoder(view))) for view in (view1, view2))
    u = net.table
    assert terms["alignment"].item() == pytest.approx((1 - ((z1 + z2) * u[index]).sum(1).mean() / 2).item())
    assert terms["diversity"].item() == pytest.approx(2 * textbook(u[index], u, index, "relu2", 0).item())
    assert terms["view_view"].item() == pytest.approx(.5 * (1 - (z1 * z2).sum(1).mean()).item())
    assert notes["cosine_to_all"].item() == pytest.approx((torch.cat([z1, z2]) @ u.T).mean().item())


def test_the_table_starts_at_the_encoders_centred_embeddings():
    data = images()
    net = model(data).float().eval()
    data = data.float()
    z = net.projector(net.encoder(data))                                 # the centre takes their mean off
    torch.testing.assert_close(net.table, F.normalize(z).detach(), rtol=1e-4, atol=1e-4)
    assert z.mean(0).abs().max() < 1e-5
    assert (net.projector[-1].mean != 0).any()


def test_the_table_can_start_at_random():
    net = model(images())
    net.start_table(images(), table_init="normal")
    assert (net.table @ net.table.T).fill_diagonal_(0).mean().abs() < .2
    torch.testing.assert_close(net.table.norm(dim=1), torch.ones(12).double())


def test_a_diversity_that_is_none_is_named():
    with pytest.raises(ValueError, match="diversity 'koleo' is neither"):
        model(images(), diversity="koleo")


def test_buffers_of_the_centre_stand_once_in_a_checkpoint():
    assert sum(name.endswith("mean") for name in model(images()).state_dict()) == 1


def test_no_sample_sees_another_one_of_its_batch():
    """Another image in place 2 changes no other sample's alignment gradient, in the views or in the table."""
    data, index = images(), torch.tensor([4, 1, 9])
    gradients = []
    for last in (0, 2):
        net, (view1, view2) = model(data), (images(3, 1), images(3, 2))
        view1[2], view2[2], index[2] = images(9, 3)[last], images(9, 4)[last], 9 - last
        views = view1.requires_grad_(), view2.requires_grad_()
        alignment = net(*views, index)[0]["alignment"]
        (_, rows), = net.taken
        gradients.append(torch.autograd.grad(alignment, (*views, rows)))
    for a, b in zip(*gradients):
        assert torch.equal(a[:2], b[:2])
        assert not torch.equal(a[2], b[2])


def updated(net, batches, views, index, *renew):
    """The state after one SGD step whose gradient is averaged over batches."""
    optimizer = torch.optim.SGD(net.parameters(), .1)
    for batch in batches:
        numbers = [index[batch], *renew] if isinstance(net, icone.IConE) else []
        terms, _ = net(*(view[batch] for view in views), *numbers)
        (sum(terms.values()) / len(batches)).backward()
    optimizer.step()
    if isinstance(net, icone.IConE):
        net.step()
    return net.state_dict()


@pytest.mark.parametrize("bank", [5, 12])
@pytest.mark.parametrize("renew", [False, True])
def test_accumulated_batches_of_one_equal_the_whole_batch(bank, renew):
    data, views, index = images(), (images(8, 1), images(8, 2)), torch.arange(8)
    whole = updated(model(data, bank=bank), [index], views, index, renew)
    ones = updated(model(data, bank=bank), index.split(1), views, index, renew)
    for name in whole:
        torch.testing.assert_close(ones[name], whole[name], rtol=1e-10, atol=1e-12)


def test_for_vicreg_they_do_not():
    def fresh():
        torch.manual_seed(0)
        return vicreg.VICReg(vicreg.Encoder(1, 2, width=2), 16, projector=(6,)).double()
    views, index = (images(8, 1), images(8, 2)), torch.arange(8)
    whole, halves = updated(fresh(), [index], views, index), updated(fresh(), index.split(4), views, index)
    assert not torch.allclose(whole["projector.0.weight"], halves["projector.0.weight"], rtol=1e-3)


def test_centre_follows_the_mean_of_what_it_saw():
    centre, x = icone.Centre(3, .99), torch.randn(256, 3) + 5
    assert torch.equal(centre(x), x)
    centre(x[:0])
    assert torch.equal(centre.eval()(x), x)                              # nothing moves before the step
    centre.step()
    torch.testing.assert_close(centre.mean, (1 - .99 ** 2) * x.mean(0))
    torch.testing.assert_close(centre(x), x - centre.mean)
    assert centre.count == 0 and not centre.total.any()
    with torch.no_grad():                                                # a validation loss, in train mode
        centre.train()(x)
    assert centre.count == 0 and not centre.total.any()
    mean = centre.mean.clone()
    centre.step()                                                        # of no views
    assert torch.equal(centre.mean, mean)


# ---- Its cost ----------------------------------------------------------------------------------------------
STEPS = """
import resource, statistics, sys, time
import torch
import icone

torch.set_num_threads(1)
nothing = torch.nn.Flatten()
nothing.place = torch.nn.Parameter(torch.zeros(()))           # says on which device the table's start is made
for count in (1437, 10_000, 50_000, 1_000_000):
    model = icone.IConE(nothing, 128, count)
    model.start_table(torch.ones(1, 128).expand(count, -1), "normal")
    model.train()
    for batch in (1, 64):
        x = torch.randn(batch, 128)
        seconds = []
        for _ in range(400):
            index = torch.randint(count, (batch,))
            start = time.perf_counter()
            terms, _ = model(x, x, index)
            sum(terms.values()).backward()
            model.step()
            seconds.append(time.perf_counter() - start)
        print(count, batch, 1e3 * statistics.median(seconds[100:]), flush=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


@pytest.mark.slow
def test_a_step_costs_hardly_more_at_a_million_rows(capsys):
    """Beside an encoder that does nothing, on one thread; the start of the table is in the memory."""
    done = subprocess.run([sys.executable, "-c", STEPS], cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, gigabytes = done.stdout.splitlines()
    took = {(int(count), int(batch)): float(ms) for count, batch, ms in map(str.split, lines)}
    with capsys.disabled():
        print("".join(f"\n{count:9,} rows, batch {batch:2}: {ms:5.2f} ms" for (count, batch), ms in took.items()))
        print(f"resident at most {float(gigabytes):.2f} GB")
    for batch in (1, 64):
        assert took[1_000_000, batch] <= 3 * took[10_000, batch]         # 1.1 to 2.3: rows further apart in memory
    assert took[1_000_000, 1] <= 3
    assert float(gigabytes) <= 2.2


# ---- Losses outside of training -----------------------------------------------------------------------------
def test_an_embedding_of_zeros_has_no_gradient():
    model = icone.IConE(torch.nn.Identity(), 8, 9, centre=0)
    model.table = torch.nn.functional.normalize(torch.randn(9, 8, generator=torch.Generator().manual_seed(0)))
    views = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    views[0, 1] = 0
    views.requires_grad_()
    terms, _ = model(*views, torch.arange(4))
    sum(terms.values()).backward()
    assert views.grad[0, 1].eq(0).all()
    assert 0 < views.grad.abs().max() < 100


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference"])
def test_a_validation_loss_leaves_nothing_behind(how):
    data = images()
    net, index = model(data), torch.arange(4)

    def train():
        terms, _ = net(data[:4], data[4:8], index)
        sum(terms.values()).backward()
        net.step()

    train()
    buffers, state = [buffer.clone() for buffer in (net.table, net.known, net.visited)], torch.get_rng_state()
    net.train(how != "eval")
    with torch.inference_mode(how == "inference"), torch.set_grad_enabled(how == "eval"):
        terms, _ = net(data[:4], data[8:12], index + 6, renew=True)
    assert all(term.isfinite() for term in terms.values())
    assert not net.taken
    assert all(map(torch.equal, buffers, (net.table, net.known, net.visited)))
    assert how != "eval" or torch.equal(state, torch.get_rng_state())
    net.train()
    train()                                                          # as if it had not been asked for
    assert not torch.equal(buffers[0], net.table)


def test_rows_move_alike_under_a_gradient_scaler():
    data, moved = images(), []
    for scale in (1., 65536.):
        net = model(data)
        terms, _ = net(data[:4], data[4:8], torch.arange(4))
        (scale * sum(terms.values())).backward()
        net.step(scale)
        moved.append(net.table)
    torch.testing.assert_close(*moved)
    assert not torch.allclose(moved[0], model(data).table)
