"""Backbones: image -> {stride: (b h w d)}. They know nothing of losses or data."""
