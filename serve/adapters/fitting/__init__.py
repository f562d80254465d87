"""An adapter against one network: whose layers its tensors are of, and the updates that they make."""
