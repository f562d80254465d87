"""Many adapters' updates on the device, each row with its own. Knows slots, and no names."""
