"""Methods that learn one threshold per weight tensor."""
