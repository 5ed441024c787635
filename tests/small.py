"""Small models of every method and their training loops, in this very process: what a test can look into."""
import argparse

import torch
import torch.nn.functional as F

import ba_ssl
import falcon
import icone
import vicreg
from kernels.harness.encoder import Encoder
from kernels.harness.images import Data
from kernels.harness.run import Run
from kernels.harness.views import posed_view
from scripts import small_arrays

LOOPS = {"vicreg": vicreg, "icone": icone, "falcon": falcon, "ba_ssl": ba_ssl}
FEATURES = 32


def small_data(view=posed_view, labels=True, count=24):
    """small_arrays as Data: `count` training and 9 test images [1, 8, 8]."""
    arrays = small_arrays(8, 8, count=count, test_count=9)
    x, y, x_test, y_test = map(torch.from_numpy, arrays.values())
    if not labels:
        return Data(x[:, None], None, x_test[:, None], None, view=view)
    return Data(x[:, None], y.long(), x_test[:, None], y_test.long(), classes=range(3), view=view)


def small_model(name, batch=4, count=24):
    """A model as its script makes it, whose projector has BatchNorm where the method has, in train() mode.

    vicreg, icone, falcon, ba_ssl; alternating: falcon with that dictionary; "ba simclr", "ba vicreg", ...: each
    base method without fusion.
    """
    torch.manual_seed(0)
    encoder = Encoder(1, 2, width=4)
    if name == "vicreg":
        model = vicreg.VICReg(encoder, FEATURES, projector=(24, 16))
    elif name == "icone":
        model = icone.IConE(encoder, FEATURES, count, bank=min(count // 2, 2048))
        model.table.normal_()
        F.normalize(model.table, out=model.table)
        model.known.fill_(True)                                          # as start_table(images, "normal")
    elif name == "falcon":
        model = falcon.FALCON(encoder, FEATURES, falcon.FixedDictionary(64, 16), batch, projector=(16,))
    elif name == "alternating":
        dictionary = falcon.AlternatingDictionary(64, 16, batch)
        model = falcon.FALCON(encoder, FEATURES, dictionary, batch, projector=(16,))
    elif name == "ba_ssl":
        model = ba_ssl.BASSL(encoder, FEATURES, ba_ssl.BatchFusion(batch), projector=(24, 16))
    else:
        projector = () if name == "ba icone" else (24, 16)
        model = ba_ssl.BASSL(encoder, FEATURES, loss=name.split()[1], projector=projector, count=count)
    return model.train()


def small_options(**more):
    """What a Run and the loops read of a script's options: steps of 2 batches of 4 images."""
    options = dict(batch=4, accumulate=2, epochs=4, seed=0, device="cpu", amp="off", compile=False,
                   save_minutes=10., beta=1., beta_rise=1.)
    return argparse.Namespace(**options | more)


def train(name, model, data, folder, state=None, kind=Run, **more):
    """The script's own loop over these data -> its Run, of this kind."""
    folder.mkdir(exist_ok=True)
    options = small_options(**more)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    run = kind(options, data, folder, state)
    meters = [lambda model: {}] if name == "ba_ssl" else []
    LOOPS[name].train(model, optimizer, data, run, *meters)
    return run
