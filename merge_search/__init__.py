"""Search for the best merge of a base model and fine-tuned experts."""

__version__ = "0.2.0.dev0"
