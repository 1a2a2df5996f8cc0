"""Measurements, as ratios against the plain libraries in the same run.

torch is imported here, before anything of ours: :mod:`infra` sets how its threads wait, and plain
transformers is to be measured with torch's own ways.
"""

import torch  # noqa: F401 - before infra, see above
