"""Tools of MCP servers: which a configuration names, what they offer, and calls of them."""
