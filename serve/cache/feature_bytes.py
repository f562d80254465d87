"""Features' arrays as bytes for a file, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

from serve.cache.features import KeptFeatures
from serve.cache.segment_bytes import from_host, to_host
from serve.cache.segment_file import HostArray
from serve.model.vision import Features


class FeatureCodec:
    """What `Disk` is given for features."""

    def dump(self, segment: KeptFeatures) -> tuple[dict[str, HostArray], dict[str, str]]:
        """No array is computed: those of features that are kept are evaluated."""
        features: Features = segment.features
        arrays = {"embeddings": features.embeddings}
        arrays |= {f"deepstack.{layer}": array for layer, array in enumerate(features.deepstack)}
        return {name: to_host(array) for name, array in arrays.items()}, {}

    def load(self, arrays: Mapping[str, HostArray], meta: Mapping[str, str]) -> KeptFeatures:
        """The arrays are copies, made on the caller's thread."""
        layers = [from_host(arrays[f"deepstack.{layer}"]) for layer in range(len(arrays) - 1)]
        return KeptFeatures(Features(from_host(arrays["embeddings"]), tuple(layers)))
