"""Names → versions: loaded by hand, found when asked for, or taken from folders that are watched."""
