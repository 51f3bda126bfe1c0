"""The classes of methods, for type checkers.

Written by .ci/type_stubs.py, not by hand.
"""

from tokenprune.methods.cdpruner import CdPruner as CdPruner
from tokenprune.methods.dart import DART as DART
from tokenprune.methods.divprune import DivPrune as DivPrune
from tokenprune.methods.downsample import Downsample as Downsample
from tokenprune.methods.era import ERA as ERA
from tokenprune.methods.evs import Evs as Evs
from tokenprune.methods.fastervlm import FasterVlm as FasterVlm
from tokenprune.methods.fastv import FastV as FastV
from tokenprune.methods.fitprune import FitPrune as FitPrune
from tokenprune.methods.flowcut import FlowCut as FlowCut
from tokenprune.methods.fsr import Fsr as Fsr
from tokenprune.methods.gtc import Gtc as Gtc
from tokenprune.methods.holitom import HoliTom as HoliTom
from tokenprune.methods.holov import HoloV as HoloV
from tokenprune.methods.oracle import Oracle as Oracle
from tokenprune.methods.pixelprune import PixelPrune as PixelPrune
from tokenprune.methods.pool import Pool as Pool
from tokenprune.methods.prumerge import PruMerge as PruMerge
from tokenprune.methods.prumerge_plus import PruMergePlus as PruMergePlus
from tokenprune.methods.prunesid import PruneSid as PruneSid
from tokenprune.methods.pyramiddrop import PyramidDrop as PyramidDrop
from tokenprune.methods.quota import Quota as Quota
from tokenprune.methods.random import Random as Random
from tokenprune.methods.scope import Scope as Scope
from tokenprune.methods.sd_rpn import SdRpn as SdRpn
from tokenprune.methods.sparsevlm import SparseVLM as SparseVLM
from tokenprune.methods.todre import ToDRE as ToDRE
from tokenprune.methods.tome import ToMe as ToMe
from tokenprune.methods.tops import Tops as Tops
from tokenprune.methods.transprune import TransPrune as TransPrune
from tokenprune.methods.uniform import Uniform as Uniform
from tokenprune.methods.vflowopt import VFlowOpt as VFlowOpt
from tokenprune.methods.vidcom2 import VidCom2 as VidCom2
from tokenprune.methods.visionzip import VisionZip as VisionZip
from tokenprune.methods.vispruner import VisPruner as VisPruner
from tokenprune.methods.vmtc import VMTC as VMTC
from tokenprune.methods.vtc_cls import VtcCls as VtcCls
