"""advisor: how to serve or train a large language model on the GPUs you have."""

__version__ = "0.1.0"
