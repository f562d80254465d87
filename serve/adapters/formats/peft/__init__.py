"""PEFT's layout: read into our form, and written from it."""
