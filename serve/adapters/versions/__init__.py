"""What a version of an adapter is, what it may be called, and what it is made of."""
