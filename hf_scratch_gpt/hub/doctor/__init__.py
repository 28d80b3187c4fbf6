"""`scratch-gpt doctor MODEL`: checks any causal language model in transformers' format; see `main`."""
