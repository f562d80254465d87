from dataclasses import dataclass
@dataclass(frozen=True)
class PrefixStats:
    pass
