"""Tokenizers that a run trains (characters, byte-pair encoding), and the door to Hugging Face's."""
