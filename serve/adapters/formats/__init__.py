"""An adapter as files: mlx-lm's layout, PEFT's, and what they hold in one form. Knows no network."""
