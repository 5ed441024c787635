"""icone.py: the diversity forms and what is known of them, and that no sample depends on the rest of its batch."""

import pytest
import torch
import torch.nn.functional as F

import icone
import vicreg


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


# ---- Diversity ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, orthogonal", [("logsumexp", 0), ("relu2", 0)])
def test_diversity_of_orthogonal_rows(kind, orthogonal):
    assert icone.crowding(torch.eye(8).double(), torch.arange(8), kind).item() == pytest.approx(orthogonal, abs=1e-7)


@pytest.mark.parametrize("kind, collapsed", [("logsumexp", 1), ("relu2", 1)])
def test_diversity_of_collapsed_rows(kind, collapsed):
    u = unit(1, 5).expand(9, 5)
    assert icone.crowding(u, torch.arange(9), kind).item() == pytest.approx(collapsed, rel=1e-6)


def test_relu2_of_random_directions():
    assert icone.crowding(unit(2000, 32), torch.arange(2000), "relu2").item() == pytest.approx(1 / 64, rel=.02)


def test_relu2_does_not_forbid_orthogonal_clusters():
    u = torch.eye(10).double().repeat(50, 1)                             # ten points, fifty rows in each
    assert icone.crowding(u, torch.arange(500), "relu2").item() == pytest.approx(1 / 10, rel=.03)


def textbook(u, rows, kind, t):
    s = (u[rows] @ u.T)[torch.arange(len(u)) != rows[:, None]].view(len(rows), len(u) - 1)     # [R, N - 1]
    if kind == "logsumexp":
        return t * (s / t).exp().mean(1).log().mean()
    return s.clamp(min=0).square().mean()


@pytest.mark.parametrize("kind", ["logsumexp", "relu2"])
def test_diversity_and_gradient_equal_the_textbook(kind):
    table = 3 * unit(20, 6).requires_grad_()
    u, rows = F.normalize(table), torch.tensor([3, 11, 11, 0])
    ours, theirs = icone.crowding(u, rows, kind, .2), textbook(u, rows, kind, .2)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-10)
    a, b = (torch.autograd.grad(-1.7 * value, table, retain_graph=True)[0] for value in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_relu2_gradient_is_the_derived_one():
    u = unit(30, 5).requires_grad_()
    gradient, = torch.autograd.grad(icone.crowding(u, torch.arange(30), "relu2"), u)
    s = (u @ u.T).clamp(min=0).fill_diagonal_(0)
    torch.testing.assert_close(gradient, 4 / (30 * 29) * s @ u)


# ---- The model ---------------------------------------------------------------------------------------------
def test_terms_are_the_formulas():
    data, index = images(), torch.tensor([2, 7])
    net = model(data, rows=0, view_view=.5, diversity="relu2", weight=2.)
    view1, view2 = images(2, 1), images(2, 2)
    terms, notes = net(view1, view2, index)
    z1, z2 = (F.normalize(net.projector(net.encoder(view))) for view in (view1, view2))
    u = F.normalize(net.table)
    assert terms["alignment"].item() == pytest.approx((1 - ((z1 + z2) * u[index]).sum(1).mean() / 2).item())
    assert terms["diversity"].item() == pytest.approx(2 * textbook(u, torch.arange(12), "relu2", 0).item())
    assert terms["view_view"].item() == pytest.approx(.5 * (1 - (z1 * z2).sum(1).mean()).item())
    assert notes["cosine_to_all"].item() == pytest.approx((torch.cat([z1, z2]) @ u.T).mean().item())


def test_the_table_starts_at_the_encoders_centred_embeddings():
    data = images()
    net = model(data).float().eval()
    data = data.float()
    torch.testing.assert_close(net.table.data, net.projector(net.encoder(data)).detach(), rtol=1e-5, atol=1e-5)
    assert net.table.mean(0).abs().max() < 1e-5
    assert (net.projector[-1].mean != 0).any()


def test_the_table_can_start_at_random():
    net = model(images())
    net.start_table(images(), table_init="normal")
    assert net.table.std().item() == pytest.approx(0.02, rel=0.3)


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
        gradients.append(torch.autograd.grad(alignment, (*views, net.table)))
    (a1, a2, a), (b1, b2, b) = gradients
    assert torch.equal(a1[:2], b1[:2]) and torch.equal(a2[:2], b2[:2]) and torch.equal(a[[4, 1]], b[[4, 1]])
    assert not torch.equal(a1[2], b1[2])


def updated(net, batches, views, index):
    """The state after one SGD step whose gradient is averaged over batches."""
    optimizer = torch.optim.SGD(net.parameters(), .1)
    for batch in batches:
        terms, _ = net(*(view[batch] for view in views), index[batch])
        (sum(terms.values()) / len(batches)).backward()
    optimizer.step()
    if isinstance(net, icone.IConE):
        net.projector[-1].step()
    return net.state_dict()


@pytest.mark.parametrize("rows", [0, 1])
def test_accumulated_batches_of_one_equal_the_whole_batch(rows):
    data, views, index = images(), (images(8, 1), images(8, 2)), torch.arange(8)
    whole = updated(model(data, rows=rows), [index], views, index)
    ones = updated(model(data, rows=rows), index.split(1), views, index)
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
