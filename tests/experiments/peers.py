"""vicreg.py, or ba_ssl.py --no-fusion, with lightly's loss in its loop: all else is the script's.

    python tests/experiments/peers.py VICReg --data FOLDER ...       # options of the script; needs lightly installed

lightly (github.com/lightly-ai/lightly) imports torchvision throughout; its two losses used here need nothing of it, so that
empty modules stand in where none can be imported.
"""
import importlib.abc
import importlib.machinery
import sys
import types

from common import ROOT  # noqa: F401 (it puts the scripts in reach)


class Empty(types.ModuleType):
    """A module in which any name is a class without anything."""
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for torchvision and all within it."""

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        pass


try:
    import torchvision  # noqa: F401
except ImportError:
    sys.meta_path.append(StandIn())
from lightly.loss import NTXentLoss, VICRegLoss

import ba_ssl
import vicreg


class LightlyVICReg(vicreg.VICReg):
    def forward(self, view1, view2):
        return {"lightly": VICRegLoss()(self.projector(self.encoder(view1)), self.projector(self.encoder(view2)))}, {}


if __name__ == "__main__":
    method, = {"VICReg", "SimCLR"} & {*sys.argv}
    sys.argv.remove(method)
    vicreg.VICReg = LightlyVICReg
    ba_ssl.nt_xent = lambda z1, z2, temperature: NTXentLoss(temperature)(z1, z2)
    script = {"VICReg": vicreg, "SimCLR": ba_ssl}[method]
    if script is ba_ssl:
        sys.argv.append("--no-fusion")
    script.launch(script.main)
