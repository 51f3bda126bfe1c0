"""The classes of interventions, for type checkers.

Written by .ci/type_stubs.py, not by hand.
"""

from tokenprune.interventions.act import ACT as ACT
from tokenprune.interventions.cmai import CMAI as CMAI
from tokenprune.interventions.gift import GIFT as GIFT
from tokenprune.interventions.imbalance import Imbalance as Imbalance
from tokenprune.interventions.naavit import NAAViT as NAAViT
from tokenprune.interventions.shortv import ShortV as ShortV
from tokenprune.interventions.var import VAR as VAR
from tokenprune.interventions.zerotuning import ZeroTuning as ZeroTuning
