"""Who may ask: keys, what each may have and for how long it lasts. Knows no HTTP."""
