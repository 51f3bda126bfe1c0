"""The classes of cache policies, for type checkers.

Written by .ci/type_stubs.py, not by hand.
"""

from tokenprune.cache_policies.a_vl import AVL as AVL
from tokenprune.cache_policies.press import Press as Press
