"""Recipes in, adapter folders out. Imports `serve` (models, prompts, adapters, engine); never the reverse."""

import serve as serve  # prepares the machine before mlx is imported
