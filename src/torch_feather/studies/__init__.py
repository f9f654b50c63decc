"""Studies: many trainings that answer one question, and the table and plot of the answer."""
