"""`a:0.7+b:0.3`: adapters weighted and added, as one more version."""
