"""Looking at runs: what there is to see in them, drawn."""
