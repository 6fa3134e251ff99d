"""Weight spaces of customised diffusion models: sample, edit, invert and generate."""

__version__ = "0.1.0"
