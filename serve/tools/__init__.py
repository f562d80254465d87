"""Tools that a model may call: how each family writes calls, and what an answer's text says of them."""
