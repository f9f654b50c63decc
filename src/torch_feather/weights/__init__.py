"""The latent weights: their memory, their shards, and the passes over them."""
