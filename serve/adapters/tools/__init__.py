"""What `lathe adapters` does offline: inspect, convert, compare, merge, extract."""
