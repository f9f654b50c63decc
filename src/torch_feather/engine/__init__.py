"""One optimizer step of sparse training, and the pieces that it is composed of."""
