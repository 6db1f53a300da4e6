"""The ten-minute demo: two experts of SmolLM2-135M, merged uniformly and layer by layer."""

import os

# Before torch is loaded: OpenMP's threads otherwise spin while they wait for one another, and on a
# machine that does anything else beside, the demo takes several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
