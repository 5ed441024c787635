"""ba_ssl.py: NT-Xent against the textbook, fusion and its inverse, and whether it can cheat on noise."""
import math

import pytest
import torch
import torch.nn.functional as F

import ba_ssl
import falcon
import icone
import vicreg


def views(b=6, shape=(1, 8, 8), seed=0):
    return torch.rand(b, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def textbook(z1, z2, t):
    """Chen et al., eq. 1, pair by pair."""
    z, n = F.normalize(torch.cat([z1, z2])), len(z1)
    s = (z @ z.T / t).exp()
    total = 0
    for i in range(2 * n):
        others = s[i].sum() - s[i, i]
        total -= (s[i, (i + n) % (2 * n)] / others).log()
    return total / (2 * n)


@pytest.mark.parametrize("n, t", [(2, .2), (5, .2), (16, .05)])
def test_nt_xent_and_its_gradient_are_the_textbooks(n, t):
    z = [torch.randn(n, 7, generator=torch.Generator().manual_seed(k), dtype=torch.float64).requires_grad_()
         for k in (0, 1)]
    ours, theirs = ba_ssl.nt_xent(*z, t), textbook(*z, t)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for a, b in zip(*(torch.autograd.grad(-1.7 * value, z, retain_graph=True) for value in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


def test_nt_xent_of_unrelated_embeddings_is_chance():
    z = [torch.randn(512, 2000, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    assert ba_ssl.nt_xent(*z, 1.).item() == pytest.approx(math.log(2 * 512 - 1), rel=1e-3)


def test_nt_xent_is_least_where_images_form_a_simplex():
    """README's .579: both views of an image alike, and 64 images as far apart as they can be."""
    z = torch.eye(64, dtype=torch.float64) - 1 / 64
    value = ba_ssl.nt_xent(z, z, .2).item()
    assert value == pytest.approx(math.log(1 + 126 * math.exp(-64 / 63 / .2))) == pytest.approx(.579, abs=1e-3)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12), (1, 8, 4, 12), (2, 4, 4, 4)])
@pytest.mark.parametrize("keep_slots", [False, True])
def test_partition_and_restore_are_inverses(shape, keep_slots):
    x, fusion = views(6, shape), ba_ssl.BatchFusion(6, 4, 0, keep_slots=keep_slots, gate=.5).double()
    picture = fusion.partition(x)
    assert picture.shape == (1, 6, math.prod(shape[1:]) // 4 ** (len(shape) - 1), shape[0] * 4 ** (len(shape) - 1))
    assert torch.equal(fusion.restore(picture, x.shape), x)
    corner = x[2][(slice(None), *[slice(0, 4)] * (x.ndim - 3), slice(-4, None))]         # the last patch of its row
    last = picture[0, 2, shape[-1] // 4 - 1]
    assert torch.equal(last.sort().values, corner.flatten().sort().values)
    torch.testing.assert_close(fusion(x), 1.5 * x)                       # F is the identity at K = 0


@pytest.mark.parametrize("mixing", ["conv", "grouped"])
@pytest.mark.parametrize("layers", range(5))
def test_at_gate_0_views_pass_unchanged_and_the_gate_has_a_gradient(mixing, layers):
    fusion, x = ba_ssl.BatchFusion(6, 4, layers, mixing).double(), views()
    out = fusion(x)
    assert torch.equal(out, x)
    (out * views(seed=1)).sum().backward()
    assert fusion.gate.grad != 0


def open_gate(**options):
    torch.manual_seed(0)
    return ba_ssl.BatchFusion(6, 4, gate=.5, **options).double()


@pytest.mark.parametrize("mixing, mixes", [("conv", True), ("grouped", False), ("mixup", True)])
def test_who_sees_whom(mixing, mixes):
    """Another image in place 3 changes other images' output where images mix, and only there."""
    fusion, x = open_gate(mixing=mixing, keep_slots=True), views()
    changed = x.clone()
    changed[3] = views(1, seed=5)[0]
    differs = (fusion(x) - fusion(changed)).flatten(1).abs().amax(1) > 1e-9
    if mixing == "mixup":
        torch.testing.assert_close(fusion(x), x + .5 * (x.roll(1, 0) - x))
        assert differs.tolist() == [False, False, False, True, True, False]
    else:
        assert differs[3] and all(differs[[0, 1, 2, 4, 5]] == mixes)


def test_a_misspelt_mixing_or_loss_is_named():
    with pytest.raises(ValueError, match="mixing 'mix' is none of"):
        ba_ssl.BatchFusion(6, mixing="mix")
    with pytest.raises(ValueError, match="loss 'SimCLR' is none of"):
        ba_ssl.BASSL(ba_ssl.Encoder(1, 2, width=4), 32, loss="SimCLR")


@pytest.mark.slow
def test_compiled_fusion_still_deals_slots_anew():
    fusion, x = torch.compile(open_gate()), views()
    assert not torch.allclose(fusion(x), fusion(x))


def test_grouped_has_as_many_weights_as_conv():
    count = {mixing: sum(p.numel() for p in ba_ssl.BatchFusion(8, mixing=mixing).parameters() if p.ndim > 1)
             for mixing in ("conv", "grouped")}
    assert count["conv"] == count["grouped"]


def test_slots_are_permuted_anew_in_each_call_unless_kept():
    fusion, kept, x = open_gate(), open_gate(keep_slots=True), views()
    assert not torch.allclose(fusion(x), fusion(x)) and torch.equal(kept(x), kept(x))


def test_wrong_batch_or_canvas_is_named():
    for x in (views(5), views(6, (1, 8, 10)), views(6, (8, 8))):
        with pytest.raises(ValueError, match="B = 6 and sides divisible by 4"):
            ba_ssl.BatchFusion(6, 4)(x)


def model_on_noise(loss, **options):
    torch.manual_seed(0)
    return ba_ssl.BASSL(ba_ssl.Encoder(1, 2, width=4), 32, loss=loss, **options), torch.rand(2, 6, 1, 8, 8)


def assert_same_terms(ours, theirs):
    assert list(ours[0]) == list(theirs[0])
    for name, value in theirs[0].items():
        torch.testing.assert_close(ours[0][name], value)


def test_vicreg_is_that_of_its_script():
    model, views = model_on_noise("vicreg", projector=(16, 16))
    own = vicreg.VICReg(model.encoder, 32, projector=(16, 16))
    own.projector.load_state_dict(model.projector.state_dict(), strict=False)             # its last layer has no bias
    assert_same_terms(model(*views, None), own(*views))


@pytest.mark.parametrize("seed", [0, 3])
def test_falcon_is_that_of_its_script(seed):
    model, views = model_on_noise("falcon", projector=(64,), seed=seed)
    own = falcon.FALCON(model.encoder, 32, batch=6, seed=seed)
    own.projector.load_state_dict(model.projector.state_dict())
    ours, theirs = model(*views, None), own(*views)
    assert_same_terms(ours, theirs)


def test_icone_is_that_of_its_script():
    """The same but for the centring, which is given away here, and the weight: there one row of a pair moves."""
    model, views = model_on_noise("icone", projector=(16,), count=6)
    own = icone.IConE(torch.nn.Identity(), 16, 6, centre=0)
    own.table = torch.nn.functional.normalize(model.table.detach())
    assert own.weight == 2 * ba_ssl.WEIGHTS["icone"]["diversity"]
    own.weight /= 2
    index = torch.randperm(6)
    z1, z2 = model.embed(*views)
    theirs, _ = own(z1, z2, index)
    for name, value in ba_ssl.icone_terms(z1, z2, model.table, index).items():
        torch.testing.assert_close(ba_ssl.WEIGHTS["icone"][name] * value, theirs[name])


@pytest.mark.parametrize("terms", [ba_ssl.nt_xent, ba_ssl.vicreg_terms, lambda z1, z2: ba_ssl.falcon_terms(z1, z2, 0),
                                   lambda z1, z2: ba_ssl.icone_terms(z1, z2, torch.ones(9, 8), torch.arange(6))])
def test_views_of_different_shapes_are_refused_and_named(terms):
    with pytest.raises(ValueError, match=r"agree in shape, got \[6, 8\] and \[5, 8\]"):
        terms(torch.ones(6, 8), torch.ones(5, 8))


def test_an_index_of_the_wrong_length_is_refused_and_named():
    z = torch.ones(6, 8)
    with pytest.raises(ValueError, match=r"each of 6 images, got \[4\]"):
        ba_ssl.icone_terms(z, z, torch.ones(9, 8), torch.arange(4))


def test_features_behind_the_module_keep_their_order_and_number():
    fusion = ba_ssl.BatchFusion(8, 4, 0, gate=.5)                        # x -> 1.5 x
    model, stack = ba_ssl.BASSL(ba_ssl.Encoder(1, 2, width=4), 32, fusion), torch.rand(19, 1, 8, 8)
    for n in (3, 8, 19):
        behind = ba_ssl.fused_features(model, stack[:n])
        torch.testing.assert_close(behind, model.encoder(1.5 * stack[:n]).detach())


class Stamp(torch.nn.Module):
    """A picture of its own in each channel, whatever comes in: the most blatant slot signature."""

    def forward(self, picture):
        return torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("keep_slots", [False, True])
def test_noise_meters_see_a_mark_that_slots_carry(keep_slots):
    model, _ = model_on_noise("simclr", fusion=ba_ssl.BatchFusion(64, keep_slots=keep_slots, gate=3.))
    model.fusion.embedding = Stamp()
    meters = ba_ssl.noise_meters(model, (64, 1, 8, 8))
    assert meters["gate"] == 3 and meters["chance"] == pytest.approx(math.log(127))
    below = meters["noise_exchanged"] - meters["noise_nt_xent"]
    assert below > 1 if keep_slots else abs(below) < .3
    verdict = ba_ssl.noise_verdict(model, (64, 1, 8, 8))
    assert verdict.startswith("SHORTCUT" if keep_slots else "Slots give no partner away") and "chance 4.84" in verdict


def test_noise_meters_without_fusion_have_no_gate():
    assert set(ba_ssl.noise_meters(model_on_noise("simclr")[0], (8, 1, 8, 8))) == {
        "noise_nt_xent", "noise_exchanged", "chance"}


def loss_after_training_on_noise(keep_slots, steps=400, b=16):
    """Mean NT-Xent of the last 50 of `steps` steps on independent noise views, over chance."""
    torch.manual_seed(0)
    fusion = ba_ssl.BatchFusion(b, 4, 2, keep_slots=keep_slots)
    model = ba_ssl.BASSL(ba_ssl.Encoder(1, 2, width=4), 32, fusion).train()
    optimizer, seen = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(steps):
        terms, _ = model(torch.rand(b, 1, 8, 8), torch.rand(b, 1, 8, 8), torch.arange(b))
        optimizer.zero_grad()
        terms["nt_xent"].backward()
        optimizer.step()
        seen.append(terms["nt_xent"].item())
    return sum(seen[-50:]) / 50 / math.log(2 * b - 1)


def test_permuted_slots_leave_noise_at_chance_and_kept_slots_do_not():
    assert loss_after_training_on_noise(False) == pytest.approx(1, abs=.02)
    assert loss_after_training_on_noise(True) < .8
