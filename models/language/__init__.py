"""The decoder: Llama, Mistral and Qwen2 language models over a paged KV cache."""
