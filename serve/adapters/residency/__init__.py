"""Where versions are (device, host memory, file, source), and how they come to a slot. Knows no names."""
