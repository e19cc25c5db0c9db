"""The local engine: a small functional decoder over SGLang's per-rank weights, with a KV cache, on CPU or GPU."""
