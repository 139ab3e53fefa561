"""Pictures of plans, of what adaptation costs, and of profiles, drawn by matplotlib.

Every function returns the figure that it drew into, or draws into axes that it is given; none of
them shows or saves a figure or changes a setting of matplotlib. Needs the extra ``plot``.
"""

import importlib.util

if importlib.util.find_spec("matplotlib") is None:
    raise ImportError(
        "jax_aat.plot: matplotlib is not installed: pip install matplotlib", name="matplotlib"
    )

from jax_aat.plot.curves import quality
from jax_aat.plot.profiles import roofline, timeline
from jax_aat.plot.resolution import resolution_map

__all__ = ["quality", "resolution_map", "roofline", "timeline"]
