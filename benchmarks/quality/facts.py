"""What figures depend on, for the records of this folder as for those of the folder above."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from surroundings import surroundings

__all__ = ["surroundings"]
