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
    """ba_ssl.md's .579: both views of an image alike, and 64 images as far apart as they can be."""
    z = torch.eye(64, dtype=torch.float64) - 1 / 64
    value = ba_ssl.nt_xent(z, z, .2).item()
    assert value == pytest.approx(math.log(1 + 126 * math.exp(-64 / 63 / .2))) == pytest.approx(.579, abs=1e-3)


def module(batch=6, **options):
    torch.manual_seed(0)
    return ba_ssl.BatchFusion(batch, **options).double()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12), (1, 8, 4, 12), (2, 4, 4, 4)])
def test_partition_and_restore_are_inverses_and_keep_neighbours(shape):
    x, axes = views(6, shape), len(shape) - 1
    fusion = module(axes=axes)
    patches = fusion.partition(x)
    assert patches.shape == (math.prod(shape) // 4 ** axes, 6, *[4] * axes)
    assert torch.equal(fusion.restore(patches, x.shape), x)
    corner = x[2][(0, *[slice(0, 4)] * axes)]                            # channel 0, first patch, laid out as it was
    assert torch.equal(patches[0, 2], corner)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_any_number_of_layers_mixes_from_the_start_and_no_bias_does(layers, axes):
    """Others make more than 5 % of an image at the start, and equal images, the bias, add less than a tenth of it;
    nor do images that vary leave a pattern of the slots: the mean over many batches."""
    fusion = module(64, layers=layers, axes=axes, keep_slots=True)
    shape = (1, 20, 20) if axes == 2 else (1, 8, 8, 8)
    batches = [views(64, shape, seed) for seed in range(30)]
    fusion.keep_slots = False
    meters = ba_ssl.mixing_meters(fusion, batches[0])
    assert meters["others"] >= .05 and meters["bias"] <= .1 * meters["others"], meters
    fusion.keep_slots = True
    added = torch.stack([fusion(x) - x for x in batches])
    pattern = ba_ssl.rms(added.mean(0)) ** 2 - ba_ssl.rms(added) ** 2 / len(added)       # less what chance leaves
    assert pattern < (.1 * ba_ssl.rms(added)) ** 2


def test_share_is_what_others_take_the_place_of():
    """By hand: x + share (mixed - differs), mixed orthogonal to each image and as strong as the batch's differences."""
    fusion, x = module(share=.3, keep_slots=True), views()
    differs = x - x.mean(0)
    mixed = (fusion(x) - x) / .3 + differs
    assert (mixed * differs).flatten(1).sum(1).abs().max() < 1e-10
    assert ba_ssl.rms(mixed).item() == pytest.approx(ba_ssl.rms(differs).item())
    assert torch.equal(module(share=0.)(x), x)
    equal = x[:1].expand(6, -1, -1, -1)
    torch.testing.assert_close(fusion(equal), equal)


def test_strength_of_the_weights_does_not_matter():
    """Neither training nor weight decay can close the module."""
    fusion, x = module(keep_slots=True), views()
    before = fusion(x)
    for weight in fusion.parameters():
        weight.data *= 1e-3
    torch.testing.assert_close(fusion(x), before)


@pytest.mark.parametrize("mixing, mixes", [("conv", True), ("random", True), ("grouped", False), ("mixup", True)])
def test_who_sees_whom(mixing, mixes):
    """Another image in place 3 changes what image 0 to 5 get of the others, and with `grouped` only its own.

    mix() is asked with images whose mean and strength stay, so that these do not carry the change around."""
    fusion, x = module(mixing=mixing, keep_slots=True), views() - .5
    changed = x.clone()
    changed[3] = -x[3]
    differs = (fusion.mix(x) - fusion.mix(changed)).flatten(1).abs().amax(1) > 1e-9
    if mixing == "mixup":
        assert torch.equal(fusion.mix(x), x.roll(1, 0))
        assert differs.tolist() == [False, False, False, False, True, False]
    elif mixes:
        assert all(differs[[0, 1, 2, 4, 5]])
    else:
        assert differs.tolist() == [False, False, False, True, False, False]


def test_mixup_is_a_fixed_share_of_another_image():
    fusion, x = module(mixing="mixup", share=.25, keep_slots=True), views()
    torch.testing.assert_close(fusion(x), .75 * x + .25 * x.roll(1, 0))


@pytest.mark.parametrize("mixing, trained", [("conv", 2), ("random", 0), ("grouped", 2), ("mixup", 0)])
def test_what_is_trained(mixing, trained):
    fusion, x = module(mixing=mixing), views().requires_grad_()
    (fusion(x) * views(seed=1)).sum().backward()
    assert sum(weight.grad is not None and bool(weight.grad.any()) for weight in fusion.parameters()) == trained


def test_a_misspelt_mixing_or_loss_and_no_layer_are_named():
    with pytest.raises(ValueError, match="mixing 'mix' is none of"):
        ba_ssl.BatchFusion(6, mixing="mix")
    for wrong in (dict(batch=6, layers=0), dict(batch=1)):
        with pytest.raises(ValueError, match="two images and a layer"):
            ba_ssl.BatchFusion(**wrong)
    with pytest.raises(ValueError, match="loss 'SimCLR' is none of"):
        ba_ssl.BASSL(ba_ssl.Encoder(1, 2, width=4), 32, loss="SimCLR")


@pytest.mark.slow
def test_compiled_fusion_still_deals_slots_anew():
    fusion, x = torch.compile(module()), views()
    assert not torch.allclose(fusion(x), fusion(x))


def test_slots_are_permuted_anew_in_each_call_unless_kept():
    fusion, kept, x = module(), module(keep_slots=True), views()
    assert not torch.allclose(fusion(x), fusion(x)) and torch.equal(kept(x), kept(x))


def test_wrong_batch_or_canvas_is_named():
    for x in (views(5), views(6, (1, 8, 10)), views(6, (8, 8)), views(6, (1, 8, 8, 8))):
        with pytest.raises(ValueError, match="B = 6 and sides divisible by 4"):
            ba_ssl.BatchFusion(6)(x)


@pytest.mark.parametrize("both", [False, True])
def test_a_fused_view_meets_a_clean_one_unless_both_are_fused(both):
    model, (view1, view2) = model_on_noise("simclr", fusion=ba_ssl.BatchFusion(6, keep_slots=True), both=both)
    z1, z2 = model.project(*model.encode(view1, view2))
    clean = model.eval().projector(model.encoder(view2))
    _, again = model.project(*model.encode(view1, view2))
    assert torch.allclose(again, clean) != both
    assert not torch.allclose(model.project(*model.encode(view1, view2))[0], model.projector(model.encoder(view1)))


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
    own = falcon.FALCON(model.encoder, 32, falcon.FixedDictionary(512, 64, seed), batch=6, projector=(64,))
    own.projector.load_state_dict(model.projector.state_dict())
    theirs, notes = own(*views)
    theirs["cross_entropy"] = .7 * theirs["cross_entropy"]
    assert_same_terms(model(*views, None), (theirs, notes))


def test_icone_is_that_of_its_script():
    """The same but for the centring, which is given away here, and the weight: there one row of a pair moves."""
    model, views = model_on_noise("icone", projector=(16,), count=6)
    own = icone.IConE(torch.nn.Identity(), 16, 6, centre=0)
    own.table = torch.nn.functional.normalize(model.table.detach())
    assert own.weight == 2 * ba_ssl.WEIGHTS["icone"]["diversity"]
    own.weight /= 2
    index = torch.randperm(6)
    z1, z2 = model.project(*model.encode(*views))
    theirs, _ = own(z1, z2, index)
    for name, value in ba_ssl.icone_terms(z1, z2, model.table, index).items():
        torch.testing.assert_close(ba_ssl.WEIGHTS["icone"][name] * value, theirs[name])


@pytest.mark.parametrize("terms", [ba_ssl.nt_xent, ba_ssl.vicreg_terms, lambda z1, z2: ba_ssl.falcon_terms(z1, z2, 0),
                                   lambda z1, z2: ba_ssl.icone_terms(z1, z2, torch.ones(9, 8), torch.arange(6))])
def test_views_of_different_shapes_are_refused_and_named(terms):
    with pytest.raises(ValueError, match=r"agree in shape, got \[6, 8\] and \[5, 8\]"):
        terms(torch.ones(6, 8), torch.ones(5, 8))


@pytest.mark.parametrize("terms", [lambda z1, z2: {"": ba_ssl.nt_xent(z1, z2)}, lambda z1, z2: ba_ssl.falcon_terms(z1, z2, 0),
                                   lambda z1, z2: ba_ssl.icone_terms(z1, z2, torch.eye(9, 8), torch.arange(6))])
def test_an_embedding_of_zeros_has_no_gradient_and_leaves_the_others_theirs(terms):
    """Of a blank image; divided by 1e-12 instead, one such gradient ends a run."""
    z = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    z[0, 2] = 0
    z[1, 4] = 0
    z.requires_grad_()
    sum(terms(*z).values()).backward()
    assert z.grad[0, 2].eq(0).all() and z.grad[1, 4].eq(0).all()
    assert 0 < z.grad.abs().max() < 100


def test_an_index_of_the_wrong_length_is_refused_and_named():
    z = torch.ones(6, 8)
    with pytest.raises(ValueError, match=r"each of 6 images, got \[4\]"):
        ba_ssl.icone_terms(z, z, torch.ones(9, 8), torch.arange(4))


def test_two_images_of_single_pixel_patches_are_refused():
    """Their patches are one number each, of opposite sign: less its own image, nothing of the mixture is left."""
    with pytest.raises(ValueError, match="for mixup, three images"):
        ba_ssl.BatchFusion(2, mixing="mixup")
    x = torch.rand(3, 1, 10, 10)                         # mixup has no patches that have to divide it
    assert not torch.equal(ba_ssl.BatchFusion(3, mixing="mixup")(x), x)
    with pytest.raises(ValueError, match="batch 2, layers 1, patch 1"):
        ba_ssl.BatchFusion(2, patch=1, layers=1)
    x = torch.rand(2, 1, 4, 4)
    assert not torch.allclose(ba_ssl.BatchFusion(2, patch=2)(x), x, atol=1e-3)


class Gain(torch.nn.Module):
    """x -> 1.5 x, of 8 images."""
    batch = 8

    def forward(self, x):
        return 1.5 * x


def test_features_behind_the_module_keep_their_order_and_number():
    model, stack = ba_ssl.BASSL(ba_ssl.Encoder(1, 2, width=4), 32, Gain()), torch.rand(19, 1, 8, 8)
    for n in (3, 8, 19):
        behind = ba_ssl.fused_features(model, stack[:n])
        torch.testing.assert_close(behind, model.encoder(1.5 * stack[:n]).detach())


def test_images_come_behind_the_module_in_random_batches():
    """In their order those of a class would be mixed with their own kind, and tell it."""
    class Seen(Gain):
        batches = []

        def forward(self, x):
            self.batches.append(x[:, 0, 0, 0].clone())
            return super().forward(x)

    model, stack = ba_ssl.BASSL(ba_ssl.Encoder(1, 2, width=4), 32, Seen()), torch.arange(64.).view(64, 1, 1, 1).expand(-1, 1, 8, 8)
    ba_ssl.fused_features(model, stack / 64)
    for batch in Seen.batches:
        assert (64 * batch).sort().values.diff().max() > 1


@pytest.mark.parametrize("keep_slots", [False, True])
def test_noise_meters_see_a_mark_that_slots_carry(keep_slots, monkeypatch):
    """A picture of its own for each slot, whatever comes in: the most blatant slot signature."""
    fusion = ba_ssl.BatchFusion(64, keep_slots=keep_slots, share=.75)
    stamp = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(fusion, "mix", lambda x: 3 * stamp)
    model, _ = model_on_noise("simclr", fusion=fusion, both=True)
    meters = ba_ssl.noise_meters(model, (64, 1, 8, 8))
    assert meters["chance"] == pytest.approx(math.log(127))
    below = meters["noise_exchanged"] - meters["noise_nt_xent"]
    assert below > 1 if keep_slots else abs(below) < .3
    verdict = ba_ssl.noise_verdict(model, (64, 1, 8, 8))
    assert verdict.startswith("SHORTCUT" if keep_slots else "Slots give no partner away") and "chance 4.84" in verdict


def loss_on_noise(both, keep_slots, steps=400, b=16, **options):
    """Mean NT-Xent of the last 50 of `steps` steps on independent noise views, over chance."""
    torch.manual_seed(0)
    fusion = ba_ssl.BatchFusion(b, keep_slots=keep_slots, **options)
    model = ba_ssl.BASSL(ba_ssl.Encoder(1, 2, width=4), 32, fusion, both).train()
    optimizer, seen = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(steps):
        terms, _ = model(torch.rand(b, 1, 8, 8), torch.rand(b, 1, 8, 8), torch.arange(b))
        optimizer.zero_grad()
        terms["nt_xent"].backward()
        optimizer.step()
        seen.append(terms["nt_xent"].item())
    return sum(seen[-50:]) / 50 / math.log(2 * b - 1)


@pytest.mark.parametrize("both, keep_slots", [
    (True, False), *(pytest.param(False, keep, marks=pytest.mark.slow) for keep in (False, True))])
def test_noise_stays_at_chance(both, keep_slots):
    """Nor can a fused view find its clean partner where slots stay: the clean one carries no mark."""
    assert loss_on_noise(both, keep_slots) == pytest.approx(1, abs=.02)


@pytest.mark.slow
def test_slots_that_stay_in_both_views_are_a_shortcut():
    """With most of an image replaced by its slot's own filter of it; at a share of .2 they stay at chance too."""
    assert loss_on_noise(True, True, share=.9, mixing="grouped") < .8


@pytest.mark.parametrize("mixing", ["conv", "random", "grouped", "mixup"])
@pytest.mark.parametrize("shade", [0., .5])
def test_equal_images_give_finite_gradients(mixing, shade):
    """A root at 0 has none: the batch less its mean is 0."""
    torch.manual_seed(0)
    fusion = ba_ssl.BatchFusion(8, mixing=mixing)
    x = torch.full((8, 1, 8, 8), shade, requires_grad=True)
    mixed = fusion(x)
    assert torch.equal(mixed, x)
    (mixed * torch.randn(8, 1, 8, 8)).sum().backward()
    for tensor in (x, *(weight for weight in fusion.parameters() if weight.requires_grad)):
        assert tensor.grad is None or tensor.grad.isfinite().all()
    assert x.grad.abs().max() > 0
