"""The decoder: the Llama family of language models over a paged KV cache."""
