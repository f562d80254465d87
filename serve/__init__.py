"""The runtime: models, prompts, adapters, engine, HTTP, experiments. It never imports `train`.

Importing it prepares the machine (a real BLAS on CPU-only Linux) before anything imports mlx.
"""

from serve import device

device.prepare()
