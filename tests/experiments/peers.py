"""vicreg.py, or ba_ssl.py --no-fusion, with lightly's loss in its loop: all else is the script's.

    python tests/experiments/peers.py VICReg --data FOLDER ...       # options of the script; needs lightly installed

lightly (github.com/lightly-ai/lightly) asks for torchvision; its two losses used here do not, so that an empty module of
that name stands in where none can be imported.
"""
import sys
import types

from common import ROOT  # noqa: F401 (it puts the scripts in reach)

try:
    import torchvision.ops  # noqa: F401
except ImportError:
    stand_in = types.ModuleType("torchvision.ops")
    stand_in.roi_align = None
    sys.modules |= {"torchvision": types.ModuleType("torchvision"), "torchvision.ops": stand_in}
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
